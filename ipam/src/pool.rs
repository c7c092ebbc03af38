//! Pools and their blocks.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

pub use polder_api::pool::{PoolPurpose as Purpose, PoolState};
use polder_api::{Family, PoolName};
use serde::{Deserialize, Serialize};

use crate::Cidr;
use crate::special::{self, Special};

/// A range of addresses for pods, cut into blocks of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// The name.
    pub name: PoolName,
    cidr: Cidr,
    block_length: u8,
    /// The state. Blocks are claimed from active pools only.
    pub state: PoolState,
    /// The purpose of the addresses: blocks or reservations.
    pub purpose: Purpose,
    /// The labels that a node must have to use the pool. Empty for all nodes.
    pub nodes: Labels,
}

/// Labels of a node, by which pools select nodes.
pub type Labels = BTreeMap<String, String>;

/// The default block length of a pool with this purpose.
pub fn usual_block_length(purpose: Purpose, cidr: Cidr) -> u8 {
    let usual = default_block_length(cidr.family());
    match purpose {
        Purpose::Blocks => usual,
        // No node claims blocks of it, so a small pool needs no block length.
        Purpose::Reservations => usual.max(cidr.length()),
    }
}

/// An aligned part of a pool, claimed by at most one node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Block(Cidr);

/// A pool with invalid parameters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum InvalidPool {
    /// The pool is smaller than one of its blocks.
    #[error(
        "pool {cidr} is smaller than one block of /{block_length}: make the pool larger, or set a block length of at \
         least {}",
        cidr.length()
    )]
    TooSmall {
        /// The range of the pool.
        cidr: Cidr,
        /// The prefix length of its blocks.
        block_length: u8,
    },
    /// A block has more addresses than a node can track.
    #[error(
        "blocks of /{block_length} in pool {cidr} are too large: a block has at most {LARGEST_BLOCK} addresses, which \
         is /{}",
        smallest_length(cidr.family())
    )]
    BlockTooLarge {
        /// The range of the pool.
        cidr: Cidr,
        /// The prefix length of its blocks.
        block_length: u8,
    },
    /// A block may have no address for a pod.
    #[error("blocks of /{block_length} in pool {cidr} are too small: pods cannot use a node's own address and \
             the first and the last of the pool; use a block length of at most {}, and a pool at least as \
             large as one block", cidr.family().bits() - 2)]
    BlockTooSmall {
        /// The range of the pool.
        cidr: Cidr,
        /// The prefix length of its blocks.
        block_length: u8,
    },
    /// Pods cannot use addresses of that range.
    #[error(
        "{cidr} cannot be a pool: pods cannot use addresses of {special}; choose a private range, e.g. in \
         10.0.0.0/8 or fd00::/8"
    )]
    Special {
        /// The range of the pool.
        cidr: Cidr,
        /// The special range that it overlaps.
        special: Special,
    },
    /// The block length is longer than an address.
    #[error(
        "blocks of /{block_length} in pool {cidr} are impossible: an {} address has {} bits",
        cidr.family(),
        cidr.family().bits()
    )]
    NoSuchLength {
        /// The range of the pool.
        cidr: Cidr,
        /// The prefix length of its blocks.
        block_length: u8,
    },
}

/// The maximum number of addresses in a block: a node keeps each of them in memory.
const LARGEST_BLOCK: u32 = 4096;

fn smallest_length(family: Family) -> u8 {
    family.bits() - 12
}

/// The default block length of a pool: 64 addresses.
pub fn default_block_length(family: Family) -> u8 {
    family.bits() - 6
}

impl Pool {
    /// A pool for blocks, open to all nodes. Fails if the lengths do not fit together.
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

    /// Checks whether pods can use the pool: every block has an address for a pod, and the range is not a special
    /// one. Records of pools that fail this check can still be decoded, so that they can be listed and removed.
    pub fn check_use(&self) -> Result<(), InvalidPool> {
        let Self { cidr, block_length, .. } = *self;
        if let Some(special) = special::refused(cidr) {
            return Err(InvalidPool::Special { cidr, special: *special });
        }
        if self.purpose == Purpose::Blocks && self.least_for_pods() == 0 {
            return Err(InvalidPool::BlockTooSmall { cidr, block_length });
        }
        Ok(())
    }

    /// The number of pod addresses in the smallest block: a node keeps the first address of each block for a gateway.
    fn least_for_pods(&self) -> u128 {
        let size = 1_u128.checked_shl(u32::from(self.family().bits() - self.block_length));
        let has_ends = self.cidr.length() + 2 <= self.family().bits();
        let excluded = match (has_ends, self.cidr.length() == self.block_length) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 2,
        };
        size.unwrap_or(u128::MAX).saturating_sub(excluded + 1)
    }

    /// The same pool in this state.
    #[must_use]
    pub fn in_state(&self, state: PoolState) -> Self {
        Self { state, ..self.clone() }
    }

    /// Whether a node with these labels may use its addresses.
    pub fn serves(&self, labels: &Labels) -> bool {
        self.nodes.iter().all(|(label, value)| labels.get(label) == Some(value))
    }

    /// Whether a node with these labels may claim a block of it.
    pub fn is_open_to(&self, labels: &Labels) -> bool {
        self.state == PoolState::Active && self.purpose == Purpose::Blocks && self.serves(labels)
    }

    /// The range.
    pub fn cidr(&self) -> Cidr {
        self.cidr
    }

    /// The address family.
    pub fn family(&self) -> Family {
        self.cidr.family()
    }

    /// The prefix length of its blocks.
    pub fn block_length(&self) -> u8 {
        self.block_length
    }

    /// Whether `block` is one of its blocks.
    pub fn has_block(&self, block: Block) -> bool {
        self.cidr.covers(block.0) && block.0.length() == self.block_length
    }

    /// The index of the last block; the first has 0.
    pub fn last_block(&self) -> u128 {
        self.cidr.last_part(self.block_length)
    }

    /// The block with this index.
    pub fn block(&self, index: u128) -> Block {
        Block(self.cidr.part(self.block_length, index))
    }

    /// The block that contains an address of the pool.
    pub fn block_of(&self, address: IpAddr) -> Block {
        Block(Cidr::containing(address, self.block_length))
    }

    /// Whether the address is never allocated: the first and the last of the pool, which older software treats as the
    /// network and broadcast address. A pool of one or two addresses excludes none.
    pub fn excludes(&self, address: IpAddr) -> bool {
        self.cidr.length() + 2 <= self.family().bits()
            && (address == self.cidr.first() || address == self.cidr.last())
    }
}

impl Block {
    /// The block with exactly these addresses.
    pub fn new(cidr: Cidr) -> Self {
        Self(cidr)
    }

    /// The range.
    pub fn cidr(self) -> Cidr {
        self.0
    }

    /// The address family.
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

/// The requested block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum BlockRequest {
    /// A block of this family, and of this pool if one is given.
    Any(Family, Option<PoolName>),
    /// This block.
    This(Block),
}

/// Labels as on a command line: `label=value`, separated by commas.
pub fn format_labels(labels: &Labels) -> String {
    let parts: Vec<_> = labels.iter().map(|(label, value)| format!("{label}={value}")).collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(cidr: &str, block_length: u8) -> Result<Pool, InvalidPool> {
        Pool::new("p".parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active)
    }

    #[test]
    fn an_invalid_pool_is_refused_with_the_remedy() {
        let small = pool("10.0.0.0/28", 26).unwrap_err().to_string();
        assert!(small.contains("10.0.0.0/28") && small.contains("at least 28"), "{small}");
        let large = pool("10.0.0.0/8", 19).unwrap_err().to_string();
        assert!(large.contains("4096 addresses, which is /20"), "{large}");
        assert!(matches!(pool("10.0.0.0/8", 33), Err(InvalidPool::NoSuchLength { .. })));
        assert!(pool("10.0.0.0/26", 26).is_ok());
    }

    #[test]
    fn a_pool_with_blocks_too_small_for_pods_is_refused() {
        for (cidr, length) in [
            ("10.0.0.0/24", 26),
            ("10.0.0.0/24", 30),
            ("10.0.0.0/30", 30),
            ("10.0.0.0/31", 31),
            ("fd00::/64", 126),
            ("fd00::/127", 127),
            ("fd00::/52", 116),
        ] {
            assert_eq!(pool(cidr, length).unwrap().check_use(), Ok(()), "{cidr} in /{length}");
        }
        for (cidr, length) in [
            ("10.0.0.0/24", 31),
            ("10.0.0.0/24", 32),
            ("10.0.0.0/8", 32),
            ("10.0.0.0/30", 31),
            ("10.0.0.0/32", 32),
            ("fd00::/64", 127),
            ("fd00::/64", 128),
            ("fd00::/128", 128),
        ] {
            let unfit = pool(cidr, length).unwrap();
            let message = unfit.check_use().unwrap_err().to_string();
            let most = if cidr.contains(':') { "at most 126" } else { "at most 30" };
            assert!(message.contains(most), "{cidr} in /{length}: {message}");
            // No node claims a block of reserved addresses.
            assert_eq!(Pool { purpose: Purpose::Reservations, ..unfit }.check_use(), Ok(()));
        }
    }

    #[test]
    fn a_pool_of_a_special_range_is_refused_for_any_purpose() {
        let multicast = pool("ff02::/64", 122).unwrap();
        let message = multicast.check_use().unwrap_err().to_string();
        assert!(message.contains("ff02::/64 cannot be a pool") && message.contains("multicast"), "{message}");
        assert!(Pool { purpose: Purpose::Reservations, ..multicast }.check_use().is_err());
    }

    #[test]
    fn only_the_first_and_last_address_of_the_pool_are_excluded() {
        let pool = pool("10.0.0.0/24", 26).unwrap();
        let excluded: Vec<_> = pool.cidr().addresses().filter(|ip| pool.excludes(*ip)).collect();
        assert_eq!(excluded, ["10.0.0.0".parse::<IpAddr>().unwrap(), "10.0.0.255".parse().unwrap()]);
    }

    #[test]
    fn a_pool_of_at_most_two_addresses_excludes_none() {
        for (cidr, length) in [("10.0.0.0/31", 31), ("10.0.0.0/32", 32), ("fd00::/127", 127)] {
            let pool = pool(cidr, length).unwrap();
            assert!(pool.cidr().addresses().all(|ip| !pool.excludes(ip)), "{cidr}");
        }
    }
}
