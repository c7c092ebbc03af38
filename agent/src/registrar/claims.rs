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
use crate::view::{Known, Source, View};

/// Attempts at a block before whoever needs it is told: each fails only because somebody else got one.
const ATTEMPTS: usize = 50;

/// A node with fewer free addresses of a family than this claims the next block before it needs it.
pub const LOW_WATER: u64 = 16;

/// A wish for another block.
#[derive(Debug)]
pub struct ClaimRequest {
    /// Of that family.
    pub family: Family,
    /// Of that pool.
    pub pool: Option<PoolName>,
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
        let ClaimRequest { family, pool, reply } = request;
        let enough = if reply.is_some() { 1 } else { LOW_WATER };
        let wanted = pool.clone();
        let free = self.agent.ipam.run(move |ipam| ipam.total(family, wanted.as_ref(), now()).free).await;
        let result = if free >= enough { Ok(()) } else { self.claim(family, pool).await };
        match (reply, result) {
            (Some(reply), result) => drop(reply.send(result)),
            (None, Err(error)) => warn!(%family, "few addresses are left: {error}"),
            (None, Ok(())) => {}
        }
    }

    /// Claims a block.
    pub(super) async fn claim(&self, family: Family, pool: Option<PoolName>) -> Result<(), ClaimError> {
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
            let (pool, block) = next_block(&view, me, family, pool.as_ref(), &lost)?;
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

/// The block to try next, and its pool.
fn next_block<'a>(
    view: &'a View,
    me: &NodeName,
    family: Family,
    wanted: Option<&PoolName>,
    lost: &BTreeSet<Block>,
) -> Result<(&'a Known<Pool>, Block), ClaimError> {
    let mut tried = Vec::new();
    for (name, pool) in &view.pools {
        let usable = pool.record.state == PoolState::Active && pool.record.family() == family;
        if !usable || wanted.is_some_and(|wanted| wanted != name) {
            continue;
        }
        // Claims of another size are rare: pools that were cut anew, or what somebody wrote by hand.
        let sized = |block: &&Block| block.cidr().length() != pool.record.block_length();
        let odd: Vec<&Block> = view.blocks.keys().filter(sized).collect();
        let is_taken = |block: Block| {
            view.blocks.contains_key(&block)
                || lost.contains(&block)
                || odd.iter().any(|odd| odd.cidr().overlaps(block.cidr()))
        };
        if let Some(block) = candidates(me, &pool.record, is_taken).next() {
            return Ok((pool, block));
        }
        let blocks = pool.record.last_block().saturating_add(1);
        tried.push(format!(
            "pool {name} ({}) has no free block, all {blocks} are claimed",
            pool.record.cidr()
        ));
    }
    Err(ClaimError::Exhausted(match (tried.is_empty(), wanted) {
        (false, _) => tried.join("; "),
        (true, Some(wanted)) => format!("there is no active {family} pool {wanted}"),
        (true, None) => format!("there is no active {family} pool"),
    }))
}
