//! The end of an attachment: first its interface, then its addresses, whoever wants it gone.

use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Refusal, RefusalKind};
use polder_api::rule;
use tracing::{info, warn};

use super::PodHost;
use crate::cause::HostError;
use crate::ledger::{Held, LedgerError};
use crate::node::NodeIpam;
use crate::release::NotReleased;

/// How long a DEL waits for an ADD of the same attachment to end.
pub const WIRING_PATIENCE: Duration = Duration::from_secs(10);

/// Takes an attachment away: first its interface, then its addresses. Succeeds where there is nothing.
pub async fn del<H: PodHost>(host: &H, attachment: &Attachment) -> Result<(), Refusal> {
    // A plugin that still wires would make an interface for an attachment that is gone.
    let lock = host.lock(attachment, WIRING_PATIENCE).await;
    if lock.is_none() {
        if !goes_on_without_lock() {
            return Err(Refusal::try_again(format!("{attachment} is being wired")));
        }
        warn!(%attachment, "its ADD does not end: taking it away nevertheless");
        let key = attachment.clone();
        host.ledger(move |ipam, _| ipam.overtake(&key)).await;
    }
    // A runtime must not be kept from forgetting a pod that is gone.
    let released = match lock {
        Some(_) => release_locked(host, attachment).await,
        None => release(host, attachment).await,
    };
    drop(released.map_err(|error| Refusal::new(RefusalKind::Failed, error.to_string()))?);
    if lock.is_none()
        && let Some(_lock) = host.try_lock(attachment)
    {
        // The ADD has ended meanwhile.
        let _ = end_overtaken(host, attachment).await;
    }
    Ok(())
}

/// Takes in that the ADD of an attachment has ended that was taken away before, and that there is no interface of it.
async fn forget_overtaken<H: PodHost>(host: &H, attachment: &Attachment) {
    let key = attachment.clone();
    let was_overtaken = host.ledger(move |ipam, _| ipam.forget_overtaken(&key)).await;
    if was_overtaken {
        host.addresses_freed();
    }
}

/// Deletes what the plugin of an ADD has made after the attachment was taken away; nothing of one that was added again since. For
/// whoever has locked the attachment.
pub(super) async fn end_overtaken<H: PodHost>(host: &H, attachment: &Attachment) -> Result<(), HostError> {
    let key = attachment.clone();
    let look = move |ipam: &mut NodeIpam<H::Ledger>, _| {
        let is_overtaken = ipam.overtaken().any(|overtaken| *overtaken == key);
        (is_overtaken, ipam.get(&key).is_some_and(|held| !held.leaving))
    };
    let (is_overtaken, is_there_again) = host.ledger(look).await;
    if !is_overtaken {
        return Ok(());
    }
    if !is_there_again && let Err(error) = host.delete_interface(attachment).await {
        warn!(%attachment, %error, "what its ADD has made after its DEL is not deleted yet");
        return Err(error);
    }
    forget_overtaken(host, attachment).await;
    Ok(())
}

/// Takes an attachment of a removed node away. Fails while its ADD has not ended: the node would say that its pods are gone, and
/// the plugin would make an interface that no pass deletes.
pub async fn cut_off<H: PodHost>(host: &H, attachment: &Attachment) -> Result<(), NotReleased> {
    let Some(_lock) = host.lock(attachment, WIRING_PATIENCE).await else {
        return Err(NotReleased::Busy(attachment.clone()));
    };
    match release_locked(host, attachment).await? {
        Addresses::Freed => Ok(()),
        Addresses::Kept(error) => Err(error.into()),
    }
}

rule! {
    /// Whether a DEL goes on whose ADD hangs. The pass deletes an interface that is made after it.
    fn goes_on_without_lock() -> bool {
        true
    }
    DelGivesUp => false
}

rule! {
    /// Whether addresses are freed only when their interface is gone.
    fn interface_goes_first() -> bool {
        true
    }
    FreedFirst => false
}

/// What became of the addresses of an attachment whose interface is gone.
#[derive(Debug)]
#[must_use]
pub enum Addresses {
    /// They are free, or there were none.
    Freed,
    /// The ledger cannot be written, for that reason: they are freed when the attachment is looked at again.
    Kept(LedgerError),
}

/// Takes an attachment away, for whoever has locked it. No ADD of it is under way then: nothing of it comes any more.
pub async fn release_locked<H: PodHost>(host: &H, attachment: &Attachment) -> Result<Addresses, HostError> {
    let released = release(host, attachment).await?;
    forget_overtaken(host, attachment).await;
    Ok(released)
}

/// Takes an attachment away. A ledger that cannot be written keeps the addresses, and nothing else.
async fn release<H: PodHost>(host: &H, attachment: &Attachment) -> Result<Addresses, HostError> {
    let key = attachment.clone();
    let (held, written) = host.ledger(move |ipam, _| ipam.begin_release(&key)).await;
    if let Err(error) = written {
        warn!(%attachment, "the ledger cannot be written: {error}");
    }
    if !interface_goes_first() {
        let _ = host.free(attachment).await;
    }
    host.delete_interface(attachment).await?;
    let Some(held) = held else { return Ok(Addresses::Freed) };
    host.forget(&held).await;
    let freed = host.free(attachment).await;
    host.attachments_changed();
    host.addresses_freed();
    Ok(match freed {
        Ok(()) => {
            info!(%attachment, addresses = ?held.addresses, "released");
            Addresses::Freed
        }
        Err(error) => {
            warn!(%attachment, "its interface is gone, its addresses are not free: the ledger cannot be written: {error}");
            Addresses::Kept(error)
        }
    })
}

/// Takes an attachment away for that reason, for whoever has locked it. What fails is tried again by the sweeper.
pub async fn release_for<H: PodHost>(host: &H, attachment: &Attachment, why: &str) {
    info!(%attachment, why, "releasing");
    if let Err(error) = release_locked(host, attachment).await {
        warn!(%attachment, %error, "not released, to be tried again");
    }
}

/// What becomes of an attachment whose plugin has gone away: if there is no interface, there never will be one; one of an
/// attachment that was taken away meanwhile goes, too. For whoever has locked it.
pub async fn abandoned<H: PodHost>(host: &H, attachment: &Attachment) {
    let key = attachment.clone();
    let _ = end_overtaken(host, attachment).await;
    let Some(held) = host.ledger(move |ipam, _| ipam.get(&key).cloned()).await else { return };
    match is_gone(host, held).await {
        Ok(false) => {}
        Ok(true) => {
            info!(%attachment, "its plugin ended without making an interface");
            let _ = release_locked(host, attachment).await;
        }
        Err(error) => warn!(%attachment, %error, "cannot see whether its plugin made an interface"),
    }
}

/// Whether the attachment has no interface any more.
pub(super) async fn is_gone<H: PodHost>(host: &H, held: Held) -> Result<bool, HostError> {
    let attachment = held.attachment.clone();
    Ok(host.gone(vec![held]).await?.contains(&attachment))
}
