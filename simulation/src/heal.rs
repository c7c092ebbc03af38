//! The end of a run: all faults stop, and the cluster must recover completely.

use polder_api::pool::PoolChange;
use polder_api::{NodeName, PoolName};
use polder_ipam::Cidr;
use polder_ipam::ids::{Incarnation, MachineId};
use polder_ipam::ledger::Ledger;
use polder_ipam::pool::PoolState;
use polder_ipam::record::{Boot, PodsGone};
use polder_ipam::removal::OperatorConfirmation;

use crate::container::Container;
use crate::fault::Fault;
use crate::operator;
use crate::schedule::Schedule;
use crate::violations::{CheckFailure, Strictness, check_invariants};
use crate::world::{Machine, World};

/// Time for a cluster to recover, in seconds.
const TIME_TO_HEAL: u64 = 240;

/// Counted event: a pool in use is drained, emptied and removed.
pub const EMPTIED: &str = "pool in use drained, emptied and removed";

/// Ends all faults, and gives the cluster time to recover. Returns an error if anything is still wrong afterwards.
pub fn heal(schedule: &mut Schedule, steps: &mut u64) -> Result<(), CheckFailure> {
    let releases = std::mem::take(&mut schedule.faults).contains(&Fault::AddressReleased);
    schedule.restore();
    schedule.world.borrow_mut().note(|| "no more faults".to_owned());
    let mut pool_removal = PoolRemoval::plan(&mut schedule.world.borrow_mut());
    for second in 0..TIME_TO_HEAL {
        schedule.start_agents();
        if !schedule.run_until_idle() {
            let unrecovered = vec!["the cluster does not become idle".to_owned()];
            return Err(CheckFailure { deviations: Vec::new(), unrecovered });
        }
        *steps += 1;
        check_invariants(&mut schedule.world.borrow_mut(), Strictness::Lenient)?;
        schedule.rejoin();
        schedule.end_name_conflicts();
        let machines = schedule.world.borrow().machines.len();
        if second % 5 == 0 {
            let mut world = schedule.world.borrow_mut();
            operator::open_all_pools(
                &mut world,
                pool_removal.as_ref().map(|pool_removal| &pool_removal.name),
            );
            remove_again(&mut world);
            confirm_dead_nodes(&mut world);
        }
        for machine in (0..machines).filter(|_| second % 5 == 0 && second < TIME_TO_HEAL - 30) {
            clean_up(schedule, machine);
        }
        if releases && second % 5 == 2 && second < TIME_TO_HEAL - 30 {
            let machine = schedule.any_machine();
            operator::send_request(&schedule.world, machine, Fault::AddressReleased);
        }
        if let Some(pool_removal) = pool_removal.as_mut().filter(|_| second % 5 == 0) {
            pool_removal.advance(schedule, second < TIME_TO_HEAL - 90);
        }
        schedule.advance(1_000);
    }
    schedule.run_until_idle();
    let mut unrecovered = unrecovered(&schedule.world.borrow());
    unrecovered.extend(pool_removal.and_then(|pool_removal| pool_removal.unrecovered()));
    match check_invariants(&mut schedule.world.borrow_mut(), Strictness::Strict) {
        Ok(()) if unrecovered.is_empty() => Ok(()),
        Ok(()) => Err(CheckFailure { deviations: Vec::new(), unrecovered }),
        Err(CheckFailure { deviations, .. }) => Err(CheckFailure { deviations, unrecovered }),
    }
}

/// A pool that operators remove while no faults occur: it is drained, its pods are moved, and in the end it must be
/// removable.
struct PoolRemoval {
    name: PoolName,
    cidr: Cidr,
    /// Whether a block of the pool was claimed.
    was_used: bool,
    is_over: bool,
}

impl PoolRemoval {
    /// Chooses an added pool for removal, in half of the runs.
    fn plan(world: &mut World) -> Option<Self> {
        let own = |pool: &PoolName| world.first_pools.iter().all(|first| first.name != *pool);
        let mut pools = world.truth.pools.iter().filter(|(name, _)| own(name));
        let (name, cidr) = pools.next().map(|(name, known)| (name.clone(), known.record.cidr()))?;
        let was_used = world.truth.blocks.keys().any(|block| cidr.covers(block.cidr()));
        world.random.once_in(2).then_some(Self { name, cidr, was_used, is_over: false })
    }

    fn advance(&mut self, schedule: &mut Schedule, moves_pods: bool) {
        let known = schedule.world.borrow().truth.pools.get(&self.name).map(|known| known.record.state);
        match known {
            None => self.is_over = true,
            Some(PoolState::Active) => {
                let drain = PoolChange::Drain(self.name.clone());
                operator::change_pools(&mut schedule.world.borrow_mut(), drain);
            }
            Some(_) if moves_pods => self.move_pods(schedule),
            Some(_) => {}
        }
        let mut world = schedule.world.borrow_mut();
        if !self.is_over && operator::change_pools(&mut world, PoolChange::Remove(self.name.clone())) {
            self.is_over = true;
            if self.was_used {
                world.count(EMPTIED);
            }
        }
    }

    /// Replaces the container of each pod that has an address of the pool.
    fn move_pods(&self, schedule: &mut Schedule) {
        let of_pool: Vec<usize> = {
            let world = schedule.world.borrow();
            let is_of_pool = |one: &Container| {
                let addresses = world.machines[one.machine].kernel.interfaces.get(&one.attachment);
                one.is_wanted
                    && addresses.is_some_and(|all| all.iter().any(|address| self.cidr.has(*address)))
            };
            (0..world.containers.len()).filter(|index| is_of_pool(&world.containers[*index])).collect()
        };
        for index in of_pool {
            let Container { machine, pod, reserved, .. } = schedule.world.borrow().containers[index].clone();
            schedule.end_container(index);
            schedule.start_container(machine, Some((pod, reserved)));
        }
    }

    fn unrecovered(&self) -> Option<String> {
        (!self.is_over).then(|| format!("pool {} was drained, and cannot be removed", self.name))
    }
}

/// The runtime removes leftover namespaces of ended containers, and retries failed pods.
fn clean_up(schedule: &mut Schedule, machine: usize) {
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
    // A pod that keeps its address has only one container at a time.
    let twice: Vec<usize> = {
        let world = schedule.world.borrow();
        let reserved: Vec<_> =
            world.containers.iter().enumerate().filter(|(_, one)| one.reserved && one.is_wanted).collect();
        let again = |(number, (index, one)): (usize, &(usize, &Container))| {
            let earlier = reserved[..number].iter().any(|(_, other)| other.pod == one.pod);
            earlier.then_some(*index)
        };
        reserved.iter().enumerate().filter_map(again).collect()
    };
    twice.into_iter().for_each(|index| schedule.end_container(index));
    schedule.retry(machine);
}

/// An operator removes nodes of destroyed machines again: their late requests may have arrived after the first
/// removal. Also removes nodes that joined again after the restored backup was made.
fn remove_again(world: &mut World) {
    let is_older = |machine: &&Machine| {
        let Some(node) = world.truth.nodes.get(&machine.name) else { return false };
        let is_same = node.record.machine_id == machine.machine_id;
        // A recreated machine reports the conflict: no remaining machine has the ids of the record.
        let is_gone = |other: &Machine| other.is_destroyed || other.boot() != Boot::from(&*node.record);
        let has_no_registered_machine = || world.machines.iter().all(is_gone);
        machine.agent.as_ref().filter(|_| !machine.is_destroyed).is_some_and(|agent| {
            let last_step_contains = |text: &str| agent.last_step.contains(text);
            let is_older = last_step_contains("does not belong to the registered node");
            let is_in_conflict = is_older || last_step_contains("has no ledger of node");
            is_same && is_older || is_in_conflict && has_no_registered_machine()
        })
    };
    if let Some(name) = world.machines.iter().find(is_older).map(|machine| machine.name.clone()) {
        operator::remove_node(world, &name, OperatorConfirmation::Yes);
    }
    let is_gone = |id: &MachineId| {
        world.machines.iter().any(|machine| machine.is_destroyed && machine.machine_id == *id)
    };
    let mut nodes = world.truth.nodes.iter();
    let gone = nodes.find(|(_, node)| is_gone(&node.record.machine_id)).map(|(name, _)| name.clone());
    if let Some(name) = gone {
        operator::remove_node(world, &name, OperatorConfirmation::Yes);
    }
}

/// An operator confirms that the pods of removed nodes are gone if no remaining machine could confirm the removal.
fn confirm_dead_nodes(world: &mut World) {
    let could_confirm = |incarnation: &Incarnation| {
        world.machines.iter().filter(|machine| !machine.is_destroyed).any(|machine| {
            let identity = machine.disk.identity().ok().flatten();
            !machine.ledger_is_whole || identity.is_some_and(|identity| identity.incarnation == *incarnation)
        })
    };
    let unconfirmed =
        || world.truth.fences.iter().filter(|(_, fence)| fence.record.pods == PodsGone::Unknown);
    // The confirmation covers all removed machines with the name.
    let is_unconfirmable = |name: &NodeName| {
        let mut of_name = unconfirmed().filter(|(_, fence)| fence.record.node == *name);
        of_name.all(|(incarnation, _)| !could_confirm(incarnation))
    };
    let unconfirmable =
        unconfirmed().map(|(_, fence)| &fence.record.node).find(|name| is_unconfirmable(name)).cloned();
    if let Some(name) = unconfirmable {
        operator::remove_node(world, &name, OperatorConfirmation::Earlier);
    }
}

/// Describes what has not recovered.
fn unrecovered(world: &World) -> Vec<String> {
    let mut unrecovered = Vec::new();
    for (index, machine) in world.machines.iter().enumerate().filter(|(_, machine)| !machine.is_destroyed) {
        let Some(agent) = &machine.agent else {
            unrecovered.push(format!("the agent of {index} does not start"));
            continue;
        };
        if agent.is_forbidden() || agent.last_step != "Settled" {
            unrecovered.push(format!("{index}/{} is not idle: {}", machine.name, agent.last_step));
        }
    }
    for one in world.containers.iter().filter(|one| one.is_wanted) {
        let interfaces = &world.machines[one.machine].kernel.interfaces;
        if !one.is_attached || !interfaces.contains_key(&one.attachment) {
            unrecovered.push(format!("{} on {} is not attached", one.attachment, one.machine));
        }
    }
    unrecovered
}
