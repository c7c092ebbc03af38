//! Tombstones: what a plugin leaves where it has deleted an interface while no agent answered. The addresses are still to be
//! freed.

use polder_api::Attachment;

use super::teardown::release_for;
use super::{LastAdd, PodHost};

/// Frees the addresses of all attachments that have a tombstone. To be done before the first ADD: it might be for one of them.
pub async fn apply_all<H: PodHost>(host: &H) {
    for attachment in host.tombstones() {
        // Whoever works on it applies its tombstone.
        let Some(_lock) = host.try_lock(&attachment) else { continue };
        apply(host, &attachment).await;
    }
}

/// Frees the addresses of the attachment if it has a tombstone. For whoever has locked the attachment.
pub async fn apply<H: PodHost>(host: &H, attachment: &Attachment) {
    if host.has_tombstone(attachment) {
        release_for(host, attachment, LastAdd::Ended, "a plugin deleted it while the agent was not running")
            .await;
        host.remove_tombstone(attachment);
    }
}
