//! The engine's parts: inputs, published values and wake-up sources.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use polder_ipam::needed::RequiredRange;
use tokio::sync::{mpsc, watch};

use super::OnNode;
use crate::bell::Wake;
use crate::board::{Chosen, Pass};
use crate::config::Config;
use crate::kernel::features::Features;
use crate::kernel::sysctl::Sysctls;
use crate::leases::Leases;
use crate::probe::direct::DirectPaths;
use crate::readiness::Readiness;
use crate::repair::{DriftSignal, RepairLog};
use crate::requests::PlanRequest;

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
}

/// The values that the engine publishes.
#[derive(Debug)]
pub struct Entries {
    /// The node's addresses on the underlay, or why there are none.
    pub underlay: watch::Sender<Chosen>,
    /// The last pass over the kernel.
    pub pass: watch::Sender<Option<Arc<Pass>>>,
    /// The neighbour entries that Polder's devices should have.
    pub neighbours: watch::Sender<BTreeSet<IpAddr>>,
    /// The repairs of kernel state.
    pub repairs: watch::Sender<RepairLog>,
}

/// What wakes the engine, besides changes of its inputs.
#[derive(Debug)]
pub struct Wakes {
    /// Foreign kernel state or etcd's addresses changed.
    pub underlay: Wake,
    /// A new attachment has addresses that are not in the packet filter yet.
    pub senders: Wake,
    /// Requests for the changes of the next pass.
    pub plans: mpsc::Receiver<PlanRequest>,
}
