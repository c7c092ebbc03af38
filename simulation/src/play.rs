//! Plays a seed through, from an empty store to a cluster in which everything is as it should be.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use polder_ipam::change::Change;
use polder_ipam::ids::Incarnation;
use polder_ipam::invariants::Deviation;
use polder_ipam::ledger::Ledger;
use polder_ipam::record::{Life, PodsGone};
use polder_ipam::removal::{self, Vouched};
use polder_ipam::transaction::transaction;

use crate::fault::Fault;
use crate::judge::{Strictness, judge};
use crate::operator;
use crate::schedule::{Schedule, add_machine};
use crate::world::{Machine, Record, World};

/// Steps with faults.
const STEPS: u64 = 350;

/// For how many seconds a cluster has time to come to rest, when nothing goes wrong any more.
const TIME_TO_HEAL: u64 = 240;

/// What was played.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// How many steps.
    pub steps: u64,
    /// How often each thing happened.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Takes in what was played besides.
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

/// A seed in which something did not hold.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// After which step.
    pub step: u64,
    /// What did not hold.
    pub deviations: Vec<Deviation>,
    /// What else is wrong: what should have come to pass, and has not.
    pub wanting: Vec<String>,
    /// The last steps.
    pub log: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.log.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        writeln!(f, "after step {}:", self.step)?;
        self.deviations.iter().try_for_each(|deviation| writeln!(f, "{deviation}"))?;
        self.wanting.iter().try_for_each(|wanting| writeln!(f, "liveness: {wanting}"))?;
        write!(f, "play it again with: scripts/simulate --seed {}", self.seed)
    }
}

/// Plays a seed. A seed that fails is played again, for the steps that led there.
pub fn play(seed: u64) -> Result<Report, Box<Failure>> {
    play_with(seed, Record::Nothing).or_else(|_| play_with(seed, Record::Last))
}

/// Plays a seed, and keeps that much of it.
pub fn play_with(seed: u64, record: Record) -> Result<Report, Box<Failure>> {
    let mut world = World::new(seed);
    world.record = record;
    for number in 0..3 + world.random.below(2) {
        add_machine(&mut world, format!("n{number}").parse().expect("a name"));
    }
    // In each seed other things go wrong, so that each has room to.
    let faults: Vec<Fault> = Fault::ALL.into_iter().filter(|_| world.random.once_in(3)).collect();
    let rarity = *world.random.one_of(&[15, 30, 60]);
    let mut schedule = Schedule { world: Rc::new(RefCell::new(world)), tasks: Vec::new(), faults, rarity };
    schedule.start_agents();
    if schedule.world.borrow_mut().random.below(4) > 0 {
        // A cluster that has come up. In the others its coming up is what goes wrong.
        for _ in 0..5 {
            schedule.settle();
            schedule.advance(1_000);
        }
    }
    let mut steps = 0;
    let played = (0..STEPS)
        .try_for_each(|_| {
            steps += 1;
            schedule.step();
            holds(&schedule, Strictness::Lenient)
        })
        .and_then(|()| heal(&mut schedule, &mut steps));
    let counts = std::mem::take(&mut schedule.world.borrow_mut().counts);
    match played {
        Ok(()) => Ok(Report { steps, counts }),
        Err(Wrong { deviations, wanting }) => {
            let log = std::mem::take(&mut schedule.world.borrow_mut().log).into();
            Err(Box::new(Failure { seed, step: steps, deviations, wanting, log }))
        }
    }
}

/// What does not hold.
struct Wrong {
    deviations: Vec<Deviation>,
    wanting: Vec<String>,
}

fn holds(schedule: &Schedule, strictness: Strictness) -> Result<(), Wrong> {
    let mut world = schedule.world.borrow_mut();
    if world.putting_back && is_put_back(&world) {
        world.putting_back = false;
    }
    let deviations = judge(&mut world, strictness);
    if deviations.is_empty() { Ok(()) } else { Err(Wrong { deviations, wanting: Vec::new() }) }
}

/// Whether all agents have noticed that records were lost, and had time to put them back.
fn is_put_back(world: &World) -> bool {
    world.machines.iter().filter(|machine| !machine.is_destroyed).all(|machine| {
        machine.agent.as_ref().is_some_and(|agent| {
            agent.view.cluster.is_some()
                && agent.view.revision == world.etcd.revision()
                && !agent.is_cautious()
                && !agent.news
        })
    })
}

/// Nothing goes wrong any more. Everything must come right.
fn heal(schedule: &mut Schedule, steps: &mut u64) -> Result<(), Wrong> {
    schedule.faults.clear();
    schedule.mend();
    schedule.world.borrow_mut().note(|| "nothing goes wrong any more".to_owned());
    for second in 0..TIME_TO_HEAL {
        schedule.start_agents();
        if !schedule.settle() {
            let wanting = vec!["there is no end to what there is to do".to_owned()];
            return Err(Wrong { deviations: Vec::new(), wanting });
        }
        *steps += 1;
        holds(schedule, Strictness::Lenient)?;
        schedule.rejoin();
        schedule.retire_rivals();
        let machines = schedule.world.borrow().machines.len();
        if second % 5 == 0 {
            let mut world = schedule.world.borrow_mut();
            operator::open_all_pools(&mut world);
            remove_again(&mut world);
            vouch(&mut world);
        }
        for machine in (0..machines).filter(|_| second % 5 == 0 && second < TIME_TO_HEAL - 30) {
            clear_up(schedule, machine);
        }
        schedule.advance(1_000);
    }
    schedule.settle();
    let world = &schedule.world;
    let wanting = wanting(&world.borrow());
    match holds(schedule, Strictness::Strict) {
        Ok(()) if wanting.is_empty() => Ok(()),
        Ok(()) => Err(Wrong { deviations: Vec::new(), wanting }),
        Err(Wrong { deviations, .. }) => Err(Wrong { deviations, wanting }),
    }
}

/// The runtime takes away what is over, and tries again what has failed.
fn clear_up(schedule: &mut Schedule, machine: usize) {
    if schedule.world.borrow().machines[machine].is_destroyed {
        return;
    }
    let over: Vec<usize> = {
        let world = schedule.world.borrow();
        let kernel = &world.machines[machine].kernel;
        let over = |index: &usize| {
            let one = &world.containers[*index];
            one.machine == machine
                && !one.is_wanted
                && kernel.namespaces.contains(one.attachment.container.as_str())
        };
        (0..world.containers.len()).filter(over).collect()
    };
    over.into_iter().for_each(|index| schedule.remove_namespace(index));
    // A pod that keeps its address has one container at a time.
    let twice: Vec<usize> = {
        let world = schedule.world.borrow();
        let reserved: Vec<_> =
            world.containers.iter().enumerate().filter(|(_, one)| one.reserved && one.is_wanted).collect();
        let again = |(number, (index, one)): (usize, &(usize, &crate::container::Container))| {
            let earlier = reserved[..number].iter().any(|(_, other)| other.pod == one.pod);
            earlier.then_some(*index)
        };
        reserved.iter().enumerate().filter_map(again).collect()
    };
    twice.into_iter().for_each(|index| schedule.end_container(index));
    schedule.retry(machine);
}

/// An operator removes nodes whose machines are gone: what they had sent may have arrived after the first removal. And
/// those that have joined anew since a backup was made that was put back.
fn remove_again(world: &mut World) {
    let is_older = |machine: &&Machine| {
        let Some(node) = world.truth.nodes.get(&machine.name) else { return false };
        let is_same = node.record.machine_id == machine.machine_id;
        // A machine that was made anew is told what to do.
        let is_gone = |other: &Machine| other.is_destroyed || other.life() != Life::from(&*node.record);
        let is_anew = || world.machines.iter().all(is_gone);
        machine.agent.as_ref().filter(|_| !machine.is_destroyed).is_some_and(|agent| {
            let says = |sign| agent.last_step.contains(sign);
            let is_told = says("is registered as incarnation") || says("has no ledger of it");
            is_same && says("is registered as incarnation") || is_told && is_anew()
        })
    };
    if let Some(name) = world.machines.iter().find(is_older).map(|machine| machine.name.clone()) {
        operator::remove_node(world, &name, Vouched::Yes);
    }
    let is_gone =
        |id: &str| world.machines.iter().any(|machine| machine.is_destroyed && machine.machine_id == id);
    let mut nodes = world.truth.nodes.iter();
    let gone = nodes.find(|(_, node)| is_gone(&node.record.machine_id)).map(|(name, _)| name.clone());
    if let Some(name) = gone {
        operator::remove_node(world, &name, Vouched::Yes);
    }
}

/// An operator vouches for removed nodes of which no machine is left that could confirm it.
fn vouch(world: &mut World) {
    let could_confirm = |incarnation: &Incarnation| {
        world.machines.iter().filter(|machine| !machine.is_destroyed).any(|machine| {
            let identity = machine.disk.identity().ok().flatten();
            !machine.ledger_is_whole || identity.is_some_and(|identity| identity.incarnation == *incarnation)
        })
    };
    let forgotten =
        world.truth.fences.iter().find(|(incarnation, fence)| {
            fence.record.pods == PodsGone::Unknown && !could_confirm(incarnation)
        });
    let Some((incarnation, fence)) = forgotten else { return };
    let change = Change::VouchForNode(vec![removal::vouch(incarnation, fence)]);
    let _ = world.etcd.commit(&transaction(&change));
    world.look();
}

/// What should have come to pass, and has not.
fn wanting(world: &World) -> Vec<String> {
    let mut wanting = Vec::new();
    for (index, machine) in world.machines.iter().enumerate().filter(|(_, machine)| !machine.is_destroyed) {
        let Some(agent) = &machine.agent else {
            wanting.push(format!("the agent of {index} does not start"));
            continue;
        };
        if agent.is_forbidden() || agent.last_step != "Settled" {
            wanting.push(format!("{index}/{} is not settled: {}", machine.name, agent.last_step));
        }
    }
    for one in world.containers.iter().filter(|one| one.is_wanted) {
        let interfaces = &world.machines[one.machine].kernel.interfaces;
        if !one.is_attached || !interfaces.contains_key(&one.attachment) {
            wanting.push(format!("{} on {} is not attached", one.attachment, one.machine));
        }
    }
    wanting
}
