//! Pools and the blocks that they are cut into.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use polder_api::{Family, PoolName};
use serde::{Deserialize, Serialize};

use crate::Cidr;

/// A range of addresses that the cluster hands out, cut into blocks of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: PoolName,
    cidr: Cidr,
    block_length: u8,
    /// Whether blocks of it may be claimed.
    pub state: PoolState,
    /// What its addresses are for.
    pub purpose: Purpose,
    /// The labels that a node must have to take addresses from it.
    pub nodes: Labels,
}

/// What is said of a node, for pools to choose by.
pub type Labels = BTreeMap<String, String>;

/// What the addresses of a pool are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// For whichever pod comes: nodes claim blocks of them.
    #[default]
    Blocks,
    /// For workloads that keep theirs by name. No node owns any of them.
    Reservations,
}

/// What may happen in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolState {
    /// Nodes may claim blocks.
    Active,
    /// No new blocks; the pods that have addresses keep them.
    Draining,
    /// Out of use; the range stays reserved.
    Retired,
}

/// An aligned slice of a pool that one node owns.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Block(Cidr);

/// A pool that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPool {
    /// The pool is smaller than one of its blocks.
    #[error("pool {cidr} is smaller than one block of /{block_length}: make the pool larger, or set a block length of at least {}", cidr.length())]
    TooSmall {
        /// The pool.
        cidr: Cidr,
        /// The length of its blocks.
        block_length: u8,
    },
    /// A block would have more addresses than a node keeps track of.
    #[error("blocks of /{block_length} in pool {cidr} are too large: a block has at most {LARGEST_BLOCK} addresses, which is /{}", smallest_length(cidr.family()))]
    BlockTooLarge {
        /// The pool.
        cidr: Cidr,
        /// The length of its blocks.
        block_length: u8,
    },
    /// The length of a block is longer than an address.
    #[error("blocks of /{block_length} in pool {cidr} do not exist: an {} address has {} bits", cidr.family(), cidr.family().bits())]
    NoSuchLength {
        /// The pool.
        cidr: Cidr,
        /// The length of its blocks.
        block_length: u8,
    },
}

/// How many addresses a block has at most: a node keeps each of them in memory.
const LARGEST_BLOCK: u32 = 4096;

fn smallest_length(family: Family) -> u8 {
    family.bits() - 12
}

/// The length of a pool's blocks where none is set: 64 addresses.
pub fn default_block_length(family: Family) -> u8 {
    family.bits() - 6
}

impl Pool {
    /// A pool for all nodes and any pod, if there can be one of these measures.
    pub fn new(name: PoolName, cidr: Cidr, block_length: u8, state: PoolState) -> Result<Self, InvalidPool> {
        if block_length > cidr.family().bits() {
            Err(InvalidPool::NoSuchLength { cidr, block_length })
        } else if block_length < cidr.length() {
            Err(InvalidPool::TooSmall { cidr, block_length })
        } else if block_length < smallest_length(cidr.family()) {
            Err(InvalidPool::BlockTooLarge { cidr, block_length })
        } else {
            Ok(Self { name, cidr, block_length, state, purpose: Purpose::default(), nodes: Labels::new() })
        }
    }

    /// The same pool in that state.
    #[must_use]
    pub fn in_state(&self, state: PoolState) -> Self {
        Self { state, ..self.clone() }
    }

    /// Whether a node with these labels may take addresses from it.
    pub fn serves(&self, labels: &Labels) -> bool {
        self.nodes.iter().all(|(label, value)| labels.get(label) == Some(value))
    }

    /// Whether a node with these labels may claim a block of it.
    pub fn is_open_to(&self, labels: &Labels) -> bool {
        self.state == PoolState::Active && self.purpose == Purpose::Blocks && self.serves(labels)
    }

    /// Its range.
    pub fn cidr(&self) -> Cidr {
        self.cidr
    }

    /// Its address family.
    pub fn family(&self) -> Family {
        self.cidr.family()
    }

    /// The prefix length of its blocks.
    pub fn block_length(&self) -> u8 {
        self.block_length
    }

    /// Whether `block` is one of the blocks that it is cut into.
    pub fn has_block(&self, block: Block) -> bool {
        self.cidr.covers(block.0) && block.0.length() == self.block_length
    }

    /// Index of its last block; the first has 0.
    pub fn last_block(&self) -> u128 {
        self.cidr.last_part(self.block_length)
    }

    /// The block with this index.
    pub fn block(&self, index: u128) -> Block {
        Block(self.cidr.part(self.block_length, index))
    }

    /// The block that an address of the pool is in.
    pub fn block_of(&self, address: IpAddr) -> Block {
        Block(Cidr::around(address, self.block_length))
    }

    /// Whether the address is never handed out: the first and the last of the pool, which older software takes for
    /// the network and its broadcast address. A pool of one or two addresses has none to spare.
    pub fn excludes(&self, address: IpAddr) -> bool {
        self.cidr.length() + 2 <= self.family().bits()
            && (address == self.cidr.first() || address == self.cidr.last())
    }
}

impl Block {
    /// The block that has exactly these addresses.
    pub fn new(cidr: Cidr) -> Self {
        Self(cidr)
    }

    /// Its range.
    pub fn cidr(self) -> Cidr {
        self.0
    }

    /// Its address family.
    pub fn family(self) -> Family {
        self.0.family()
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(cidr: &str, block_length: u8) -> Result<Pool, InvalidPool> {
        Pool::new("p".parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active)
    }

    #[test]
    fn a_pool_that_cannot_be_is_refused_with_the_remedy() {
        let small = pool("10.0.0.0/28", 26).unwrap_err().to_string();
        assert!(small.contains("10.0.0.0/28") && small.contains("at least 28"), "{small}");
        let large = pool("10.0.0.0/8", 19).unwrap_err().to_string();
        assert!(large.contains("4096 addresses, which is /20"), "{large}");
        assert!(matches!(pool("10.0.0.0/8", 33), Err(InvalidPool::NoSuchLength { .. })));
        assert!(pool("10.0.0.0/26", 26).is_ok());
    }

    #[test]
    fn only_the_ends_of_the_pool_are_excluded_not_those_of_each_block() {
        let pool = pool("10.0.0.0/24", 26).unwrap();
        let excluded: Vec<_> = pool.cidr().addresses().filter(|ip| pool.excludes(*ip)).collect();
        assert_eq!(excluded, ["10.0.0.0".parse::<IpAddr>().unwrap(), "10.0.0.255".parse().unwrap()]);
    }

    #[test]
    fn a_pool_of_two_addresses_has_two_addresses() {
        for (cidr, length) in [("10.0.0.0/31", 31), ("10.0.0.0/32", 32), ("fd00::/127", 127)] {
            let pool = pool(cidr, length).unwrap();
            assert!(pool.cidr().addresses().all(|ip| !pool.excludes(ip)), "{cidr}");
        }
    }
}
