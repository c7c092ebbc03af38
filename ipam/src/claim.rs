//! Claiming a block: where to look, and what the claim rests on.
//!
//! There are no locks and there is no pending state: either the claim is in the store or it is not. An attempt
//! whose outcome is unknown is never repeated blindly. It is looked up, and its nonce says whose it is.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use polder_api::NodeName;
use polder_api::rule;
use sha2::{Digest, Sha256};

use crate::change::{Claim, MOST_RECORDS, Member};
use crate::ids::{Incarnation, Nonce};
use crate::ledger::Identity;
use crate::needed;
use crate::pool::{Block, BlockRequest, Labels, Pool};
use crate::record::{BlockRecord, Life};
use crate::shortage::{AllClaimed, NoPool};
use crate::view::{Known, View};

mod none;

pub use none::{Exhausted, NoClaim, Taken, Unavailable};

/// How many blocks go back at once: what that rests on has to have room in the change, too.
pub const AT_ONCE: usize = MOST_RECORDS - 2;

/// A node with fewer free addresses of a family than this claims the next block before it needs it; and it keeps twice as
/// many when it gives a block back.
pub const LOW_WATER: u64 = 16;

/// What a claim rests on: records that must still be as they were when it takes effect.
#[derive(Debug, Clone)]
pub struct Grounds<'a> {
    /// The claiming node.
    pub by: Member,
    /// Its incarnation.
    pub incarnation: &'a Incarnation,
    /// The pool to claim from.
    pub pool: &'a Known<Pool>,
}

impl Claim {
    /// The claim of the block, if node and pool are as they were.
    pub fn new(grounds: Grounds<'_>, block: Block, nonce: Nonce) -> Self {
        let Grounds { by, incarnation, pool } = grounds;
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
    /// Whether nothing is claimed while the owners of lost records put them back.
    pub(crate) fn holds_off(caution: bool) -> bool {
        caution
    }
    NoCaution => false
}

/// Who wants to claim, and what he knows.
#[derive(Debug, Clone)]
pub struct Claimant<'a> {
    /// The node's name.
    pub me: &'a NodeName,
    /// What the configuration says of it.
    pub labels: &'a Labels,
    /// Who it is, as its ledger says.
    pub identity: Option<&'a Identity>,
    /// Which machine it is, and which boot of it.
    pub life: Life<'a>,
    /// The cluster.
    pub view: &'a View,
    /// Whether claims wait: the store has lost records, and their owners are putting them back.
    pub caution: bool,
}

impl Claimant<'_> {
    /// The claim to try next. `lost` are those blocks that others were faster at.
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
        // A claim that rests on the record of another incarnation or machine would be made in its name.
        if node.record.incarnation != identity.incarnation || Life::from(&*node.record) != self.life {
            return Err(Unavailable::OtherLife.into());
        }
        if let Some(away) = Unavailable::away(view) {
            return Err(away.into());
        }
        if holds_off(self.caution) {
            return Err(Unavailable::Caution.into());
        }
        let (pool, block) = next_block(view, self.me, self.labels, wanted, lost)?;
        let by = Member { node: identity.node.clone(), revision: node.revision };
        let grounds = Grounds { by, incarnation: &identity.incarnation, pool };
        Ok(Claim::new(grounds, block, nonce))
    }
}

/// The free blocks of the pool, in the order in which the node should try them: from a place of its own, so that
/// nodes that start together do not meet, then on and round.
pub fn candidates<'a>(
    node: &NodeName,
    pool: &'a Pool,
    is_taken: impl Fn(Block) -> bool + 'a,
) -> impl Iterator<Item = Block> + 'a {
    let last = pool.last_block();
    let start = place(node, pool) % last.saturating_add(1);
    (start..=last).chain(0..start).map(|index| pool.block(index)).filter(move |block| !is_taken(*block))
}

/// The block that node `me` with these labels should try next, and its pool; or why there is none. Pools that ask for
/// labels come before those that are for all.
pub fn next_block<'a>(
    view: &'a View,
    me: &NodeName,
    labels: &Labels,
    wanted: &BlockRequest,
    lost: &BTreeSet<Block>,
) -> Result<(&'a Known<Pool>, Block), Exhausted> {
    let mut tried = Vec::new();
    let mut pools: Vec<_> = view.pools.values().filter(|pool| pool.record.is_open_to(labels)).collect();
    pools.sort_by_key(|pool| Reverse(pool.record.nodes.len()));
    for pool in pools {
        let name = &pool.record.name;
        // Claims of another size are rare: pools that were cut anew, or what somebody wrote by hand.
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
            BlockRequest::This(block) => Taken::Block(*block),
            BlockRequest::Any(..) => Taken::Pool(AllClaimed::of(view, &pool.record)),
        });
    }
    Err(if tried.is_empty() {
        Exhausted::NoPool(NoPool::of(view, labels, wanted))
    } else {
        Exhausted::Taken(tried)
    })
}

/// A number that is the node's own in that pool, and the same at every start.
fn place(node: &NodeName, pool: &Pool) -> u128 {
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
    fn a_node_tries_every_free_block_once_and_starts_at_a_place_of_its_own() {
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
    fn a_pool_of_2_to_the_66_blocks_is_not_counted_through() {
        let pool = pool("fd00:244::/56", 122);
        let first = candidates(&"n1".parse().unwrap(), &pool, |_| false).next().unwrap();
        assert!(pool.has_block(first), "{first}");
    }
}
