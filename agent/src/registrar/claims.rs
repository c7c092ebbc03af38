//! Claims blocks: one transaction each, tried until one is won or there is none.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::{Family, NodeName, PoolName};
use polder_ipam::Block;
use polder_ipam::claim::{Claim, Grounds, LOW_WATER, Wanted, next_block};
use polder_ipam::key::Key;
use polder_ipam::ledger::{LedgerError, OwnedBlock};
use polder_ipam::pool::Labels;
use polder_ipam::record::{BlockRecord, Nonce};
use polder_ipam::store::{Outcome, Range, StoreError};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{info, warn};

use super::Registrar;
use crate::machine::{MachineError, now, random_name};
use polder_ipam::view::{Source, View};

/// Attempts at a block before whoever needs it is told: each fails only because somebody else got one.
const ATTEMPTS: usize = 50;

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
            if self.is_cautious() {
                let reason = "the store has lost records, and their owners are putting them back".to_owned();
                return Err(ClaimError::Unavailable(reason));
            }
            let labels = &self.agent.config.labels;
            let (pool, block) =
                next_block(&view, me, labels, &wanted, &lost).map_err(ClaimError::Exhausted)?;
            let nonce =
                random_name().map_err(|error: MachineError| ClaimError::Unavailable(error.to_string()))?;
            let of_block = (*pool.record).clone();
            let grounds = Grounds {
                node: &identity.node,
                incarnation: &identity.incarnation,
                node_revision: node.revision,
                pool: &pool.record,
                pool_revision: pool.revision,
            };
            let claim = Claim::new(&grounds, block, Nonce(nonce));
            if self.commit(&claim).await? {
                let BlockRecord { pool, nonce, .. } = claim.record;
                info!(%block, %pool, "claimed");
                let owned = OwnedBlock { block, pool, nonce, leaving: false };
                self.agent.ipam.run(move |ipam| ipam.add_block(owned, &of_block)).await?;
                let (blocks, gateways) =
                    self.agent.ipam.run(|ipam| (ipam.blocks().to_vec(), ipam.gateways().to_vec())).await;
                self.announce(&Some(identity), &blocks, &gateways);
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
                Ok(claim.is_made(found.entries.first()))
            }
        }
    }
}

/// Whether there is a block to be had, as far as that is known here.
pub fn could_claim(
    view: &View,
    me: &NodeName,
    labels: &Labels,
    family: Family,
    pool: Option<&PoolName>,
) -> Result<(), ClaimError> {
    if let Some(reason) = &view.lost {
        return Err(ClaimError::Unavailable(reason.clone()));
    }
    let wanted = Wanted::Any(family, pool.cloned());
    next_block(view, me, labels, &wanted, &BTreeSet::new()).map(|_| ()).map_err(ClaimError::Exhausted)
}
