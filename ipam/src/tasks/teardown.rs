//! Releases an attachment: first its interface, then its addresses.

use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Refusal, RefusalKind, Refuse};
use polder_api::rule;
use tracing::{info, warn};

use super::{LastAdd, PodHost};
use crate::cause::HostError;
use crate::ledger::{AttachmentEntry, LedgerError};
use crate::node::NodeIpam;
use crate::release::NotReleased;

/// The longest time that a DEL waits for an ADD of the same attachment to end.
pub const WIRING_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a DEL does not release the attachment.
#[derive(Debug, thiserror::Error)]
enum NotDeleted {
    /// An ADD of the attachment did not end while the DEL waited for it.
    /// Remedy: none, the runtime repeats the DEL.
    #[error("an ADD of {0} is running")]
    AddRuns(Attachment),
    /// The kernel did not delete the interface of the attachment.
    /// Remedy: check the error of the kernel; the runtime repeats the DEL, and the agent retries.
    #[error(transparent)]
    Interface(#[from] HostError),
}

impl Refuse for NotDeleted {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::AddRuns(_) => RefusalKind::TryAgain,
            Self::Interface(_) => RefusalKind::Failed,
        }
    }
}

/// Releases an attachment: first its interface, then its addresses. Succeeds if nothing is left to release.
pub async fn del<H: PodHost>(host: &H, attachment: &Attachment) -> Result<(), Refusal> {
    // Otherwise a plugin that is still running would create an interface for a released attachment.
    let lock = host.lock(attachment, WIRING_TIMEOUT).await;
    if lock.is_none() {
        if !is_running_without_lock() {
            return Err(NotDeleted::AddRuns(attachment.clone()).into());
        }
        warn!(%attachment, "the ADD does not end: releasing anyway");
    }
    // A DEL must not fail because of a hanging ADD: the runtime has to finish the deletion of the pod.
    let add = if lock.is_some() { LastAdd::Ended } else { LastAdd::StillRunning };
    let released = release(host, attachment, add).await;
    drop(released.map_err(NotDeleted::from)?);
    if lock.is_none()
        && let Some(_lock) = host.try_lock(attachment)
    {
        // The ADD has ended meanwhile.
        release_for(host, attachment, LastAdd::Ended, CREATED_AFTER_DEL).await;
    }
    Ok(())
}

/// The reason logged for the release of what an ADD created after its DEL.
pub(super) const CREATED_AFTER_DEL: &str = "its ADD continued after its DEL";

/// Releases an attachment of a removed node. Fails while its ADD is running: otherwise the node would confirm that its
/// pods are gone, and the plugin would create an interface that no pass deletes.
pub async fn cut_off<H: PodHost>(host: &H, attachment: &Attachment) -> Result<(), NotReleased> {
    let Some(_lock) = host.lock(attachment, WIRING_TIMEOUT).await else {
        return Err(NotReleased::Busy(attachment.clone()));
    };
    match release(host, attachment, LastAdd::Ended).await? {
        ReleaseOutcome::Freed => Ok(()),
        ReleaseOutcome::Kept(error) => Err(error.into()),
    }
}

rule! {
    /// Whether a DEL continues if the ADD of its attachment hangs. A pass deletes an interface that is created later.
    fn is_running_without_lock() -> bool {
        true
    }
    DelGivesUp => false
}

rule! {
    /// Whether addresses are freed only after their interface is deleted.
    fn delete_interface_first() -> bool {
        true
    }
    FreedFirst => false
}

/// The addresses of an attachment whose interface is deleted.
#[derive(Debug)]
#[must_use]
pub enum ReleaseOutcome {
    /// They are freed, or the attachment had none.
    Freed,
    /// The ledger cannot be written: they are freed by the next attempt to release the attachment.
    Kept(LedgerError),
}

/// Releases an attachment, including what its ADD created after its DEL. If the ledger cannot be written, the interface
/// is deleted and only the addresses are kept.
pub async fn release<H: PodHost>(
    host: &H,
    attachment: &Attachment,
    add: LastAdd,
) -> Result<ReleaseOutcome, HostError> {
    let key = attachment.clone();
    let begin =
        move |ipam: &mut NodeIpam<H::Ledger>, _| (ipam.begin_release(&key), ipam.is_deleted_during_add(&key));
    let ((held, written), is_deleted_during_add) = host.ledger(begin).await;
    if let Err(error) = written {
        warn!(%attachment, "cannot write the ledger: {}", error.reason());
    }
    if !delete_interface_first() {
        let _ = host.free(attachment, add).await;
    }
    host.delete_interface(attachment, held.as_ref()).await?;
    match &held {
        Some(held) => host.forget(held).await,
        None if is_deleted_during_add => {}
        None => return Ok(ReleaseOutcome::Freed),
    }
    let freed = host.free(attachment, add).await;
    host.attachments_changed();
    host.addresses_freed();
    Ok(match freed {
        Ok(()) => {
            info!(%attachment, addresses = ?held.map(|held| held.addresses), "released");
            ReleaseOutcome::Freed
        }
        Err(error) => {
            let reason = error.reason();
            warn!(%attachment, "interface deleted, but addresses not freed: cannot write the ledger: {reason}");
            ReleaseOutcome::Kept(error)
        }
    })
}

/// Releases an attachment, and logs `why`. The caller holds its lock. The orphan collector retries a failed release.
pub async fn release_for<H: PodHost>(host: &H, attachment: &Attachment, add: LastAdd, why: &str) {
    info!(%attachment, why, "releasing");
    if let Err(error) = release(host, attachment, add).await {
        warn!(%attachment, %error, "not released: retrying");
    }
}

/// Ends the ADD of an attachment whose plugin has created the interface. If the attachment was released before that,
/// deletes the interface. The caller holds its lock.
pub async fn attached<H: PodHost>(host: &H, attachment: &Attachment) {
    let key = attachment.clone();
    let is_released =
        move |ipam: &mut NodeIpam<H::Ledger>, _| ipam.get(&key).is_none() && ipam.is_deleted_during_add(&key);
    if host.ledger(is_released).await {
        release_for(host, attachment, LastAdd::Ended, CREATED_AFTER_DEL).await;
    }
}

/// Releases an attachment whose plugin has disconnected, if it has no interface: it will never get one. If the
/// attachment was released before its ADD ended, deletes an interface created since. The caller holds its lock.
pub async fn abandoned<H: PodHost>(host: &H, attachment: &Attachment) {
    let key = attachment.clone();
    let look =
        move |ipam: &mut NodeIpam<H::Ledger>, _| (ipam.get(&key).cloned(), ipam.is_deleted_during_add(&key));
    let held = match host.ledger(look).await {
        (Some(held), _) => held,
        (None, true) => return release_for(host, attachment, LastAdd::Ended, CREATED_AFTER_DEL).await,
        (None, false) => return,
    };
    match is_gone(host, held).await {
        Ok(false) => {}
        Ok(true) => {
            let why = "its plugin ended without creating an interface";
            release_for(host, attachment, LastAdd::Ended, why).await;
        }
        Err(error) => warn!(%attachment, %error, "cannot check whether its plugin created an interface"),
    }
}

/// Whether the attachment has no interface any more.
pub(super) async fn is_gone<H: PodHost>(host: &H, held: AttachmentEntry) -> Result<bool, HostError> {
    let attachment = held.attachment.clone();
    Ok(host.gone(vec![held]).await?.contains(&attachment))
}
