//! Runs a seed, from an empty store to a fully recovered cluster.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use polder_ipam::invariants::Deviation;

use crate::fault::Fault;
use crate::heal::heal;
use crate::schedule::{Schedule, add_machine};
use crate::violations::{CheckFailure, Strictness, check_invariants};
use crate::world::{Record, StoreKind, World};

/// Number of steps with faults.
const STEPS: u64 = 350;

/// The statistics of one or more runs.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Number of steps.
    pub steps: u64,
    /// Number of occurrences of each event.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Adds the statistics of another run.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} steps", self.steps)?;
        self.counts.iter().try_for_each(|(what, count)| write!(f, ", {what} {count}"))
    }
}

/// A seed in which a check failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// The step after which the check failed.
    pub step: u64,
    /// The violated invariants.
    pub deviations: Vec<Deviation>,
    /// Expected outcomes that have not occurred.
    pub unrecovered: Vec<String>,
    /// The last log lines.
    pub log: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.log.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        writeln!(f, "after step {}:", self.step)?;
        self.deviations.iter().try_for_each(|deviation| writeln!(f, "{deviation}"))?;
        self.unrecovered.iter().try_for_each(|unrecovered| writeln!(f, "liveness: {unrecovered}"))?;
        write!(f, "run it again with: scripts/simulate --seed {}", self.seed)
    }
}

/// Runs a seed. A seed that fails runs a second time, to record its last steps.
pub fn run_seed(seed: u64) -> Result<Report, Box<Failure>> {
    run_seed_with(seed, Record::Nothing).or_else(|_| run_seed_with(seed, Record::Last))
}

/// Runs a seed, and records its steps as `record` states.
pub fn run_seed_with(seed: u64, record: Record) -> Result<Report, Box<Failure>> {
    let mut world = World::new(seed);
    world.record = record;
    let machines = if world.random.once_in(8) {
        world.store_kind = StoreKind::Embedded;
        1
    } else {
        3 + world.random.below(2)
    };
    for number in 0..machines {
        add_machine(&mut world, format!("n{number}").parse().expect("a name"));
    }
    // Each seed uses a random subset of the faults, so that each fault has room to take effect.
    let can_happen = |fault: &Fault| machines > 1 || fault.affects_embedded_store();
    let all = Fault::ALL.into_iter().filter(can_happen);
    let changes_pools = world.random.once_in(3);
    let is_chosen =
        |fault: &Fault| if fault.is_pool_change() { changes_pools } else { world.random.once_in(3) };
    let faults: Vec<Fault> = all.filter(is_chosen).collect();
    let rarity = *world.random.one_of(&[15, 30, 60]);
    let mut schedule = Schedule { world: Rc::new(RefCell::new(world)), tasks: Vec::new(), faults, rarity };
    schedule.start_agents();
    if schedule.world.borrow_mut().random.below(4) > 0 {
        // Usually the cluster starts up completely first. In the other runs faults can occur during the start.
        for _ in 0..5 {
            schedule.run_until_idle();
            schedule.advance(1_000);
        }
    }
    let mut steps = 0;
    let result = (0..STEPS)
        .try_for_each(|_| {
            steps += 1;
            schedule.step();
            check_invariants(&mut schedule.world.borrow_mut(), Strictness::Lenient)
        })
        .and_then(|()| heal(&mut schedule, &mut steps));
    let counts = std::mem::take(&mut schedule.world.borrow_mut().counts);
    match result {
        Ok(()) => Ok(Report { steps, counts }),
        Err(CheckFailure { deviations, unrecovered }) => {
            let log = std::mem::take(&mut schedule.world.borrow_mut().log).into();
            Err(Box::new(Failure { seed, step: steps, deviations, unrecovered, log }))
        }
    }
}
