//! Claims of blocks: which block a node tries, and the records that the claim depends on.
//!
//! There are no locks and no pending state: the claim is either in the datastore or not. If the outcome of an attempt
//! is unknown, the node never just repeats it. It reads the record: the nonce identifies the attempt.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use polder_api::NodeName;
use polder_api::rule;
use sha2::{Digest, Sha256};

use crate::capacity::{AllClaimed, NoPool};
use crate::change::{Claim, MOST_RECORDS, Member};
use crate::ids::{Incarnation, Nonce};
use crate::ledger::NodeIdentity;
use crate::needed;
use crate::pool::{Block, BlockRequest, Labels, Pool};
use crate::record::{BlockRecord, Boot};
use crate::view::{Versioned, View};

mod none;

pub use none::{AlreadyClaimed, Exhausted, NoClaim, Unavailable};

/// Maximum number of blocks released in one change, which also needs room for the records that it depends on.
pub const MAX_PER_CHANGE: usize = MOST_RECORDS - 2;

/// Number of addresses of one family. A node with fewer free ones claims another block in advance; it keeps twice as
/// many free when it releases a block.
pub const LOW_WATER: u64 = 16;

/// The records that must be unchanged when a claim takes effect.
#[derive(Debug, Clone)]
pub struct Preconditions<'a> {
    /// The claiming node.
    pub by: Member,
    /// Its incarnation.
    pub incarnation: &'a Incarnation,
    /// The pool to claim from.
    pub pool: &'a Versioned<Pool>,
}

impl Claim {
    /// The claim of the block; it takes effect only if the records of node and pool are unchanged.
    pub fn new(grounds: Preconditions<'_>, block: Block, nonce: Nonce) -> Self {
        let Preconditions { by, incarnation, pool } = grounds;
        let record = BlockRecord {
            node: by.node.clone(),
            incarnation: incarnation.clone(),
            pool: pool.record.name.clone(),
            nonce,
        };
        Self { by, block, record, pool: pool.record.cidr(), pool_revision: pool.revision }
    }
}

rule! {
    /// Whether claims must wait while the owners of lost records restore them.
    pub(crate) fn delays_claims(hold_off: bool) -> bool {
        hold_off
    }
    NoCaution => false
}

/// The claiming node, with the facts that it uses.
#[derive(Debug, Clone)]
pub struct Claimant<'a> {
    /// The node's name.
    pub me: &'a NodeName,
    /// The node's labels.
    pub labels: &'a Labels,
    /// The identity in its ledger; `None` before the first registration.
    pub identity: Option<&'a NodeIdentity>,
    /// The machine id and boot id of this machine.
    pub boot: Boot<'a>,
    /// The cluster's records, as last read.
    pub view: &'a View,
    /// Whether no block is claimed: the datastore lost records, and their owners are restoring them.
    pub hold_off: bool,
}

impl Claimant<'_> {
    /// The claim to try next. `lost` contains the blocks that other nodes claimed first.
    pub fn attempt(
        &self,
        wanted: &BlockRequest,
        lost: &BTreeSet<Block>,
        nonce: Nonce,
    ) -> Result<Claim, NoClaim> {
        let view = self.view;
        let (Some(identity), Some(node)) = (self.identity, view.nodes.get(self.me)) else {
            return Err(Unavailable::Unregistered.into());
        };
        // A claim based on the record of another incarnation or machine would belong to that one.
        if node.record.incarnation != identity.incarnation || Boot::from(&*node.record) != self.boot {
            return Err(Unavailable::OtherBoot.into());
        }
        if let Some(away) = Unavailable::if_unreachable(view) {
            return Err(away.into());
        }
        if delays_claims(self.hold_off) {
            return Err(Unavailable::HoldOff.into());
        }
        let (pool, block) = next_block(view, self.me, self.labels, wanted, lost)?;
        let by = Member { node: identity.node.clone(), revision: node.revision };
        let grounds = Preconditions { by, incarnation: &identity.incarnation, pool };
        Ok(Claim::new(grounds, block, nonce))
    }
}

/// The free blocks of the pool in the order in which the node tries them. The start depends on the node's name, so that
/// nodes that start together try different blocks; after the last block follows the first.
pub fn candidates<'a>(
    node: &NodeName,
    pool: &'a Pool,
    is_taken: impl Fn(Block) -> bool + 'a,
) -> impl Iterator<Item = Block> + 'a {
    let last = pool.last_block();
    let start = own_offset(node, pool) % last.saturating_add(1);
    (start..=last).chain(0..start).map(|index| pool.block(index)).filter(move |block| !is_taken(*block))
}

/// The block that node `me` with these labels tries next, and its pool; or the reason why there is none. Pools
/// restricted by labels are tried first.
pub fn next_block<'a>(
    view: &'a View,
    me: &NodeName,
    labels: &Labels,
    wanted: &BlockRequest,
    lost: &BTreeSet<Block>,
) -> Result<(&'a Versioned<Pool>, Block), Exhausted> {
    let mut tried = Vec::new();
    let mut pools: Vec<_> = view.pools.values().filter(|pool| pool.record.is_open_to(labels)).collect();
    pools.sort_by_key(|pool| Reverse(pool.record.nodes.len()));
    for pool in pools {
        let name = &pool.record.name;
        // Claims of another size are rare: from a pool with a changed block length, or written by hand.
        let sized = |block: &&Block| block.cidr().length() != pool.record.block_length();
        let odd: Vec<&Block> = view.blocks.keys().filter(sized).collect();
        let is_taken = |block: Block| {
            view.blocks.contains_key(&block)
                || lost.contains(&block)
                || needed::overlapping(&view.needed, block.cidr()).is_some()
                || odd.iter().any(|odd| odd.cidr().overlaps(block.cidr()))
        };
        let found = match wanted {
            BlockRequest::Any(family, only) => {
                if *family != pool.record.family() || only.as_ref().is_some_and(|only| only != name) {
                    continue;
                }
                candidates(me, &pool.record, is_taken).next()
            }
            BlockRequest::This(block) if !pool.record.has_block(*block) => continue,
            BlockRequest::This(block) => Some(*block).filter(|block| !is_taken(*block)),
        };
        if let Some(block) = found {
            return Ok((pool, block));
        }
        tried.push(match wanted {
            BlockRequest::This(block) => AlreadyClaimed::Block(*block),
            BlockRequest::Any(..) => AlreadyClaimed::Pool(AllClaimed::of(view, &pool.record)),
        });
    }
    Err(if tried.is_empty() {
        Exhausted::NoPool(NoPool::of(view, labels, wanted))
    } else {
        Exhausted::Taken(tried)
    })
}

/// A number that depends on the node's name and the pool's range: the same at every start.
fn own_offset(node: &NodeName, pool: &Pool) -> u128 {
    let mut hash = Sha256::new();
    hash.update(node.as_str());
    hash.update([0]);
    hash.update(pool.cidr().to_string());
    let digest = hash.finalize();
    u128::from_be_bytes(digest[..16].try_into().expect("SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PoolState;

    fn pool(cidr: &str, block_length: u8) -> Pool {
        Pool::new("p".parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active).unwrap()
    }

    #[test]
    fn a_node_tries_every_free_block_once_from_its_own_start() {
        let pool = pool("10.0.0.0/20", 26);
        let taken = pool.block(7);
        let order = |node: &str| -> Vec<_> {
            candidates(&node.parse().unwrap(), &pool, |block| block == taken).collect()
        };
        let all: BTreeSet<_> = order("n1").into_iter().collect();
        assert_eq!((order("n1").len(), all.len()), (63, 63));
        assert!(!all.contains(&taken));
        assert_eq!(order("n1"), order("n1"));
        let starts: BTreeSet<_> = (0..30).map(|n| order(&format!("n{n}"))[0]).collect();
        assert!(starts.len() > 15, "30 nodes start at {} places", starts.len());
    }

    #[test]
    fn a_candidate_in_a_pool_of_2_to_the_66_blocks_is_found() {
        let pool = pool("fd00:244::/56", 122);
        let first = candidates(&"n1".parse().unwrap(), &pool, |_| false).next().unwrap();
        assert!(pool.has_block(first), "{first}");
    }
}
