//! Which nodes have left Kubernetes: decides from lists of Node objects, the records and the leases. Pure.
//!
//! A deleted Node object does not prove that the machine is gone: pods can still run there. So a node is removed only
//! if its agent is not alive either, and its blocks are held back until the node confirms, or until there is proof
//! ([`ShutDown`]) that the boot in its record has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use polder_api::NodeName;
use serde::{Deserialize, Serialize};

use crate::ids::{BootId, Incarnation, NodeUid};
use crate::moment::Moment;
use crate::record::NodeRecord;
use crate::view::View;

/// How long a Node object must be missing: from the first list without it to the last one, with no list in between
/// that has it.
pub const MISSING_FOR: Duration = Duration::from_secs(45);

/// Number of missing nodes up to which a removal is not suspicious, in a cluster of any size.
pub const FEW: usize = 3;

/// The most that may be missing in a larger cluster: one of this many.
const ONE_OF: usize = 3;

/// Maximum number of nodes that are reported one by one.
pub const MAX_REPORTED: usize = 10;

/// A statement in a Node object that its machine was shut down. Counts only while the kubelet sends no status: the
/// taints can stay on a node that has started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutDown {
    /// Taint `node.kubernetes.io/out-of-service`: an administrator, or a program that has fenced the machine, has set
    /// it. Kubernetes requires that the machine is powered off, and detaches its volumes because of it
    /// (`pkg/controller/podgc/gc_controller.go`).
    OutOfService,
    /// Taint `node.cloudprovider.kubernetes.io/shutdown`: the cloud provider has reported the instance of a node that
    /// is not ready as shut down (`staging/src/k8s.io/cloud-provider/controllers/nodelifecycle`).
    CloudProvider,
}

impl fmt::Display for ShutDown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfService => "taint node.kubernetes.io/out-of-service",
            Self::CloudProvider => "taint node.cloudprovider.kubernetes.io/shutdown",
        })
    }
}

/// A Node object, as far as it is needed here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesNode {
    /// Distinguishes successive Node objects of this name.
    pub uid: NodeUid,
    /// Whether its machine is shut down, and its kubelet sends no status (condition `Ready` is `Unknown`).
    pub shut_down: Option<ShutDown>,
}

/// A complete list of the Node objects.
pub type NodeList = BTreeMap<NodeName, KubernetesNode>;

/// What happened to the Node object of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Departure {
    /// It was deleted.
    Deleted,
    /// It was deleted, and another one of that name exists: of another machine, or of the same after it has registered
    /// again.
    Replaced,
}

/// Whether the agent of a node is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// Its lease is valid: the machine runs, and is never removed automatically.
    Alive,
    /// It has no lease.
    NotAlive,
}

/// A node whose Node object is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departed {
    /// The node.
    pub node: NodeName,
    /// The incarnation in its record.
    pub incarnation: Incarnation,
    /// The boot in its record.
    pub boot_id: BootId,
    /// The Node object in its record.
    pub uid: NodeUid,
    /// What happened to the Node object.
    pub departure: Departure,
    /// Whether its agent is alive.
    pub agent: AgentState,
    /// The proof that the boot in the record has ended.
    pub proof: Option<ShutDown>,
}

impl Departed {
    /// Whether the record is still the one for which this was decided.
    pub fn is_of(&self, record: &NodeRecord) -> bool {
        self.incarnation == record.incarnation
            && self.boot_id == record.boot_id
            && Some(&self.uid) == record.kubernetes_uid.as_ref()
    }
}

/// Why no node is removed, whatever is missing in the list.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Doubt {
    /// The API server returned no Node object at all.
    #[error(
        "Kubernetes lists no nodes: no node is removed automatically. Check that the API server in [kubernetes] is \
         that of this cluster, and that its data is complete (kubectl get nodes)"
    )]
    EmptyList,
    /// The list does not contain the Node object of the agent that reads it.
    #[error(
        "Kubernetes does not list node {0} with the uid in its record, although its agent runs: no node is removed \
         automatically. Check that the API server in [kubernetes] is that of this cluster; if the Node was deleted, \
         restart the kubelet on {0}"
    )]
    OwnNodeMissing(NodeName),
    /// More nodes than usual are missing at once.
    #[error(
        "{missing} of {nodes} nodes have no Node object in Kubernetes: more than {limit} at once are not removed \
         automatically. Check kubectl get nodes, then run polderctl node remove for each node that is gone"
    )]
    Many {
        /// Number of missing nodes.
        missing: usize,
        /// Number of nodes that had a Node object.
        nodes: usize,
        /// The most that may be missing.
        limit: usize,
    },
}

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Departures {
    /// The nodes whose Node object is missing, in the order of their names.
    pub missing: Vec<Departed>,
    /// Why none of them may be removed automatically.
    pub doubt: Option<Doubt>,
}

impl Departures {
    /// The nodes that may be removed now without an operator.
    pub fn removable(&self) -> impl Iterator<Item = &Departed> {
        let missing = self.missing.iter().filter(|departed| departed.agent == AgentState::NotAlive);
        missing.filter(|_| self.doubt.is_none())
    }
}

/// One node in one list, for comparison with later ones.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sighting {
    incarnation: Incarnation,
    boot_id: BootId,
    uid: NodeUid,
}

impl Sighting {
    fn of(record: &NodeRecord, uid: &NodeUid) -> Self {
        Self { incarnation: record.incarnation.clone(), boot_id: record.boot_id.clone(), uid: uid.clone() }
    }
}

/// What the lists so far have shown. Belongs to one leader: the next one begins anew.
#[derive(Debug, Clone, Default)]
pub struct NodeHistory {
    /// The nodes that are missing, with the time of the first list without them.
    missing: BTreeMap<NodeName, (Sighting, AgentState, Moment)>,
    /// The nodes that were shut down when they were last listed, and whose agent has not been alive since then.
    shut_down: BTreeMap<NodeName, (Sighting, ShutDown)>,
}

impl NodeHistory {
    /// Evaluates a complete list. `me` is the node of the agent that has read it, `alive` are the nodes with a lease,
    /// read after the list.
    pub fn observe(
        &mut self,
        me: &NodeName,
        list: &NodeList,
        view: &View,
        alive: &BTreeSet<NodeName>,
        now: Moment,
    ) -> Departures {
        if let Some(doubt) = doubt_about(me, list, view) {
            // Nothing is concluded from such a list, and none before it counts any more.
            *self = Self::default();
            return Departures { missing: Vec::new(), doubt: Some(doubt) };
        }
        // A node that was never a Node is not mentioned at all: it can be outside Kubernetes.
        let of_kubernetes: Vec<_> = view
            .nodes
            .iter()
            .filter(|(name, _)| *name != me)
            .filter_map(|(name, known)| Some((name, &*known.record, known.record.kubernetes_uid.as_ref()?)))
            .collect();
        let names: BTreeSet<&NodeName> = of_kubernetes.iter().map(|(name, ..)| *name).collect();
        self.missing.retain(|name, _| names.contains(name));
        self.shut_down.retain(|name, _| names.contains(name));
        let mut missing = Vec::new();
        for (name, record, uid) in &of_kubernetes {
            let sighting = Sighting::of(record, uid);
            let agent = if alive.contains(*name) { AgentState::Alive } else { AgentState::NotAlive };
            let listed = list.get(*name).filter(|node| node.uid == **uid);
            self.note_shut_down(name, &sighting, agent, listed);
            if listed.is_some() {
                self.missing.remove(*name);
                continue;
            }
            let (known, was, since) =
                self.missing.entry((*name).clone()).or_insert_with(|| (sighting.clone(), agent, now));
            if *known != sighting || *was != agent {
                (*known, *was, *since) = (sighting.clone(), agent, now);
            }
            if now.since(*since) < MISSING_FOR {
                continue;
            }
            let proof = self.shut_down.get(*name).filter(|(seen, _)| *seen == sighting);
            missing.push(Departed {
                node: (*name).clone(),
                incarnation: sighting.incarnation.clone(),
                boot_id: sighting.boot_id.clone(),
                uid: sighting.uid.clone(),
                departure: if list.contains_key(*name) { Departure::Replaced } else { Departure::Deleted },
                agent,
                proof: proof.map(|(_, shut_down)| *shut_down),
            });
        }
        // Counted with those that are missing in this list only: a wrong list is recognised at once.
        let (absent, nodes) = (self.missing.len(), of_kubernetes.len() + 1);
        let limit = FEW.max(nodes / ONE_OF);
        let doubt = (absent > limit).then_some(Doubt::Many { missing: absent, nodes, limit });
        Departures { missing, doubt }
    }

    /// Remembers what the Node object stated when it was last listed. An agent that is alive refutes it.
    fn note_shut_down(
        &mut self,
        name: &NodeName,
        sighting: &Sighting,
        agent: AgentState,
        listed: Option<&KubernetesNode>,
    ) {
        let stated = match listed {
            Some(node) => node.shut_down,
            None => self.shut_down.get(name).filter(|(seen, _)| seen == sighting).map(|(_, stated)| *stated),
        };
        match stated.filter(|_| agent == AgentState::NotAlive) {
            Some(stated) => drop(self.shut_down.insert(name.clone(), (sighting.clone(), stated))),
            None => drop(self.shut_down.remove(name)),
        }
    }
}

/// Whether the list is not that of this cluster, or not complete.
fn doubt_about(me: &NodeName, list: &NodeList, view: &View) -> Option<Doubt> {
    if list.is_empty() {
        return Some(Doubt::EmptyList);
    }
    let own = view.nodes.get(me).and_then(|known| known.record.kubernetes_uid.as_ref());
    let is_listed = own.is_some_and(|own| list.get(me).is_some_and(|node| node.uid == *own));
    (!is_listed).then(|| Doubt::OwnNodeMissing(me.clone()))
}

#[cfg(test)]
mod tests;
