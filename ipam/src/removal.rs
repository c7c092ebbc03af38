//! A node that is removed, and what becomes of its blocks.
//!
//! The removal fences the node's incarnation: in one transaction its record goes and a fence stands in its place, so
//! that nothing that the node still writes takes effect, for all of it rests on that record. Its pods may live, so its
//! blocks rest: until the node itself has cut them off and says so, or an operator vouches that they are gone, and
//! the cool-down is over. The cool-down is counted by whoever gives the blocks back, on a clock of his own, from when
//! he first saw the confirmation: no two machines have to agree about the time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polder_api::NodeName;
use polder_api::mutant::{self, Mutant};
use sha2::{Digest, Sha256};

use crate::ids::Incarnation;
use crate::key::Key;
use crate::moment::Moment;
use crate::pool::Block;
use crate::record::{FenceRecord, Life, NodeRecord, PodsGone, encode};
use crate::reservation;
use crate::store::{Compare, LARGEST_TXN, Txn, Write};
use crate::view::{Known, View};

/// Whether somebody answers for it that the node and all its pods are gone for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vouched {
    /// Nobody does: the node has to confirm it.
    No,
    /// The operator does.
    Yes,
    /// The operator does, for those that had the name before and were removed: not for the one that has it now.
    Earlier,
}

/// Why a node is not removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotRemoved {
    /// Nobody of that name is there or was removed.
    #[error("there is no node {0}, and none of that name whose blocks still rest: see polderctl node list")]
    Unknown(NodeName),
    /// It is removed already.
    #[error(
        "node {0} was removed before, and what it had rests: say --dead if you know that it is gone for good"
    )]
    Already(NodeName),
    /// The word could be meant for either of two machines.
    #[error(
        "two machines had the name {node}: one was removed and has not confirmed that its pods are gone ({earlier}), and \
         one is registered now ({now}). If the first is gone for good, say so with polderctl node remove {node} --dead \
         --earlier; then this command removes the second"
    )]
    Ambiguous {
        /// The name.
        node: NodeName,
        /// The machine that was removed.
        earlier: String,
        /// The machine that has the name now.
        now: String,
    },
}

/// The transaction that removes the node; or that vouches for one that was removed before.
pub fn remove(view: &View, name: &NodeName, vouched: Vouched) -> Result<Txn, NotRemoved> {
    let pods = match vouched {
        Vouched::No => PodsGone::Unknown,
        Vouched::Yes | Vouched::Earlier => PodsGone::Vouched,
    };
    let of_name = || view.fences.iter().filter(|(_, fence)| fence.record.node == *name);
    let mut silent = of_name().filter(|(_, fence)| fence.record.pods == PodsGone::Unknown);
    if let (Some(node), true) = (view.nodes.get(name), vouched != Vouched::Earlier) {
        if let (Vouched::Yes, Some((_, fence))) = (vouched, silent.next()) {
            return Err(NotRemoved::Ambiguous {
                node: name.clone(),
                earlier: Life::from(&*fence.record).to_string(),
                now: Life::from(&*node.record).to_string(),
            });
        }
        let key = Key::Node(name.clone()).to_string();
        let fence = Key::Fence(name.clone(), node.record.incarnation.clone());
        let NodeRecord { machine_id, boot_id, .. } = (*node.record).clone();
        let record = FenceRecord { node: name.clone(), machine_id, boot_id, pods };
        return Ok(Txn {
            compares: vec![
                Compare::Unchanged { key: key.clone(), revision: node.revision },
                Compare::absent(&fence),
            ],
            writes: vec![
                Write::Delete { key },
                Write::Put { key: fence.to_string(), value: encode(&record) },
            ],
        });
    }
    let mut txn = Txn::default();
    for (incarnation, fence) in silent {
        if vouched == Vouched::No {
            return Err(NotRemoved::Already(name.clone()));
        }
        set(&mut txn, incarnation, fence, PodsGone::Vouched);
    }
    if txn.writes.is_empty() && of_name().next().is_none() {
        return Err(NotRemoved::Unknown(name.clone()));
    }
    Ok(txn)
}

/// The transaction by which a removed node says that its pods are gone.
pub fn confirm(incarnation: &Incarnation, fence: &Known<FenceRecord>) -> Txn {
    let mut txn = Txn::default();
    set(&mut txn, incarnation, fence, PodsGone::Confirmed);
    txn
}

fn set(txn: &mut Txn, incarnation: &Incarnation, fence: &Known<FenceRecord>, pods: PodsGone) {
    let key = Key::Fence(fence.record.node.clone(), incarnation.clone()).to_string();
    let value = encode(&FenceRecord { pods, ..(*fence.record).clone() });
    txn.compares.push(Compare::Unchanged { key: key.clone(), revision: fence.revision });
    txn.writes.push(Write::Put { key, value });
}

/// What a transaction that gives back can change at once: the fence and the record of the node that gives back are
/// compared, too.
const AT_ONCE: usize = LARGEST_TXN - 2;

/// How many fences are kept of nodes of which nothing else is left: should one come back after all, or with what its
/// ledger said earlier, it learns from its fence that nothing that it had is its own.
pub const FENCES_KEPT: usize = 1_000;

/// What is to be given back of a removed node whose pods are gone, in one transaction; the rest by the next. `None` if
/// there is nothing left to give back. The fence stays.
pub fn give_back(view: &View, incarnation: &Incarnation) -> Option<Txn> {
    let fence = view.fences.get(incarnation)?;
    let key = Key::Fence(fence.record.node.clone(), incarnation.clone()).to_string();
    let unchanged = |key: String, revision| Compare::Unchanged { key, revision };
    let mut txn = Txn { compares: vec![unchanged(key, fence.revision)], writes: Vec::new() };
    for (block, claim) in blocks_of(view, incarnation).take(AT_ONCE) {
        let key = Key::Block(block).to_string();
        txn.compares.push(unchanged(key.clone(), claim));
        txn.writes.push(Write::Delete { key });
    }
    let room = AT_ONCE - txn.writes.len();
    let held = view.reservations.iter().filter(|(_, known)| {
        known.record.holder.as_ref().is_some_and(|holder| holder.incarnation == *incarnation)
    });
    for (address, known) in held.take(room) {
        let let_go = reservation::let_go(*address, known);
        txn.compares.extend(let_go.compares);
        txn.writes.extend(let_go.writes);
    }
    (!txn.writes.is_empty()).then_some(txn)
}

/// The transaction that forgets a fence of which nothing else is left.
fn forget(node: &NodeName, incarnation: &Incarnation, revision: i64) -> Txn {
    let key = Key::Fence(node.clone(), incarnation.clone()).to_string();
    let unchanged = Compare::Unchanged { key: key.clone(), revision };
    Txn { compares: vec![unchanged], writes: vec![Write::Delete { key }] }
}

/// The incarnations that the store says have something.
fn holders(view: &View) -> BTreeSet<&Incarnation> {
    let claims = view.blocks.values().map(|claim| &claim.record.incarnation);
    let held = view.reservations.values().filter_map(|known| known.record.holder.as_ref());
    claims.chain(held.map(|holder| &holder.incarnation)).collect()
}

/// The blocks that an incarnation has claimed, with the revisions of the claims.
pub fn blocks_of<'a>(view: &'a View, incarnation: &'a Incarnation) -> impl Iterator<Item = (Block, i64)> {
    let own = view.blocks.iter().filter(move |(_, claim)| claim.record.incarnation == *incarnation);
    own.map(|(block, claim)| (*block, claim.revision))
}

/// Since when it has been known here that the pods of removed nodes are gone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Quarantine {
    rest: Duration,
    gone: BTreeMap<Incarnation, Moment>,
}

/// How long each of the other nodes, in an order that differs for each removed one, leaves it to those before.
const TURN: Duration = Duration::from_secs(10);

impl Quarantine {
    /// For blocks that rest that long.
    pub fn new(rest: Duration) -> Self {
        Self { rest, gone: BTreeMap::new() }
    }

    /// Takes in what is known now.
    pub fn observe(&mut self, view: &View, now: Moment) {
        let is_gone = |incarnation: &Incarnation| {
            let is_gone = |pods| pods != PodsGone::Unknown || mutant::is(Mutant::SilenceConfirms);
            view.fences.get(incarnation).is_some_and(|fence| is_gone(fence.record.pods))
        };
        self.gone.retain(|incarnation, _| is_gone(incarnation));
        for incarnation in view.fences.keys().filter(|incarnation| is_gone(incarnation)) {
            self.gone.entry(incarnation.clone()).or_insert(now);
        }
    }

    /// The removed node of which node `me` is to give something back now, and what. Where that is nothing, perhaps one that
    /// was removed so long ago that it is forgotten.
    pub fn over(&self, view: &View, me: &NodeName, now: Moment) -> Option<(NodeName, Txn)> {
        let is_my_turn = |incarnation: &Incarnation| {
            let since = self.gone.get(incarnation);
            let rest = if mutant::is(Mutant::RemovedBlocksDoNotRest) { Duration::ZERO } else { self.rest };
            since.is_some_and(|since| now.since(*since) >= rest + TURN * place(view, me, incarnation))
        };
        let holders = holders(view);
        let (held, spent): (Vec<_>, Vec<_>) = view
            .fences
            .iter()
            .filter(|(incarnation, _)| self.gone.contains_key(*incarnation))
            .partition(|(incarnation, _)| holders.contains(*incarnation));
        let mut held = held.into_iter().filter(|(incarnation, _)| is_my_turn(incarnation));
        if let Some((incarnation, fence)) = held.next() {
            return Some((fence.record.node.clone(), give_back(view, incarnation)?));
        }
        let (incarnation, oldest) = spent
            .iter()
            .min_by_key(|(_, fence)| fence.revision)
            .filter(|(incarnation, _)| spent.len() > FENCES_KEPT && is_my_turn(incarnation))?;
        Some((oldest.record.node.clone(), forget(&oldest.record.node, incarnation, oldest.revision)))
    }
}

/// How many nodes are to give back before `me`.
fn place(view: &View, me: &NodeName, incarnation: &Incarnation) -> u32 {
    let lot = |name: &NodeName| {
        let mut hash = Sha256::new();
        hash.update(&incarnation.0);
        hash.update([0]);
        hash.update(name.as_str());
        hash.finalize()
    };
    let own = lot(me);
    let before = view.nodes.keys().filter(|name| lot(name) < own).count();
    u32::try_from(before).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Contents, Entry, Update};

    fn view(fences: usize) -> View {
        let fence = |number: usize| {
            let record = FenceRecord {
                node: "n".parse().unwrap(),
                machine_id: "machine".to_owned(),
                boot_id: "boot".to_owned(),
                pods: PodsGone::Confirmed,
            };
            let incarnation = Incarnation(format!("i{}", fences - number));
            let key = Key::Fence("n".parse().unwrap(), incarnation).to_string();
            Entry { key, value: encode(&record), revision: 2 + i64::try_from(number).unwrap() }
        };
        let mut view = View::default();
        let entries = (0..fences).map(fence).collect();
        view.apply(Update::Loaded(Contents { revision: 1_000_000, entries }));
        view
    }

    #[test]
    fn a_spent_fence_stays_until_there_are_very_many_and_then_the_oldest_goes() {
        let (rest, less) = (Duration::from_secs(60), Duration::from_secs(59));
        let forgotten = |fences: usize, after: Duration| {
            let view = view(fences);
            let mut quarantine = Quarantine::new(rest);
            quarantine.observe(&view, Moment::BOOT);
            quarantine.over(&view, &"me".parse().unwrap(), Moment::BOOT + after).map(|(_, txn)| txn.writes)
        };
        assert_eq!(forgotten(FENCES_KEPT, rest), None);
        let key = format!("/polder/v1/fences/n/i{}", FENCES_KEPT + 1);
        assert_eq!(forgotten(FENCES_KEPT + 1, rest), Some(vec![Write::Delete { key }]));
        assert_eq!(forgotten(FENCES_KEPT + 1, less), None);
    }

    #[test]
    fn a_word_that_could_hit_either_of_two_machines_is_refused() {
        let entry = |key: &str, value: &str| Entry {
            key: format!("/polder/v1/{key}"),
            value: value.into(),
            revision: 5,
        };
        let node = r#"{"incarnation":"new","machine_id":"m2","boot_id":"b","underlay":[],"gateways":[],
            "vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0"}"#;
        let fence = r#"{"node":"n","machine_id":"m1","boot_id":"b","pods":"unknown"}"#;
        let mut view = View::default();
        let entries = vec![entry("fences/n/old", fence), entry("nodes/n", node)];
        view.apply(Update::Loaded(Contents { revision: 5, entries }));
        let name: NodeName = "n".parse().unwrap();
        let refused = remove(&view, &name, Vouched::Yes).unwrap_err().to_string();
        assert!(
            refused.contains("m1") && refused.contains("m2") && refused.contains("--earlier"),
            "{refused}"
        );
        let keys = |vouched| -> Vec<String> {
            let txn = remove(&view, &name, vouched).unwrap();
            let key = |write: &Write| match write {
                Write::Put { key, .. } | Write::Delete { key } => key.clone(),
            };
            txn.writes.iter().map(key).collect()
        };
        assert_eq!(keys(Vouched::Earlier), ["/polder/v1/fences/n/old"]);
        assert_eq!(keys(Vouched::No), ["/polder/v1/nodes/n", "/polder/v1/fences/n/new"]);
    }
}
