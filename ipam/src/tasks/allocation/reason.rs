//! Reasons why an attachment gets no addresses.

use std::net::IpAddr;

use polder_api::message::{RefusalKind, Refuse};
use polder_api::{Attachment, Family, NodeName, PoolName, PortMapping};

use crate::Block;
use crate::capacity::{LabelMismatch, OwnShare, REMEDY};
use crate::cause::HostError;
use crate::claim::{Exhausted, NoClaim};
use crate::node::AllocateError;
use crate::tasks::{LedgerUnusable, NotHandedOver};

/// Why an attachment gets no addresses.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotAllocated {
    /// An earlier ADD of the attachment continued after its DEL, and the interface that it created cannot be deleted.
    /// Remedy: check the error of the kernel in the text; the runtime repeats the ADD.
    #[error("the interface of an earlier ADD is not deleted yet: {0}")]
    EarlierAdd(#[source] HostError),
    /// The ledger cannot be read or written.
    #[error(transparent)]
    Ledger(#[from] LedgerUnusable),
    /// The node's blocks cannot provide the requested address or MAC address, or the node has no gateway address.
    #[error(transparent)]
    Node(AllocateError),
    /// No address of the node's blocks is free, and no other block is left to claim.
    #[error("{own}; {why}. {REMEDY}")]
    Exhausted {
        /// The use of the node's addresses.
        own: OwnShare,
        /// Why there is no other block.
        #[source]
        why: Exhausted,
    },
    /// No address of the node's blocks is free, and no block can be claimed now.
    /// Remedy: correct the cause in the text if it persists; the runtime repeats the ADD.
    #[error("{own}; {error}")]
    NoClaim {
        /// The use of the node's addresses.
        own: OwnShare,
        /// Why no block can be claimed.
        error: Box<NoClaim>,
    },
    /// Another IPAM plugin assigned an address of a Polder pool, which Polder could assign to another pod.
    #[error(
        "{address} is in pool {pool}, which Polder manages: give the other IPAM plugin a range of its own"
    )]
    Managed {
        /// The assigned address.
        address: IpAddr,
        /// The pool.
        pool: PoolName,
    },
    /// Another IPAM plugin assigned an address of a family for which the node has no gateway address.
    /// Remedy: add a pool of that family with polderctl pool add, or let the other IPAM plugin assign the other family.
    #[error("{address} has no gateway: the cluster has no {family} pool")]
    NoGateway {
        /// The assigned address.
        address: IpAddr,
        /// Its family.
        family: Family,
    },
    /// The request contains several addresses of one family.
    /// Remedy: request at most one address of each family.
    #[error("more than one {0} address was requested: a pod gets one")]
    TwoAddresses(Family),
    /// No pool of the cluster contains the requested address.
    /// Remedy: request an address of a pool that polderctl pool list shows.
    #[error("{0} is not in any pool")]
    InNoPool(IpAddr),
    /// The requested address is not in the requested pool.
    /// Remedy: request an address of that pool, or omit the pool.
    #[error("{address} is not in pool {pool}")]
    NotInPool {
        /// The requested address.
        address: IpAddr,
        /// The requested pool.
        pool: PoolName,
    },
    /// New pods get no addresses of that family, because no pool for blocks with that family is active.
    /// Remedy: add a pool of that family with polderctl pool add, or omit the address.
    #[error("{address} is not available: no pool gives new pods {family} addresses")]
    ClosedFamily {
        /// The requested address.
        address: IpAddr,
        /// Its family.
        family: Family,
    },
    /// The requested pool is for nodes with other labels.
    /// Remedy: schedule the pod on a node with those labels, or request another pool.
    #[error("pool {pool} {foreign}")]
    ForeignPool {
        /// The requested pool.
        pool: PoolName,
        /// The labels of pool and node.
        #[source]
        foreign: LabelMismatch,
    },
    /// Reserved addresses belong to pod names, but the runtime passed no pod name.
    /// Remedy: use a runtime that passes `K8S_POD_NAMESPACE` and `K8S_POD_NAME` in `CNI_ARGS`, or a pool for blocks.
    #[error("a reserved address needs the name of the pod, but the runtime did not pass it")]
    Nameless,
    /// No reserved address is handed over to the pod.
    #[error(transparent)]
    NotHandedOver(#[from] NotHandedOver),
    /// The requested pool does not exist.
    /// Remedy: request a pool that polderctl pool list shows.
    #[error("there is no pool {0}")]
    UnknownPool(PoolName),
    /// The cluster has no pool that gives new pods addresses; the datastore lost it after the request was admitted.
    /// Remedy: add a pool with polderctl pool add; the runtime repeats the ADD.
    #[error("there is no pool to take addresses from")]
    NoPool,
    /// The kernel of this node does not support an address family of the cluster.
    /// Remedy: enable that family in the kernel of this node, or remove the pools of that family.
    #[error("the cluster has an {0} pool, but this kernel has no {0}")]
    NoFamily(Family),
    /// Another node owns the block of the requested address.
    #[error("{address} is in block {block} of node {node}: only a pod there can use it")]
    OtherNode {
        /// The requested address.
        address: IpAddr,
        /// Its block.
        block: Block,
        /// The owner of the block.
        node: NodeName,
    },
    /// The block of the requested address cannot be claimed.
    /// Remedy: request an address of another block; if the claim failed because of the datastore, the runtime repeats
    /// the ADD.
    #[error("{address} is in block {block}, which this node does not own: {error}")]
    NotClaimed {
        /// The requested address.
        address: IpAddr,
        /// Its block.
        block: Block,
        /// Why the block is not claimed.
        error: Box<NoClaim>,
    },
    /// The requested address was released less than the cool-down ago.
    /// Remedy: none, the runtime repeats the ADD.
    #[error("{address} was just released: it is in cool-down for another {seconds} s")]
    Resting {
        /// The requested address.
        address: IpAddr,
        /// The rest of the cool-down, rounded up to seconds.
        seconds: u64,
    },
    /// An earlier pod of the same name has the requested address, because its DEL did not come yet.
    /// Remedy: none, the runtime repeats the ADD.
    #[error("{address} is still used by {last}, of the same pod: it becomes free soon after its DEL")]
    Predecessor {
        /// The requested address.
        address: IpAddr,
        /// The attachment of the earlier pod.
        last: Attachment,
    },
    /// Another pod of this node uses the requested address.
    /// Remedy: request another address, or delete that pod.
    #[error("{address} is used by {holder}")]
    Used {
        /// The requested address.
        address: IpAddr,
        /// The attachment that uses it.
        holder: Attachment,
    },
    /// The requested address is a gateway address of this node.
    /// Remedy: request another address.
    #[error("{0} is used by this node itself")]
    UsedByNode(IpAddr),
    /// The requested address is excluded from allocation.
    /// Remedy: request another address.
    #[error("{0} is never assigned to pods: it is a gateway address, or the first or the last of its pool")]
    NeverAssigned(IpAddr),
    /// Another pod of this node has the requested host port.
    /// Remedy: request another host port, or delete that pod.
    #[error("host port {port} is used by {holder}")]
    PortTaken {
        /// The requested host port.
        port: PortMapping,
        /// The attachment that has it.
        holder: Attachment,
    },
    /// The requested host port is still in use by a pod that is being deleted, or by an earlier pod of the same name.
    /// Remedy: none, the runtime repeats the ADD.
    #[error("host port {port} is still used by {last}: it becomes free soon after its DEL")]
    PortNotFreeYet {
        /// The requested host port.
        port: PortMapping,
        /// The attachment that has it.
        last: Attachment,
    },
    /// The node receives tunnel packets on the requested host port: without them, its pods lose all other nodes.
    /// Remedy: request another host port, or set another port for tunnels with polderctl cluster set.
    #[error("host port {0} is the port of the tunnels between nodes")]
    TunnelPort(PortMapping),
}

impl Refuse for NotAllocated {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Ledger(error) => error.kind(),
            Self::NotHandedOver(why) => why.kind(),
            Self::NoFamily(_) => RefusalKind::Failed,
            Self::NotClaimed { error, .. } => match **error {
                NoClaim::Exhausted(_) => RefusalKind::AddressTaken,
                NoClaim::Unavailable(_) => RefusalKind::TryAgain,
            },
            Self::Exhausted { .. } => RefusalKind::PoolExhausted,
            Self::EarlierAdd(_)
            | Self::Node(AllocateError::NoGateway { .. })
            | Self::NoClaim { .. }
            | Self::NoPool
            | Self::Resting { .. }
            | Self::Predecessor { .. }
            | Self::PortNotFreeYet { .. } => RefusalKind::TryAgain,
            Self::Managed { .. }
            | Self::NoGateway { .. }
            | Self::TwoAddresses(_)
            | Self::InNoPool(_)
            | Self::NotInPool { .. }
            | Self::ClosedFamily { .. }
            | Self::ForeignPool { .. }
            | Self::Nameless
            | Self::UnknownPool(_)
            | Self::TunnelPort(_) => RefusalKind::Invalid,
            Self::Node(_)
            | Self::OtherNode { .. }
            | Self::Used { .. }
            | Self::UsedByNode(_)
            | Self::NeverAssigned(_)
            | Self::PortTaken { .. } => RefusalKind::AddressTaken,
        }
    }
}
