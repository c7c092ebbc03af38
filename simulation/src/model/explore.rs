//! Explores a space completely, and reports the result.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Path};

use super::tally::Tally;
use super::{Action, Cluster, Space};

/// The result of exploring a space.
#[derive(Debug)]
pub struct Report {
    /// Name of the space.
    pub name: &'static str,
    /// Number of generated states, repeated ones included.
    pub generated: usize,
    /// Number of distinct states.
    pub states: usize,
    /// Length of the longest sequence of events before no new state appears.
    pub depth: usize,
    /// Wall-clock time of the exploration.
    pub took: Duration,
    /// The violated properties, each with the events that lead to a violation.
    pub violations: Counterexamples,
    /// Number of occurrences of each event.
    pub tally: Arc<Tally>,
}

/// For each violated property, the events that lead to a violation.
pub type Counterexamples = BTreeMap<&'static str, Vec<String>>;

impl Space {
    /// Explores the whole space, or until a property is violated, by the shortest sequence of events.
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
            violations: violations(&all),
            tally,
        };
        // The first violation is not always the shortest: the checker visits many states before it stops.
        while let Some(shortest) = report.violations.values().map(Vec::len).min() {
            let checker = self.clone().checker().threads(1).target_max_depth(shortest + 1);
            let shorter = violations(&checker.spawn_bfs().join());
            if shorter.is_empty() {
                report.violations.retain(|_, path| path.len() == shortest);
                break;
            }
            report.violations = shorter;
        }
        report
    }
}

fn violations(checker: &impl Checker<Space>) -> Counterexamples {
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
        for (property, path) in &self.violations {
            write!(f, "\n  violated: {property}:")?;
            path.iter()
                .enumerate()
                .try_for_each(|(number, action)| write!(f, "\n  {:>4}. {action}", number + 1))?;
        }
        Ok(())
    }
}
