//! Problems with records that are not applied, or only in part.

use std::fmt;
use std::net::IpAddr;

use polder_api::{Family, Mac, NodeName, PoolName};

use crate::record::{MTU_RANGE, NodeRecord};
use crate::view::{PoolDoubt, RecordRefusal};
use crate::{Block, Cidr};

/// Reason why a record is not used on this node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum RecordFault {
    /// The record cannot be decoded, or its pool is not usable on this node; with the reason.
    #[error(transparent)]
    Refused(RecordRefusal),
    /// The pool of the record is in use, but only partly usable on this node; with the reason.
    #[error(transparent)]
    Doubtful(PoolDoubt),
    /// Two nodes cannot share this address.
    #[error("its {identity} is already used by node {owner}: {}", identity.remedy())]
    OfAnother {
        /// The address that is already used.
        identity: UniqueAddress,
        /// The node that uses it.
        owner: NodeName,
    },
    /// A node has at most one of them per family.
    #[error(
        "it has more than one {family} {kind} address: restart the agent of that node, unless that agent is a newer \
         release"
    )]
    TooMany {
        /// The family of the addresses.
        family: Family,
        /// `underlay`, `gateway` or `probe`.
        kind: &'static str,
    },
    /// An unspecified, loopback or multicast address.
    #[error(
        "underlay address {0} is unspecified, loopback or multicast: correct [underlay] in agent.toml of that node"
    )]
    Unreachable(IpAddr),
    /// A route to it would lead to a pod.
    #[error(
        "its underlay address {address} is inside pool {pool}: drain and remove the pool, or give the node another \
         underlay address"
    )]
    UnderlayInPool {
        /// The underlay address.
        address: IpAddr,
        /// The pool that contains it.
        pool: PoolName,
    },
    /// A multicast or all-zero MAC address.
    #[error(
        "vtep_mac {0} is not a unicast MAC address: restart the agent of that node, which rewrites the record"
    )]
    Mac(Mac),
    /// Outside [`MTU_RANGE`].
    #[error(
        "its MTU {mtu} is not in the range {} to {}: correct the MTU of the underlay interface of that node, or mtu in \
         its agent.toml",
        MTU_RANGE.start(),
        MTU_RANGE.end()
    )]
    Mtu {
        /// MTU in the record, in bytes.
        mtu: u32,
    },
    /// The address is ignored; the rest of the record is used.
    #[error(
        "gateway address {0} is ignored, because it is not in a pool that this node can use, and the rest of the \
         record is used: add the pool again with polderctl pool add, or correct it if status reports a problem with it"
    )]
    StrayGateway(IpAddr),
    /// The address is ignored; the rest of the record is used.
    /// Remedy: none, the agent of that node assigns another one.
    #[error(
        "probe address {0} is ignored, because it is not in a block of that node, and the rest of the record is used"
    )]
    StrayProbe(IpAddr),
    /// An earlier claim overlaps it.
    #[error(
        "it overlaps block {first} of node {node}, which has the older claim: drain one of the two nodes, and remove \
         it with polderctl node remove"
    )]
    Overlaps {
        /// The block of the older claim.
        first: Block,
        /// Owner of the older claim.
        node: NodeName,
    },
    /// The pool is unusable on this node: the node needs some of its addresses, or pods cannot have them.
    #[error("pool {0} cannot be used on this node: see polderctl status for the reason")]
    UnusablePool(PoolName),
    /// Its pool does not exist.
    #[error("pool {0} does not exist: add it again as it was, with polderctl pool add")]
    NoPool(PoolName),
    /// It is outside the pool's range, or not of its block length.
    #[error(
        "it is not a /{block_length} inside {cidr}, the range of pool {pool}: restore the record of the pool, or drain \
         the owner of the block and remove it with polderctl node remove"
    )]
    NoBlockOf {
        /// The pool.
        pool: PoolName,
        /// Range of the pool.
        cidr: Cidr,
        /// Prefix length of the pool's blocks.
        block_length: u8,
    },
    /// No node may use the block yet.
    #[error(
        "its owner {0} was removed: the block is released after it is confirmed that the pods of {0} are gone, and \
         after the cool-down: see polderctl node list"
    )]
    Rests(NodeName),
    /// Its owner has no valid record.
    #[error(
        "its owner {0} has no valid node record: correct the problem of nodes/{0} in this list, or start the agent of \
         {0}. If that machine is permanently gone, run polderctl node remove {0} --dead; only if there is no such \
         node, delete this record with etcdctl del"
    )]
    NoNode(NodeName),
    /// Its owner is gone, and another node has the same name.
    #[error(
        "it belongs to another incarnation of node {0} than the registered one: if the machine of that incarnation is \
         permanently gone, delete this record with etcdctl del"
    )]
    Earlier(NodeName),
    /// No pool for reservations contains the address.
    #[error(
        "it is not in a pool for reservations that this node can use: correct the pool if status reports a problem \
         with it; otherwise add one with this address (polderctl pool add --reservations), or release the address \
         (polderctl ipam release)"
    )]
    StrayReservation,
}

impl RecordFault {
    /// Whether the rest of the record is used.
    pub(super) fn is_partial(&self) -> bool {
        matches!(self, Self::Doubtful(_) | Self::StrayGateway(_) | Self::StrayProbe(_))
    }
}

/// An address that two nodes cannot share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UniqueAddress {
    /// Underlay address.
    Underlay(IpAddr),
    /// Gateway address of the node in the pod network.
    Gateway(IpAddr),
    /// MAC address of the VXLAN tunnel endpoint.
    Tunnel(Mac),
}

impl UniqueAddress {
    /// Whether it is an underlay address.
    pub(super) fn is_of_underlay(&self) -> bool {
        matches!(self, Self::Underlay(_))
    }

    /// What to do about two nodes with this address.
    fn remedy(&self) -> &'static str {
        match self {
            Self::Underlay(_) => "give one of the two nodes another underlay address",
            Self::Gateway(_) => "run polderctl ipam check",
            Self::Tunnel(_) => "give one of the two nodes another name",
        }
    }

    /// All addresses of a node that must be unique.
    pub(super) fn all(record: &NodeRecord) -> impl Iterator<Item = Self> {
        let underlay = record.underlay.iter().copied().map(Self::Underlay);
        let gateways = record.gateways.iter().copied().map(Self::Gateway);
        underlay.chain(gateways).chain([Self::Tunnel(record.vtep_mac)])
    }
}

impl fmt::Display for UniqueAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Underlay(address) => write!(f, "underlay address {address}"),
            Self::Gateway(address) => write!(f, "gateway address {address}"),
            Self::Tunnel(mac) => write!(f, "tunnel MAC address {mac}"),
        }
    }
}
