//! Tombstones: files that a plugin leaves where it has deleted an interface while the agent was away. The addresses are still to
//! be freed.

use std::fs;
use std::path::Path;

use polder_api::{Attachment, tombstone, tombstones};
use tracing::warn;

use crate::agent::Agent;
use crate::teardown::release_for;

/// Frees the addresses of all attachments that have a tombstone. To be done before the first ADD: it might be for one of them.
pub async fn apply_all(agent: &Agent) {
    let folder = tombstones(&agent.config.socket);
    // Most of the time there is none.
    let Ok(entries) = fs::read_dir(&folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        match fs::read_to_string(&path).map(|text| text.parse::<Attachment>()) {
            // Whoever works on it applies its tombstone.
            Ok(Ok(attachment)) => {
                let Some(_held) = agent.in_flight.hold(&attachment) else { continue };
                apply(agent, &attachment).await;
            }
            Ok(Err(error)) => {
                warn!(file = %path.display(), %error, "a tombstone that cannot be read is thrown away");
                remove(&path);
            }
            Err(error) => warn!(file = %path.display(), %error, "a tombstone cannot be read"),
        }
    }
}

/// Frees the addresses of the attachment if it has a tombstone. For whoever holds the attachment.
pub async fn apply(agent: &Agent, attachment: &Attachment) {
    let tombstone = tombstone(&agent.config.socket, attachment);
    if tombstone.exists() {
        release_for(agent, attachment, "a plugin took it down while the agent was away").await;
        remove(&tombstone);
    }
}

fn remove(tombstone: &Path) {
    if let Err(error) = fs::remove_file(tombstone) {
        warn!(file = %tombstone.display(), %error, "a tombstone cannot be removed");
    }
}
