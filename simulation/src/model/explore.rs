//! Exploring a space to its end, and saying what came of it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Path};

use super::tally::Tally;
use super::{Action, Cluster, Space};

/// What came of exploring a space.
#[derive(Debug)]
pub struct Report {
    /// The space.
    pub name: &'static str,
    /// How many states followed another.
    pub generated: usize,
    /// How many of them differ.
    pub states: usize,
    /// How many things happen at most, one after another, before there is nothing new.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
    /// The properties that do not hold, each with what leads to a state in which it does not.
    pub broken: Ways,
    /// What has happened.
    pub tally: Arc<Tally>,
}

/// What leads to a state in which a property does not hold.
pub type Ways = BTreeMap<&'static str, Vec<String>>;

impl Space {
    /// Explores all of it; or as much as it takes to break a property, in the shortest way.
    pub fn explore(self) -> Report {
        let (name, tally, started) = (self.name, Arc::clone(&self.tally), Instant::now());
        let all =
            self.clone().checker().threads(1).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let mut report = Report {
            name,
            generated: all.state_count(),
            states: all.unique_state_count(),
            depth: all.max_depth(),
            took: started.elapsed(),
            broken: broken(&all),
            tally,
        };
        // What is found first is not always the shortest: the checker looks at many states before it stops.
        while let Some(shortest) = report.broken.values().map(Vec::len).min() {
            let checker = self.clone().checker().threads(1).target_max_depth(shortest + 1);
            let shorter = broken(&checker.spawn_bfs().join());
            if shorter.is_empty() {
                report.broken.retain(|_, path| path.len() == shortest);
                break;
            }
            report.broken = shorter;
        }
        report
    }
}

fn broken(checker: &impl Checker<Space>) -> Ways {
    let words = |path: Path<Cluster, Action>| path.into_actions().iter().map(ToString::to_string).collect();
    checker.discoveries().into_iter().map(|(property, path)| (property, words(path))).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, generated, states, depth, took, .. } = self;
        write!(
            f,
            "{name}: {states} states, {generated} generated, depth {depth}, {:.1} s",
            took.as_secs_f64()
        )?;
        for (property, path) in &self.broken {
            write!(f, "\n  it is not so that {property}:")?;
            path.iter()
                .enumerate()
                .try_for_each(|(number, action)| write!(f, "\n  {:>4}. {action}", number + 1))?;
        }
        Ok(())
    }
}
