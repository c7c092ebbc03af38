//! Gives back what nobody gives back: the addresses of pods that are gone without a DEL.
//!
//! The truth is the kernel: an attachment lives as long as its interface, or as its namespace where the interface is
//! another plugin's. One whose interface is missing twice, a
//! grace period apart, and that nobody is wiring, is released.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use polder_api::{Attachment, tombstone, tombstones};
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::missing::Missing;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::agent::Agent;
use crate::kernel::Kernel;
use crate::machine::now;
use crate::presence::Presence;
use crate::service::{self, Addresses};

/// Frees what plugins took down while the agent was away, as their notes say. To be done before the first ADD: it
/// might be for an attachment that a note is about.
pub async fn take_notes(agent: &Agent) {
    let folder = tombstones(&agent.config.socket);
    // Most of the time there is none.
    let Ok(entries) = fs::read_dir(&folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        match fs::read_to_string(&path).map(|text| text.parse::<Attachment>()) {
            // Who else works on it takes the note himself.
            Ok(Ok(attachment)) => {
                let Some(_held) = agent.in_flight.hold(&attachment) else { continue };
                take_note(agent, &attachment).await;
            }
            Ok(Err(error)) => {
                warn!(file = %path.display(), %error, "a note that cannot be read is thrown away");
                remove(&path);
            }
            Err(error) => warn!(file = %path.display(), %error, "a note cannot be read"),
        }
    }
}

/// Frees what the note about the attachment says, if there is one. For whoever holds the attachment.
pub async fn take_note(agent: &Agent, attachment: &Attachment) {
    let note = tombstone(&agent.config.socket, attachment);
    if note.exists() {
        release(agent, attachment, "a plugin took it down while the agent was away").await;
        remove(&note);
    }
}

fn remove(note: &Path) {
    if let Err(error) = fs::remove_file(note) {
        warn!(file = %note.display(), %error, "a note cannot be removed");
    }
}

/// Runs for ever. First finishes taking away the attachments that an earlier agent had begun to take away.
pub async fn run(agent: Arc<Agent>, leaving: Vec<Attachment>) {
    for attachment in leaving {
        let Some(_held) = agent.in_flight.hold(&attachment) else { continue };
        release(&agent, &attachment, "an earlier agent had begun to release it").await;
    }
    let mut missing = Missing::default();
    loop {
        // Whatever is released has been seen missing at least twice.
        sleep(agent.config.grace / 3).await;
        take_notes(&agent).await;
        match look(&agent).await {
            Ok(gone) => {
                let is_in_flight = |attachment: &Attachment| agent.in_flight.has(attachment);
                for attachment in missing.observe(&gone, is_in_flight, agent.config.grace, now()) {
                    let why = "it has been gone for longer than the grace period";
                    if let Err(error) = sweep(&agent, &attachment, why).await {
                        warn!(%attachment, error, "not released, to be tried again");
                    }
                }
            }
            Err(error) => warn!(error, "the pods' interfaces cannot be looked at"),
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
pub async fn sweep(agent: &Agent, attachment: &Attachment, why: &str) -> Result<Swept, String> {
    let Some(_held) = agent.in_flight.hold(attachment) else { return Ok(Swept::Busy) };
    if !look(agent).await?.contains(attachment) {
        return Ok(Swept::Alive);
    }
    info!(%attachment, why, "releasing");
    match service::release(agent, attachment).await.map_err(|refusal| refusal.message)? {
        Addresses::Freed => Ok(Swept::Released),
        Addresses::Kept(refusal) => Err(refusal.message),
    }
}

/// The attachments that have no interface any more, or no namespace for one.
async fn look(agent: &Agent) -> Result<BTreeSet<Attachment>, String> {
    // First the ledger, then the kernel: what comes meanwhile is not taken for gone.
    let held: Vec<Held> = agent.ipam.run(|ipam| ipam.attachments().cloned().collect()).await;
    let links = agent.pods.run(Kernel::pod_interfaces).await.map_err(|error| error.to_string())?;
    let gone = |held: &Held| match held.kind {
        Kind::Pod => !links.contains(&held.attachment.host_interface()),
        // Another plugin's interface has no name that we know. It is not longer there than its namespace.
        Kind::Lease => Presence::of(Path::new(&held.netns)) == Presence::Gone,
    };
    Ok(held.into_iter().filter(gone).map(|held| held.attachment).collect())
}

async fn release(agent: &Agent, attachment: &Attachment, why: &str) {
    info!(%attachment, why, "releasing");
    if let Err(refusal) = service::release(agent, attachment).await {
        warn!(%attachment, %refusal, "not released, to be tried again");
    }
}
