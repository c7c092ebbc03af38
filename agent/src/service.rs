//! Requests of the CNI plugins: ADD, lease and CHECK.

use std::net::IpAddr;
use std::path::Path;

use ipnetwork::IpNetwork;
use polder_api::Attachment;
use polder_api::message::{
    AddRequest, LeasedAddress, Permission, Refusal, RefusalKind, Refuse, Reply, Wiring,
};
use polder_ipam::Block;
use polder_ipam::cause::HostError;
use polder_ipam::ledger::AttachmentKind;
use polder_ipam::tasks::{self, NotPermitted};
use polder_netlink::Error;

use crate::caller::Caller;
use crate::in_flight::AttachmentLock;
use crate::node::Node;
use crate::owner::StartedJob;
use crate::wiring::wiring;

/// Why a request of a CNI plugin is not served, although its addresses are allocated or known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotServed {
    /// The agent has not read the cluster's settings from the datastore yet. The wiring of a pod depends on them.
    ///
    /// Remedy: none, the runtime retries the request. If it persists, check with `polderctl status` that the datastore
    /// is reachable.
    #[error("the cluster's settings are not known yet")]
    NoSettings,
    /// The ledger of this node has no attachment of that name whose interface another plugin creates, or its addresses
    /// are being released.
    ///
    /// Remedy: check that the IPAM plugin has completed an ADD for the attachment on this node.
    #[error("{0} has no addresses")]
    NoAddresses(Attachment),
    /// The ledger of this node has no pod for the attachment, or the pod is being detached.
    ///
    /// Remedy: delete the pod, so that its controller creates a new one.
    #[error("{0} is not attached")]
    NotAttached(Attachment),
}

impl Refuse for NotServed {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::NoSettings => RefusalKind::TryAgain,
            Self::NoAddresses(_) | Self::NotAttached(_) => RefusalKind::Missing,
        }
    }
}

/// The permission of a pod to send and receive with its addresses, while the packet filter is being changed.
#[derive(Debug)]
pub struct PodPermission {
    /// The attachment of the pod.
    pub attachment: Attachment,
    /// The change of the packet filter.
    pub change: StartedJob<Result<(), Error>>,
}

impl PodPermission {
    /// Waits for the change. Returns the second reply to the ADD.
    pub async fn reply(self) -> Reply {
        let Self { attachment, change } = self;
        match change.result().await.map_err(HostError::new) {
            Ok(()) => Reply::Permitted,
            Err(error) => Reply::Refused(NotPermitted { attachment, error }.into()),
        }
    }
}

/// An attachment whose interface the plugin can create.
#[derive(Debug)]
pub struct Added {
    /// The parameters of the interface.
    pub wiring: Wiring,
    /// Marks the attachment as being wired.
    pub lock: AttachmentLock,
    /// The second reply follows when it is given.
    pub permission: PodPermission,
}

/// Allocates the addresses of the attachment.
pub async fn add(node: &Node, request: AddRequest, caller: &Caller<'_>) -> Result<Added, Refusal> {
    let before = node.node_state.view();
    let me = node.node_state.membership.me();
    let tasks::Added { held, lock, permission } = tasks::add(node, me, request, caller).await?;
    node.pods.stale.reuse(&held.addresses, &held.attachment).await;
    let now = node.node_state.view();
    // If the datastore has just lost the settings, those from before the allocation are used.
    let Some(cluster) = now.cluster.as_ref().or(before.cluster.as_ref()) else {
        return Err(NotServed::NoSettings.into());
    };
    let wiring = Wiring {
        permission: Permission::Follows,
        ..wiring(&node.node_state.membership, node.features, &cluster.record, &held)
    };
    node.pods.stale.add_ports(&held.ports);
    let is_first_port =
        !held.ports.is_empty() && node.node_state.pass().is_none_or(|pass| !pass.has_host_ports);
    if is_first_port || !wiring.strays.is_empty() {
        // The packet filter needs addresses that are in none of the node's blocks. Host ports need a kernel setting.
        node.channels.engine.wake();
    }
    Ok(Added { wiring, lock, permission })
}

/// Allocates addresses for an interface of another plugin. They are released by its DEL, or when its network namespace
/// no longer exists.
pub async fn lease(
    node: &Node,
    mut request: AddRequest,
    caller: &Caller<'_>,
) -> Result<Vec<LeasedAddress>, Refusal> {
    // A path that is not visible to the agent now cannot show later that the namespace is gone.
    if !Path::new(&request.netns).exists() {
        request.netns.clear();
    }
    let (held, _lock) = tasks::lease(node, node.node_state.membership.me(), request, caller).await?;
    node.pods.stale.reuse(&held.addresses, &held.attachment).await;
    leased(node, held.attachment).await
}

/// The addresses of an attachment with an interface of another plugin.
pub async fn leased(node: &Node, attachment: Attachment) -> Result<Vec<LeasedAddress>, Refusal> {
    let key = attachment.clone();
    let found = node.ipam.run(move |ipam| {
        let held = ipam.get(&key).filter(|held| held.kind == AttachmentKind::Lease && !held.leaving)?;
        let address = |address: &IpAddr| Some((*address, ipam.neighbourhood(*address)?));
        held.addresses.iter().map(address).collect::<Option<Vec<_>>>()
    });
    let Some(found) = found.await else {
        return Err(NotServed::NoAddresses(attachment).into());
    };
    let leased = |(address, (block, gateway)): (IpAddr, (Block, IpAddr))| LeasedAddress {
        address: IpNetwork::new(address, block.cidr().length()).expect("the length of a block"),
        gateway,
    };
    Ok(found.into_iter().map(leased).collect())
}

/// The wiring that an existing attachment should have.
pub async fn check(node: &Node, attachment: Attachment) -> Result<Wiring, Refusal> {
    let view = node.node_state.view();
    let Some(cluster) = &view.cluster else {
        return Err(NotServed::NoSettings.into());
    };
    let key = attachment.clone();
    match node.ipam.run(move |ipam| ipam.get(&key).cloned()).await {
        Some(held) if held.has_interface() => {
            Ok(wiring(&node.node_state.membership, node.features, &cluster.record, &held))
        }
        _ => Err(NotServed::NotAttached(attachment).into()),
    }
}
