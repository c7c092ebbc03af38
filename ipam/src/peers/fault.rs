//! Problems with records that are not applied, or only in part.

use std::fmt;
use std::net::IpAddr;

use polder_api::{Family, Mac, NodeName, PoolName};

use crate::record::{MTU_RANGE, NodeRecord};
use crate::{Block, Cidr};

/// Reason why a record is not used on this node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Fault {
    /// The record cannot be decoded, or its pool is not or only partly usable on this node; with the reason.
    #[error("{0}")]
    Refused(String),
    /// Two nodes cannot share this address.
    #[error("its {identity} is already used by node {owner}")]
    OfAnother {
        /// The address that is already used.
        identity: UniqueAddress,
        /// The node that uses it.
        owner: NodeName,
    },
    /// A node has at most one of them per family.
    #[error("it has more than one {family} {kind} address")]
    TooMany {
        /// The family of the addresses.
        family: Family,
        /// `underlay`, `gateway` or `probe`.
        kind: &'static str,
    },
    /// An unspecified, loopback or multicast address.
    #[error("{0} cannot be used as the address of a node")]
    Unreachable(IpAddr),
    /// A route to it would lead to a pod.
    #[error("its underlay address {address} is inside pool {pool}")]
    UnderlayInPool {
        /// The underlay address.
        address: IpAddr,
        /// The pool that contains it.
        pool: PoolName,
    },
    /// A multicast or all-zero MAC address.
    #[error("{0} is not a unicast MAC address")]
    Mac(Mac),
    /// Outside [`MTU_RANGE`].
    #[error("its MTU {mtu} is out of range {} to {}", MTU_RANGE.start(), MTU_RANGE.end())]
    Mtu {
        /// MTU in the record, in bytes.
        mtu: u32,
    },
    /// The address is ignored; the rest of the record is used.
    #[error("its gateway address {0} is not in a pool")]
    StrayGateway(IpAddr),
    /// The address is ignored; the rest of the record is used.
    #[error("its probe address {0} is not in one of its blocks: the address is not used")]
    StrayProbe(IpAddr),
    /// An earlier claim overlaps it.
    #[error("it overlaps {first}, which node {node} claimed first")]
    Overlaps {
        /// The block of the older claim.
        first: Block,
        /// Owner of the older claim.
        node: NodeName,
    },
    /// The pool is unusable on this node: the node needs some of its addresses, or pods cannot have them.
    #[error("pool {0} cannot be used on this node")]
    UnusablePool(PoolName),
    /// Its pool does not exist.
    #[error("there is no pool {0}")]
    NoPool(PoolName),
    /// It is outside the pool's range, or not of its block length.
    #[error("pool {pool} is {cidr} with blocks of /{block_length}")]
    NoBlockOf {
        /// The pool.
        pool: PoolName,
        /// Range of the pool.
        cidr: Cidr,
        /// Prefix length of the pool's blocks.
        block_length: u8,
    },
    /// No node may use the block yet.
    #[error("its owner {0} was removed: the block is held back until the pods there are confirmed gone")]
    Rests(NodeName),
    /// Its owner has no valid record.
    #[error("its owner {0} is not a node of the cluster")]
    NoNode(NodeName),
    /// Its owner is gone, and another node has the same name.
    #[error("it belongs to an earlier incarnation of node {0}")]
    Earlier(NodeName),
    /// No pool for reservations contains the address.
    #[error("it is not in a pool for reservations")]
    StrayReservation,
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
