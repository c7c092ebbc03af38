//! The registrar's task ([`polder_ipam::tasks`]) on a node: its inputs, its use of the rest of the agent, and its
//! wake-up sources.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use polder_api::Attachment;
use polder_ipam::Revision;
use polder_ipam::bootstrap::AddressesUnknown;
use polder_ipam::cause::HostError;
use polder_ipam::membership::{NoPresence, NodePresence};
use polder_ipam::record::LeaseRecord;
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::release::NotReleased;
use polder_ipam::store::StoreError;
use polder_ipam::tasks::{CATCH_UP, Registrar, RegistrarHost, teardown};
use polder_ipam::view::View;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::kernel::Kernel;
use crate::kernel::desired::pod_mtu;
use crate::kernel::tunnel::Encapsulation;
use crate::machine::random_name;
use crate::node::Node;
use crate::node_state::set_if_changed;
use crate::owner::Owner;
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::wake::WakeReceiver;

/// Interval of checks for conditions that no record reports.
const RETRY: Duration = Duration::from_secs(5);

/// The registrar's task and its wake-up sources.
#[derive(Debug)]
pub struct Task {
    /// The node, as the registrar uses it.
    pub host: OnNode,
    /// Wakes the task when there may be a block to release.
    pub wake: WakeReceiver,
    /// Requests for blocks.
    pub claims: mpsc::Receiver<ClaimRequest>,
    /// Requests for reserved addresses.
    pub reservations: mpsc::Receiver<ReserveRequest>,
}

impl Task {
    /// Runs for ever.
    pub async fn run(self) {
        let Self { host, wake, mut claims, mut reservations } = self;
        let agent = &host.node;
        let mut view = agent.node_state.records.changes();
        let mut underlay = agent.node_state.passes.underlays();
        let mut properties = agent.node_state.properties.changes();
        let mut registrar = Registrar::new(&host, agent.node_state.membership.me());
        loop {
            view.mark_unchanged();
            underlay.mark_unchanged();
            properties.mark_unchanged();
            registrar.run_once().await;
            // All branches are cancel-safe: a change that is not received now is received in the next iteration.
            tokio::select! {
                _ = view.changed() => {}
                _ = underlay.changed() => {}
                () = properties.changed() => {}
                () = wake.woken() => {}
                request = claims.recv() => {
                    let Some(request) = request else { return };
                    claim(&registrar, request).await;
                    while let Ok(request) = claims.try_recv() {
                        claim(&registrar, request).await;
                    }
                }
                request = reservations.recv() => {
                    let Some(request) = request else { return };
                    reserve(&registrar, request).await;
                }
                () = sleep(RETRY) => {}
            }
        }
    }
}

async fn claim(registrar: &Registrar<'_, OnNode>, request: ClaimRequest) {
    let ClaimRequest { wanted, reply } = request;
    if reply.as_ref().is_some_and(oneshot::Sender::is_closed) {
        // The requester gave up and was refused.
        return;
    }
    match (registrar.serve(wanted, reply.is_some()).await, reply) {
        (result, Some(reply)) => drop(reply.send(result)),
        (Err(error), None) => warn!("few addresses are left, and no further block could be claimed: {error}"),
        (Ok(()), None) => {}
    }
}

async fn reserve(registrar: &Registrar<'_, OnNode>, request: ReserveRequest) {
    let ReserveRequest { wanted, owner, attachment, reply } = request;
    if reply.is_closed() {
        // The ADD gave up and was refused.
        return;
    }
    let answer = |came| reply.send(came).is_ok();
    registrar.serve_reservation(&wanted, &owner, &attachment, answer).await;
}

/// [`RegistrarHost`] on this node: the only publisher of its registration and allocations.
#[derive(Debug)]
pub struct OnNode {
    /// The node.
    pub node: Arc<Node>,
    /// The kernel connection of the passes, for the node's own addresses.
    pub kernel: Owner<Kernel>,
    /// Whether the node is registered in the datastore.
    pub registration: watch::Sender<Registration>,
    /// The node's identity, blocks and own addresses.
    pub allocations: watch::Sender<Arc<Allocations>>,
    /// The record of the machine that this one replaces, as confirmed by an operator.
    pub adopted: watch::Receiver<Option<LeaseRecord>>,
}

impl Deref for OnNode {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl RegistrarHost for OnNode {
    fn fresh_name(&self) -> Result<String, HostError> {
        random_name().map_err(HostError::new)
    }

    async fn changed(&self, view: &Arc<View>, max_wait: Duration) {
        let mut views = self.node.node_state.records.changes();
        let _ = timeout(max_wait, views.wait_for(|now| !Arc::ptr_eq(now, view))).await;
    }

    async fn wait_for_revision(&self, revision: Revision) -> Result<(), StoreError> {
        let mut views = self.node.node_state.records.changes();
        match timeout(CATCH_UP, views.wait_for(|view| view.revision >= revision)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(StoreError::NoAnswer {
                store: self.node.store.name(),
                reason: format!("a record that was written did not appear within {} s", CATCH_UP.as_secs()),
            }),
        }
    }

    fn presence(&self, view: &View) -> Result<NodePresence, NoPresence> {
        let config = &self.node.config;
        let underlay = self.node.node_state.underlay().map_err(HostError::new)?;
        let Some(cluster) = &view.cluster else { return Err(NoPresence::NoSettings) };
        if view.own_addresses != underlay.addresses() {
            return Err(NoPresence::Moving);
        }
        Ok(NodePresence {
            underlay: underlay.addresses(),
            vtep_mac: Encapsulation::of(&cluster.record).mac(&cluster.record, &config.node),
            mtu: pod_mtu(&underlay, &cluster.record, config.mtu),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_object: self.node.node_state.properties.node_object(config.kubernetes.as_ref()),
        })
    }

    fn check_addresses_in_use(&self, view: &View) -> Result<(), AddressesUnknown> {
        let underlay = self.node.node_state.underlay().map_err(HostError::new)?;
        if view.own_addresses != underlay.addresses() || view.needed != underlay.needed {
            return Err(AddressesUnknown::Reading);
        }
        Ok(())
    }

    fn adopted(&self) -> Option<LeaseRecord> {
        self.adopted.borrow().clone()
    }

    fn register(&self, registration: Registration) {
        self.registration.send_replace(registration);
    }

    fn publish_allocations(&self, allocations: Allocations) {
        set_if_changed(&self.allocations, Arc::new(allocations));
    }

    async fn cut_off(&self, attachment: &Attachment) -> Result<(), NotReleased> {
        teardown::cut_off(&*self.node, attachment).await
    }

    fn is_wired_by_earlier_process(&self, attachment: &Attachment) -> bool {
        self.node.in_flight.is_wired_by_earlier_process(attachment)
    }

    fn is_any_wired_by_earlier_process(&self) -> bool {
        self.node.in_flight.is_any_wired_by_earlier_process()
    }

    async fn remove_gateways(&self) -> Result<(), HostError> {
        self.kernel.run(Kernel::remove_gateways).await.map_err(HostError::new)
    }
}
