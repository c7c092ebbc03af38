//! What the plugin asks for: attachments come and are checked.

use std::net::IpAddr;
use std::path::Path;

use ipnetwork::IpNetwork;
use polder_api::Attachment;
use polder_api::message::{AddRequest, LeasedAddress, Refusal, RefusalKind, Wiring};
use polder_ipam::Block;
use polder_ipam::ledger::{Held, Kind};
use tracing::info;

use crate::agent::Agent;
use crate::allocation::{Allocated, allocate};
use crate::caller::Caller;
use crate::in_flight::Wired;
use crate::kernel::{Kernel, ruleset};
use crate::refusal::refuse;
use crate::wiring::wiring;
use crate::{teardown, tombstones};
use polder_ipam::readiness::smallest_mtu;
use polder_ipam::registration::Registration;

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
    tombstones::apply(agent, attachment).await;
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
        let _ = teardown::release(agent, &attachment).await;
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
