//! Releases the addresses of pods that ended without a DEL.
//!
//! The kernel is authoritative: an attachment exists as long as its interface, or as its network namespace if another
//! plugin creates the interface. It is released if that is missing in two checks, a grace period apart, and no ADD or
//! DEL of it is running.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::Attachment;
use tracing::{info, warn};

use super::teardown::{self, ReleaseOutcome};
use super::{LastAdd, PodHost, tombstones};
use crate::cause::HostError;
use crate::ledger::AttachmentEntry;
use crate::orphans::Orphans;
use crate::release::NotReleased;

/// Runs for ever. First completes the releases that an earlier agent had begun (`leaving`).
pub async fn run<H: PodHost>(host: &H, leaving: Vec<Attachment>, grace: Duration) {
    for attachment in leaving {
        let Some(_lock) = host.try_lock(&attachment) else { continue };
        let why = "an earlier agent began to release it";
        teardown::release_for(host, &attachment, LastAdd::Ended, why).await;
    }
    let mut missing = Orphans::default();
    loop {
        // With a third of the grace period, an attachment is missing in at least two checks before it is released.
        host.sleep(grace / 3).await;
        tombstones::apply_all(host).await;
        end_deleted_during_add(host).await;
        match missing_interfaces(host).await {
            Ok(gone) => {
                let is_locked = |attachment: &Attachment| host.is_locked(attachment);
                for attachment in missing.observe(&gone, is_locked, grace, host.now()) {
                    let why = "its interface or namespace has been missing for longer than the grace period";
                    if let Err(error) = sweep(host, &attachment, why).await {
                        warn!(%attachment, %error, "not released: retrying");
                    }
                }
            }
            Err(error) => warn!(%error, "cannot list the pods' interfaces"),
        }
    }
}

/// Deletes what plugins created after the release of their attachments, unless that was done already.
pub(super) async fn end_deleted_during_add<H: PodHost>(host: &H) {
    let all = host.ledger(|ipam, _| ipam.deleted_meanwhile().cloned().collect::<Vec<_>>()).await;
    for attachment in all {
        if let Some(_lock) = host.try_lock(&attachment) {
            teardown::release_for(host, &attachment, LastAdd::Ended, teardown::CREATED_AFTER_DEL).await;
        }
    }
}

/// The result of sweeping one attachment that was reported gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SweepResult {
    /// It was gone, and is released.
    Released,
    /// Its interface exists, or its network namespace if another plugin creates the interface.
    Alive,
    /// An ADD, a DEL or another task has locked it.
    Busy,
}

/// Releases an attachment that is gone: locks it, checks it again, and releases it.
pub async fn sweep<H: PodHost>(
    host: &H,
    attachment: &Attachment,
    why: &str,
) -> Result<SweepResult, NotReleased> {
    let Some(_lock) = host.try_lock(attachment) else { return Ok(SweepResult::Busy) };
    if !missing_interfaces(host).await?.contains(attachment) {
        return Ok(SweepResult::Alive);
    }
    info!(%attachment, why, "releasing");
    match teardown::release(host, attachment, LastAdd::Ended).await? {
        ReleaseOutcome::Freed => Ok(SweepResult::Released),
        ReleaseOutcome::Kept(error) => Err(error.into()),
    }
}

/// The attachments that have no interface any more, or no network namespace if another plugin creates the interface.
async fn missing_interfaces<H: PodHost>(host: &H) -> Result<BTreeSet<Attachment>, HostError> {
    // The ledger is read before the kernel: an attachment added in between is not reported as gone.
    let held: Vec<AttachmentEntry> = host.ledger(|ipam, _| ipam.attachments().cloned().collect()).await;
    host.gone(held).await
}
