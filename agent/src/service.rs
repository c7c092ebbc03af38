//! What the plugin asks for: attachments come, are checked, and go.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polder_api::message::{AddRequest, Attach, PodAddress, Refusal, RefusalKind, Wiring};
use polder_api::{Attachment, Family};
use polder_ipam::allocator::Rest;
use polder_ipam::ledger::{Held, Kind, LedgerError};
use polder_ipam::node::{AllocateError, Wish};
use polder_ipam::record::{AttachMode, ClusterRecord};
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::agent::Agent;
use crate::kernel::desired::{bridge_mac, smallest_mtu};
use crate::kernel::{Kernel, ruleset};
use crate::machine::now;
use crate::registrar::{ClaimError, ClaimRequest, LOW_WATER};
use crate::sweeper;
use crate::view::View;

/// How long an ADD waits for another block.
const CLAIM_PATIENCE: Duration = Duration::from_secs(15);

/// How long a DEL waits for an ADD of the same attachment to end.
const WIRING_PATIENCE: Duration = Duration::from_secs(10);

/// The attachments that somebody is working on: a plugin that wires, or who takes one away.
#[derive(Debug, Default)]
pub struct InFlight {
    attachments: Mutex<BTreeSet<Attachment>>,
    ended: Notify,
}

/// Holds an attachment, so that nobody else works on it, until it is dropped.
#[derive(Debug)]
pub struct Wired {
    in_flight: Arc<InFlight>,
    attachment: Attachment,
}

impl InFlight {
    /// Holds the attachment; `None` if somebody else does.
    pub fn hold(self: &Arc<Self>, attachment: &Attachment) -> Option<Wired> {
        let new = self.lock().insert(attachment.clone());
        new.then(|| Wired { in_flight: Arc::clone(self), attachment: attachment.clone() })
    }

    /// Whether somebody holds it.
    pub fn has(&self, attachment: &Attachment) -> bool {
        self.lock().contains(attachment)
    }

    /// Holds the attachment as soon as nobody else does.
    async fn take(self: &Arc<Self>, attachment: &Attachment) -> Wired {
        loop {
            let ended = self.ended.notified();
            if let Some(wired) = self.hold(attachment) {
                return wired;
            }
            ended.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<Attachment>> {
        // A set of names is whole, whoever panicked.
        self.attachments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wired {
    /// What is held.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }
}

impl Drop for Wired {
    fn drop(&mut self) {
        self.in_flight.lock().remove(&self.attachment);
        self.in_flight.ended.notify_waiters();
    }
}

fn refuse<T>(kind: RefusalKind, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(kind, message))
}

fn ledger_failed(error: LedgerError) -> Refusal {
    let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    Refusal::new(RefusalKind::Failed, format!("the ledger cannot be written: {error}{source}"))
}

/// Gives the attachment its addresses. What is returned with the wiring holds the attachment as being wired.
pub async fn add(agent: &Agent, request: AddRequest) -> Result<(Wiring, Wired), Refusal> {
    let attachment = request.attachment.clone();
    let Some(wired) = agent.in_flight.hold(&attachment) else {
        return refuse(
            RefusalKind::TryAgain,
            format!("{attachment} is being worked on by another ADD or DEL"),
        );
    };
    let obstacles = agent.board.obstacles();
    if !obstacles.is_empty() {
        return refuse(RefusalKind::TryAgain, format!("this node is not ready: {}", obstacles.join("; ")));
    }
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
    sweeper::take_note(agent, &attachment).await;
    let held = allocate(agent, &view, request, mtu).await?;
    let table = ruleset::table(&cluster.record);
    let (mac, addresses) = (held.mac, held.addresses.clone());
    if let Err(error) = agent.pods.run(move |kernel| kernel.admit_pod(&table, mac, &addresses)).await {
        let _ = release(agent, &attachment).await;
        return refuse(RefusalKind::Failed, format!("let {attachment} send under its address: {error}"));
    }
    agent.attachments_changed.notify_one();
    info!(%attachment, addresses = ?held.addresses, pod = held.pod.as_ref().map(ToString::to_string), "added");
    Ok((wiring(agent, &cluster.record, &held), wired))
}

async fn allocate(agent: &Agent, view: &View, request: AddRequest, mtu: u32) -> Result<Held, Refusal> {
    let families: Vec<Family> = match &request.pool {
        None => view.families().into_iter().collect(),
        Some(name) => match view.pools.get(name) {
            Some(pool) => vec![pool.record.family()],
            None => return refuse(RefusalKind::Invalid, format!("there is no pool {name}")),
        },
    };
    if families.contains(&Family::V6) && !agent.features.ipv6 {
        return refuse(RefusalKind::Failed, "the cluster has an IPv6 pool, and this kernel has no IPv6");
    }
    let pool = request.pool.clone();
    let wish = Wish {
        attachment: request.attachment,
        kind: Kind::Pod,
        families: families.clone(),
        pool: request.pool,
        mtu,
        netns: request.netns,
        pod: request.pod,
    };
    let mut rest = Rest::Full;
    loop {
        let (again, how) = (wish.clone(), rest);
        let (allocated, free) = agent
            .ipam
            .run(move |ipam| {
                let at = now();
                let allocated = ipam.allocate(again, how, at);
                (allocated, Family::BOTH.map(|family| (family, ipam.total(family, None, at).free)))
            })
            .await;
        let (family, counts) = match allocated {
            Ok(held) => {
                for (family, free) in free {
                    if free < LOW_WATER && families.contains(&family) {
                        // If the queue is full, whoever asked before will have done it.
                        let _ = agent.claims.try_send(ClaimRequest { family, pool: None, reply: None });
                    }
                }
                return Ok(held);
            }
            Err(AllocateError::Exists(held)) => return already_there(agent, &held).await,
            Err(AllocateError::Ledger(error)) => return Err(ledger_failed(error)),
            Err(AllocateError::Shortage { family, counts }) => (family, counts),
        };
        match (claim(agent, family, pool.clone()).await, rest) {
            (Ok(()), _) => {}
            // No other address and no other block: one that has rested the shortest time must do.
            (Err(ClaimError::Exhausted(_)), Rest::Full) => rest = Rest::Shortest,
            (Err(ClaimError::Exhausted(why)), Rest::Shortest) => {
                return refuse(
                    RefusalKind::PoolExhausted,
                    format!(
                        "no free {family} address: {} of this node are used, {} rest, {} are free; {why}. Add a pool \
                         or remove nodes that are gone",
                        counts.used, counts.resting, counts.free
                    ),
                );
            }
            (Err(error @ ClaimError::Unavailable(_)), _) => {
                return refuse(
                    RefusalKind::TryAgain,
                    format!(
                        "no free {family} address ({} used, {} resting), and {error}",
                        counts.used, counts.resting
                    ),
                );
            }
        }
    }
}

/// Asks for another block, and waits for it.
async fn claim(agent: &Agent, family: Family, pool: Option<polder_api::PoolName>) -> Result<(), ClaimError> {
    let unavailable = |why: &str| ClaimError::Unavailable(why.to_owned());
    let (reply, answer) = oneshot::channel();
    let request = ClaimRequest { family, pool, reply: Some(reply) };
    let asked = async {
        agent.claims.send(request).await.map_err(|_| unavailable("the agent is stopping"))?;
        answer.await.map_err(|_| unavailable("the agent is stopping"))?
    };
    timeout(CLAIM_PATIENCE, asked).await.unwrap_or_else(|_| Err(unavailable("the store is too slow")))
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

/// Says how an attachment that is there should be wired.
pub async fn check(agent: &Agent, attachment: Attachment) -> Result<Wiring, Refusal> {
    let view = agent.board.view();
    let Some(cluster) = &view.cluster else {
        return refuse(RefusalKind::TryAgain, "the cluster's settings are not known yet");
    };
    let key = attachment.clone();
    match agent.ipam.run(move |ipam| ipam.get(&key).cloned()).await {
        Some(held) if !held.leaving => Ok(wiring(agent, &cluster.record, &held)),
        _ => refuse(RefusalKind::Missing, format!("{attachment} is not attached")),
    }
}

fn wiring(agent: &Agent, cluster: &ClusterRecord, held: &Held) -> Wiring {
    let gateways = agent.board.holdings().gateways.clone();
    let bridge = bridge_mac(&agent.config.node);
    let addresses = held.addresses.iter().filter_map(|address| {
        let same_family = |gateway: &&std::net::IpAddr| Family::of(**gateway) == Family::of(*address);
        let gateway = *gateways.iter().find(same_family)?;
        Some(PodAddress { address: *address, gateway })
    });
    Wiring {
        host_interface: held.attachment.host_interface(),
        alias: alias(held),
        attach: match cluster.attach {
            AttachMode::Bridge => Attach::Bridge { locked: agent.features.locked_ports },
            AttachMode::Routed => Attach::Routed,
        },
        mac: held.mac,
        mtu: held.mtu,
        addresses: addresses.collect(),
        gateway_mac: bridge,
    }
}

/// The attachment in words, for `ip link`, and for a ledger that has to be made anew: the attachment first.
fn alias(held: &Held) -> String {
    /// `IFALIASZ` (`include/uapi/linux/if.h`) less the NUL.
    const LONGEST: usize = 255;
    let mut alias = held.attachment.to_string();
    if let Some(pod) = &held.pod {
        alias.push(' ');
        alias.push_str(&pod.to_string());
    }
    alias.truncate(alias.floor_char_boundary(LONGEST));
    alias
}

/// Takes an attachment away: first its interface, then its addresses. Succeeds where there is nothing.
pub async fn del(agent: &Agent, attachment: &Attachment) -> Result<(), Refusal> {
    // A plugin that still wires would make an interface for an attachment that is gone.
    let held = timeout(WIRING_PATIENCE, agent.in_flight.take(attachment)).await;
    if held.is_err() {
        warn!(%attachment, "its ADD does not end: taking it away nevertheless");
    }
    release(agent, attachment).await
}

/// Takes an attachment away, for whoever holds it. A ledger that cannot be written keeps the addresses, and nothing
/// else: they are freed when the attachment is looked at again.
pub async fn release(agent: &Agent, attachment: &Attachment) -> Result<(), Refusal> {
    let key = attachment.clone();
    let (held, written) = agent.ipam.run(move |ipam| ipam.begin_release(&key)).await;
    if let Err(error) = written {
        warn!(%attachment, "{}", ledger_failed(error));
    }
    let failed = |reason: String| Refusal::new(RefusalKind::Failed, reason);
    agent.reaper.delete(attachment.host_interface()).await.map_err(failed)?;
    let Some(held) = held else { return Ok(()) };
    if let Some(cluster) = &agent.board.view().cluster {
        let table = ruleset::table(&cluster.record);
        let (mac, addresses) = (held.mac, held.addresses.clone());
        let forgotten = agent.pods.run(move |kernel| kernel.forget_pod(&table, mac, &addresses)).await;
        // Until the next pass forgets it, too: no other pod has that MAC address with that address.
        if let Err(error) = forgotten {
            warn!(%attachment, %error, "not all of it is forgotten yet");
        }
    }
    let key = attachment.clone();
    let freed = agent.ipam.run(move |ipam| ipam.release(&key, now())).await;
    agent.attachments_changed.notify_one();
    match freed {
        Ok(()) => info!(%attachment, addresses = ?held.addresses, "released"),
        Err(error) => {
            warn!(%attachment, "its interface is gone, its addresses are not free: {}", ledger_failed(error));
        }
    }
    Ok(())
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
