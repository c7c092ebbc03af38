//! The record of the agent that compares the nodes with Kubernetes. Bound to a lease.

use polder_api::NodeName;
use serde::{Deserialize, Serialize};

use crate::departure::{AgentState, Departed, Departure, Departures, Doubt, MAX_REPORTED, ShutDown};
use crate::ids::BootId;

/// The leader, and what it found. Every agent reads it, and reports it to operators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaderRecord {
    /// The leader.
    pub node: NodeName,
    /// The boot of its machine.
    pub boot_id: BootId,
    /// The nodes whose Node object is missing, at most [`MAX_REPORTED`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<MissingNode>,
    /// Number of further missing nodes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub more: usize,
    /// Why no node is removed automatically.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<Doubt>,
    /// Why the removal of a node failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde requires")]
const fn is_zero(more: &usize) -> bool {
    *more == 0
}

/// A node whose Node object is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MissingNode {
    /// The node.
    pub node: NodeName,
    /// What happened to its Node object.
    pub departure: Departure,
    /// Whether its agent is alive.
    pub agent: AgentState,
    /// The proof that its machine was shut down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<ShutDown>,
}

impl From<&Departed> for MissingNode {
    fn from(departed: &Departed) -> Self {
        let Departed { node, departure, agent, proof, .. } = departed.clone();
        Self { node, departure, agent, proof }
    }
}

impl LeaderRecord {
    /// A leader that has found nothing yet.
    pub const fn new(node: NodeName, boot_id: BootId) -> Self {
        Self { node, boot_id, missing: Vec::new(), more: 0, doubt: None, failure: None }
    }

    /// The record after an evaluation.
    #[must_use]
    pub fn with(&self, found: &Departures, failure: Option<String>) -> Self {
        Self {
            missing: found.missing.iter().take(MAX_REPORTED).map(MissingNode::from).collect(),
            more: found.missing.len().saturating_sub(MAX_REPORTED),
            doubt: found.doubt.clone(),
            failure,
            ..Self::new(self.node.clone(), self.boot_id.clone())
        }
    }

    /// The problems to report. `is_member`: whether a node still has a record.
    pub fn problems(&self, is_member: impl Fn(&NodeName) -> bool) -> Vec<String> {
        let missing = self.missing.iter().filter(|missing| is_member(&missing.node)).map(problem);
        let more = (self.more > 0).then(|| {
            format!("{} more nodes have no Node object in Kubernetes: compare polderctl node list", self.more)
        });
        let doubt = self.doubt.as_ref().map(ToString::to_string);
        missing.chain(more).chain(doubt).chain(self.failure.clone()).collect()
    }
}

fn problem(missing: &MissingNode) -> String {
    let node = &missing.node;
    let what = match missing.departure {
        Departure::Deleted => "its Node object in Kubernetes was deleted",
        Departure::Replaced => {
            "its Node object in Kubernetes was deleted, and there is another one of that name"
        }
    };
    match (missing.agent, missing.proof) {
        (AgentState::Alive, _) => format!(
            "node {node}: {what}, but its agent is alive, so it is not removed automatically: if the machine is to \
             stay, restart the kubelet on {node}; otherwise shut it down, or run `polderctl node remove {node}`"
        ),
        (AgentState::NotAlive, Some(proof)) => format!(
            "node {node}: {what} after the machine was shut down ({proof}), and its agent is not alive: run \
             `polderctl node remove {node} --dead`"
        ),
        (AgentState::NotAlive, None) => format!(
            "node {node}: {what}, and its agent is not alive: run `polderctl node remove {node}`, and add --dead if \
             you know that the machine is permanently gone"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn departed(node: &str, agent: AgentState, proof: Option<ShutDown>) -> Departed {
        Departed {
            node: node.parse().unwrap(),
            incarnation: crate::ids::Incarnation::new("i"),
            boot_id: BootId::new("b"),
            uid: crate::ids::NodeUid::new("u"),
            departure: Departure::Deleted,
            agent,
            proof,
        }
    }

    #[test]
    fn every_missing_node_is_reported_with_its_command() {
        let leader = LeaderRecord::new("n1".parse().unwrap(), BootId::new("b"));
        let missing = vec![
            departed("n2", AgentState::NotAlive, None),
            departed("n3", AgentState::NotAlive, Some(ShutDown::OutOfService)),
            departed("n4", AgentState::Alive, None),
            departed("gone", AgentState::NotAlive, None),
        ];
        let found = Departures { missing, doubt: Some(Doubt::Many { missing: 4, nodes: 5, limit: 3 }) };
        let problems = leader.with(&found, None).problems(|node| node.as_str() != "gone");
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(problems[0].contains("`polderctl node remove n2`"), "{problems:?}");
        assert!(problems[1].contains("`polderctl node remove n3 --dead`"), "{problems:?}");
        assert!(problems[1].contains("node.kubernetes.io/out-of-service"), "{problems:?}");
        assert!(problems[2].contains("restart the kubelet on n4"), "{problems:?}");
        assert!(problems[3].contains("4 of 5 nodes"), "{problems:?}");
    }

    #[test]
    fn of_many_missing_nodes_ten_are_named_and_the_record_stays_small() {
        let leader = LeaderRecord::new("n1".parse().unwrap(), BootId::new("b"));
        let name = |number: usize| format!("worker-{number:03}.example.internal");
        let missing = (0..40)
            .map(|number| departed(&name(number), AgentState::NotAlive, Some(ShutDown::CloudProvider)));
        let record = leader.with(&Departures { missing: missing.collect(), doubt: None }, None);
        assert_eq!((record.missing.len(), record.more), (MAX_REPORTED, 30));
        assert!(record.problems(|_| true)[MAX_REPORTED].contains("30 more"));
        let encoded = crate::record::encode(&record);
        assert!(encoded.len() < 2048, "{} bytes", encoded.len());
        assert_eq!(serde_json::from_slice::<LeaderRecord>(&encoded).unwrap(), record);
    }
}
