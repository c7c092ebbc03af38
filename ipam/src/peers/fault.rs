//! What is wrong with a record that is not applied.

use std::fmt;
use std::net::IpAddr;

use polder_api::{Family, Mac, NodeName, PoolName};

use crate::record::{MTU_RANGE, NodeRecord};
use crate::{Block, Cidr};

/// Why a record cannot be believed, or why it is not used here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Fault {
    /// It cannot be read, or its pool cannot be used here, for that reason.
    #[error("{0}")]
    Refused(String),
    /// Two nodes cannot share that.
    #[error("its {identity} is already used by node {owner}")]
    OfAnother {
        /// What is another's.
        identity: Identity,
        /// Whose it is.
        owner: NodeName,
    },
    /// A node has one of them.
    #[error("it has more than one {family} {kind} address")]
    TooMany {
        /// The family of the addresses.
        family: Family,
        /// What they are for.
        kind: &'static str,
    },
    /// No packet to it leaves a host.
    #[error("{0} cannot be used as the address of a node")]
    Unreachable(IpAddr),
    /// It would lead to a pod.
    #[error("its underlay address {address} is inside pool {pool}")]
    UnderlayInPool {
        /// The address.
        address: IpAddr,
        /// The pool.
        pool: PoolName,
    },
    /// It is a group's, or nobody's.
    #[error("{0} is not a unicast MAC address")]
    Mac(Mac),
    /// No interface takes it, or no host has to.
    #[error("its MTU {mtu} is out of range {} to {}", MTU_RANGE.start(), MTU_RANGE.end())]
    Mtu {
        /// What it says, in bytes.
        mtu: u32,
    },
    /// The rest of the record is used.
    #[error("its gateway address {0} is not in a pool")]
    StrayGateway(IpAddr),
    /// The rest of the record is used.
    #[error("its probe address {0} is not in one of its blocks: the address is not used")]
    StrayProbe(IpAddr),
    /// Another claim is older.
    #[error("it overlaps {first}, which node {node} claimed first")]
    Overlaps {
        /// The block of the older claim.
        first: Block,
        /// Whose that is.
        node: NodeName,
    },
    /// Some of its addresses are needed here otherwise.
    #[error("pool {0} cannot be used on this node")]
    UnusablePool(PoolName),
    /// Its pool is not there.
    #[error("there is no pool {0}")]
    NoPool(PoolName),
    /// Its pool is cut otherwise.
    #[error("pool {pool} is {cidr} with blocks of /{block_length}")]
    NoBlockOf {
        /// The pool.
        pool: PoolName,
        /// Its range.
        cidr: Cidr,
        /// The prefix length of its blocks.
        block_length: u8,
    },
    /// Nobody may use it yet.
    #[error("its owner {0} was removed: the block is held back until the pods there are confirmed gone")]
    Rests(NodeName),
    /// Its owner has no record that can be believed.
    #[error("its owner {0} is not a node of the cluster")]
    NoNode(NodeName),
    /// Its owner is gone, and another node has the name.
    #[error("it belongs to an earlier incarnation of node {0}")]
    Earlier(NodeName),
    /// No pool has the address for a workload.
    #[error("it is not in a pool for reservations")]
    StrayReservation,
}

/// What no two nodes can share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// Where peers reach it.
    Underlay(IpAddr),
    /// Its own address in the pod network.
    Gateway(IpAddr),
    /// The MAC address of its end of the tunnels.
    Tunnel(Mac),
}

impl Identity {
    /// Whether it is where peers reach a node.
    pub(super) fn is_of_underlay(&self) -> bool {
        matches!(self, Self::Underlay(_))
    }

    /// All of a node.
    pub(super) fn all(record: &NodeRecord) -> impl Iterator<Item = Self> {
        let underlay = record.underlay.iter().copied().map(Self::Underlay);
        let gateways = record.gateways.iter().copied().map(Self::Gateway);
        underlay.chain(gateways).chain([Self::Tunnel(record.vtep_mac)])
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Underlay(address) => write!(f, "underlay address {address}"),
            Self::Gateway(address) => write!(f, "gateway address {address}"),
            Self::Tunnel(mac) => write!(f, "tunnel MAC address {mac}"),
        }
    }
}
