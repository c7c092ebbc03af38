//! Pools and blocks, as an operator changes and sees them.

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{NodeName, PoolName};

/// A change of the cluster's pools.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolChange {
    /// Add one; one that is being drained becomes active again.
    Add(NewPool),
    /// Claim no more blocks of it.
    Drain(PoolName),
    /// Remove one of which nothing is in use.
    Remove(PoolName),
}

/// A pool that is to be added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewPool {
    /// Its name.
    pub name: PoolName,
    /// Its range.
    pub cidr: IpNetwork,
    /// The prefix length of its blocks, unless it is the usual one.
    pub block_length: Option<u8>,
    /// What its addresses are for.
    pub purpose: PoolPurpose,
    /// The labels that a node must have to take addresses from it.
    pub nodes: BTreeMap<String, String>,
}

/// What the addresses of a pool are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolPurpose {
    /// For whichever pod comes: nodes claim blocks of them.
    Blocks,
    /// For workloads that keep theirs by name.
    Reservations,
}

/// A pool of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: PoolName,
    /// Its range.
    pub cidr: IpNetwork,
    /// The prefix length of its blocks.
    pub block_length: u8,
    /// What its addresses are for.
    pub purpose: PoolPurpose,
    /// `active`, `draining` or `retired`.
    pub state: String,
    /// The labels that a node must have to take addresses from it.
    pub nodes: BTreeMap<String, String>,
    /// Blocks that nodes of the cluster own.
    pub blocks_owned: u64,
    /// Blocks of nodes that were removed.
    pub blocks_resting: u64,
    /// All its blocks, claimed or not; 2^64 - 1 where there are more.
    pub blocks_total: u64,
    /// Addresses that are reserved.
    pub reserved: u64,
    /// Addresses that pods have, as far as their nodes have published them; `None` where the store could not be asked.
    pub addresses_used: Option<u64>,
}

/// A block that was claimed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimStatus {
    /// The block.
    pub block: IpNetwork,
    /// The pool that it is cut from.
    pub pool: PoolName,
    /// Whose it is.
    pub node: NodeName,
    /// Which of the nodes that had this name claimed it.
    pub incarnation: String,
    /// The revision of the store at which it was claimed.
    pub revision: i64,
    /// Addresses that pods have, as far as the node has published them; `None` where the store could not be asked.
    pub addresses_used: Option<u64>,
    /// `owned`; `rests (...)` of a node that was removed; `refused: ...` with the reason.
    pub standing: String,
}
