//! What the plugin asks for: attachments come, are checked, and go.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ipnetwork::IpNetwork;
use polder_api::message::{AddRequest, Attach, LeasedAddress, PodAddress, Refusal, RefusalKind, Wiring};
use polder_api::{Attachment, Family};
use polder_ipam::ledger::{Held, Kind, LedgerError};
use polder_ipam::record::{AttachMode, ClusterRecord};
use polder_ipam::{Block, alias};
use polder_netlink::nft::FilterSocket;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::agent::Agent;
use crate::allocation::{Allocated, allocate};
use crate::board::Registration;
use crate::in_flight::Wired;
use crate::kernel::desired::{bridge_mac, smallest_mtu};
use crate::kernel::{Kernel, ruleset};
use crate::machine::now;
use crate::server::Caller;
use crate::sweeper;

/// How long a DEL waits for an ADD of the same attachment to end.
const WIRING_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn refuse<T>(kind: RefusalKind, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(kind, message))
}

pub(crate) fn ledger_failed(error: LedgerError) -> Refusal {
    let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    Refusal::new(RefusalKind::Failed, format!("the ledger cannot be written: {error}{source}"))
}

/// Holds the attachment for somebody who wants to add it, if the node serves.
async fn admit(agent: &Agent, attachment: &Attachment, caller: &Caller<'_>) -> Result<Wired, Refusal> {
    let Some(held) = agent.in_flight.hold(attachment) else {
        let problem = format!("{attachment} is being worked on by another ADD or DEL");
        return refuse(RefusalKind::TryAgain, problem);
    };
    // Its DEL may have been served before it, and will not come again.
    if caller.is_gone() {
        info!(%attachment, "whoever wanted it added is gone");
        return refuse(RefusalKind::Failed, "the caller is gone");
    }
    let obstacles = agent.board.obstacles();
    if !obstacles.is_empty() {
        let removed = matches!(*agent.board.registration.borrow(), Registration::Removed(_));
        let kind = if removed { RefusalKind::Removed } else { RefusalKind::TryAgain };
        return refuse(kind, format!("this node is not ready: {}", obstacles.join("; ")));
    }
    sweeper::take_note(agent, attachment).await;
    Ok(held)
}

/// Gives the attachment its addresses. What is returned with the wiring holds the attachment as being wired.
pub async fn add(
    agent: &Agent,
    request: AddRequest,
    caller: &Caller<'_>,
) -> Result<(Wiring, Wired), Refusal> {
    let attachment = request.attachment.clone();
    let wired = admit(agent, &attachment, caller).await?;
    let view = agent.board.view();
    let (Some(cluster), Some(pass)) = (&view.cluster, agent.board.pass()) else {
        return refuse(RefusalKind::TryAgain, "this node is not ready");
    };
    let mtu = request.mtu.unwrap_or(pass.mtu);
    let smallest = smallest_mtu(&view.families());
    if !(smallest..=pass.mtu).contains(&mtu) {
        let problem =
            format!("mtu {mtu} is not in {smallest} to {}, which is what this node can carry", pass.mtu);
        return refuse(RefusalKind::Invalid, problem);
    }
    let held = match allocate(agent, &view, Kind::Pod, request, mtu, caller).await? {
        Allocated::New(held) => held,
        Allocated::Exists(held) => already_there(agent, &held).await?,
    };
    let table = ruleset::table(&cluster.record, &ruleset::Lengths::new());
    let (mac, addresses) = (held.mac, held.addresses.clone());
    if let Err(error) = agent.pods.run(move |kernel| kernel.admit_pod(&table, mac, &addresses)).await {
        let _ = release(agent, &attachment).await;
        return refuse(RefusalKind::Failed, format!("let {attachment} send under its address: {error}"));
    }
    agent.attachments_changed.notify_one();
    let wiring = wiring(agent, &cluster.record, &held);
    if !wiring.strays.is_empty() {
        // The filter has to know addresses that are in none of the node's blocks.
        agent.board.holdings.send_modify(|_| {});
    }
    info!(%attachment, addresses = ?held.addresses, pod = held.pod.as_ref().map(ToString::to_string), "added");
    Ok((wiring, wired))
}

/// What a second ADD of the same attachment gets: a refusal, if the first one is in place. One that came to nothing
/// is taken up again with the addresses that it has.
async fn already_there(agent: &Agent, held: &Held) -> Result<Held, Refusal> {
    let attachment = &held.attachment;
    if held.leaving {
        return refuse(RefusalKind::TryAgain, format!("{attachment} is being released"));
    }
    match agent.pods.run(Kernel::pod_interfaces).await {
        Ok(interfaces) if interfaces.contains(&attachment.host_interface()) => refuse(
            RefusalKind::Exists,
            format!("{attachment} is attached already: it needs a DEL before another ADD"),
        ),
        Ok(_) => Ok(held.clone()),
        Err(error) => refuse(RefusalKind::Failed, format!("look for the interface of {attachment}: {error}")),
    }
}

/// Gives the attachment addresses for an interface that another plugin makes. What ends it is its DEL, or the end of
/// its network namespace.
pub async fn lease(
    agent: &Agent,
    request: AddRequest,
    caller: &Caller<'_>,
) -> Result<Vec<LeasedAddress>, Refusal> {
    let attachment = request.attachment.clone();
    let _held = admit(agent, &attachment, caller).await?;
    let view = agent.board.view();
    let mut request = request;
    // A path that cannot be seen from here says nothing when it cannot be seen later.
    if !Path::new(&request.netns).exists() {
        request.netns.clear();
    }
    let held = match allocate(agent, &view, Kind::Lease, request, 0, caller).await? {
        Allocated::New(held) => held,
        Allocated::Exists(_) => {
            let problem = format!("{attachment} has addresses already: it needs a DEL before another ADD");
            return refuse(RefusalKind::Exists, problem);
        }
    };
    agent.attachments_changed.notify_one();
    info!(%attachment, addresses = ?held.addresses, "leased");
    leased(agent, attachment).await
}

/// The addresses of an attachment whose interface is another plugin's.
pub async fn leased(agent: &Agent, attachment: Attachment) -> Result<Vec<LeasedAddress>, Refusal> {
    let key = attachment.clone();
    let found = agent.ipam.run(move |ipam| {
        let held = ipam.get(&key).filter(|held| held.kind == Kind::Lease && !held.leaving)?;
        let address = |address: &IpAddr| Some((*address, ipam.neighbourhood(*address)?));
        held.addresses.iter().map(address).collect::<Option<Vec<_>>>()
    });
    let Some(found) = found.await else {
        return refuse(RefusalKind::Missing, format!("{attachment} has no addresses"));
    };
    let leased = |(address, (block, gateway)): (IpAddr, (Block, IpAddr))| LeasedAddress {
        address: IpNetwork::new(address, block.cidr().length()).expect("the length of a block"),
        gateway,
    };
    Ok(found.into_iter().map(leased).collect())
}

/// Says how an attachment that is there should be wired.
pub async fn check(agent: &Agent, attachment: Attachment) -> Result<Wiring, Refusal> {
    let view = agent.board.view();
    let Some(cluster) = &view.cluster else {
        return refuse(RefusalKind::TryAgain, "the cluster's settings are not known yet");
    };
    let key = attachment.clone();
    match agent.ipam.run(move |ipam| ipam.get(&key).cloned()).await {
        Some(held) if !held.leaving && held.kind == Kind::Pod => Ok(wiring(agent, &cluster.record, &held)),
        _ => refuse(RefusalKind::Missing, format!("{attachment} is not attached")),
    }
}

/// How an attachment should be wired.
pub(crate) fn wiring(agent: &Agent, cluster: &ClusterRecord, held: &Held) -> Wiring {
    let holdings = agent.board.holdings();
    let gateways = &holdings.gateways;
    let own = |address: &IpAddr| holdings.blocks.iter().any(|owned| owned.block.cidr().has(*address));
    let bridge = bridge_mac(&agent.config.node);
    let addresses = held.addresses.iter().filter_map(|address| {
        let same_family = |gateway: &&IpAddr| Family::of(**gateway) == Family::of(*address);
        let gateway = *held.gateways.iter().chain(gateways).find(same_family)?;
        Some(PodAddress { address: *address, gateway })
    });
    Wiring {
        host_interface: held.attachment.host_interface(),
        alias: alias::write(&held.attachment, held.pod.as_ref()),
        attach: match cluster.attach {
            AttachMode::Bridge => Attach::Bridge { locked: agent.features.locked_ports },
            AttachMode::Routed => Attach::Routed,
        },
        mac: held.mac,
        mtu: held.mtu,
        addresses: addresses.collect(),
        gateway_mac: bridge,
        strays: held.addresses.iter().copied().filter(|address| !own(address)).collect(),
    }
}

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
        warn!(%attachment, "{}", ledger_failed(error));
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
            let reason = ledger_failed(error);
            warn!(%attachment, "its interface is gone, its addresses are not free: {reason}");
            Addresses::Kept(reason)
        }
    })
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
