//! For tests: the entries that the tasks publish, set by the test. By default those of a node of a cluster.

use std::sync::Arc;
use std::time::Duration;

use polder_api::Mac;
use polder_ipam::Revision;
use polder_ipam::ids::{BootId, ClusterId, Incarnation, MachineId};
use polder_ipam::ledger::{MemberState, NodeIdentity};
use polder_ipam::membership::Proof;
use polder_ipam::pool::{Labels, Pool, PoolState};
use polder_ipam::record::{ClusterRecord, NodeRecord};
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::tasks::OwnNode;
use polder_ipam::view::{Versioned, View, ViewSource};
use tokio::sync::watch;

use crate::kubernetes::node_object::NodeFacts;
use crate::kubernetes::properties::Properties;
use crate::node_state::{Chosen, Membership, NodeState, Pass, Passes, Records};
use crate::underlay::NotChosen;

/// The entries.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) view: watch::Sender<Arc<View>>,
    pub(crate) registration: watch::Sender<Registration>,
    pub(crate) allocations: watch::Sender<Arc<Allocations>>,
    pub(crate) underlay: watch::Sender<Chosen>,
    pub(crate) pass: watch::Sender<Option<Arc<Pass>>>,
    pub(crate) facts: watch::Sender<Arc<NodeFacts>>,
}

impl Fixture {
    /// A registered node without a completed pass.
    pub(crate) fn new() -> Self {
        let allocations = Allocations { identity: Some(identity()), ..Allocations::default() };
        Self {
            view: watch::Sender::new(Arc::new(view())),
            registration: watch::Sender::new(Registration::Registered),
            allocations: watch::Sender::new(Arc::new(allocations)),
            underlay: watch::Sender::new(Err(NotChosen::NotYet)),
            pass: watch::Sender::default(),
            facts: watch::Sender::default(),
        }
    }

    /// The entries as tasks read them.
    pub(crate) fn node_state(&self) -> NodeState {
        NodeState {
            records: Records::new(self.view.subscribe()),
            membership: Membership::new(me(), self.registration.subscribe(), self.allocations.subscribe()),
            passes: Passes::new(self.underlay.subscribe(), self.pass.subscribe()),
            properties: Properties::new(Labels::new(), self.facts.subscribe()),
        }
    }
}

pub(crate) fn me() -> OwnNode {
    OwnNode {
        name: "n1".parse().unwrap(),
        machine_id: MachineId::new("m1"),
        boot_id: BootId::new("b1"),
        proof: Proof::Machine,
        bootstrap: None,
        cooldown: Duration::from_secs(60),
    }
}

pub(crate) fn identity() -> NodeIdentity {
    NodeIdentity {
        node: me().name,
        cluster: ClusterId::new("c"),
        incarnation: Incarnation::new("i1"),
        member_state: MemberState::Member,
    }
}

pub(crate) fn cluster() -> ClusterRecord {
    ClusterRecord::new(ClusterId::new("c"))
}

/// The records of a cluster of one node, with a pool.
pub(crate) fn view() -> View {
    let OwnNode { name, machine_id, boot_id, .. } = me();
    let record = NodeRecord {
        incarnation: identity().incarnation,
        machine_id,
        boot_id,
        underlay: vec!["192.0.2.7".parse().unwrap()],
        gateways: Vec::new(),
        probes: Vec::new(),
        vtep_mac: Mac([2; 6]),
        mtu: 1450,
        version: String::new(),
        kubernetes_uid: None,
    };
    let pool =
        Pool::new("p".parse().unwrap(), "10.244.0.0/16".parse().unwrap(), 26, PoolState::Active).unwrap();
    let mut view = View::default();
    view.source = ViewSource::Store;
    view.own_addresses = record.underlay.clone();
    view.cluster = Some(Versioned { record: Arc::new(cluster()), revision: Revision::new(1) });
    view.pools.insert(pool.name.clone(), Versioned { record: Arc::new(pool), revision: Revision::new(1) });
    view.nodes.insert(name, Versioned { record: Arc::new(record), revision: Revision::new(7) });
    view
}
