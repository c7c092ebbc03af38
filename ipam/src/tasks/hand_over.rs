//! Hands reserved addresses over to pods of this node.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use polder_api::message::{RefusalKind, Refuse};
use polder_api::{Attachment, PoolName};
use tracing::info;

use super::{ATTEMPTS, AttemptResult, Registrar, RegistrarHost, attempt};
use crate::change::HandOver;
use crate::claim::Unavailable;
use crate::ledger::MemberState;
use crate::record::Holder;
use crate::reservation::{self, HandOverDenied};
use crate::view::View;

/// The longest wait for a changed view before the next attempt.
const VIEW_WAIT: Duration = Duration::from_millis(500);

/// A request for a reserved address.
#[derive(Debug, Clone)]
pub enum ReservationRequest {
    /// This address.
    Address(IpAddr),
    /// The address that the workload has in this pool, or any free address of the pool.
    Pool(PoolName),
}

/// Why no reserved address is handed over.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotHandedOver {
    /// The request can be repeated.
    #[error(transparent)]
    TryAgain(#[from] RetryReason),
    /// The records do not allow it.
    #[error(transparent)]
    Denied(#[from] HandOverDenied),
}

impl Refuse for NotHandedOver {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Denied(HandOverDenied::Exhausted { .. }) => RefusalKind::PoolExhausted,
            // The current holder may release it soon.
            Self::TryAgain(_)
            | Self::Denied(HandOverDenied::Unregistered { .. } | HandOverDenied::Held { .. }) => {
                RefusalKind::TryAgain
            }
            Self::Denied(HandOverDenied::Foreign { .. } | HandOverDenied::Unfit { .. }) => {
                RefusalKind::AddressTaken
            }
        }
    }
}

/// Why no address is handed over now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RetryReason {
    /// The records cannot be read.
    /// Remedy: correct the error of the datastore; the runtime repeats the ADD.
    #[error("a reserved address needs the datastore: {0}")]
    DatastoreUnreachable(#[source] Unavailable),
    /// The datastore or the node cannot provide it.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The pool was removed.
    /// Remedy: request another pool, or add that pool again with polderctl pool add.
    #[error("pool {0} was removed")]
    PoolGone(PoolName),
    /// The pod that had the address is deleted, but its ADD can still create an interface.
    /// Remedy: none, the runtime repeats the ADD.
    #[error("{0} used the address: it was deleted, but its ADD is still running")]
    AddStillRunning(Attachment),
    /// Every attempt was refused, because the records had changed.
    /// Remedy: none, the runtime repeats the ADD.
    #[error("the reservation keeps changing")]
    Contended,
}

impl<H: RegistrarHost> Registrar<'_, H> {
    /// Serves an ADD that waits for a reserved address. `answer` passes the result to the ADD and returns false if the
    /// ADD no longer waits. In that case the address is unused, and the membership rules release it.
    pub async fn serve_reservation(
        &self,
        wanted: &ReservationRequest,
        owner: &str,
        attachment: &Attachment,
        answer: impl FnOnce(Result<IpAddr, NotHandedOver>) -> bool,
    ) {
        let result = self.hand_over(wanted, owner, attachment).await;
        if let Err(why) = &result {
            info!(%attachment, owner, "no reserved address: {why}");
        }
        let address = result.as_ref().ok().copied();
        let was_delivered = answer(result);
        if let (Some(address), false) = (address, was_delivered) {
            info!(%attachment, %address, "the ADD no longer waits: releasing the address");
            self.release_expected(address, attachment).await;
        }
    }

    async fn release_expected(&self, address: IpAddr, attachment: &Attachment) {
        let holder = attachment.clone();
        self.host.ledger(move |ipam, _| ipam.cancel_expected(address, &holder)).await;
    }

    /// Hands an address over to the attachment, if it is free for the workload. The node expects the address from then
    /// on, until it is used or released.
    pub(super) async fn hand_over(
        &self,
        wanted: &ReservationRequest,
        owner: &str,
        attachment: &Attachment,
    ) -> Result<IpAddr, NotHandedOver> {
        for _ in 0..ATTEMPTS {
            let view = self.host.view();
            let prepared = self.prepare(&view, wanted, owner, attachment).await?;
            let address = prepared.address;
            // Before the attempt: the membership rules release every address that is not expected.
            let holder = attachment.clone();
            self.host.ledger(move |ipam, _| ipam.mark_expected(address, &holder)).await;
            let outcome = self.commit_hand_over(&prepared).await;
            if let Ok(true) = outcome {
                info!(%address, owner, %attachment, generation = prepared.record.generation, "handed over");
                return Ok(address);
            }
            self.release_expected(address, attachment).await;
            outcome?;
            self.host.changed(&view, VIEW_WAIT).await;
        }
        Err(RetryReason::Contended.into())
    }

    async fn prepare(
        &self,
        view: &View,
        wanted: &ReservationRequest,
        owner: &str,
        attachment: &Attachment,
    ) -> Result<HandOver, NotHandedOver> {
        if let Some(away) = Unavailable::if_unreachable(view) {
            return Err(RetryReason::DatastoreUnreachable(away).into());
        }
        if self.delays_claims(view) {
            return Err(RetryReason::Unavailable(Unavailable::HoldOff).into());
        }
        let (identity, held, deleted_meanwhile) = self
            .host
            .ledger(|ipam, _| {
                let held: BTreeSet<Attachment> =
                    ipam.attachments().map(|held| held.attachment.clone()).collect();
                let deleted_meanwhile: BTreeSet<Attachment> = ipam.deleted_meanwhile().cloned().collect();
                (ipam.identity(), held, deleted_meanwhile)
            })
            .await;
        let identity = identity.map_err(Unavailable::from).map_err(RetryReason::from)?;
        let identity = identity.filter(|identity| identity.member_state == MemberState::Member);
        let (Some(identity), Some(node)) = (identity, view.nodes.get(&self.me.name)) else {
            return Err(RetryReason::Unavailable(Unavailable::Unregistered).into());
        };
        let address = match wanted {
            ReservationRequest::Address(address) => *address,
            ReservationRequest::Pool(name) => match view.pools.get(name) {
                Some(pool) => reservation::choose(view, pool, owner)?,
                None => return Err(RetryReason::PoolGone(name.clone()).into()),
            },
        };
        let holder = Holder {
            node: identity.node,
            incarnation: identity.incarnation,
            boot_id: self.me.boot_id.clone(),
            attachment: attachment.clone(),
        };
        let is_add_running = |last: &Attachment| {
            deleted_meanwhile.contains(last) || self.host.is_wired_by_earlier_process(last)
        };
        // The interface is deleted before the ledger entry, so an attachment that is not in the ledger has no
        // interface, unless its ADD is still running.
        let is_gone = |last: &Holder| {
            let last = &last.attachment;
            last == attachment || !(held.contains(last) || is_add_running(last))
        };
        match reservation::hand_over(view, address, owner, &holder, node.revision, &is_gone) {
            Err(HandOverDenied::Held { holder, .. }) if is_add_running(&holder.attachment) => {
                Err(RetryReason::AddStillRunning(holder.attachment).into())
            }
            prepared => Ok(prepared?),
        }
    }

    /// Carries out a hand-over. Returns true if it was made, false if the records have changed.
    async fn commit_hand_over(&self, prepared: &HandOver) -> Result<bool, NotHandedOver> {
        match attempt(self.host, &prepared.clone().into()).await {
            AttemptResult::Made(_) => Ok(true),
            AttemptResult::Refused => Ok(false),
            // If it is made later, the membership rules release the address once the view shows it.
            AttemptResult::NotMade(error) | AttemptResult::Failed(error) => {
                Err(RetryReason::Unavailable(Unavailable::Store(error)).into())
            }
        }
    }
}
