//! The sources of reports to operators, runtimes and monitoring. Read-only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use polder_api::NodeName;
use polder_store::{NodeIpam, Store};
use tokio::sync::watch;

use crate::config::Config;
use crate::endpoint::Endpoint;
use crate::fastpath::{Interfaces, NotUsed};
use crate::kernel::features::Features;
use crate::kubernetes::removal::NoLeader;
use crate::leases::Leases;
use crate::node_state::NodeState;
use crate::owner::Owner;
use crate::probe::direct::DirectPaths;
use crate::probe::schedule::{Key, Verdict};
use crate::readiness::Readiness;
use crate::repair::RepairLog;

/// Sources for reports about the node and the cluster.
#[derive(Debug, Clone)]
pub struct Reporter {
    /// The configuration.
    pub config: Arc<Config>,
    /// Features that the kernel supports.
    pub features: Features,
    /// The datastore with the cluster's records.
    pub store: Store,
    /// The node's addresses.
    pub ipam: Owner<NodeIpam>,
    /// The interfaces with the programs of the fast path.
    pub fast_path: Owner<Interfaces>,
    /// Whether the node is ready, and the inputs for that.
    pub readiness: Readiness,
    /// Further values that the tasks publish.
    pub published: Published,
}

/// Values that the tasks publish mainly for reports.
#[derive(Debug, Clone)]
pub struct Published {
    /// The repairs of kernel state by the engine.
    pub repairs: watch::Receiver<RepairLog>,
    /// Probe results of the path to each peer.
    pub verdicts: watch::Receiver<Arc<BTreeMap<Key, Verdict>>>,
    /// Test results of the direct paths.
    pub direct: watch::Receiver<Arc<DirectPaths>>,
    /// The nodes whose agents are not alive.
    pub leases: watch::Receiver<Arc<Leases>>,
    /// The state of the node's probe endpoint.
    pub endpoint: watch::Receiver<Endpoint>,
    /// Effects of other software on the host on pods, each with its remedy.
    pub host: watch::Receiver<Vec<String>>,
    /// Why the fast path is not used. `None` if it is.
    pub fast_path: watch::Receiver<Option<NotUsed>>,
    /// Why health and metrics are not served over HTTP.
    pub listen_problem: watch::Receiver<Option<String>>,
    /// Problems of the connection to the Kubernetes API server, each with its remedy.
    pub kubernetes: watch::Receiver<Vec<String>>,
    /// Why no agent compares the nodes with Kubernetes.
    pub no_leader: watch::Receiver<Option<NoLeader>>,
}

impl Reporter {
    /// The nodes whose agents are treated as dead.
    pub fn dead(&self) -> BTreeSet<NodeName> {
        self.published.leases.borrow().dead().clone()
    }

    /// The inputs for the decision whether an ADD is served.
    pub fn node_state(&self) -> &NodeState {
        &self.readiness.node_state
    }
}
