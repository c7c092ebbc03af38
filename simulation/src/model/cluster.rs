//! The state of the cluster: store, machines, transactions in flight, and the remaining limits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use polder_ipam::Revision;
use polder_ipam::ids::Incarnation;
use polder_ipam::key::Key;
use polder_ipam::record::PodsGone;
use polder_ipam::store::{Outcome, Update, Write};

use super::limits::Limits;
use super::machine::{MACHINES, Machine, MachineIndex};
use super::task::Sent;
use super::watcher::Watcher;
use crate::etcd::{self, WatchMessage};

/// The complete state.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The store.
    pub etcd: Arc<etcd::Model>,
    /// The current contents of the store.
    pub truth: Watcher,
    /// The machines, by index.
    pub machines: [Arc<Machine>; MACHINES],
    /// Transactions in flight for which no task waits any more.
    pub late: Vec<Sent>,
    /// Number of times that each event may still occur.
    pub remaining: Limits,
    /// Time that has passed, in ticks.
    pub tick: u8,
    /// The addresses released since the last tick.
    pub in_cool_down: BTreeSet<IpAddr>,
    /// The incarnations that were ever removed.
    pub removed: BTreeMap<Incarnation, RemovedPods>,
    /// The first violation found.
    pub violation: Option<Violation>,
}

/// Knowledge about the pods of a removed node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemovedPods {
    /// The pods may still exist.
    Unknown,
    /// The pods are gone, but the cool-down has not passed yet.
    InCoolDown,
    /// The pods are gone, and the cool-down has passed.
    CooledDown,
}

/// A violation that the state itself does not show afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Violation {
    /// A removed node has changed the store.
    WroteAfterFence,
    /// A removed node's block was released before its pods were known to be gone, or before its cool-down had passed.
    BlockReleasedEarly,
    /// A removed node confirmed that its pods are gone while one still existed.
    ConfirmedEarly,
    /// A pod got an address without cool-down.
    ReusedInCoolDown,
    /// A DEL released addresses of another pod.
    ReleasedOthers,
}

impl Cluster {
    /// Records a violation. The first one is kept.
    pub fn record_violation(&mut self, violation: Violation) {
        self.violation.get_or_insert(violation);
    }

    /// Mutable access to a machine.
    pub fn machine(&mut self, index: MachineIndex) -> &mut Machine {
        Arc::make_mut(&mut self.machines[index])
    }

    /// Executes a transaction in the store.
    pub fn commit(&mut self, sent: &Sent) -> Outcome {
        let outcome = Arc::make_mut(&mut self.etcd).commit(&sent.txn).expect("a valid transaction");
        if let Outcome::Applied { revision } = outcome {
            let removed = sent.by.as_ref().is_some_and(|by| self.removed.contains_key(by));
            if removed && !sent.confirms() {
                self.record_violation(Violation::WroteAfterFence);
            }
            let deleted = sent.txn.writes.iter().filter_map(|write| match write {
                Write::Delete { key } => key.parse().ok(),
                Write::Put { .. } => None,
            });
            deleted.for_each(|key| self.check_deletion(&key));
            self.deliver_update(revision);
        }
        outcome
    }

    /// Checks a deletion, before the view includes it.
    fn check_deletion(&mut self, key: &Key) {
        let Key::Block(block) = key else { return };
        let Some(claim) = self.truth.view.blocks.get(block) else { return };
        let pods = self.removed.get(&claim.record.incarnation);
        if pods.is_some_and(|pods| *pods != RemovedPods::CooledDown) {
            self.record_violation(Violation::BlockReleasedEarly);
        }
    }

    /// Sends the change to all watches, and compacts the history.
    fn deliver_update(&mut self, revision: Revision) {
        let etcd = Arc::make_mut(&mut self.etcd);
        let mut watch = etcd.watch(Key::followed(), revision);
        let opened = watch.send(etcd);
        debug_assert!(matches!(opened, Some(WatchMessage::Opened { .. })), "{opened:?}");
        let Some(WatchMessage::Events { events, .. }) = watch.send(etcd) else { return };
        let changes = events.iter().map(|event| event.change().1).collect();
        let update = Arc::new(Update::Changed { revision, changes });
        // No task reads old revisions: every watch that lacks the change has it in flight.
        etcd.compact(revision).expect("a new revision");
        self.truth.push(&update);
        self.truth.receive(&self.etcd);
        for machine in &mut self.machines {
            Arc::make_mut(machine).agent.watcher.push(&update);
        }
        self.update_removed();
    }

    fn update_removed(&mut self) {
        let truth = Arc::clone(&self.truth.view);
        for (incarnation, fence) in &truth.fences {
            let known = self.removed.get(incarnation).copied();
            let pods = match (fence.record.pods, known) {
                (PodsGone::Unknown, _) => RemovedPods::Unknown,
                (PodsGone::Confirmed | PodsGone::ConfirmedByOperator, Some(RemovedPods::CooledDown)) => {
                    RemovedPods::CooledDown
                }
                (PodsGone::Confirmed | PodsGone::ConfirmedByOperator, _) => RemovedPods::InCoolDown,
            };
            if pods == RemovedPods::InCoolDown && self.pods_of(incarnation) > 0 {
                self.record_violation(Violation::ConfirmedEarly);
            }
            self.removed.insert(incarnation.clone(), pods);
        }
    }

    /// Number of pods of an incarnation.
    fn pods_of(&self, incarnation: &Incarnation) -> usize {
        let is_it = |machine: &&Arc<Machine>| {
            machine.identity().is_some_and(|identity| identity.incarnation == *incarnation)
        };
        self.machines.iter().filter(is_it).map(|machine| machine.plugged.len()).sum()
    }

    /// A claim nonce that does not occur anywhere it could still be compared with.
    pub fn nonce(&self, index: MachineIndex) -> String {
        let id = self.machines[index].id;
        let mut names = (1..).map(|number| format!("{id}-x{number}-"));
        names.find(|name| !self.mentions(name)).expect("there is no end of numbers")
    }

    /// Whether the name occurs anywhere in the state.
    fn mentions(&self, name: &str) -> bool {
        let is_in = |value: &[u8]| value.windows(name.len()).any(|window| window == name.as_bytes());
        let in_txn = |sent: &Sent| {
            sent.txn.writes.iter().any(|write| matches!(write, Write::Put { value, .. } if is_in(value)))
        };
        let in_ledger = |machine: &Arc<Machine>| {
            machine.ipam.blocks().iter().any(|owned| owned.nonce.to_string() == name)
        };
        let in_view = |machine: &Arc<Machine>| machine.agent.watcher.mentions(&is_in);
        self.truth.view.blocks.values().any(|claim| claim.record.nonce.to_string() == name)
            || self.late.iter().any(in_txn)
            || self.machines.iter().any(|machine| {
                in_ledger(machine) || in_view(machine) || machine.agent.in_flight().any(in_txn)
            })
    }
}
