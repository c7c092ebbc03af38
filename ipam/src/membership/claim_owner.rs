//! The owner of a claim that overlaps a block of this node, and what to do about it.

use polder_api::NodeName;

use crate::Block;
use crate::key::Key;
use crate::record::{BlockRecord, PodsGone};
use crate::view::View;

/// What the records show about the owner of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClaimOwner {
    /// It is a member of the cluster.
    Member(OwnerLease),
    /// It was removed, and it is not confirmed that its pods are gone.
    Removed,
    /// It was removed like [`Self::Removed`], and another machine has its name now.
    RemovedEarlier,
    /// It was removed, and its pods are gone. The claim is deleted after the cool-down.
    Gone,
    /// The records have neither this node nor its removal.
    Unregistered,
}

/// Whether the agent of a member holds its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OwnerLease {
    /// Not known: the datastore has just lost records, when it may have old leases, or the lease cannot be read.
    Unknown,
    /// It holds the lease.
    Held,
    /// It does not hold the lease.
    Missing,
}

impl ClaimOwner {
    /// The owner of that claim. Leases are not among the records of a view.
    pub fn of(view: &View, claim: &BlockRecord) -> Self {
        let BlockRecord { node, incarnation, .. } = claim;
        if let Some(fence) = view.fences.get(incarnation) {
            return match fence.record.pods {
                PodsGone::Unknown if view.nodes.contains_key(node) => Self::RemovedEarlier,
                PodsGone::Unknown => Self::Removed,
                PodsGone::Confirmed | PodsGone::ConfirmedByOperator => Self::Gone,
            };
        }
        let is_unreadable = || view.refused.contains_key(&Key::Node(node.clone()).to_string());
        match view.nodes.get(node) {
            Some(known) if known.record.incarnation == *incarnation => Self::Member(OwnerLease::Unknown),
            None if is_unreadable() => Self::Member(OwnerLease::Unknown),
            _ => Self::Unregistered,
        }
    }

    /// What to do about its claim of that block.
    pub(super) fn remedy(self, node: &NodeName, block: Block) -> String {
        let gone = format!("run polderctl node remove {node} --dead");
        match self {
            Self::Member(OwnerLease::Unknown) => format!(
                "If {node} is permanently gone, for example if it was removed after the backup that etcd was restored \
                 from, {gone}. Otherwise drain one of the two nodes with kubectl drain, and remove it with polderctl \
                 node remove"
            ),
            Self::Member(OwnerLease::Missing) => format!(
                "The agent of {node} is not alive. If {node} is permanently gone, for example if it was removed after \
                 the backup that etcd was restored from, {gone}. Otherwise drain this node with kubectl drain, and \
                 remove it with polderctl node remove"
            ),
            Self::Member(OwnerLease::Held) => format!(
                "The agent of {node} is alive. Drain one of the two nodes with kubectl drain, and remove it with \
                 polderctl node remove"
            ),
            Self::Removed => format!(
                "Node {node} was removed and has not confirmed that its pods are gone. If it is permanently gone, {gone}"
            ),
            Self::RemovedEarlier => format!(
                "An earlier machine with the name {node} was removed and has not confirmed that its pods are gone. If \
                 it is permanently gone, {gone} --earlier"
            ),
            Self::Gone => format!(
                "Node {node} was removed, and its pods are gone: the claim is deleted after the cool-down. Nothing to do"
            ),
            Self::Unregistered => format!(
                "There is no record of this node: delete the claim with etcdctl del {}",
                Key::Block(block)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Revision;
    use crate::ids::{BootId, Incarnation, MachineId, Nonce};
    use crate::record::{FenceRecord, NodeRecord, encode};
    use crate::store::{Contents, Entry, Update};

    const OWNER: &str = "n3";

    fn claim() -> BlockRecord {
        BlockRecord {
            node: OWNER.parse().unwrap(),
            incarnation: Incarnation::new("i3"),
            pool: "p".parse().unwrap(),
            nonce: Nonce::new("x"),
        }
    }

    fn node(incarnation: &str) -> (Key, Vec<u8>) {
        let record = NodeRecord {
            incarnation: Incarnation::new(incarnation),
            machine_id: MachineId::new("m"),
            boot_id: BootId::new("b"),
            underlay: vec!["192.0.2.3".parse().unwrap()],
            gateways: Vec::new(),
            probes: Vec::new(),
            vtep_mac: "02:00:00:00:00:03".parse().unwrap(),
            mtu: 1450,
            version: "0".to_owned(),
            kubernetes_uid: None,
        };
        (Key::Node(OWNER.parse().unwrap()), encode(&record))
    }

    fn fence(pods: PodsGone) -> (Key, Vec<u8>) {
        let node: NodeName = OWNER.parse().unwrap();
        let record = FenceRecord {
            node: node.clone(),
            machine_id: MachineId::new("m"),
            boot_id: BootId::new("b"),
            kubernetes_uid: None,
            pods,
        };
        (Key::Fence(node, Incarnation::new("i3")), encode(&record))
    }

    fn owner(records: Vec<(Key, Vec<u8>)>) -> ClaimOwner {
        let revision = Revision::new(1);
        let entry = |(key, value): (Key, Vec<u8>)| Entry { key: key.to_string(), value, revision };
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision, entries: records.into_iter().map(entry).collect() }));
        ClaimOwner::of(&view, &claim())
    }

    #[test]
    fn the_remedy_for_a_claimed_block_depends_on_the_state_of_the_claims_owner() {
        let block = Block::new("10.244.0.0/26".parse().unwrap());
        let dead = "run polderctl node remove n3 --dead";
        for (records, expected, remedy) in [
            (vec![node("i3")], ClaimOwner::Member(OwnerLease::Unknown), dead),
            (vec![(node("i3").0, b"?".to_vec())], ClaimOwner::Member(OwnerLease::Unknown), dead),
            (vec![fence(PodsGone::Unknown)], ClaimOwner::Removed, dead),
            (
                vec![fence(PodsGone::Unknown), node("i4")],
                ClaimOwner::RemovedEarlier,
                "node remove n3 --dead --earlier",
            ),
            (vec![fence(PodsGone::ConfirmedByOperator)], ClaimOwner::Gone, "Nothing to do"),
            (vec![fence(PodsGone::Confirmed), node("i4")], ClaimOwner::Gone, "Nothing to do"),
            (vec![node("i4")], ClaimOwner::Unregistered, "etcdctl del /polder/v1/blocks/"),
            (Vec::new(), ClaimOwner::Unregistered, "etcdctl del /polder/v1/blocks/"),
        ] {
            let found = owner(records);
            assert_eq!(found, expected);
            assert!(
                found.remedy(&claim().node, block).contains(remedy),
                "{}",
                found.remedy(&claim().node, block)
            );
        }
    }

    #[test]
    fn only_a_living_owner_of_a_claimed_block_is_drained() {
        let block = Block::new("10.244.0.0/26".parse().unwrap());
        let remedy = |lease| ClaimOwner::Member(lease).remedy(&claim().node, block);
        assert!(!remedy(OwnerLease::Held).contains("--dead"), "{}", remedy(OwnerLease::Held));
        assert!(remedy(OwnerLease::Held).contains("Drain one of the two nodes"));
        assert!(remedy(OwnerLease::Missing).contains("node remove n3 --dead. Otherwise drain this node"));
    }
}
