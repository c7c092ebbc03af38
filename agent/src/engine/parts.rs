//! The engine's parts: inputs, published values and wake-up sources.

use std::collections::BTreeSet;
use std::sync::Arc;

use polder_api::message::Refusal;
use polder_ipam::needed::RequiredRange;
use polder_netlink::IfIndex;
use tokio::sync::{mpsc, oneshot, watch};

use super::OnNode;
use crate::config::Config;
use crate::connections::StaleConnections;
use crate::in_flight::InFlight;
use crate::kernel::features::Features;
use crate::kernel::state::PodLink;
use crate::kernel::sysctl::Sysctls;
use crate::leases::Leases;
use crate::local_pods::LocalPods;
use crate::node_state::{Chosen, Pass};
use crate::probe::direct::DirectPaths;
use crate::readiness::Readiness;
use crate::repair::{DriftSignal, RepairLog};
use crate::requests::{NoPlan, PlanRequest};
use crate::wake::WakeReceiver;

/// The engine's inputs and its access to the kernel.
#[derive(Debug)]
pub struct Tools<D = OnNode> {
    /// The configuration.
    pub config: Arc<Config>,
    /// Features that the kernel supports.
    pub features: Features,
    /// The kernel's settings.
    pub sysctls: Sysctls,
    /// The kernel and the ledger.
    pub datapath: D,
    /// The values that tasks publish, including the engine's own.
    pub readiness: Readiness,
    /// etcd's addresses; `None` until they were first looked up.
    pub store_at: watch::Receiver<Option<Vec<RequiredRange>>>,
    /// Test results of the direct paths to peers on the same link.
    pub direct: watch::Receiver<Arc<DirectPaths>>,
    /// The other nodes whose agents are not alive.
    pub leases: watch::Receiver<Arc<Leases>>,
    /// Reports that another program changed Polder's kernel state.
    pub drift_signal: Arc<DriftSignal>,
    /// The pods of this node.
    pub pods: Arc<LocalPods>,
    /// Attachments that are being added or deleted.
    pub in_flight: Arc<InFlight>,
    /// Tracked connections that are not deleted yet.
    pub stale: Arc<StaleConnections>,
}

/// The values that the engine publishes.
#[derive(Debug)]
pub struct Entries {
    /// The node's addresses on the underlay, or why there are none.
    pub underlay: watch::Sender<Chosen>,
    /// The last pass over the kernel.
    pub pass: watch::Sender<Option<Arc<Pass>>>,
    /// What the monitor compares notifications with.
    pub expected: watch::Sender<Expected>,
    /// The repairs of kernel state.
    pub repairs: watch::Sender<RepairLog>,
}

/// What the monitor compares notifications with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// The settings of the host's end of each pod's pair; `None` before the first pass.
    pub pod_link: Option<PodLink>,
    /// The foreign interfaces on the paths to peers, to etcd and out of the cluster; `None` while the node has no
    /// underlay address, so that any interface may get it.
    pub path_interfaces: Option<BTreeSet<IfIndex>>,
}

/// What wakes the engine, besides changes of its inputs.
#[derive(Debug)]
pub struct Wakes {
    /// Foreign kernel state or etcd's addresses changed.
    pub underlay: WakeReceiver,
    /// A new attachment has addresses that are not in the packet filter yet.
    pub senders: WakeReceiver,
    /// Requests for the changes of the next pass.
    pub plans: mpsc::Receiver<PlanRequest>,
}

/// The changes of the next pass, in order.
pub async fn ask(plans: &mpsc::Sender<PlanRequest>) -> Result<Vec<String>, Refusal> {
    let (reply, answer) = oneshot::channel();
    let sent = plans.send(reply).await;
    let answered = async { sent.ok().and(answer.await.ok()) }.await;
    let planned = answered.unwrap_or(Err(NoPlan::Stopped));
    planned.map_err(Refusal::from)
}
