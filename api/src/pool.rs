//! Pools and blocks, for `polderctl pool` and `polderctl block`.

use std::collections::BTreeMap;
use std::fmt;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{NodeName, PoolName, UnknownWord};

/// A change of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolChange {
    /// Add a pool; a draining pool with the same parameters becomes active again.
    Add(NewPool),
    /// Drain a pool: no further blocks of it are claimed.
    Drain(PoolName),
    /// Remove an unused pool.
    Remove(PoolName),
}

/// Parameters of a new pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewPool {
    /// Pool name.
    pub name: PoolName,
    /// Address range of the pool.
    pub cidr: IpNetwork,
    /// Prefix length of its blocks; default: that of the family.
    pub block_length: Option<u8>,
    /// Purpose of its addresses.
    pub purpose: PoolPurpose,
    /// Labels that a node needs to use the pool. Empty: all nodes.
    pub nodes: BTreeMap<String, String>,
}

words! {
    /// Purpose of a pool.
    #[derive(Default)]
    PoolPurpose {
        /// For any pod: nodes claim blocks.
        #[default]
        Blocks = "blocks",
        /// For workloads that keep their address by pod name. Nodes claim no blocks.
        Reservations = "reservations",
    }
}

/// A pool of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Pool name.
    pub name: PoolName,
    /// Address range of the pool.
    pub cidr: IpNetwork,
    /// Prefix length of its blocks.
    pub block_length: u8,
    /// Purpose of its addresses.
    pub purpose: PoolPurpose,
    /// State of the pool.
    pub state: PoolState,
    /// Labels that a node needs to use the pool. Empty: all nodes.
    pub nodes: BTreeMap<String, String>,
    /// Number of blocks owned by members of the cluster.
    pub blocks_owned: u64,
    /// Number of blocks held back because their nodes were removed.
    pub blocks_resting: u64,
    /// Number of all blocks of the pool, claimed or not; at most 2^64 - 1.
    pub blocks_total: u64,
    /// Number of reserved addresses.
    pub reserved: u64,
    /// Number of addresses in use by pods, as published by their nodes; `None` if the datastore was not reachable.
    pub addresses_used: Option<u64>,
}

words! {
    /// State of a pool.
    PoolState {
        /// Nodes may claim blocks.
        Active = "active",
        /// No new blocks; running pods keep their addresses.
        Draining = "draining",
        /// Out of use; the range stays reserved.
        Retired = "retired",
    }
}

/// A claimed block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimStatus {
    /// The block.
    pub block: IpNetwork,
    /// Pool of the block.
    pub pool: PoolName,
    /// Owning node.
    pub node: NodeName,
    /// Incarnation of the owning node.
    pub incarnation: String,
    /// Datastore revision of the claim.
    pub revision: i64,
    /// Number of addresses in use by pods, as published by the node; `None` if the datastore was not reachable.
    pub addresses_used: Option<u64>,
    /// State of the claim.
    pub standing: BlockStanding,
}

/// State of a claim. A string in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum BlockStanding {
    /// The claim is valid.
    Owned,
    /// The node was removed; the block is not released yet.
    Rests,
    /// The claim is not valid, with the reason.
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
