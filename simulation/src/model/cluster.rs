//! The state of everything: the store, the machines, what is under way between them, and what is still to go wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use polder_ipam::Revision;
use polder_ipam::ids::Incarnation;
use polder_ipam::key::Key;
use polder_ipam::record::PodsGone;
use polder_ipam::store::{Outcome, Update, Write};

use super::limits::Limits;
use super::machine::{MACHINES, Machine, Who};
use super::task::Sent;
use super::watcher::Watcher;
use crate::etcd::{self, Said};

/// The state of everything.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The store.
    pub etcd: Arc<etcd::Model>,
    /// What it holds.
    pub truth: Watcher,
    /// The machines.
    pub machines: [Arc<Machine>; MACHINES],
    /// The transactions that are under way though nobody waits for them any more.
    pub late: Vec<Sent>,
    /// What may still happen.
    pub left: Limits,
    /// How much time has passed.
    pub tick: u8,
    /// The addresses that somebody had since time last passed, and has no more.
    pub warm: BTreeSet<IpAddr>,
    /// The incarnations that were ever removed.
    pub removed: BTreeMap<Incarnation, Remains>,
    /// What must not happen, and has.
    pub broken: Option<Broken>,
}

/// What is known of the pods of a removed node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Remains {
    /// Nothing.
    Unknown,
    /// They are gone, since time last passed.
    Warm,
    /// They have been gone for as long as addresses rest.
    Cold,
}

/// What must not happen, and is not seen in what is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// A removed node has changed the store.
    WroteAfterFence,
    /// A removed node's block was given back before its pods were known to be gone, or before it rested.
    GivenBackEarly,
    /// A removed node said that its pods are gone while one was there.
    ConfirmedEarly,
    /// A pod got an address that did not rest.
    ReusedWarm,
    /// Taking one pod away took something from another.
    FreedAnothers,
}

impl Cluster {
    /// Notes that something must not have happened.
    pub fn breaks(&mut self, broken: Broken) {
        self.broken.get_or_insert(broken);
    }

    /// The machine, to be changed.
    pub fn machine(&mut self, who: Who) -> &mut Machine {
        Arc::make_mut(&mut self.machines[who])
    }

    /// Lets the store carry out a transaction.
    pub fn commit(&mut self, sent: &Sent) -> Outcome {
        let outcome =
            Arc::make_mut(&mut self.etcd).commit(&sent.txn).expect("a transaction that etcd looks at");
        if let Outcome::Applied { revision } = outcome {
            let removed = sent.by.as_ref().is_some_and(|by| self.removed.contains_key(by));
            if removed && !sent.confirms() {
                self.breaks(Broken::WroteAfterFence);
            }
            let deleted = sent.txn.writes.iter().filter_map(|write| match write {
                Write::Delete { key } => key.parse().ok(),
                Write::Put { .. } => None,
            });
            deleted.for_each(|key| self.deleted(&key));
            self.tell(revision);
        }
        outcome
    }

    /// Looks at what is deleted, as of before.
    fn deleted(&mut self, key: &Key) {
        let Key::Block(block) = key else { return };
        let Some(claim) = self.truth.view.blocks.get(block) else { return };
        let remains = self.removed.get(&claim.record.incarnation);
        if remains.is_some_and(|remains| *remains != Remains::Cold) {
            self.breaks(Broken::GivenBackEarly);
        }
    }

    /// Sends what has changed to all who follow, and forgets it.
    fn tell(&mut self, revision: Revision) {
        let etcd = Arc::make_mut(&mut self.etcd);
        let mut watch = etcd.watch(Key::followed(), revision);
        let opened = watch.send(etcd);
        debug_assert!(matches!(opened, Some(Said::Opened { .. })), "{opened:?}");
        let Some(Said::Events { events, .. }) = watch.send(etcd) else { return };
        let changes = events.iter().map(|event| event.change().1).collect();
        let update = Arc::new(Update::Changed { revision, changes });
        // Nobody reads what was: whoever has not heard of it has it under way.
        etcd.compact(revision).expect("a new revision");
        self.truth.push(&update);
        self.truth.hear(&self.etcd);
        for machine in &mut self.machines {
            Arc::make_mut(machine).agent.watcher.push(&update);
        }
        self.note_fences();
    }

    fn note_fences(&mut self) {
        let truth = Arc::clone(&self.truth.view);
        for (incarnation, fence) in &truth.fences {
            let known = self.removed.get(incarnation).copied();
            let remains = match (fence.record.pods, known) {
                (PodsGone::Unknown, _) => Remains::Unknown,
                (PodsGone::Confirmed | PodsGone::Vouched, Some(Remains::Cold)) => Remains::Cold,
                (PodsGone::Confirmed | PodsGone::Vouched, _) => Remains::Warm,
            };
            if remains == Remains::Warm && self.pods_of(incarnation) > 0 {
                self.breaks(Broken::ConfirmedEarly);
            }
            self.removed.insert(incarnation.clone(), remains);
        }
    }

    /// How many pods an incarnation has.
    fn pods_of(&self, incarnation: &Incarnation) -> usize {
        let is_it = |machine: &&Arc<Machine>| {
            machine.identity().is_some_and(|identity| identity.incarnation == *incarnation)
        };
        self.machines.iter().filter(is_it).map(|machine| machine.plugged.len()).sum()
    }

    /// A name for a claim that nothing has that can still be compared with it.
    pub fn nonce(&self, who: Who) -> String {
        let id = self.machines[who].id;
        let mut names = (1..).map(|number| format!("{id}-x{number}-"));
        names.find(|name| !self.mentions(name)).expect("there is no end of numbers")
    }

    /// Whether a name is anywhere.
    fn mentions(&self, name: &str) -> bool {
        let is_in = |value: &[u8]| value.windows(name.len()).any(|window| window == name.as_bytes());
        let in_txn = |sent: &Sent| {
            sent.txn.writes.iter().any(|write| matches!(write, Write::Put { value, .. } if is_in(value)))
        };
        let in_ledger =
            |machine: &Arc<Machine>| machine.ipam.blocks().iter().any(|owned| owned.nonce.as_str() == name);
        let heard = |machine: &Arc<Machine>| machine.agent.watcher.mentions(&is_in);
        self.truth.view.blocks.values().any(|claim| claim.record.nonce.as_str() == name)
            || self.late.iter().any(in_txn)
            || self
                .machines
                .iter()
                .any(|machine| in_ledger(machine) || heard(machine) || machine.agent.under_way().any(in_txn))
    }
}
