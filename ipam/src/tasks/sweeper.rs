//! Gives back what nobody gives back: the addresses of pods that are gone without a DEL.
//!
//! The truth is the kernel: an attachment lives as long as its interface, or as its namespace where the interface is
//! another plugin's. One whose interface is missing twice, a grace period apart, and that nobody is wiring, is released.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::Attachment;
use tracing::{info, warn};

use super::teardown::{self, Addresses};
use super::{LastAdd, PodHost, tombstones};
use crate::cause::HostError;
use crate::ledger::Held;
use crate::missing::Missing;
use crate::release::NotReleased;

/// Runs for ever. First finishes taking away the attachments that an earlier agent had begun to take away.
pub async fn run<H: PodHost>(host: &H, leaving: Vec<Attachment>, grace: Duration) {
    for attachment in leaving {
        let Some(_lock) = host.try_lock(&attachment) else { continue };
        let why = "an earlier agent began to release it";
        teardown::release_for(host, &attachment, LastAdd::Ended, why).await;
    }
    let mut missing = Missing::default();
    loop {
        // Whatever is released has been seen missing at least twice.
        host.sleep(grace / 3).await;
        tombstones::apply_all(host).await;
        end_overtaken(host).await;
        match look(host).await {
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

/// Deletes what plugins have made after their attachments were taken away, where nobody else has done so.
pub(super) async fn end_overtaken<H: PodHost>(host: &H) {
    let all = host.ledger(|ipam, _| ipam.overtaken().cloned().collect::<Vec<_>>()).await;
    for attachment in all {
        if let Some(_lock) = host.try_lock(&attachment) {
            teardown::release_for(host, &attachment, LastAdd::Ended, teardown::MADE_LATE).await;
        }
    }
}

/// What became of an attachment that seemed to be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swept {
    /// It was, and is released.
    Released,
    /// It is not: its interface is there, or its namespace, where the interface is another plugin's.
    Alive,
    /// Somebody works on it.
    Busy,
}

/// Releases an attachment that is gone, if it still is when nobody else works on it.
pub async fn sweep<H: PodHost>(host: &H, attachment: &Attachment, why: &str) -> Result<Swept, NotReleased> {
    let Some(_lock) = host.try_lock(attachment) else { return Ok(Swept::Busy) };
    if !look(host).await?.contains(attachment) {
        return Ok(Swept::Alive);
    }
    info!(%attachment, why, "releasing");
    match teardown::release(host, attachment, LastAdd::Ended).await? {
        Addresses::Freed => Ok(Swept::Released),
        Addresses::Kept(error) => Err(error.into()),
    }
}

/// The attachments that have no interface any more, or no namespace for one.
async fn look<H: PodHost>(host: &H) -> Result<BTreeSet<Attachment>, HostError> {
    // First the ledger, then the kernel: what comes meanwhile is not taken for gone.
    let held: Vec<Held> = host.ledger(|ipam, _| ipam.attachments().cloned().collect()).await;
    host.gone(held).await
}
