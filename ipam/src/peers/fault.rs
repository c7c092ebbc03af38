//! Problems with records that are not applied, or only in part.

use std::fmt;
use std::net::IpAddr;

use polder_api::{Family, Mac, NodeName, PoolName};

use crate::cause::SharedError;
use crate::record::{MTU_RANGE, NodeRecord};
use crate::{Block, Cidr};

/// Reason why a record is not used on this node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Fault {
    /// The record cannot be decoded, or its pool is not or only partly usable on this node; with the reason.
    #[error(transparent)]
    Refused(SharedError),
    /// Two nodes cannot share this address.
    /// Remedy: give one of the two nodes another address.
    #[error("its {identity} is already used by node {owner}")]
    OfAnother {
        /// The address that is already used.
        identity: UniqueAddress,
        /// The node that uses it.
        owner: NodeName,
    },
    /// A node has at most one of them per family.
    /// Remedy: none if the node runs a newer release; otherwise restart its agent.
    #[error("it has more than one {family} {kind} address")]
    TooMany {
        /// The family of the addresses.
        family: Family,
        /// `underlay`, `gateway` or `probe`.
        kind: &'static str,
    },
    /// An unspecified, loopback or multicast address.
    /// Remedy: correct the node's address in its agent's configuration.
    #[error("{0} cannot be used as the address of a node")]
    Unreachable(IpAddr),
    /// A route to it would lead to a pod.
    /// Remedy: drain and remove the pool, or give the node another underlay address.
    #[error("its underlay address {address} is inside pool {pool}")]
    UnderlayInPool {
        /// The underlay address.
        address: IpAddr,
        /// The pool that contains it.
        pool: PoolName,
    },
    /// A multicast or all-zero MAC address.
    /// Remedy: restart the agent of the node: it writes the record again.
    #[error("{0} is not a unicast MAC address")]
    Mac(Mac),
    /// Outside [`MTU_RANGE`].
    /// Remedy: correct the MTU of the node's underlay or in its agent's configuration.
    #[error("its MTU {mtu} is out of range {} to {}", MTU_RANGE.start(), MTU_RANGE.end())]
    Mtu {
        /// MTU in the record, in bytes.
        mtu: u32,
    },
    /// The address is ignored; the rest of the record is used.
    /// Remedy: add the pool again with polderctl pool add.
    #[error("its gateway address {0} is not in a pool")]
    StrayGateway(IpAddr),
    /// The address is ignored; the rest of the record is used.
    /// Remedy: none, the agent of that node assigns another one.
    #[error("its probe address {0} is not in one of its blocks: the address is not used")]
    StrayProbe(IpAddr),
    /// An earlier claim overlaps it.
    /// Remedy: drain one of the two nodes: it releases the block when its pods are gone.
    #[error("it overlaps {first}, which node {node} claimed first")]
    Overlaps {
        /// The block of the older claim.
        first: Block,
        /// Owner of the older claim.
        node: NodeName,
    },
    /// The pool is unusable on this node: the node needs some of its addresses, or pods cannot have them.
    /// Remedy: see the record of the pool in the same list for the reason.
    #[error("pool {0} cannot be used on this node")]
    UnusablePool(PoolName),
    /// Its pool does not exist.
    /// Remedy: add the pool again with polderctl pool add.
    #[error("there is no pool {0}")]
    NoPool(PoolName),
    /// It is outside the pool's range, or not of its block length.
    /// Remedy: remove the pool and add it again with its earlier range and block length.
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
    /// Remedy: see polderctl node list for the event that it waits for.
    #[error("its owner {0} was removed: the block is held back until the pods there are confirmed gone")]
    Rests(NodeName),
    /// Its owner has no valid record.
    /// Remedy: none if the node is just registering; otherwise remove it with polderctl node remove.
    #[error("its owner {0} is not a node of the cluster")]
    NoNode(NodeName),
    /// Its owner is gone, and another node has the same name.
    /// Remedy: remove the earlier node with polderctl node remove NODE --dead --earlier, if it is gone for good.
    #[error("it belongs to an earlier incarnation of node {0}")]
    Earlier(NodeName),
    /// No pool for reservations contains the address.
    /// Remedy: add a pool for reservations with that address, or release it with polderctl ipam release.
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
