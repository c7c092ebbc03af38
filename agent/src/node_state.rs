//! Values that the agent's tasks publish to each other: the latest value of each entry. An entry has one writer, the
//! task that owns its sender; any number of tasks have receivers, grouped here by writer.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::PerFamily;
use polder_api::message::{Refusal, RefusalKind, Refuse};
use polder_ipam::Revision;
use polder_ipam::cause::SharedError;
use polder_ipam::peers::RecordProblem;
use polder_ipam::publication::Basis;
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::store::position::Interruption;
use polder_ipam::tasks::OwnNode;
use polder_ipam::view::{View, ViewSource};
use polder_ipam::{publication, readiness};
use tokio::sync::watch;

use crate::kernel::desired::PeerPath;
use crate::kubernetes::properties::Properties;
use crate::probe::schedule::Key;
use crate::underlay::{NotChosen, Underlay};

/// The node's addresses on the underlay, or why there are none.
pub type Chosen = Result<Arc<Underlay>, NotChosen>;

/// The cluster's records, as published by the watcher.
#[derive(Debug, Clone)]
pub struct Records(watch::Receiver<Arc<View>>);

impl Records {
    /// Reads the value that the watcher publishes.
    pub fn new(view: watch::Receiver<Arc<View>>) -> Self {
        Self(view)
    }

    /// The cluster's current records.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.0.borrow())
    }

    /// Receiver of future changes.
    pub fn changes(&self) -> watch::Receiver<Arc<View>> {
        from_now_on(&self.0)
    }

    /// The cluster's records for an operator's request; refused until they are loaded.
    pub fn read(&self) -> Result<Arc<View>, Refusal> {
        let view = self.view();
        if view.source != ViewSource::Nowhere {
            return Ok(view);
        }
        Err(view.lost.clone().map_or(NoRecords::Loading, NoRecords::Lost).into())
    }
}

/// Why an operator's request that needs the cluster's records is refused.
#[derive(Debug, thiserror::Error)]
enum NoRecords {
    /// The agent has just started, and is reading the records.
    ///
    /// Remedy: none, repeat the command in a few seconds.
    #[error("the cluster's records are not known yet: they are being loaded")]
    Loading,
    /// The datastore has been unreachable since the agent's start, and there is no snapshot.
    ///
    /// Remedy: correct the error at the end of the text, and repeat the command.
    #[error("the cluster's records are not known yet: {0}")]
    Lost(#[source] Interruption),
}

impl Refuse for NoRecords {
    fn kind(&self) -> RefusalKind {
        RefusalKind::TryAgain
    }
}

/// This node's identity and allocations, as published by the registrar.
#[derive(Debug, Clone)]
pub struct Membership {
    me: Arc<OwnNode>,
    registration: watch::Receiver<Registration>,
    allocations: watch::Receiver<Arc<Allocations>>,
}

impl Membership {
    /// Reads the values that the registrar of node `me` publishes.
    pub fn new(
        me: OwnNode,
        registration: watch::Receiver<Registration>,
        allocations: watch::Receiver<Arc<Allocations>>,
    ) -> Self {
        Self { me: Arc::new(me), registration, allocations }
    }

    /// The node's identity.
    pub fn me(&self) -> &OwnNode {
        &self.me
    }

    /// Whether the node is registered in the datastore.
    pub fn registration(&self) -> Registration {
        self.registration.borrow().clone()
    }

    /// Receiver of future changes of the registration.
    pub fn registrations(&self) -> watch::Receiver<Registration> {
        from_now_on(&self.registration)
    }

    /// The node's identity, blocks and own addresses.
    pub fn allocations(&self) -> Arc<Allocations> {
        Arc::clone(&self.allocations.borrow())
    }

    /// Receiver of future changes of the allocations.
    pub fn changes(&self) -> watch::Receiver<Arc<Allocations>> {
        from_now_on(&self.allocations)
    }

    /// The revision of the node's own record in the datastore; `None` if it does not exist or belongs to another
    /// machine.
    pub fn own_revision(&self, view: &View) -> Option<Revision> {
        publication::own_revision(view, &self.me.name, self.allocations().identity.as_ref(), self.me.boot())
    }
}

/// The state of the node's kernel, as published by the engine.
#[derive(Debug, Clone)]
pub struct Passes {
    underlay: watch::Receiver<Chosen>,
    pass: watch::Receiver<Option<Arc<Pass>>>,
}

impl Passes {
    /// Reads the values that the engine publishes.
    pub fn new(underlay: watch::Receiver<Chosen>, pass: watch::Receiver<Option<Arc<Pass>>>) -> Self {
        Self { underlay, pass }
    }

    /// The node's addresses on the underlay, or why there are none.
    pub fn underlay(&self) -> Chosen {
        self.underlay.borrow().clone()
    }

    /// Receiver of future changes of those addresses.
    pub fn underlays(&self) -> watch::Receiver<Chosen> {
        from_now_on(&self.underlay)
    }

    /// The last pass over the kernel.
    pub fn last(&self) -> Option<Arc<Pass>> {
        self.pass.borrow().clone()
    }

    /// Receiver of future passes.
    pub fn changes(&self) -> watch::Receiver<Option<Arc<Pass>>> {
        from_now_on(&self.pass)
    }
}

fn from_now_on<T>(entry: &watch::Receiver<T>) -> watch::Receiver<T> {
    let mut entry = entry.clone();
    entry.mark_unchanged();
    entry
}

/// Whether a pass completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Made {
    /// It completed.
    #[default]
    Yes,
    /// It failed: its results are those of an earlier pass.
    No,
}

/// A pass over the kernel.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// Whether the pass completed.
    pub made: Made,
    /// Number of the pass since the agent started; the first is 1.
    pub count: u64,
    /// Number of changes to the kernel in this pass.
    pub writes: usize,
    /// Number of changes by all passes so far.
    pub written: u64,
    /// Duration of the pass.
    pub took: Duration,
    /// Failures of changes that the node needs to serve its pods.
    pub local_failures: Vec<SharedError>,
    /// Other failures.
    pub other_failures: Vec<SharedError>,
    /// The node's own addresses that are in the kernel.
    pub gateways: Vec<IpAddr>,
    /// The MTU of pods, in bytes.
    pub mtu: u32,
    /// Records that were not applied, and why.
    pub problems: Vec<RecordProblem>,
    /// The path to each peer's blocks, by peer and family. Shared by successive passes while it does not change.
    pub paths: Arc<BTreeMap<Key, PeerPath>>,
    /// Number of underlay neighbours through which peers are reached, by family.
    pub next_hops: PerFamily<usize>,
    /// Foreign interfaces on which pods' packets arrive.
    pub ingress_interfaces: BTreeSet<String>,
    /// The addresses of the host that have host ports.
    pub host_addresses: BTreeSet<IpAddr>,
    /// Whether a pod has a host port: the kernel settings for them are in place.
    pub has_host_ports: bool,
}

/// Publishes the value if it differs, and wakes its receivers. Returns whether it differed.
pub fn set_if_changed<T: PartialEq>(entry: &watch::Sender<T>, value: T) -> bool {
    entry.send_if_modified(|known| {
        let changed = *known != value;
        if changed {
            *known = value;
        }
        changed
    })
}

/// The state of the node: the inputs for the decision whether an ADD is served.
#[derive(Debug, Clone)]
pub struct NodeState {
    /// The cluster's records.
    pub records: Records,
    /// This node's identity and allocations.
    pub membership: Membership,
    /// The state of its kernel.
    pub passes: Passes,
    /// Its labels and addresses in configuration and Node object.
    pub properties: Properties,
}

impl NodeState {
    /// The cluster's current records.
    pub fn view(&self) -> Arc<View> {
        self.records.view()
    }

    /// Whether the node is registered in the datastore.
    pub fn registration(&self) -> Registration {
        self.membership.registration()
    }

    /// The node's identity, blocks and own addresses.
    pub fn allocations(&self) -> Arc<Allocations> {
        self.membership.allocations()
    }

    /// The node's addresses on the underlay, or why there are none.
    pub fn underlay(&self) -> Chosen {
        self.passes.underlay()
    }

    /// The last pass over the kernel.
    pub fn pass(&self) -> Option<Arc<Pass>> {
        self.passes.last()
    }

    /// The current basis for the node's publications in the datastore.
    pub fn basis(&self) -> Basis {
        let (view, allocations, me) = (self.view(), self.allocations(), self.membership.me());
        Basis::of(&view, &me.name, allocations.identity.as_ref(), me.boot())
    }

    /// Why an ADD would be refused. Empty if it would be served. Used by ADD and STATUS.
    pub fn obstacles(&self) -> Vec<String> {
        let (view, allocations, pass) = (self.view(), self.allocations(), self.pass().unwrap_or_default());
        let (registration, underlay) = (self.registration(), self.underlay());
        readiness::obstacles(&readiness::ReadinessInputs {
            view: &view,
            registration: &registration,
            allocations: &allocations,
            underlay: underlay.as_ref().map(|_| ()).map_err(|error| error as &(dyn Error + 'static)),
            gateways: &pass.gateways,
            mtu: pass.mtu,
            failures: &pass.local_failures,
        })
    }
}
