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

use crate::key::Key;
use crate::moment::Moment;
use crate::pool::Block;
use crate::record::{FenceRecord, Incarnation, PodsGone, encode};
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
}

/// The transaction that removes the node; or that vouches for one that was removed before.
pub fn remove(view: &View, name: &NodeName, vouched: Vouched) -> Result<Txn, NotRemoved> {
    let pods = match vouched {
        Vouched::No => PodsGone::Unknown,
        Vouched::Yes => PodsGone::Vouched,
    };
    if let Some(node) = view.nodes.get(name) {
        let key = Key::Node(name.clone()).to_string();
        let fence = Key::Fence(node.record.incarnation.clone());
        let record = FenceRecord { node: name.clone(), boot_id: node.record.boot_id.clone(), pods };
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
    let of_name = || view.fences.iter().filter(|(_, fence)| fence.record.node == *name);
    for (incarnation, fence) in of_name().filter(|(_, fence)| fence.record.pods == PodsGone::Unknown) {
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
    let key = Key::Fence(incarnation.clone()).to_string();
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
    let key = Key::Fence(incarnation.clone()).to_string();
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
fn forget(incarnation: &Incarnation, revision: i64) -> Txn {
    let key = Key::Fence(incarnation.clone()).to_string();
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
        Some((oldest.record.node.clone(), forget(incarnation, oldest.revision)))
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
                boot_id: "boot".to_owned(),
                pods: PodsGone::Confirmed,
            };
            let key = Key::Fence(Incarnation(format!("i{}", fences - number))).to_string();
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
        let key = format!("/polder/v1/fences/i{}", FENCES_KEPT + 1);
        assert_eq!(forgotten(FENCES_KEPT + 1, rest), Some(vec![Write::Delete { key }]));
        assert_eq!(forgotten(FENCES_KEPT + 1, less), None);
    }
}
