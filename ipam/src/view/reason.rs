//! Reasons why a node cannot use a record, or only in part.

use std::net::IpAddr;
use std::sync::Arc;

use polder_api::{NodeName, PoolName};

use crate::Cidr;
use crate::needed::RequiredRange;
use crate::pool::InvalidPool;
use crate::record::NotDecoded;
use crate::special::Special;

/// A record that is refused.
/// Remedy: if a newer release wrote the record, upgrade this node. Otherwise correct it, for example from a backup of
/// etcd. Never delete the record of the cluster, a block or a removed node (fence): addresses could be used twice.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("record {key} of the datastore is ignored: {reason}")]
pub struct RefusedRecord {
    /// Key of the record.
    pub key: String,
    /// Decoding error or contradiction.
    pub reason: RecordRefusal,
}

/// Why a record is refused. The reasons are shared, because a view is copied at every change.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum RecordRefusal {
    /// The record cannot be decoded.
    #[error(transparent)]
    NotDecoded(Arc<NotDecoded>),
    /// This node cannot use the pool of the record.
    #[error(transparent)]
    NotUsable(Arc<NotUsable>),
}

impl From<NotDecoded> for RecordRefusal {
    fn from(reason: NotDecoded) -> Self {
        Self::NotDecoded(Arc::new(reason))
    }
}

impl From<NotUsable> for RecordRefusal {
    fn from(reason: NotUsable) -> Self {
        Self::NotUsable(Arc::new(reason))
    }
}

/// Why this node does not use a pool.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum NotUsable {
    /// The pool contains an address of this node.
    #[error(
        "{cidr} contains this node's own address {address}: node and pod ranges must not overlap. Remove it \
         with polderctl pool remove {pool}"
    )]
    OwnAddress {
        /// The pool.
        pool: PoolName,
        /// Its range.
        cidr: Cidr,
        /// The address.
        address: IpAddr,
    },
    /// Pods cannot have addresses of the range.
    #[error(
        "pods cannot use addresses of {special}: this node uses no address of it. Remove it with polderctl \
         pool remove {pool}, and add another range"
    )]
    Special {
        /// The pool.
        pool: PoolName,
        /// The special range that it overlaps.
        special: Special,
    },
    /// Range and block length of the pool do not fit together.
    #[error(
        "{error}: this node uses no address of it. Remove it with polderctl pool remove {pool}, and add \
         another range"
    )]
    Unfit {
        /// The pool.
        pool: PoolName,
        /// The reason.
        #[source]
        error: InvalidPool,
    },
    /// This node must reach addresses of the range outside the pod network.
    #[error(
        "it overlaps {needed}: this node uses no address of it. Remove it with polderctl pool remove {pool}, \
         and add another range"
    )]
    Needed {
        /// The pool.
        pool: PoolName,
        /// The host or network.
        needed: RequiredRange,
    },
    /// The pool contains an address by which other nodes reach a node.
    #[error(
        "it contains {address}, the underlay address of node {node}: this node uses no address of it. Remove \
         it with polderctl pool remove {pool}, and add another range"
    )]
    Underlay {
        /// The pool.
        pool: PoolName,
        /// The address.
        address: IpAddr,
        /// The node.
        node: NodeName,
    },
}

/// Why this node uses only a part of a pool that is in use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum PoolDoubt {
    /// Pods should not have addresses of the pool, but have some.
    #[error("{error}. It is in use: drain it with polderctl pool drain {pool}")]
    Unfit {
        /// The pool.
        pool: PoolName,
        /// The reason.
        #[source]
        error: InvalidPool,
    },
    /// This node must reach addresses of the range outside the pod network.
    #[error(
        "it overlaps {0}: addresses there are not routed to pods on this node. Give one of the two another range"
    )]
    Needed(RequiredRange),
}
