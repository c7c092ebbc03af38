//! Claims blocks: one transaction each, tried until one is won or there is none.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::{Family, NodeName, PoolName};
use polder_ipam::Block;
use polder_ipam::claim::{Claim, Claimant, LOW_WATER, NoClaim, next_block};
use polder_ipam::ids::Nonce;
use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::{LedgerError, OwnedBlock};
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::record::BlockRecord;
use polder_ipam::store::{Outcome, StoreError};
use polder_store::NodeIpam;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{info, warn};

use super::Registrar;
use crate::machine::{MachineError, now, random_name};
use crate::requests::ClaimRequest;
use polder_ipam::view::View;

/// Attempts at a block before whoever needs it is told: each fails because somebody else got one, or nobody knows what
/// became of it.
const ATTEMPTS: usize = 50;

/// What became of a claim.
enum Attempted {
    /// It is ours.
    Won,
    /// Somebody else was faster.
    Lost,
    /// There was no answer, and there is nothing of it.
    Unknown(StoreError),
}

impl Registrar {
    /// Serves a wish for another block, unless there are free addresses again.
    pub(super) async fn serve(&self, request: ClaimRequest) {
        let ClaimRequest { wanted, reply } = request;
        if reply.as_ref().is_some_and(oneshot::Sender::is_closed) {
            // Whoever waited has given up, and been told that he gets nothing.
            return;
        }
        let enough = if reply.is_some() { 1 } else { LOW_WATER };
        let sought = wanted.clone();
        let served = self.agent.ipam.run(move |ipam| match sought {
            BlockRequest::Any(family, pool) => ipam.total(family, pool.as_ref(), now()).free >= enough,
            BlockRequest::This(block) => ipam.blocks().iter().any(|owned| owned.block == block),
        });
        let result = if served.await { Ok(()) } else { self.claim(wanted).await };
        match (reply, result) {
            (Some(reply), result) => drop(reply.send(result)),
            (None, Err(error)) => warn!("few addresses are left: {error}"),
            (None, Ok(())) => {}
        }
    }

    /// Claims a block.
    pub(super) async fn claim(&self, wanted: BlockRequest) -> Result<(), NoClaim> {
        let mut lost: BTreeSet<Block> = BTreeSet::new();
        let mut unanswered = None;
        for _ in 0..ATTEMPTS {
            let view = self.agent.board.view();
            let identity = self.agent.ipam.run(|ipam| ipam.identity()).await?;
            let nonce =
                random_name().map_err(|error: MachineError| NoClaim::Unavailable(error.to_string()))?;
            let claimant = Claimant {
                me: &self.agent.config.node,
                labels: &self.agent.config.labels,
                identity: identity.as_ref(),
                life: self.agent.machine.life(),
                view: &view,
                caution: self.is_cautious(),
            };
            let claim = claimant.attempt(&wanted, &lost, Nonce(nonce))?;
            let block = claim.block;
            let attempted = self.commit(&claim).await?;
            if matches!(attempted, Attempted::Won) {
                let BlockRecord { pool, nonce, .. } = claim.record;
                info!(%block, %pool, "claimed");
                let owned = OwnedBlock { block, pool, nonce, leaving: false };
                let name = owned.pool.clone();
                let mut is_useless = false;
                if let Some(pool) = view.pools.get(&owned.pool).map(|pool| (*pool.record).clone()) {
                    let add = move |ipam: &mut NodeIpam| {
                        ipam.add_block(owned, &pool, now())?;
                        Ok::<_, LedgerError>(!ipam.is_for_pods(block, now()))
                    };
                    is_useless = self.agent.ipam.run(add).await?;
                }
                let (blocks, gateways) =
                    self.agent.ipam.run(|ipam| (ipam.blocks().to_vec(), ipam.gateways().to_vec())).await;
                self.announce(identity, &blocks, &gateways);
                if is_useless {
                    return Err(NoClaim::Exhausted(format!(
                        "block {block} of pool {name} is claimed and has no address for a pod: add a pool with larger \
                         blocks"
                    )));
                }
                return Ok(());
            }
            lost.insert(block);
            unanswered = match attempted {
                Attempted::Unknown(error) => Some(error),
                Attempted::Won | Attempted::Lost => None,
            };
            // Somebody was faster: what he did is about to be seen.
            let mut changed = self.agent.board.view.subscribe();
            let _ = timeout(Duration::from_millis(200), changed.changed()).await;
        }
        Err(match unanswered {
            Some(error) => error.into(),
            None => NoClaim::Unavailable(format!("{ATTEMPTS} attempts were lost to other nodes")),
        })
    }

    /// Carries out a claim. An outcome that is not known is looked up, not tried again. A refusal ends the attempt: another
    /// block would be refused, too.
    async fn commit(&self, claim: &Claim) -> Result<Attempted, NoClaim> {
        let error = match self.agent.store.commit(&claim.txn).await {
            Ok(Outcome::Applied { revision }) => {
                self.caught_up(revision).await?;
                return Ok(Attempted::Won);
            }
            Ok(Outcome::Refused) => return Ok(Attempted::Lost),
            Err(error) => error,
        };
        if error.needs_look() {
            let range = Range::single(Key::Block(claim.block).to_string());
            let Ok(found) = self.agent.store.range(&range).await else { return Err(error.into()) };
            if claim.is_made(found.entries.first()) {
                return Ok(Attempted::Won);
            }
        }
        // Gone or never there: should it still come to pass, it is taken over when it is seen.
        if error.is_unknown() { Ok(Attempted::Unknown(error)) } else { Err(error.into()) }
    }
}

/// Whether there is a block to be had, as far as that is known here.
pub fn could_claim(
    view: &View,
    me: &NodeName,
    labels: &Labels,
    family: Family,
    pool: Option<&PoolName>,
) -> Result<(), NoClaim> {
    if let Some(reason) = &view.lost {
        return Err(NoClaim::Unavailable(reason.clone()));
    }
    let wanted = BlockRequest::Any(family, pool.cloned());
    next_block(view, me, labels, &wanted, &BTreeSet::new()).map(|_| ()).map_err(NoClaim::Exhausted)
}
