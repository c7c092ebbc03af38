//! Gives back what nobody gives back: the addresses of pods that are gone without a DEL.
//!
//! The truth is the kernel: an attachment lives as long as its interface, or as its namespace where the interface is
//! another plugin's. One whose interface is missing twice, a grace period apart, and that nobody is wiring, is released.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use polder_api::Attachment;
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::missing::Missing;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::agent::Agent;
use crate::kernel::Kernel;
use crate::machine::now;
use crate::presence::Presence;
use crate::teardown::{self, Addresses};
use crate::tombstones;

/// Runs for ever. First finishes taking away the attachments that an earlier agent had begun to take away.
pub async fn run(agent: Arc<Agent>, leaving: Vec<Attachment>) {
    for attachment in leaving {
        let Some(_held) = agent.in_flight.hold(&attachment) else { continue };
        teardown::release_for(&agent, &attachment, "an earlier agent had begun to release it").await;
    }
    let mut missing = Missing::default();
    loop {
        // Whatever is released has been seen missing at least twice.
        sleep(agent.config.grace / 3).await;
        tombstones::apply_all(&agent).await;
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
    match teardown::release(agent, attachment).await.map_err(|refusal| refusal.message)? {
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
