//! Faults of the store and of its connections to the nodes.

use super::file::fall_behind;
use crate::etcd::Space;
use crate::fault::Fault;
use crate::schedule::Schedule;
use crate::store_request::{Progress, Request, no_answer};
use crate::world::{Agent, Machine, StoreKind, World};

impl Schedule {
    /// Empties or restores the store, only while all agents run and follow it: an agent that does not run would not
    /// detect the loss, and could not repair it in the period without claims.
    pub(super) fn lose_or_restore_store(&mut self, fault: Fault) -> bool {
        self.restore();
        self.start_agents();
        self.run_until_idle();
        let mut world = self.world.borrow_mut();
        let revision = world.etcd.revision();
        let follows = |machine: &Machine| {
            let follows = |agent: &Agent| {
                agent.view.revision == revision && agent.view.cluster.is_some() && !agent.is_forbidden()
            };
            machine.is_destroyed || machine.ledger_is_whole && machine.agent.as_ref().is_some_and(follows)
        };
        if !world.machines.iter().all(follows) || (fault == Fault::StoreRestored && world.backups.is_empty())
        {
            return false;
        }
        if fault == Fault::StoreEmptied {
            world.etcd.empty();
        } else {
            let backups = std::mem::take(&mut world.backups);
            let backup = world.random.one_of(&backups);
            world.etcd.restore(backup);
            world.backups = backups;
        }
        // Requests in flight were addressed to the lost store.
        world.requests.retain(|request| !matches!(request.state, Progress::Late));
        for request in &mut world.requests {
            request.state = Progress::Answered(Err(no_answer()));
        }
        world.note_store_loss();
        true
    }

    /// Ends all faults that persist.
    pub fn restore(&mut self) {
        let mut world = self.world.borrow_mut();
        world.etcd.set_space(Space::Enough);
        for machine in &mut world.machines {
            machine.disk.fill(false);
            machine.is_partitioned = false;
            machine.is_stopped = false;
            machine.reads_only = false;
            if let Some(agent) = &mut machine.agent {
                agent.watcher.restore();
            }
        }
    }
}

/// Injects a fault between the nodes and the store.
pub(super) fn try_inject(world: &mut World, fault: Fault, machine: usize) -> bool {
    match fault {
        Fault::DiskFull => {
            let disk = &world.machines[machine].disk;
            disk.fill(!disk.is_full());
        }
        Fault::RequestLost | Fault::RequestLate | Fault::ReplyLost => return lose(world, fault),
        Fault::Partition => cut(world, machine),
        Fault::NoSpace => {
            let space = match (world.etcd.space(), world.random.once_in(2)) {
                (Space::Enough, true) => Space::ForOneWrite,
                (Space::Enough, false) => Space::None,
                _ => Space::Enough,
            };
            world.etcd.set_space(space);
        }
        Fault::ReadsOnly => {
            let Machine { reads_only, .. } = &mut world.machines[machine];
            *reads_only = !*reads_only;
        }
        Fault::LeaderChange => {
            for index in 0..world.requests.len() {
                give_up(world, index);
            }
        }
        Fault::Compaction => {
            let revision = world.etcd.revision();
            return world.etcd.compact(revision).is_ok();
        }
        Fault::ClockSpeed => {
            let rate = 500 + world.random.below(501);
            world.machines[machine].rate = u64::try_from(rate).unwrap_or(1_000);
        }
        _ => return disturb_watch(world, fault, machine),
    }
    true
}

fn disturb_watch(world: &mut World, fault: Fault, machine: usize) -> bool {
    let World { machines, etcd, random, store_kind, .. } = world;
    let is_partitioned = machines[machine].is_partitioned;
    let Some(agent) = machines[machine].agent.as_mut().filter(|_| !is_partitioned) else { return false };
    match fault {
        Fault::WatchEnds if *store_kind == StoreKind::Embedded => fall_behind(agent),
        Fault::WatchEnds => agent.watcher.disconnect(),
        Fault::WatchDelayed if random.once_in(2) => agent.watcher.delay(),
        Fault::WatchDelayed => agent.watcher.restore(),
        _ => agent.watcher.repeat(etcd, 3),
    }
    true
}

fn lose(world: &mut World, fault: Fault) -> bool {
    let is_open =
        |index: &usize| matches!(world.requests[*index].state, Progress::Sent | Progress::Served(_));
    let open: Vec<usize> = (0..world.requests.len()).filter(is_open).collect();
    if open.is_empty() {
        return false;
    }
    let index = *world.random.one_of(&open);
    match fault {
        Fault::RequestLate => give_up(world, index),
        Fault::ReplyLost => {
            if matches!(world.requests[index].state, Progress::Sent) {
                world.serve(index);
            }
            world.requests[index].state = Progress::Answered(Err(no_answer()));
        }
        _ => world.requests[index].state = Progress::Answered(Err(no_answer())),
    }
    true
}

/// Fails a request for its sender. If it has not reached the store, it can still arrive.
fn give_up(world: &mut World, index: usize) {
    let (machine, operation) = (world.requests[index].machine, world.requests[index].operation.clone());
    match world.requests[index].state {
        Progress::Sent => {
            let id = world.number();
            let late = Request { id, machine, operation, state: Progress::Late };
            world.requests[index].state = Progress::Answered(Err(no_answer()));
            world.requests.push(late);
        }
        Progress::Served(_) => world.requests[index].state = Progress::Answered(Err(no_answer())),
        Progress::Late | Progress::Answered(_) => {}
    }
}

pub(super) fn cut(world: &mut World, machine: usize) {
    let is_partitioned = !world.machines[machine].is_partitioned;
    world.machines[machine].is_partitioned = is_partitioned;
    if let Some(agent) = &mut world.machines[machine].agent {
        if is_partitioned { agent.watcher.cut() } else { agent.watcher.restore() }
    }
    if is_partitioned {
        for index in 0..world.requests.len() {
            if world.requests[index].machine == machine {
                give_up(world, index);
            }
        }
    }
}
