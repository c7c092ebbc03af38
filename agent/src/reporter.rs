//! What answers to operators, runtimes and monitoring are put together from. It only reads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use polder_api::NodeName;
use polder_store::{NodeIpam, Store};
use tokio::sync::watch;

use crate::board::Board;
use crate::config::Config;
use crate::endpoint::Endpoint;
use crate::kernel::features::Features;
use crate::leases::Leases;
use crate::owner::Owner;
use crate::probe::direct::DirectPaths;
use crate::probe::schedule::{Key, Verdict};
use crate::readiness::Readiness;
use crate::repair::Repairs;

/// Where to read what is known of the node and the cluster.
#[derive(Debug, Clone)]
pub struct Reporter {
    /// What the operator said.
    pub config: Arc<Config>,
    /// What the kernel can do.
    pub features: Features,
    /// Where the cluster's records are.
    pub store: Store,
    /// The node's addresses.
    pub ipam: Owner<NodeIpam>,
    /// Whether the node is ready, and what that is told by.
    pub readiness: Readiness,
    /// What else the tasks tell.
    pub told: Told,
}

/// What the tasks tell for reports alone, or nearly so.
#[derive(Debug, Clone)]
pub struct Told {
    /// What the engine has put right in the kernel.
    pub repairs: watch::Receiver<Repairs>,
    /// What the prober knows of the way to each peer.
    pub verdicts: watch::Receiver<Arc<BTreeMap<Key, Verdict>>>,
    /// What it knows of the direct paths.
    pub direct: watch::Receiver<Arc<DirectPaths>>,
    /// Which other nodes' agents are not alive.
    pub leases: watch::Receiver<Arc<Leases>>,
    /// Whether the node has a probe endpoint.
    pub endpoint: watch::Receiver<Endpoint>,
    /// What others on the host do to pods or could do, each with its remedy.
    pub host: watch::Receiver<Vec<String>>,
    /// Why health and metrics are not served over HTTP.
    pub unserved: watch::Receiver<Option<String>>,
}

impl Reporter {
    /// The nodes whose agents are taken for dead.
    pub fn dead(&self) -> BTreeSet<NodeName> {
        self.told.leases.borrow().dead().clone()
    }

    /// What the node would be judged by if it were asked to serve a pod.
    pub fn board(&self) -> &Board {
        &self.readiness.board
    }
}
