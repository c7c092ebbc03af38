//! Pools and blocks, as an operator changes and sees them.

use std::collections::BTreeMap;
use std::fmt;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{NodeName, PoolName, UnknownWord};

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

words! {
    /// What the addresses of a pool are for.
    #[derive(Default)]
    PoolPurpose {
        /// For whichever pod comes: nodes claim blocks of them.
        #[default]
        Blocks = "blocks",
        /// For workloads that keep theirs by name. No node owns any of them.
        Reservations = "reservations",
    }
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
    /// What may happen in it.
    pub state: PoolState,
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

words! {
    /// What may happen in a pool.
    PoolState {
        /// Nodes may claim blocks.
        Active = "active",
        /// No new blocks; the pods that have addresses keep them.
        Draining = "draining",
        /// Out of use; the range stays reserved.
        Retired = "retired",
    }
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
    /// Whether the claim counts.
    pub standing: BlockStanding,
}

/// Whether the claim of a block counts. A string in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum BlockStanding {
    /// It does.
    Owned,
    /// The node was removed: nobody else has the block yet.
    Rests,
    /// It does not, for this reason.
    Refused(String),
}

const OWNED: &str = "owned";
const RESTS: &str = "rests (node removed)";
const REFUSED: &str = "refused: ";

impl fmt::Display for BlockStanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owned => f.pad(OWNED),
            Self::Rests => f.pad(RESTS),
            Self::Refused(reason) => write!(f, "{REFUSED}{reason}"),
        }
    }
}

impl From<BlockStanding> for String {
    fn from(standing: BlockStanding) -> Self {
        standing.to_string()
    }
}

impl TryFrom<String> for BlockStanding {
    type Error = UnknownWord;

    fn try_from(text: String) -> Result<Self, UnknownWord> {
        match (text.as_str(), text.strip_prefix(REFUSED)) {
            (OWNED, _) => Ok(Self::Owned),
            (RESTS, _) => Ok(Self::Rests),
            (_, Some(reason)) => Ok(Self::Refused(reason.to_owned())),
            _ => Err(UnknownWord(text)),
        }
    }
}
