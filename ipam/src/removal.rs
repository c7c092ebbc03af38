//! Removal of a node, and release of its blocks.
//!
//! The removal fences the node's incarnation: one change replaces the node's record by a fence. All writes of the
//! node depend on its record, so none takes effect any more. Its pods may still run, so its blocks stay claimed until
//! the node itself has disconnected them and confirms it, or an operator confirms that they are gone, and the
//! cool-down is over. The node that releases the blocks measures the cool-down with its own clock, from when it first
//! read the confirmation: no two clocks need to agree.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polder_api::NodeName;
use polder_api::rule;
use sha2::{Digest, Sha256};

use crate::Revision;
use crate::change::{Change, Confirmation, Fence, MOST_RECORDS, Member, RemovedAllocations, RequiredLease};
use crate::departure::Departed;
use crate::ids::Incarnation;
use crate::moment::Moment;
use crate::pool::Block;
use crate::record::{Boot, FenceRecord, NodeRecord, PodsGone};
use crate::reservation;
use crate::view::{Versioned, View};

/// Whether an operator confirms that the node and all its pods are permanently gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperatorConfirmation {
    /// No: the node has to confirm it.
    No,
    /// Yes.
    Yes,
    /// Yes, for earlier nodes of that name that were removed, not for the node that has the name now.
    Earlier,
}

/// Why a node is not removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotRemoved {
    /// No node of that name exists or was removed.
    #[error(
        "there is no node {0}, and no removed node of that name still holds blocks: see polderctl \
             node list"
    )]
    Unknown(NodeName),
    /// The node is already removed.
    #[error(
        "node {0} was already removed, and its blocks are not released yet: add --dead if you know that the \
         machine is permanently gone"
    )]
    AlreadyRemoved(NodeName),
    /// The request could apply to either of two machines.
    #[error(
        "two machines had the name {node}: one was removed and has not confirmed that its pods are gone \
         ({earlier}), and one is registered now ({now}). If the first is permanently gone, run polderctl node \
         remove {node} --dead --earlier; then this command removes the second"
    )]
    Ambiguous {
        /// The name of both nodes.
        node: NodeName,
        /// The machine that was removed.
        earlier: String,
        /// The machine that has the name now.
        now: String,
    },
}

/// Removes the node, or confirms that the pods of a removed node are gone. `None` if there is nothing to change.
pub fn remove(
    view: &View,
    name: &NodeName,
    confirmed: OperatorConfirmation,
) -> Result<Option<Change>, NotRemoved> {
    let pods = match confirmed {
        OperatorConfirmation::No => PodsGone::Unknown,
        OperatorConfirmation::Yes | OperatorConfirmation::Earlier => PodsGone::ConfirmedByOperator,
    };
    let of_name = || view.fences.iter().filter(|(_, fence)| fence.record.node == *name);
    let mut unconfirmed = of_name().filter(|(_, fence)| fence.record.pods == PodsGone::Unknown);
    if let (Some(node), true) = (view.nodes.get(name), confirmed != OperatorConfirmation::Earlier) {
        if let (OperatorConfirmation::Yes, Some((_, fence))) = (confirmed, unconfirmed.next()) {
            return Err(NotRemoved::Ambiguous {
                node: name.clone(),
                earlier: Boot::from(&*fence.record).to_string(),
                now: Boot::from(&*node.record).to_string(),
            });
        }
        return Ok(Some(remove_registered(name, node, pods, RequiredLease::Any)));
    }
    let unconfirmed: Vec<_> = unconfirmed.collect();
    match (unconfirmed.is_empty(), confirmed) {
        (true, _) if of_name().next().is_none() => Err(NotRemoved::Unknown(name.clone())),
        (true, _) => Ok(None),
        (false, OperatorConfirmation::No) => Err(NotRemoved::AlreadyRemoved(name.clone())),
        (false, OperatorConfirmation::Yes | OperatorConfirmation::Earlier) => {
            let confirmation = |(incarnation, fence)| confirm_by_operator(incarnation, fence);
            Ok(Some(Change::ConfirmByOperator(unconfirmed.into_iter().map(confirmation).collect())))
        }
    }
}

/// Removes a node that has left Kubernetes, if its record is still the one for which that was decided and its agent is
/// not alive. Its pods count as gone only if there is proof.
pub fn remove_departed(view: &View, departed: &Departed) -> Option<Change> {
    let node = view.nodes.get(&departed.node).filter(|known| departed.is_of(&known.record))?;
    let pods = match departed.proof {
        // The administrator or the cloud provider states it, as an operator does with --dead.
        Some(_) => PodsGone::ConfirmedByOperator,
        None => PodsGone::Unknown,
    };
    Some(remove_registered(&departed.node, node, pods, RequiredLease::Absent))
}

fn remove_registered(
    name: &NodeName,
    known: &Versioned<NodeRecord>,
    pods: PodsGone,
    lease: RequiredLease,
) -> Change {
    let NodeRecord { incarnation, machine_id, boot_id, kubernetes_uid, .. } = (*known.record).clone();
    let fence = FenceRecord { node: name.clone(), machine_id, boot_id, pods, kubernetes_uid };
    Change::RemoveNode { incarnation, revision: known.revision, fence, lease }
}

/// An operator's confirmation that the pods of a removed node are gone.
pub fn confirm_by_operator(incarnation: &Incarnation, fence: &Versioned<FenceRecord>) -> Confirmation {
    confirmation(incarnation, fence, PodsGone::ConfirmedByOperator)
}

/// A removed node's own confirmation that its pods are gone.
pub fn confirm(incarnation: &Incarnation, fence: &Versioned<FenceRecord>) -> Change {
    Change::ConfirmRemoval(confirmation(incarnation, fence, PodsGone::Confirmed))
}

fn confirmation(incarnation: &Incarnation, fence: &Versioned<FenceRecord>, pods: PodsGone) -> Confirmation {
    let record = FenceRecord { pods, ..(*fence.record).clone() };
    Confirmation { incarnation: incarnation.clone(), record, revision: fence.revision }
}

/// The number of records released in one change. The change needs room for the fence and for the record of the node
/// that releases them.
const MAX_PER_CHANGE: usize = MOST_RECORDS - 2;

/// The number of fences kept for removed nodes that hold no blocks or addresses any more. If such a node returns, or
/// its ledger is an older copy, its fence shows that it owns nothing any more.
pub const FENCES_KEPT: usize = 1_000;

/// The blocks and addresses of a removed node that one change releases; the rest follows in later changes. `None` if
/// nothing is left to release. The fence stays.
pub fn release_removed(view: &View, by: &Member, incarnation: &Incarnation) -> Option<RemovedAllocations> {
    let fence = fence(incarnation, view.fences.get(incarnation)?);
    let blocks: Vec<_> = blocks_of(view, incarnation).take(MAX_PER_CHANGE).collect();
    let room = MAX_PER_CHANGE - blocks.len();
    let held = view.reservations.iter().filter(|(_, known)| {
        known.record.holder.as_ref().is_some_and(|holder| holder.incarnation == *incarnation)
    });
    let addresses: Vec<_> =
        held.take(room).map(|(address, known)| reservation::released(*address, known)).collect();
    let is_nothing = blocks.is_empty() && addresses.is_empty();
    (!is_nothing).then(|| RemovedAllocations { by: by.clone(), fence, blocks, addresses })
}

fn fence(incarnation: &Incarnation, known: &Versioned<FenceRecord>) -> Fence {
    Fence { node: known.record.node.clone(), incarnation: incarnation.clone(), revision: known.revision }
}

/// The incarnations that hold blocks or reserved addresses in the datastore.
fn holders(view: &View) -> BTreeSet<&Incarnation> {
    let claims = view.blocks.values().map(|claim| &claim.record.incarnation);
    let held = view.reservations.values().filter_map(|known| known.record.holder.as_ref());
    claims.chain(held.map(|holder| &holder.incarnation)).collect()
}

/// The blocks that an incarnation has claimed, with the revisions of the claims.
pub fn blocks_of<'a>(
    view: &'a View,
    incarnation: &'a Incarnation,
) -> impl Iterator<Item = (Block, Revision)> {
    let own = view.blocks.iter().filter(move |(_, claim)| claim.record.incarnation == *incarnation);
    own.map(|(block, claim)| (*block, claim.revision))
}

/// When this node first read that the pods of removed nodes are gone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Quarantine {
    cool_down: Duration,
    confirmed_at: BTreeMap<Incarnation, Moment>,
}

/// The delay per position: the node at position N, counted from 0, waits N times this before it releases. The order of
/// the nodes depends on the removed node.
const DELAY_PER_RANK: Duration = Duration::from_secs(10);

rule! {
    /// Whether the pods of a removed node are gone: a confirmation is required.
    fn are_gone(pods: PodsGone) -> bool {
        pods != PodsGone::Unknown
    }
    UnconfirmedCountsAsGone => true
}

rule! {
    /// The cool-down of a removed node's blocks after its pods are gone, given the cool-down of addresses.
    fn cool_down_of_removed(cool_down: Duration) -> Duration {
        cool_down
    }
    RemovedBlocksSkipCoolDown => Duration::ZERO
}

impl Quarantine {
    /// A quarantine with this cool-down.
    pub fn new(cool_down: Duration) -> Self {
        Self { cool_down, confirmed_at: BTreeMap::new() }
    }

    /// Records when this node first read the confirmations in the view, and forgets those that the view lacks.
    pub fn observe(&mut self, view: &View, now: Moment) {
        let is_gone = |incarnation: &Incarnation| {
            view.fences.get(incarnation).is_some_and(|fence| are_gone(fence.record.pods))
        };
        self.confirmed_at.retain(|incarnation, _| is_gone(incarnation));
        for incarnation in view.fences.keys().filter(|incarnation| is_gone(incarnation)) {
            self.confirmed_at.entry(incarnation.clone()).or_insert(now);
        }
    }

    /// The change that this node is to make now: release blocks and addresses of a removed node, or, if none holds
    /// any, delete the oldest fence above [`FENCES_KEPT`].
    pub fn next_change(&self, view: &View, by: &Member, now: Moment) -> Option<Change> {
        if view.fences.is_empty() {
            return None;
        }
        let is_my_turn = |incarnation: &Incarnation| {
            let since = self.confirmed_at.get(incarnation);
            let cool_down = cool_down_of_removed(self.cool_down);
            since.is_some_and(|since| {
                now.since(*since) >= cool_down + DELAY_PER_RANK * rank(view, &by.node, incarnation)
            })
        };
        let holders = holders(view);
        let (held, empty_fences): (Vec<_>, Vec<_>) = view
            .fences
            .iter()
            .filter(|(incarnation, _)| self.confirmed_at.contains_key(*incarnation))
            .partition(|(incarnation, _)| holders.contains(*incarnation));
        let mut held = held.into_iter().filter(|(incarnation, _)| is_my_turn(incarnation));
        if let Some((incarnation, _)) = held.next() {
            return release_removed(view, by, incarnation).map(Change::ReleaseRemoved);
        }
        let (incarnation, oldest) = empty_fences
            .iter()
            .min_by_key(|(_, fence)| fence.revision)
            .filter(|(incarnation, _)| empty_fences.len() > FENCES_KEPT && is_my_turn(incarnation))?;
        Some(Change::ForgetFence { by: by.clone(), fence: fence(incarnation, oldest) })
    }
}

/// The number of nodes before `me` in the order of release.
fn rank(view: &View, me: &NodeName, incarnation: &Incarnation) -> u32 {
    let rank_hash = |name: &NodeName| {
        let mut hash = Sha256::new();
        hash.update(incarnation.to_string());
        hash.update([0]);
        hash.update(name.as_str());
        hash.finalize()
    };
    let own = rank_hash(me);
    let before = view.nodes.keys().filter(|name| rank_hash(name) < own).count();
    u32::try_from(before).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{BootId, MachineId};
    use crate::key::Key;
    use crate::record::encode;
    use crate::store::{Contents, Entry, Update};

    fn view(fences: usize) -> View {
        let fence = |number: usize| {
            let record = FenceRecord {
                node: "n".parse().unwrap(),
                machine_id: MachineId::new("machine"),
                boot_id: BootId::new("boot"),
                pods: PodsGone::Confirmed,
                kubernetes_uid: None,
            };
            let incarnation = Incarnation::new(format!("i{}", fences - number));
            let key = Key::Fence("n".parse().unwrap(), incarnation).to_string();
            Entry { key, value: encode(&record), revision: Revision::new(2 + i64::try_from(number).unwrap()) }
        };
        let mut view = View::default();
        let entries = (0..fences).map(fence).collect();
        view.apply(Update::Loaded(Contents { revision: Revision::new(1_000_000), entries }));
        view
    }

    #[test]
    fn the_oldest_empty_fence_is_deleted_only_above_the_limit() {
        let (cool_down, less) = (Duration::from_secs(60), Duration::from_secs(59));
        let forgotten = |fences: usize, after: Duration| {
            let view = view(fences);
            let mut quarantine = Quarantine::new(cool_down);
            quarantine.observe(&view, Moment::BOOT);
            let by = Member { node: "me".parse().unwrap(), revision: Revision::new(7) };
            quarantine.next_change(&view, &by, Moment::BOOT + after)
        };
        assert_eq!(forgotten(FENCES_KEPT, cool_down), None);
        let Some(Change::ForgetFence { fence, .. }) = forgotten(FENCES_KEPT + 1, cool_down) else {
            panic!("nothing is forgotten")
        };
        assert_eq!(fence.incarnation.to_string(), format!("i{}", FENCES_KEPT + 1));
        assert_eq!(forgotten(FENCES_KEPT + 1, less), None);
    }

    #[test]
    fn an_ambiguous_removal_is_refused() {
        let entry = |key: &str, value: &str| Entry {
            key: format!("/polder/v1/{key}"),
            value: value.into(),
            revision: Revision::new(5),
        };
        let node = r#"{"incarnation":"new","machine_id":"m2","boot_id":"b","underlay":[],"gateways":[],
            "vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0"}"#;
        let fence = r#"{"node":"n","machine_id":"m1","boot_id":"b","pods":"unknown"}"#;
        let mut view = View::default();
        let entries = vec![entry("fences/n/old", fence), entry("nodes/n", node)];
        view.apply(Update::Loaded(Contents { revision: Revision::new(5), entries }));
        let name: NodeName = "n".parse().unwrap();
        let refused = remove(&view, &name, OperatorConfirmation::Yes).unwrap_err().to_string();
        assert!(
            refused.contains("m1") && refused.contains("m2") && refused.contains("--earlier"),
            "{refused}"
        );
        let change = |confirmed| remove(&view, &name, confirmed).unwrap().unwrap();
        let Change::ConfirmByOperator(confirmations) = change(OperatorConfirmation::Earlier) else {
            panic!("not confirmed")
        };
        let confirmations: Vec<_> = confirmations
            .iter()
            .map(|confirmation| (confirmation.incarnation.to_string(), confirmation.record.pods))
            .collect();
        assert_eq!(confirmations, [("old".to_owned(), PodsGone::ConfirmedByOperator)]);
        let Change::RemoveNode { incarnation, fence, .. } = change(OperatorConfirmation::No) else {
            panic!("not removed")
        };
        assert_eq!((incarnation.to_string(), fence.pods), ("new".to_owned(), PodsGone::Unknown));
    }
}
