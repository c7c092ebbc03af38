//! Reasons why pools or settings are not changed.

use std::fmt;
use std::net::IpAddr;

use polder_api::status::AttachMode;
use polder_api::{NodeName, PoolName};

use crate::Cidr;
use crate::capacity::LargestOwners;
use crate::needed::RequiredRange;
use crate::pool::{Block, InvalidPool};
use crate::view::RecordRefusal;

/// Why the pools or the settings are not changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotChanged {
    /// A record cannot be read, so conflicts with it are unknown.
    #[error("record {key} cannot be read ({reason}): correct it or delete it first")]
    Unreadable {
        /// The key of the record.
        key: String,
        /// The decoding error.
        reason: RecordRefusal,
    },
    /// A different pool of that name exists.
    #[error(
        "pool {name} already exists as {there}: choose another name, or drain and remove that pool first"
    )]
    Different {
        /// The name.
        name: PoolName,
        /// The parameters of the existing pool.
        there: String,
    },
    /// The range overlaps another pool.
    #[error("{cidr} overlaps pool {other} ({other_cidr}): choose another range")]
    Overlaps {
        /// The requested range.
        cidr: Cidr,
        /// The existing pool.
        other: PoolName,
        /// The range of the existing pool.
        other_cidr: Cidr,
    },
    /// The range contains an address of the node that decides the change.
    #[error(
        "{address}, this node's own address, is inside {cidr}: node and pod ranges must not overlap, choose \
         another range"
    )]
    OwnAddress {
        /// The requested range.
        cidr: Cidr,
        /// The address.
        address: IpAddr,
    },
    /// The range contains an address by which other nodes reach a node.
    #[error(
        "{address}, the underlay address of node {node}, is inside {cidr}: node and pod ranges must not \
         overlap, choose another range"
    )]
    Underlay {
        /// The requested range.
        cidr: Cidr,
        /// The address.
        address: IpAddr,
        /// The node.
        node: NodeName,
    },
    /// The range is inside a network that the node must reach outside the pod network.
    #[error(
        "{cidr} is inside {needed}: pod ranges must not overlap addresses that nodes need, choose another range"
    )]
    Inside {
        /// The requested range.
        cidr: Cidr,
        /// The network.
        needed: RequiredRange,
    },
    /// The range contains a host or a network that the node must reach outside the pod network.
    #[error(
        "{needed}, is inside {cidr}: pod ranges must not overlap addresses that nodes need, choose another range"
    )]
    Needed {
        /// The requested range.
        cidr: Cidr,
        /// The host or network.
        needed: RequiredRange,
    },
    /// A block in the range is still claimed from an earlier pool.
    #[error(
        "block {block}, which was claimed from pool {pool}, is inside {cidr}: choose another range, or wait \
         until that block is released"
    )]
    Claimed {
        /// The requested range.
        cidr: Cidr,
        /// The block.
        block: Block,
        /// The earlier pool.
        pool: PoolName,
    },
    /// A block in the range is claimed, but the record of the claim cannot be read.
    #[error("block {block} is inside {cidr}: choose another range, or wait until that block is released")]
    ClaimedUnreadably {
        /// The requested range.
        cidr: Cidr,
        /// The block.
        block: Block,
    },
    /// An address in the range is reserved, and the new pool is not for reservations.
    #[error(
        "{address}, which is reserved, is inside {cidr}: choose another range, or release it with polderctl \
         ipam release"
    )]
    Reserved {
        /// The requested range.
        cidr: Cidr,
        /// The address.
        address: IpAddr,
    },
    /// Pods cannot use addresses of the pool.
    #[error(transparent)]
    Unfit(#[from] InvalidPool),
    /// The attach mode is fixed when a cluster is created.
    #[error(
        "the attach mode of this cluster is {from} and cannot change to {to}: running pods have the devices \
         and the gateway of {from}. Set attach = \"{to}\" in [bootstrap] of a new cluster"
    )]
    Attach {
        /// The current attach mode.
        from: AttachMode,
        /// The requested attach mode.
        to: AttachMode,
    },
    /// The cluster has no settings.
    #[error("the cluster has no settings yet: start an agent whose configuration has [bootstrap]")]
    NoCluster,
    /// The pool does not exist.
    #[error("there is no pool {0}: see polderctl pool list")]
    Unknown(PoolName),
    /// The pool is active, and has claimed blocks or reserved addresses.
    #[error("pool {name} is in use: {users}: drain it first with polderctl pool drain {name}")]
    Active {
        /// The name of the pool.
        name: PoolName,
        /// Its blocks and addresses in use.
        users: Users,
    },
    /// The pool for reservations is drained, and still has reserved addresses.
    #[error("pool {name} is in use: {users}: release them with polderctl ipam release")]
    StillReserved {
        /// The name of the pool.
        name: PoolName,
        /// Its blocks and addresses in use.
        users: Users,
    },
    /// The pool is drained, and nodes still have blocks of it.
    #[error(
        "pool {name} is in use: {users}: blocks are released when their pods are gone and the cool-down is \
         over; blocks of a removed node after it confirms that its pods are gone: see polderctl ipam show pool \
         {name}"
    )]
    StillClaimed {
        /// The name of the pool.
        name: PoolName,
        /// Its blocks and addresses in use.
        users: Users,
    },
}

/// The claimed blocks and the reserved addresses of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Users {
    /// The number of claimed blocks, and their owners; `None` without blocks.
    pub blocks: Option<(usize, LargestOwners)>,
    /// The number of reserved addresses, and one of them; `None` without addresses.
    pub reserved: Option<(usize, IpAddr)>,
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((count, owners)) = &self.blocks {
            write!(f, "{count} blocks are claimed ({owners})")?;
        }
        if self.blocks.is_some() && self.reserved.is_some() {
            f.write_str("; ")?;
        }
        if let Some((count, first)) = &self.reserved {
            write!(f, "{count} addresses are reserved, e.g. {first}")?;
        }
        Ok(())
    }
}
