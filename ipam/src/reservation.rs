//! Reserved addresses: they belong to workloads by name, and move with them from node to node.
//!
//! They are in separate pools, of which nodes claim no blocks, so only the reservation decides the use of an address.
//! A hand-over requires proof that the earlier holder is gone; an unreachable holder is not proof.

use std::net::IpAddr;

use polder_api::{NodeName, PoolName, rule};

use crate::Revision;
use crate::change::{AddressRelease, Change, HandOver, Member};
use crate::pool::{Labels, Pool, PoolState, Purpose};
use crate::record::{Holder, NodeRecord, PodsGone, ReservationRecord};
use crate::view::{Versioned, View};

/// Why a workload does not get an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HandOverDenied {
    /// It belongs to another workload.
    /// Remedy: request another address, or release it with polderctl ipam release.
    #[error("{address} is reserved for {owner}")]
    Foreign {
        /// The address.
        address: IpAddr,
        /// The workload that owns it.
        owner: String,
    },
    /// It belongs to the workload, but its last pod may still use it.
    ///
    /// Remedy: the text names the event to wait for, and the command if it needs an operator.
    #[error(
        "{address} is still held by {} on node {}: {}",
        holder.attachment,
        holder.node,
        until.for_holder(*address, holder)
    )]
    Held {
        /// The address.
        address: IpAddr,
        /// The last holder.
        holder: Box<Holder>,
        /// The event that clears the holder.
        until: ReleaseCondition,
    },
    /// It cannot be reserved.
    ///
    /// Remedy: request another address of a pool for reservations.
    #[error("{address} cannot be reserved: {reason}")]
    Unfit {
        /// The address.
        address: IpAddr,
        /// The reason.
        reason: UnusableAddress,
    },
    /// The node of the new holder has not registered since its boot.
    #[error(
        "{address} is not assigned to node {node}, which has not registered since its last boot: try again"
    )]
    Unregistered {
        /// The address.
        address: IpAddr,
        /// The node.
        node: NodeName,
    },
    /// The pool has no free address.
    #[error(
        "pool {pool} has no address left: all {reserved} are reserved. Release one with polderctl ipam \
         release, or add a pool"
    )]
    Exhausted {
        /// The pool.
        pool: PoolName,
        /// The number of reserved addresses.
        reserved: usize,
    },
}

/// Why an address cannot be reserved.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum UnusableAddress {
    /// No pool for reservations contains it.
    /// Remedy: request an address of a pool that polderctl pool list shows as for reservations.
    #[error("it is not in a pool for reservations")]
    NoPool,
    /// Its pool is drained or retired: it gives no new reservations.
    /// Remedy: activate the pool again with polderctl pool add, or request an address of another pool.
    #[error("pool {0} is not active")]
    NotActive(PoolName),
    /// It is excluded from allocation: older software treats it as the network or broadcast address.
    /// Remedy: request another address of the pool.
    #[error("it is the first or the last address of pool {0}")]
    Excluded(PoolName),
}

/// The event that clears the holder of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReleaseCondition {
    /// The DEL of its pod on this node.
    Deleted,
    /// The DEL of its pod on another node, or a confirmation that this node is gone.
    DeletedElsewhere,
    /// A confirmation of its removed node that its pods are gone.
    Confirmed,
    /// Its node has no record and was not removed: only an operator can confirm that it is gone.
    Unknown,
}

impl ReleaseCondition {
    /// The event as text, with the command for a node that is gone.
    fn for_holder(self, address: IpAddr, Holder { node, .. }: &Holder) -> String {
        match self {
            Self::Deleted => "the address is assigned again when that pod is gone".to_owned(),
            Self::DeletedElsewhere => format!(
                "the address is assigned again when that pod is gone. If the machine of node {node} is \
                 permanently gone, run \
                 polderctl node remove {node} --dead"
            ),
            Self::Confirmed => format!(
                "node {node} was removed, and has not confirmed that its pods are gone. If its machine is \
                 permanently gone, run \
                 polderctl node remove {node} --dead"
            ),
            Self::Unknown => format!(
                "node {node} is unknown. If its machine is permanently gone, run polderctl ipam release {address} \
                 --dead"
            ),
        }
    }
}

/// Whether the attachment that holds an address on this node is gone.
pub type IsGone<'a> = &'a dyn Fn(&Holder) -> bool;

/// Hands the address over to `holder`, a pod of workload `owner`. `own_revision` is the revision of the holder's node
/// record, which must be of the holder's boot: other nodes treat a pod of another boot as gone.
pub fn hand_over(
    view: &View,
    address: IpAddr,
    owner: &str,
    holder: &Holder,
    own_revision: Revision,
    is_gone: IsGone<'_>,
) -> Result<HandOver, HandOverDenied> {
    let unfit = |reason| HandOverDenied::Unfit { address, reason };
    let pool = pool_of(view, address).ok_or_else(|| unfit(UnusableAddress::NoPool))?;
    let is_registered =
        |node: &NodeRecord| node.incarnation == holder.incarnation && node.boot_id == holder.boot_id;
    if !view.nodes.get(&holder.node).is_some_and(|node| is_registered(&node.record)) {
        return Err(HandOverDenied::Unregistered { address, node: holder.node.clone() });
    }
    let known = view.reservations.get(&address);
    let generation = match known {
        None if pool.record.state != PoolState::Active => {
            return Err(unfit(UnusableAddress::NotActive(pool.record.name.clone())));
        }
        None if pool.record.excludes(address) => {
            return Err(unfit(UnusableAddress::Excluded(pool.record.name.clone())));
        }
        None => 1,
        Some(known) if known.record.owner != owner => {
            return Err(HandOverDenied::Foreign { address, owner: known.record.owner.clone() });
        }
        Some(known) => {
            if let Some(last) = &known.record.holder {
                check_gone(view, address, last, holder, is_gone)?;
            }
            known.record.generation + 1
        }
    };
    let record = ReservationRecord { owner: owner.to_owned(), holder: Some(holder.clone()), generation };
    let by = Member { node: holder.node.clone(), revision: own_revision };
    let before = known.map(|known| known.revision);
    let source_pool = known.is_none().then(|| (pool.record.name.clone(), pool.revision));
    Ok(HandOver { by, address, record, before, source_pool })
}

rule! {
    /// Whether a reserved address is handed over only with proof that its last pod is gone.
    fn needs_proof() -> bool {
        true
    }
    NoProof => false
}

/// Checks for proof that the last pod of the address is gone.
fn check_gone(
    view: &View,
    address: IpAddr,
    last: &Holder,
    next: &Holder,
    is_gone: IsGone<'_>,
) -> Result<(), HandOverDenied> {
    if !needs_proof() {
        return Ok(());
    }
    let held = |until| Err(HandOverDenied::Held { address, holder: Box::new(last.clone()), until });
    if last.incarnation == next.incarnation {
        return if last.boot_id != next.boot_id || is_gone(last) {
            Ok(())
        } else {
            held(ReleaseCondition::Deleted)
        };
    }
    if let Some(fence) = view.fences.get(&last.incarnation) {
        return match fence.record.pods {
            PodsGone::Confirmed | PodsGone::ConfirmedByOperator => Ok(()),
            PodsGone::Unknown => held(ReleaseCondition::Confirmed),
        };
    }
    match view.nodes.get(&last.node).filter(|node| node.record.incarnation == last.incarnation) {
        // A pod does not survive a reboot of its node.
        Some(node) if node.record.boot_id != last.boot_id => Ok(()),
        Some(_) => held(ReleaseCondition::DeletedElsewhere),
        None => held(ReleaseCondition::Unknown),
    }
}

/// The reservation without a holder: the workload keeps the address.
pub fn released(address: IpAddr, known: &Versioned<ReservationRecord>) -> AddressRelease {
    let record = ReservationRecord { holder: None, ..(*known.record).clone() };
    AddressRelease { address, record, revision: known.revision }
}

/// Deletes the reservation of an address. The caller checks that no pod holds it.
pub fn delete(address: IpAddr, known: &Versioned<ReservationRecord>) -> Change {
    Change::DeleteReservation { address, revision: known.revision }
}

/// The address for a workload that requests none: its reserved address in the pool, or the first free one.
pub fn choose(view: &View, pool: &Versioned<Pool>, owner: &str) -> Result<IpAddr, HandOverDenied> {
    let cidr = pool.record.cidr();
    let of_pool = || view.reservations.iter().filter(|(address, _)| cidr.has(**address));
    if let Some((address, _)) = of_pool().find(|(_, known)| known.record.owner == owner) {
        return Ok(*address);
    }
    let free = |address: &IpAddr| !pool.record.excludes(*address) && !view.reservations.contains_key(address);
    cidr.addresses().find(free).ok_or_else(|| HandOverDenied::Exhausted {
        pool: pool.record.name.clone(),
        reserved: of_pool().count(),
    })
}

/// The pool for reservations that contains the address.
pub fn pool_of(view: &View, address: IpAddr) -> Option<&Versioned<Pool>> {
    let mut pools = view.pools.values();
    pools.find(|pool| pool.record.purpose == Purpose::Reservations && pool.record.cidr().has(address))
}

/// Whether a pod on a node with these labels may have an address of the pool.
pub fn serves(pool: &Pool, labels: &Labels) -> bool {
    pool.purpose == Purpose::Reservations && pool.state != PoolState::Retired && pool.serves(labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BootId;
    use crate::store::{Contents, Entry, Update};

    /// A cluster with a pool for reservations, and a node that is registered in that boot.
    fn view(boot_id: &str) -> View {
        let pool = r#"{"cidr":"10.1.0.0/24","block_length":26,"state":"active","purpose":"reservations"}"#;
        let node = format!(
            r#"{{"incarnation":"i","machine_id":"m","boot_id":"{boot_id}","underlay":[],"gateways":[],
                "vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0"}}"#
        );
        let entry = |key: &str, value: &str| Entry {
            key: format!("/polder/v1/{key}"),
            value: value.into(),
            revision: Revision::new(7),
        };
        let entries = vec![entry("nodes/n", &node), entry("pools/p", pool)];
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision: Revision::new(7), entries }));
        view
    }

    #[test]
    fn no_address_is_handed_over_to_a_node_registered_in_an_earlier_boot() {
        let address = "10.1.0.5".parse().unwrap();
        let holder = Holder {
            node: "n".parse().unwrap(),
            incarnation: crate::ids::Incarnation::new("i"),
            boot_id: BootId::new("boot-2"),
            attachment: "net/a/eth0".parse().unwrap(),
        };
        let handed_over = |boot_id| {
            hand_over(&view(boot_id), address, "default/db", &holder, Revision::new(7), &|_: &Holder| true)
        };
        assert!(matches!(handed_over("boot-1"), Err(HandOverDenied::Unregistered { .. })));
        assert!(handed_over("boot-2").is_ok());
    }
}
