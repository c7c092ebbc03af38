//! The initial states.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use polder_ipam::ids::ClusterId;
use polder_ipam::key::Key;
use polder_ipam::pool::{PoolState, Purpose};
use polder_ipam::record::{ClusterRecord, PoolRecord, encode};
use polder_ipam::store::{Txn, Write};

use super::Space;
use super::action::{Action, Fate, TaskKind};
use super::cluster::Cluster;
use super::limits::Limits;
use super::machine::{EARLIER, Kernel, Machine, MachineIndex, NAMES, Power};
use super::task::Wait;
use super::transition::Transition;
use super::watcher::Watcher;
use crate::etcd;

/// An initial state. All have a pool of two blocks of four addresses, and a pool for reservations, with one address
/// reserved for a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Two machines without blocks, not registered yet.
    Empty,
    /// The first machine has a block; the second is not registered yet.
    One,
    /// Two machines with one block each.
    Settled,
    /// As `Settled`, but all machines are containers on one host.
    OneKernel,
}

/// The cluster in the initial state of the space.
pub(super) fn cluster(space: &Space) -> Cluster {
    let mut etcd = etcd::Model::new();
    let txn = Txn { compares: Vec::new(), writes: settings() };
    etcd.commit(&txn).expect("a valid transaction");
    etcd.compact(etcd.revision()).expect("a new revision");
    let kernel = if space.start == Start::OneKernel { Kernel::Shared } else { Kernel::Own };
    let mut truth = Watcher::default();
    truth.receive(&etcd);
    let mut cluster = Cluster {
        etcd: Arc::new(etcd),
        truth,
        machines: NAMES.map(|(id, name)| Arc::new(Machine::new(id, name, kernel))),
        late: Vec::new(),
        remaining: Limits::default(),
        tick: EARLIER,
        in_cool_down: BTreeSet::new(),
        removed: BTreeMap::new(),
        violation: None,
    };
    [0, 1].into_iter().for_each(|index| cluster.machine(index).power = Power::On);
    let first: &[MachineIndex] = match space.start {
        Start::Empty => &[],
        Start::One => &[0],
        Start::Settled | Start::OneKernel => &[0, 1],
    };
    // The steps that lead to the initial state are not part of the exploration.
    let quiet = Space { flaw: None, tally: Arc::default(), ..space.clone() };
    let mut transition = Transition { space: &quiet, cluster };
    first.iter().for_each(|index| run_until_idle(&mut transition, *index));
    first.iter().for_each(|index| run_until_idle(&mut transition, *index));
    transition.cluster.remaining = space.limits;
    transition.cluster
}

/// Runs a machine, without faults, until it has nothing left to do.
fn run_until_idle(transition: &mut Transition<'_>, index: MachineIndex) {
    loop {
        let before = transition.cluster.clone();
        while !transition.cluster.machines[index].agent.watcher.is_current() {
            transition.apply(&Action::ReceiveChange(index));
        }
        let registrar = transition.cluster.machines[index].agent.registrar.as_ref();
        let next = match registrar.map(|stopped| &stopped.wait) {
            None => Action::Decide(index),
            Some(Wait::Commit(_)) => Action::CompleteTransaction(index, Fate::Answered),
            Some(_) => Action::Continue(index, TaskKind::Registrar),
        };
        transition.apply(&next);
        if transition.cluster == before {
            return;
        }
    }
}

fn settings() -> Vec<Write> {
    let cluster = ClusterRecord::new(ClusterId::new("c"));
    let pool = |cidr: &str, block_length, purpose| PoolRecord {
        cidr: cidr.parse().expect("a network"),
        block_length,
        state: PoolState::Active,
        purpose,
        nodes: BTreeMap::new(),
    };
    let pools = [
        ("main", pool("10.0.0.0/29", 30, Purpose::Blocks)),
        ("names", pool("10.1.0.0/30", 30, Purpose::Reservations)),
    ];
    let put = |key: Key, value: Vec<u8>| Write::Put { key: key.to_string(), value };
    let mut writes = vec![put(Key::Cluster, encode(&cluster))];
    writes.extend(
        pools.iter().map(|(name, record)| put(Key::Pool(name.parse().expect("a name")), encode(record))),
    );
    writes
}
