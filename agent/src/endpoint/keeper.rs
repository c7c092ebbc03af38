//! The task that creates the probe endpoint, keeps it in place, and removes it.

use std::collections::BTreeSet;
use std::fs::File;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use polder_api::message::Wiring;
use polder_api::{Attachment, Family, IfName};
use polder_ipam::cause::SharedError;
use polder_ipam::ledger::{AttachmentEntry, LedgerError};
use polder_ipam::record::{AttachMode, ClusterRecord};
use polder_ipam::tasks::{LastAdd, teardown};
use polder_netlink::nft::FilterSocket;
use polder_netlink::{Error, IfIndex, namespace};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{Endpoint, NoEndpoint, OpenEndpoint};
use crate::config::StoreConfig;
use crate::kernel::endpoint::{EndpointError, interface};
use crate::kernel::reaper::NotDeleted;
use crate::kernel::{self, Kernel};
use crate::local_pods::LocalPod;
use crate::machine::now;
use crate::node::Node;
use crate::node_state::NodeState;
use crate::owner::Owner;
use crate::wiring::wiring;

/// Pause between two checks of the endpoint.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Pause before the next attempt, after creation failed.
const RETRY: Duration = Duration::from_secs(60);

/// The inputs of the task, and the value that it publishes.
#[derive(Debug)]
pub struct Task {
    /// The node whose blocks provide the endpoint's addresses.
    pub node: Arc<Node>,
    /// The kernel connection of the passes.
    pub kernel: Owner<Kernel>,
    /// The state of the node's probe endpoint.
    pub endpoint: watch::Sender<Endpoint>,
}

impl Task {
    /// Runs for ever.
    pub async fn run(self) {
        if matches!(self.node.config.store, StoreConfig::Embedded) {
            drop(self.endpoint.send_replace(Endpoint::Unneeded));
            return pending().await;
        }
        let namespace = if self.node.config.probe_peers {
            new_namespace().map_err(|error| NoEndpoint::NoNamespace(SharedError::new(error)))
        } else {
            Err(NoEndpoint::Disabled)
        };
        let namespace = match namespace {
            Ok(namespace) => Arc::new(namespace),
            Err(reason) => {
                if self.node.config.probe_peers {
                    warn!("{reason}");
                }
                release(&self.node, "when the agent starts again").await;
                drop(self.endpoint.send_replace(Endpoint::Unavailable(reason)));
                return pending().await;
            }
        };
        let Self { node, kernel, endpoint } = self;
        keep(OnNode { node, kernel }, namespace, endpoint).await;
    }
}

/// Keeps the endpoint in place. Never returns.
async fn keep<W: EndpointHost>(host: W, namespace: Arc<File>, endpoint: watch::Sender<Endpoint>) {
    let mut passes = host.node_state().passes.changes();
    let mut membership_changes = host.node_state().membership.changes();
    let mut keeper = Keeper { host, namespace, endpoint, made: None, failed: None };
    loop {
        passes.mark_unchanged();
        membership_changes.mark_unchanged();
        let endpoint = keeper.ensure_endpoint().await;
        keeper.publish(endpoint);
        // All branches are cancel-safe: a change that is not received now is received in the next iteration.
        tokio::select! {
            _ = passes.changed() => {}
            _ = membership_changes.changed() => {}
            () = sleep(CHECK_INTERVAL) => {}
        }
    }
}

/// A new network namespace, which exists as long as the file is open.
fn new_namespace() -> io::Result<File> {
    namespace::run_in_new(|| File::open("/proc/thread-self/ns/net"))?
}

/// Why the endpoint cannot be created.
#[derive(Debug, thiserror::Error)]
enum NotMade {
    /// The interfaces of an earlier endpoint cannot be deleted.
    #[error(transparent)]
    Earlier(#[from] NotDeleted),
    /// The endpoint's addresses cannot be added to the packet filter.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The agent retries after 60 s.
    #[error("cannot add the addresses of the probe endpoint to the packet filter")]
    Admission(#[source] Error),
    /// The endpoint's interfaces cannot be created.
    #[error(transparent)]
    Interfaces(#[from] EndpointError),
}

/// Access to the node and its kernel for the endpoint.
trait EndpointHost {
    /// The values that other tasks publish.
    fn node_state(&self) -> &NodeState;

    /// Whether the endpoint's addresses match these families.
    fn fits(&self, families: BTreeSet<Family>) -> impl Future<Output = bool> + Send;

    /// Allocates the endpoint's addresses in these families; `None` if none is available.
    fn allocate(
        &self,
        families: BTreeSet<Family>,
        mtu: u32,
    ) -> impl Future<Output = Result<Option<AttachmentEntry>, LedgerError>> + Send;

    /// Parameters for wiring the endpoint.
    fn wiring(&self, cluster: &ClusterRecord, held: &AttachmentEntry) -> Wiring;

    /// The index of the interface with that name, if it exists.
    fn index_of(&self, name: IfName) -> impl Future<Output = Result<Option<IfIndex>, Error>> + Send;

    /// Creates the interfaces and admits them in the packet filter; returns the index of the host's end.
    fn make(
        &self,
        namespace: Arc<File>,
        wiring: Wiring,
    ) -> impl Future<Output = Result<IfIndex, NotMade>> + Send;

    /// Deletes the endpoint's interfaces.
    fn delete(&self) -> impl Future<Output = Result<(), NotDeleted>> + Send;

    /// Releases the endpoint's addresses, if it has any, and deletes the interfaces.
    fn release(&self) -> impl Future<Output = ()> + Send;

    /// Publishes the endpoint's addresses to the peers.
    fn publish_to_peers(&self);
}

struct Keeper<W> {
    host: W,
    namespace: Arc<File>,
    endpoint: watch::Sender<Endpoint>,
    made: Option<Made>,
    /// Time and reason of the last failed creation.
    failed: Option<(Instant, NoEndpoint)>,
}

/// The created endpoint, with the values to check that it is still in place.
struct Made {
    endpoint: Arc<OpenEndpoint>,
    wiring: Wiring,
    index: IfIndex,
}

impl<W: EndpointHost> Keeper<W> {
    /// Creates the endpoint, if it should exist and does not exist.
    async fn ensure_endpoint(&mut self) -> Endpoint {
        let node_state = self.host.node_state();
        if node_state.registration().not_serving_reason().is_some() {
            // The registrar releases the endpoint's addresses when it disconnects the pods of a removed node.
            if self.made.take().is_some()
                && let Err(error) = self.host.delete().await
            {
                warn!(%error, "cannot delete the interfaces of the probe endpoint");
            }
            return Endpoint::Awaited;
        }
        let (view, pass) = (node_state.view(), node_state.pass().unwrap_or_default());
        let families = view.families();
        let in_place = |family: &Family| pass.gateways.iter().any(|gateway| Family::of(*gateway) == *family);
        let (Some(cluster), true) = (&view.cluster, !families.is_empty() && families.iter().all(in_place))
        else {
            return self.current();
        };
        if let Some((at, reason)) = &self.failed
            && at.elapsed() < RETRY
        {
            return Endpoint::Unavailable(reason.clone());
        }
        let cluster = Arc::clone(&cluster.record);
        if !self.host.fits(families.clone()).await {
            self.discard_and_release().await;
        }
        let mtu = pass.mtu;
        let held = match self.host.allocate(families, mtu).await {
            Ok(Some(held)) => AttachmentEntry { mtu, ..held },
            Ok(None) => return Endpoint::Unavailable(NoEndpoint::NoAddress),
            Err(error) => return Endpoint::Unavailable(NoEndpoint::NotSaved(error)),
        };
        let host_interface = interface(cluster.attach);
        let wiring = Wiring { host_interface, ..self.host.wiring(&cluster, &held) };
        if self.is_made(&wiring).await {
            return self.current();
        }
        self.made = None;
        match self.make(wiring).await {
            Ok(()) => {
                self.failed = None;
                info!(addresses = ?held.addresses, "probe endpoint created");
                // Publishes the new addresses to the peers.
                self.host.publish_to_peers();
            }
            Err(error) => {
                let reason = NoEndpoint::NotCreated(SharedError::new(error));
                warn!("{reason}");
                self.failed = Some((Instant::now(), reason));
                // A published address without an endpoint would be reported as a fault by peers.
                self.discard_and_release().await;
            }
        }
        self.current()
    }

    fn current(&self) -> Endpoint {
        match (&self.made, &self.failed) {
            (Some(made), _) => Endpoint::Open(Arc::clone(&made.endpoint)),
            (None, Some((_, reason))) => Endpoint::Unavailable(reason.clone()),
            (None, None) => Endpoint::Awaited,
        }
    }

    async fn is_made(&self, wiring: &Wiring) -> bool {
        let Some(made) = &self.made else { return false };
        let found = self.host.index_of(wiring.host_interface.clone()).await;
        // If the interface cannot be read, assume that it still exists.
        made.wiring == *wiring && found.unwrap_or(Some(made.index)) == Some(made.index)
    }

    async fn make(&mut self, wiring: Wiring) -> Result<(), NotMade> {
        // The interfaces of a killed agent may still exist: the kernel deletes its network namespace with a delay.
        self.host.delete().await?;
        let index = self.host.make(Arc::clone(&self.namespace), wiring.clone()).await?;
        let addresses = wiring.addresses.iter().map(|pod_address| pod_address.address).collect();
        let endpoint = Arc::new(OpenEndpoint { namespace: Arc::clone(&self.namespace), addresses });
        self.made = Some(Made { endpoint, wiring, index });
        Ok(())
    }

    async fn discard_and_release(&mut self) {
        self.made = None;
        self.host.release().await;
    }

    fn publish(&self, endpoint: Endpoint) {
        self.endpoint.send_if_modified(|known| {
            let changed = match (&*known, &endpoint) {
                (Endpoint::Open(known), Endpoint::Open(now)) => !Arc::ptr_eq(known, now),
                (Endpoint::Unavailable(known), Endpoint::Unavailable(now)) => known != now,
                (Endpoint::Awaited, Endpoint::Awaited) => false,
                _ => true,
            };
            *known = endpoint;
            changed
        });
    }
}

/// [`EndpointHost`] on this node.
struct OnNode {
    node: Arc<Node>,
    kernel: Owner<Kernel>,
}

impl EndpointHost for OnNode {
    fn node_state(&self) -> &NodeState {
        &self.node.node_state
    }

    async fn fits(&self, families: BTreeSet<Family>) -> bool {
        self.node.ipam.run(move |ipam| ipam.probe_fits(&families, now())).await
    }

    async fn allocate(
        &self,
        families: BTreeSet<Family>,
        mtu: u32,
    ) -> Result<Option<AttachmentEntry>, LedgerError> {
        self.node.ipam.run(move |ipam| ipam.take_probe(&families, mtu, now())).await
    }

    fn wiring(&self, cluster: &ClusterRecord, held: &AttachmentEntry) -> Wiring {
        wiring(&self.node.node_state.membership, self.node.features, cluster, held)
    }

    async fn index_of(&self, name: IfName) -> Result<Option<IfIndex>, Error> {
        self.node.pods.kernel.run(move |kernel| kernel.index_of(&name)).await
    }

    async fn make(&self, namespace: Arc<File>, wiring: Wiring) -> Result<IfIndex, NotMade> {
        let addresses = wiring.addresses.iter().map(|pod_address| pod_address.address).collect();
        let pod =
            LocalPod { name: wiring.host_interface.clone(), mac: wiring.mac, addresses, ports: Vec::new() };
        self.node.pods.local.add(pod.clone());
        let admit = move |filter: &mut FilterSocket| kernel::admit_pod(filter, &pod);
        self.node.pods.filter.run(admit).await.map_err(NotMade::Admission)?;
        // Runs on the thread of the passes, so that no pass finds a half-created endpoint.
        Ok(self.kernel.run(move |kernel| kernel.make_probe(&namespace, &wiring)).await?)
    }

    async fn delete(&self) -> Result<(), NotDeleted> {
        delete_interfaces(&self.node).await
    }

    async fn release(&self) {
        release(&self.node, "after at most 60 s").await;
    }

    fn publish_to_peers(&self) {
        self.node.channels.registrar.wake();
    }
}

/// Releases the endpoint's addresses, if it has any. `retry` is the time of the next attempt, for the log.
async fn release(node: &Node, retry: &str) {
    if node.ipam.run(|ipam| ipam.probe().is_none()).await {
        return;
    }
    if let Err(error) = delete_interfaces(node).await {
        return warn!(%error, "cannot delete the interfaces of the probe endpoint: retrying {retry}");
    }
    if let Err(refusal) = teardown::release(node, &Attachment::of_probe(), LastAdd::Ended).await {
        warn!(%refusal, "cannot release the addresses of the probe endpoint: retrying {retry}");
    }
}

/// Deletes the interfaces of both attachment modes.
async fn delete_interfaces(node: &Node) -> Result<(), NotDeleted> {
    for attach in [AttachMode::Bridge, AttachMode::Routed] {
        node.pods.local.remove_interface(&interface(attach));
        node.pods.reaper.delete(interface(attach)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
