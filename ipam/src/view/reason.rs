//! Reasons why a node cannot use a pool, or only in part.

use std::net::IpAddr;

use polder_api::{NodeName, PoolName};

use crate::Cidr;
use crate::needed::RequiredRange;
use crate::pool::InvalidPool;
use crate::special::Special;

/// Why this node does not use a pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotUsable {
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
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum PoolDoubt {
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
