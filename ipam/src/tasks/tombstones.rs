//! Tombstones: files of plugins that deleted an interface while no agent answered. The agent still has to free the
//! addresses.

use polder_api::Attachment;

use super::teardown::release_for;
use super::{LastAdd, PodHost};

/// Frees the addresses of all attachments that have a tombstone. Must run before the first ADD, which may be for one of
/// them.
pub async fn apply_all<H: PodHost>(host: &H) {
    for attachment in host.tombstones() {
        // The holder of the lock applies the tombstone.
        let Some(_lock) = host.try_lock(&attachment) else { continue };
        apply(host, &attachment).await;
    }
}

/// Frees the addresses of the attachment if it has a tombstone. The caller holds its lock.
pub async fn apply<H: PodHost>(host: &H, attachment: &Attachment) {
    if host.has_tombstone(attachment) {
        release_for(host, attachment, LastAdd::Ended, "a plugin deleted it while the agent was not running")
            .await;
        host.remove_tombstone(attachment);
    }
}
