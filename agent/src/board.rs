//! Where the agent's tasks tell each other what they know. Each entry has one writer; everybody may read and wait.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::Family;
use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::readiness;
use polder_ipam::registration::{Holdings, Registration};
use tokio::sync::watch;

use crate::endpoint::Endpoint;
use crate::kernel::desired::Reached;
use crate::leases::Leases;
use crate::probe::schedule::{Key, Verdict};
use crate::repair::Repairs;
use crate::underlay::Underlay;
use polder_ipam::needed::Needed;
use polder_ipam::peers::Problem;
use polder_ipam::record::Alive;
use polder_ipam::view::{Source, View};

/// The entries.
#[derive(Debug)]
pub struct Board {
    /// The cluster. Written by the follower.
    pub view: watch::Sender<Arc<View>>,
    /// The node's addresses on the underlay, or why there are none. Written by the engine.
    pub underlay: watch::Sender<Result<Arc<Underlay>, String>>,
    /// Where etcd is; `None` until that was first looked for. Written by the task of `endpoints`.
    pub endpoints: watch::Sender<Option<Vec<Needed>>>,
    /// What the node owns. Written by the registrar.
    pub holdings: watch::Sender<Arc<Holdings>>,
    /// Whether the store knows the node. Written by the registrar.
    pub registration: watch::Sender<Registration>,
    /// The last pass over the kernel. Written by the engine.
    pub pass: watch::Sender<Option<Arc<Pass>>>,
    /// The neighbours that devices of ours are to have. Written by the engine.
    pub neighbours: watch::Sender<BTreeSet<IpAddr>>,
    /// What was put right in the kernel. Written by the engine.
    pub repairs: watch::Sender<Repairs>,
    /// Whether the ways to the peers were seen to be open, or there are none; why not yet. Once they were, it stays so:
    /// what happens to them later is no reason to turn pods away. Written by the prober.
    pub probed: watch::Sender<Result<(), String>>,
    /// What is known of the way to each peer. Written by the prober.
    pub verdicts: watch::Sender<Arc<BTreeMap<Key, Verdict>>>,
    /// Which other nodes' agents are not alive. Written by the task of `leases`.
    pub leases: watch::Sender<Arc<Leases>>,
    /// Whether the CNI configuration is in place, or why it is not. Written by the engine.
    pub announced: watch::Sender<Result<(), String>>,
    /// Whether the node has a probe endpoint. Written by its task.
    pub endpoint: watch::Sender<Endpoint>,
    /// What others on the host do to pods or could do, each with its remedy. Written by the task of `host`.
    pub host: watch::Sender<Vec<String>>,
    /// The machine that an operator says this one is in place of.
    pub adopted: watch::Sender<Option<Alive>>,
}

/// Whether a pass came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Made {
    /// It did.
    #[default]
    Yes,
    /// It did not: what it says was found by an earlier one.
    No,
}

/// A pass over the kernel.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// Whether it came to its end.
    pub made: Made,
    /// The how manyeth.
    pub count: u64,
    /// Changes that it made.
    pub writes: usize,
    /// Changes that all passes made so far.
    pub written: u64,
    /// How long it took.
    pub took: Duration,
    /// What it could not do of what the node needs to serve its pods.
    pub local_failures: Vec<String>,
    /// What else it could not do.
    pub other_failures: Vec<String>,
    /// The node's own addresses that are in place.
    pub gateways: Vec<IpAddr>,
    /// The MTU of pods, in bytes.
    pub mtu: u32,
    /// Records that were not applied.
    pub problems: Vec<Problem>,
    /// How each peer's blocks of each family are reached.
    pub paths: BTreeMap<Key, Reached>,
    /// Neighbours on the underlay through which peers are reached, by family.
    pub next_hops: BTreeMap<Family, usize>,
    /// The interfaces of others through which pods' packets come in.
    pub carriers: BTreeSet<String>,
}

/// Makes the value the entry's, and wakes those who wait for it, if it is another one; whether it is.
pub fn set_if_changed<T: PartialEq>(entry: &watch::Sender<T>, value: T) -> bool {
    entry.send_if_modified(|known| {
        let changed = *known != value;
        if changed {
            *known = value;
        }
        changed
    })
}

impl Default for Board {
    fn default() -> Self {
        Self {
            view: watch::Sender::new(Arc::default()),
            underlay: watch::Sender::new(Err("the addresses on the underlay are not chosen yet".to_owned())),
            endpoints: watch::Sender::new(None),
            holdings: watch::Sender::new(Arc::default()),
            registration: watch::Sender::new(Registration::default()),
            pass: watch::Sender::new(None),
            neighbours: watch::Sender::new(BTreeSet::new()),
            repairs: watch::Sender::new(Repairs::default()),
            probed: watch::Sender::new(Err("the ways to the peers are not known yet".to_owned())),
            verdicts: watch::Sender::new(Arc::default()),
            leases: watch::Sender::new(Arc::default()),
            announced: watch::Sender::new(Err("the CNI configuration is not written yet".to_owned())),
            endpoint: watch::Sender::new(Endpoint::Awaited),
            host: watch::Sender::new(Vec::new()),
            adopted: watch::Sender::new(None),
        }
    }
}

impl Board {
    /// The cluster as it is known now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// The records of the cluster, for an operator who asks for them; refused as long as none were read.
    pub fn records(&self) -> Result<Arc<View>, Refusal> {
        let view = self.view();
        if view.source != Source::Nowhere {
            return Ok(view);
        }
        let why = view.lost.clone().unwrap_or_else(|| "they are being read".to_owned());
        Err(Refusal::new(
            RefusalKind::TryAgain,
            format!("the records of the cluster are not known yet: {why}"),
        ))
    }

    /// The node's addresses on the underlay, or why there are none.
    pub fn underlay(&self) -> Result<Arc<Underlay>, String> {
        self.underlay.borrow().clone()
    }

    /// What the node owns.
    pub fn holdings(&self) -> Arc<Holdings> {
        Arc::clone(&self.holdings.borrow())
    }

    /// The last pass over the kernel.
    pub fn pass(&self) -> Option<Arc<Pass>> {
        self.pass.borrow().clone()
    }

    /// Whether a device of ours is to have that neighbour.
    pub fn is_neighbour(&self, address: IpAddr) -> bool {
        self.neighbours.borrow().contains(&address)
    }

    /// Why the node is not ready for pods. Empty if it is: then a runtime finds the CNI configuration, too.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = self.unannounced();
        if let (true, Err(reason)) = (reasons.is_empty(), &*self.announced.borrow()) {
            reasons.push(reason.clone());
        }
        reasons
    }

    /// Why the CNI configuration is not put in place. Empty if it is.
    pub fn unannounced(&self) -> Vec<String> {
        let mut reasons = self.obstacles();
        if let (true, Err(reason)) = (reasons.is_empty(), &*self.probed.borrow()) {
            reasons.push(reason.clone());
        }
        reasons
    }

    /// Why an ADD would not be served. Empty if it would. ADD and STATUS both ask this.
    pub fn obstacles(&self) -> Vec<String> {
        let (view, holdings, pass) = (self.view(), self.holdings(), self.pass().unwrap_or_default());
        let (registration, underlay) = (self.registration.borrow().clone(), self.underlay());
        readiness::obstacles(&readiness::Facts {
            view: &view,
            registration: &registration,
            holdings: &holdings,
            underlay: underlay.as_ref().map(|_| ()).map_err(String::as_str),
            gateways: &pass.gateways,
            mtu: pass.mtu,
            failures: &pass.local_failures,
        })
    }
}
