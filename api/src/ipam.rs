//! Who has which address and why, whether all of it is right, and giving one up: as an operator asks.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::pool::{ClaimStatus, PoolStatus};
use crate::{Attachment, NodeName, PoolName};

/// What is to be shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// All pools, and what each node has of them.
    Cluster,
    /// A pool, its blocks and its reserved addresses.
    Pool(PoolName),
    /// A block and its addresses.
    Block(IpNetwork),
    /// A node, its blocks and its addresses.
    Node(NodeName),
    /// An address.
    Address(IpAddr),
    /// The addresses of a pod, as `namespace/name`.
    Pod(String),
}

/// What is known of a subject.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Shown {
    /// Sentences.
    pub remarks: Vec<String>,
    /// Pools.
    pub pools: Vec<PoolStatus>,
    /// What nodes have.
    pub nodes: Vec<NodeShare>,
    /// Blocks that are claimed.
    pub blocks: Vec<ClaimStatus>,
    /// Addresses.
    pub addresses: Vec<AddressStatus>,
}

/// What a node has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeShare {
    /// Its name.
    pub name: NodeName,
    /// Which of the nodes that had this name.
    pub incarnation: String,
    /// `member`, or `removed` with what its blocks wait for.
    pub standing: String,
    /// Its own addresses in the pod network.
    pub gateways: Vec<IpAddr>,
    /// Its blocks.
    pub blocks: u64,
    /// Addresses that its pods have, as far as it has published them; `None` where the store could not be asked.
    pub addresses_used: Option<u64>,
}

/// An address, and who has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressStatus {
    /// The address.
    pub address: IpAddr,
    /// `used`, `gateway`, `resting`, `free`, `reserved`, `excluded`, `unclaimed` or `foreign`.
    pub standing: String,
    /// The pool that it is in.
    pub pool: Option<PoolName>,
    /// The block that it is in, if that is claimed.
    pub block: Option<IpNetwork>,
    /// The node that has it.
    pub node: Option<NodeName>,
    /// Which of the nodes that had this name.
    pub incarnation: Option<String>,
    /// What has it.
    pub attachment: Option<Attachment>,
    /// The pod, as `namespace/name`, where the runtime named it; of a reserved address the workload.
    pub pod: Option<String>,
    /// Since when.
    pub since: Option<String>,
    /// How that is known, and what it means.
    pub why: String,
}

/// Whether a check is to put right what it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Repairs {
    /// It only looks.
    None,
    /// It puts right what can be put right without taking anything from the living.
    Safe,
}

/// What a check has found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Checked {
    /// The nodes that have looked at themselves.
    pub nodes: Vec<NodeChecked>,
    /// Nodes that are alive and have not answered in time.
    pub silent: Vec<NodeName>,
    /// Nodes of the cluster that are not alive and have not answered.
    pub absent: Vec<NodeName>,
    /// The node that was asked, if it is not a member of the cluster: nobody has checked it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unregistered: Option<NodeName>,
    /// What is not as it should be.
    pub deviations: Vec<DeviationStatus>,
    /// How many more there are that were not put right: nodes have only told the number.
    pub left_out: u64,
}

/// A node that has looked at itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeChecked {
    /// Its name.
    pub name: NodeName,
    /// How many attachments its ledger has.
    pub attachments: u64,
    /// How many interfaces of pods its kernel has.
    pub interfaces: u64,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviationStatus {
    /// What should hold, in a word or two.
    pub invariant: String,
    /// The node that it concerns.
    pub node: Option<NodeName>,
    /// What does not hold.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
    /// Whether it was put right just now.
    pub repaired: bool,
}

impl Checked {
    /// Whether every node of the cluster has answered, and nothing is left that is not as it should be.
    pub fn is_clean(&self) -> bool {
        self.is_complete() && self.left_out == 0 && self.deviations.iter().all(|found| found.repaired)
    }

    /// Whether every node of the cluster has answered, and there is one.
    pub fn is_complete(&self) -> bool {
        let all = self.silent.is_empty() && self.absent.is_empty() && self.unregistered.is_none();
        all && !self.nodes.is_empty()
    }
}

/// An address that is to be given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The address.
    pub address: IpAddr,
    /// Whether whoever asks knows that the pod that has it is gone for good.
    pub dead: bool,
}
