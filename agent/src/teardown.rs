//! The end of an attachment: its interface, then its addresses, whoever wants it gone.

use std::net::IpAddr;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::message::{Refusal, RefusalKind};
use polder_netlink::nft::FilterSocket;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::agent::Agent;
use crate::in_flight::Wired;
use crate::kernel::{Kernel, ruleset};
use crate::machine::now;
use crate::refusal::ledger_failed;

/// How long a DEL waits for an ADD of the same attachment to end.
const WIRING_PATIENCE: Duration = Duration::from_secs(10);

/// Takes an attachment away: first its interface, then its addresses. Succeeds where there is nothing.
pub async fn del(agent: &Agent, attachment: &Attachment) -> Result<(), Refusal> {
    // A plugin that still wires would make an interface for an attachment that is gone.
    let held = timeout(WIRING_PATIENCE, agent.in_flight.take(attachment)).await;
    if held.is_err() {
        warn!(%attachment, "its ADD does not end: taking it away nevertheless");
    }
    // A runtime must not be kept from forgetting a pod that is gone.
    release(agent, attachment).await.map(drop)
}

/// What became of the addresses of an attachment whose interface is gone.
#[derive(Debug)]
#[must_use]
pub enum Addresses {
    /// They are free, or there were none.
    Freed,
    /// The ledger cannot be written, for that reason: they are freed when the attachment is looked at again.
    Kept(Refusal),
}

/// Takes an attachment away, for whoever holds it. A ledger that cannot be written keeps the addresses, and nothing
/// else.
pub async fn release(agent: &Agent, attachment: &Attachment) -> Result<Addresses, Refusal> {
    let key = attachment.clone();
    let (held, written) = agent.ipam.run(move |ipam| ipam.begin_release(&key)).await;
    if let Err(error) = written {
        warn!(%attachment, "{}", ledger_failed(&error));
    }
    let failed = |reason: String| Refusal::new(RefusalKind::Failed, reason);
    agent.reaper.delete(attachment.host_interface()).await.map_err(failed)?;
    let Some(held) = held else { return Ok(Addresses::Freed) };
    if let Some(cluster) = &agent.board.view().cluster {
        let table = ruleset::table(&cluster.record, &ruleset::Lengths::new());
        let (mac, addresses) = (held.mac, held.addresses.clone());
        let forgotten = agent.pods.run(move |kernel| kernel.forget_pod(&table, mac, &addresses)).await;
        // Until the next pass forgets it, too: no other pod has that MAC address with that address.
        if let Err(error) = forgotten {
            warn!(%attachment, %error, "not all of it is forgotten yet");
        }
    }
    forget_connections(agent, held.addresses.clone());
    let key = attachment.clone();
    let freed = agent.ipam.run(move |ipam| ipam.release(&key, now())).await;
    agent.attachments_changed.notify_one();
    agent.holdings_changed.notify_one();
    Ok(match freed {
        Ok(()) => {
            info!(%attachment, addresses = ?held.addresses, "released");
            Addresses::Freed
        }
        Err(error) => {
            let reason = ledger_failed(&error);
            warn!(%attachment, "its interface is gone, its addresses are not free: {reason}");
            Addresses::Kept(reason)
        }
    })
}

/// Takes an attachment away for that reason, for whoever holds it. What fails is tried again by the sweeper.
pub async fn release_for(agent: &Agent, attachment: &Attachment, why: &str) {
    info!(%attachment, why, "releasing");
    if let Err(refusal) = release(agent, attachment).await {
        warn!(%attachment, %refusal, "not released, to be tried again");
    }
}

/// Lets the kernel forget what the addresses were connected to: the next pod that has one is not to get the last one's
/// packets. Nobody waits for it, for it looks at every connection of the node, and the addresses rest for longer.
fn forget_connections(agent: &Agent, addresses: Vec<IpAddr>) {
    let connections = agent.connections.clone();
    tokio::spawn(async move {
        let forget = move |socket: &mut FilterSocket| {
            addresses.iter().try_for_each(|address| socket.forget_connections(*address).map(drop))
        };
        if let Err(error) = connections.run(forget).await {
            debug!(%error, "connections of freed addresses are not forgotten");
        }
    });
}

/// What becomes of an attachment whose plugin has gone away: if there is no interface, there never will be one.
pub async fn abandoned(agent: &Agent, wired: Wired) {
    let attachment = wired.attachment().clone();
    match agent.pods.run(Kernel::pod_interfaces).await {
        Ok(interfaces) if interfaces.contains(&attachment.host_interface()) => {}
        Ok(_) => {
            let key = attachment.clone();
            if agent.ipam.run(move |ipam| ipam.get(&key).is_some()).await {
                info!(%attachment, "its plugin ended without making an interface");
                let _ = release(agent, &attachment).await;
            }
        }
        Err(error) => warn!(%attachment, %error, "cannot see whether its plugin made an interface"),
    }
}
