//! Claims blocks. Each attempt is one change; attempts continue until one succeeds or no block is available.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::{Family, NodeName, PoolName};
use tracing::info;

use super::{AttemptResult, Registrar, RegistrarHost, attempt};
use crate::change::Claim;
use crate::claim::{Claimant, Exhausted, NoClaim, Unavailable, next_block};
use crate::ids::Nonce;
use crate::ledger::{LedgerError, OwnedBlock};
use crate::moment::Moment;
use crate::node::NodeIpam;
use crate::pool::{Block, BlockRequest, Labels};
use crate::record::BlockRecord;
use crate::view::View;

/// Maximum attempts before the request fails. An attempt fails because another node claimed the block first, or because
/// its outcome is unknown.
const BLOCKS_TRIED: usize = 50;

/// The longest wait for a changed view before the next attempt.
const VIEW_WAIT: Duration = Duration::from_millis(200);

impl<H: RegistrarHost> Registrar<'_, H> {
    /// Serves a request for a block: claims one unless enough addresses are free by now, or the node owns the requested
    /// block. Enough is one address if an ADD waits (`is_add_waiting`), otherwise the low-water mark.
    pub async fn serve(&self, wanted: BlockRequest, is_add_waiting: bool) -> Result<(), NoClaim> {
        let wanted_block = wanted.clone();
        let served = self.host.ledger(move |ipam, now| match wanted_block {
            BlockRequest::Any(family, pool) => {
                let enough = if is_add_waiting { 1 } else { ipam.low_water() };
                ipam.total(family, pool.as_ref(), now).free >= enough
            }
            BlockRequest::This(block) => ipam.blocks().iter().any(|owned| owned.block == block),
        });
        if served.await { Ok(()) } else { self.claim(wanted).await }
    }

    /// Claims a block, and adds it to the ledger.
    pub(super) async fn claim(&self, wanted: BlockRequest) -> Result<(), NoClaim> {
        let mut lost: BTreeSet<Block> = BTreeSet::new();
        let mut unanswered = None;
        for _ in 0..BLOCKS_TRIED {
            let view = self.host.view();
            let identity = self.host.ledger(|ipam, _| ipam.identity()).await?;
            let nonce = self.host.fresh_name()?;
            let claimant = Claimant {
                me: &self.me.name,
                labels: &self.host.labels(),
                identity: identity.as_ref(),
                boot: self.me.boot(),
                view: &view,
                hold_off: self.delays_claims(&view),
            };
            let claim = claimant.attempt(&wanted, &lost, Nonce::new(nonce))?;
            let block = claim.block;
            match attempt(self.host, &claim.clone().into()).await {
                AttemptResult::Made(revision) => {
                    self.host.wait_for_revision(revision).await?;
                    return self.take(claim, &view).await;
                }
                AttemptResult::Refused => unanswered = None,
                // If it is made later, the membership rules adopt the block once the view shows the claim.
                AttemptResult::NotMade(error) => unanswered = Some(error),
                // The same error is expected for any other block.
                AttemptResult::Failed(error) => return Err(error.into()),
            }
            lost.insert(block);
            // Another node may have claimed it: wait for the view to show that.
            self.host.changed(&view, VIEW_WAIT).await;
        }
        Err(match unanswered {
            Some(error) => error.into(),
            None => Unavailable::Overtaken(BLOCKS_TRIED).into(),
        })
    }

    /// Adds a claimed block to the ledger.
    async fn take(&self, claim: Claim, view: &View) -> Result<(), NoClaim> {
        let block = claim.block;
        let BlockRecord { pool: name, nonce, .. } = claim.record;
        info!(%block, pool = %name, "claimed");
        let owned = OwnedBlock { block, pool: name.clone(), nonce, leaving: false };
        let mut is_useless = false;
        if let Some(pool) = view.pools.get(&name).map(|pool| (*pool.record).clone()) {
            let add = move |ipam: &mut NodeIpam<H::Ledger>, now: Moment| {
                ipam.add_block(owned, &pool, now)?;
                Ok::<_, LedgerError>(!ipam.is_for_pods(block, now))
            };
            is_useless = self.host.ledger(add).await?;
        }
        let (identity, blocks, gateways) = self
            .host
            .ledger(|ipam, _| (ipam.identity(), ipam.blocks().to_vec(), ipam.gateways().to_vec()))
            .await;
        self.publish_allocations(identity?, &blocks, &gateways);
        if is_useless {
            return Err(Exhausted::Useless { block, pool: name }.into());
        }
        Ok(())
    }
}

/// Whether a block is available, as far as this view shows.
pub fn could_claim(
    view: &View,
    me: &NodeName,
    labels: &Labels,
    family: Family,
    pool: Option<&PoolName>,
) -> Result<(), NoClaim> {
    if let Some(reason) = &view.lost {
        return Err(Unavailable::Unreachable(reason.clone()).into());
    }
    let wanted = BlockRequest::Any(family, pool.cloned());
    next_block(view, me, labels, &wanted, &BTreeSet::new())?;
    Ok(())
}
