//! Claims blocks: one transaction each, tried until one is won or there is none.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::{Family, NodeName, PoolName};
use polder_ipam::Block;
use polder_ipam::Pool;
use polder_ipam::claim::{Claim, candidates};
use polder_ipam::key::Key;
use polder_ipam::ledger::LedgerError;
use polder_ipam::pool::PoolState;
use polder_ipam::record::{Nonce, encode};
use polder_ipam::store::{Outcome, Range, StoreError};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{Registrar, grounds};
use crate::machine::{MachineError, now, random_name};
use polder_ipam::view::{Known, Source, View};

/// Attempts at a block before whoever needs it is told: each fails only because somebody else got one.
const ATTEMPTS: usize = 50;

/// A node with fewer free addresses of a family than this claims the next block before it needs it.
pub const LOW_WATER: u64 = 16;

/// Which block is wanted.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// One of that family, and of that pool if one is named.
    Any(Family, Option<PoolName>),
    /// That one.
    This(Block),
}

/// A wish for another block.
#[derive(Debug)]
pub struct ClaimRequest {
    /// Which one.
    pub wanted: Wanted,
    /// Who waits for it. With nobody waiting, it is for later.
    pub reply: Option<oneshot::Sender<Result<(), ClaimError>>>,
}

/// There is no block to be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// All blocks are claimed, or there is no pool to claim from.
    #[error("{0}")]
    Exhausted(String),
    /// The store or the ledger failed: try again.
    #[error("no block can be claimed: {0}")]
    Unavailable(String),
}

impl From<StoreError> for ClaimError {
    fn from(error: StoreError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

impl From<LedgerError> for ClaimError {
    fn from(error: LedgerError) -> Self {
        Self::Unavailable(error.to_string())
    }
}

impl Registrar {
    /// Serves a wish for another block, unless there are free addresses again.
    pub(super) async fn serve(&self, request: ClaimRequest) {
        let ClaimRequest { wanted, reply } = request;
        let enough = if reply.is_some() { 1 } else { LOW_WATER };
        let sought = wanted.clone();
        let served = self.agent.ipam.run(move |ipam| match sought {
            Wanted::Any(family, pool) => ipam.total(family, pool.as_ref(), now()).free >= enough,
            Wanted::This(block) => ipam.blocks().iter().any(|owned| owned.block == block),
        });
        let result = if served.await { Ok(()) } else { self.claim(wanted).await };
        match (reply, result) {
            (Some(reply), result) => drop(reply.send(result)),
            (None, Err(error)) => warn!("few addresses are left: {error}"),
            (None, Ok(())) => {}
        }
    }

    /// Claims a block.
    pub(super) async fn claim(&self, wanted: Wanted) -> Result<(), ClaimError> {
        let me = &self.agent.config.node;
        let mut lost: BTreeSet<Block> = BTreeSet::new();
        for _ in 0..ATTEMPTS {
            let view = self.agent.board.view();
            let identity = self.agent.ipam.run(|ipam| ipam.identity()).await?;
            let (Some(identity), Some(node)) = (identity, view.nodes.get(me)) else {
                return Err(ClaimError::Unavailable("the node is not registered".to_owned()));
            };
            if view.source != Source::Store || view.lost.is_some() {
                let reason = view.lost.clone().unwrap_or_else(|| "the store is away".to_owned());
                return Err(ClaimError::Unavailable(reason));
            }
            let (pool, block) = next_block(&view, me, &wanted, &lost)?;
            let nonce =
                random_name().map_err(|error: MachineError| ClaimError::Unavailable(error.to_string()))?;
            let claim = Claim::new(&grounds(&identity, node, pool), block, Nonce(nonce));
            if self.commit(&claim).await? {
                self.add_block(&view, block, &claim.record).await?;
                info!(%block, pool = %claim.record.pool, "claimed");
                self.announce_holdings(Some(&identity)).await;
                return Ok(());
            }
            lost.insert(block);
            // Somebody was faster: what he did is about to be seen.
            let mut changed = self.agent.board.view.subscribe();
            let _ = timeout(Duration::from_millis(200), changed.changed()).await;
        }
        Err(ClaimError::Unavailable(format!("{ATTEMPTS} attempts were lost to other nodes")))
    }

    /// Carries out a claim; true if it is ours. An outcome that is not known is looked up, not tried again.
    async fn commit(&self, claim: &Claim) -> Result<bool, ClaimError> {
        match self.agent.store.commit(&claim.txn).await {
            Ok(Outcome::Applied { revision }) => {
                self.caught_up(revision).await?;
                Ok(true)
            }
            Ok(Outcome::Refused) => Ok(false),
            Err(error) => {
                let range = Range::single(Key::Block(claim.block).to_string());
                let found = self.agent.store.range(&range).await.map_err(|_| error)?;
                // Gone or never there: should it still come to pass, it is taken over when it is seen.
                Ok(found.entries.first().is_some_and(|entry| entry.value == encode(&claim.record)))
            }
        }
    }
}

/// Whether there is a block to be had, as far as that is known here.
pub fn could_claim(
    view: &View,
    me: &NodeName,
    family: Family,
    pool: Option<&PoolName>,
) -> Result<(), ClaimError> {
    if let Some(reason) = &view.lost {
        return Err(ClaimError::Unavailable(reason.clone()));
    }
    next_block(view, me, &Wanted::Any(family, pool.cloned()), &BTreeSet::new()).map(|_| ())
}

/// The block to try next, and its pool.
fn next_block<'a>(
    view: &'a View,
    me: &NodeName,
    wanted: &Wanted,
    lost: &BTreeSet<Block>,
) -> Result<(&'a Known<Pool>, Block), ClaimError> {
    let mut tried = Vec::new();
    for (name, pool) in view.pools.iter().filter(|(_, pool)| pool.record.state == PoolState::Active) {
        // Claims of another size are rare: pools that were cut anew, or what somebody wrote by hand.
        let sized = |block: &&Block| block.cidr().length() != pool.record.block_length();
        let odd: Vec<&Block> = view.blocks.keys().filter(sized).collect();
        let is_taken = |block: Block| {
            view.blocks.contains_key(&block)
                || lost.contains(&block)
                || odd.iter().any(|odd| odd.cidr().overlaps(block.cidr()))
        };
        let found = match wanted {
            Wanted::Any(family, only) => {
                if *family != pool.record.family() || only.as_ref().is_some_and(|only| only != name) {
                    continue;
                }
                candidates(me, &pool.record, is_taken).next()
            }
            Wanted::This(block) if !pool.record.has_block(*block) => continue,
            Wanted::This(block) => Some(*block).filter(|block| !is_taken(*block)),
        };
        if let Some(block) = found {
            return Ok((pool, block));
        }
        tried.push(match wanted {
            Wanted::This(block) => format!("block {block} is claimed"),
            Wanted::Any(..) => {
                let blocks = pool.record.last_block().saturating_add(1);
                let cidr = pool.record.cidr();
                format!("pool {name} ({cidr}) has no free block, all {blocks} are claimed")
            }
        });
    }
    Err(ClaimError::Exhausted(match (tried.is_empty(), wanted) {
        (false, _) => tried.join("; "),
        (true, Wanted::Any(family, Some(pool))) => format!("there is no active {family} pool {pool}"),
        (true, Wanted::Any(family, None)) => format!("there is no active {family} pool"),
        (true, Wanted::This(block)) => format!("there is no active pool with block {block}"),
    }))
}
