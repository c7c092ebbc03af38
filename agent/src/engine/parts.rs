//! What the engine is made of: what it works with, what it writes, and what wakes it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use polder_ipam::needed::Needed;
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
use crate::repair::{Alarm, Repairs};
use crate::requests::PlanRequest;

/// What the engine works with.
#[derive(Debug)]
pub struct Tools<D = OnNode> {
    /// What the operator said.
    pub config: Arc<Config>,
    /// What the kernel can do.
    pub features: Features,
    /// The kernel's settings.
    pub sysctls: Sysctls,
    /// What passes read and change.
    pub datapath: D,
    /// What the other tasks tell, and the engine itself.
    pub readiness: Readiness,
    /// Where etcd is; `None` until that was first looked for.
    pub store_at: watch::Receiver<Option<Vec<Needed>>>,
    /// What is known of the direct paths to peers on the same link.
    pub direct: watch::Receiver<Arc<DirectPaths>>,
    /// Which other nodes' agents are not alive.
    pub leases: watch::Receiver<Arc<Leases>>,
    /// Rings when somebody else has changed something of ours in the kernel.
    pub alarm: Arc<Alarm>,
}

/// The engine's entries.
#[derive(Debug)]
pub struct Entries {
    /// The node's addresses on the underlay, or why there are none.
    pub underlay: watch::Sender<Chosen>,
    /// The last pass over the kernel.
    pub pass: watch::Sender<Option<Arc<Pass>>>,
    /// The neighbours that devices of ours are to have.
    pub neighbours: watch::Sender<BTreeSet<IpAddr>>,
    /// What was put right in the kernel.
    pub repairs: watch::Sender<Repairs>,
}

/// What wakes the engine, besides what it reads.
#[derive(Debug)]
pub struct Wakes {
    /// Something that is not ours changed in the kernel, or etcd has moved.
    pub underlay: Wake,
    /// An attachment came whose addresses the filter does not know yet.
    pub senders: Wake,
    /// It is asked what the next pass would change.
    pub plans: mpsc::Receiver<PlanRequest>,
}
