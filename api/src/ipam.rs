//! Who has which address and why, whether all of it is right, and giving one up: as an operator asks.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::pool::{ClaimStatus, PoolStatus};
use crate::words::UnknownWord;
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
    /// Whether it is a member.
    pub standing: NodeShareStanding,
    /// Its own addresses in the pod network.
    pub gateways: Vec<IpAddr>,
    /// Its blocks.
    pub blocks: u64,
    /// Addresses that its pods have, as far as it has published them; `None` where the store could not be asked.
    pub addresses_used: Option<u64>,
}

/// Whether a node is a member of the cluster. A string in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum NodeShareStanding {
    /// It is a member.
    Member,
    /// It was removed.
    Removed(PodsGone),
}

words! {
    /// Whether it is known that the pods of a removed node are gone.
    PodsGone {
        /// It is not.
        Unknown = "unknown",
        /// The node itself has cut them off.
        Confirmed = "confirmed",
        /// An operator says so.
        Vouched = "vouched",
    }
}

const MEMBER: &str = "member";
const REMOVED: &str = "removed, pods gone: ";

impl fmt::Display for NodeShareStanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member => f.pad(MEMBER),
            Self::Removed(pods) => f.pad(&format!("{REMOVED}{pods}")),
        }
    }
}

impl From<NodeShareStanding> for String {
    fn from(standing: NodeShareStanding) -> Self {
        standing.to_string()
    }
}

impl TryFrom<String> for NodeShareStanding {
    type Error = UnknownWord;

    fn try_from(text: String) -> Result<Self, UnknownWord> {
        if text == MEMBER {
            return Ok(Self::Member);
        }
        let pods = text.strip_prefix(REMOVED);
        let found = PodsGone::ALL.iter().find(|known| pods == Some(known.as_str()));
        found.map(|pods| Self::Removed(*pods)).ok_or(UnknownWord(text))
    }
}

/// An address, and who has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressStatus {
    /// The address.
    pub address: IpAddr,
    /// What it is used for.
    pub standing: AddressStanding,
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

words! {
    /// What an address is used for.
    AddressStanding {
        /// A pod has it.
        Used = "used",
        /// It is a node's own, the gateway of its pods.
        Gateway = "gateway",
        /// It is that of a node's probe endpoint.
        Probe = "probe",
        /// It was freed, and goes to nobody until the cool-down is over.
        Resting = "resting",
        /// A pod can get it.
        Free = "free",
        /// It belongs to a workload by name.
        Reserved = "reserved",
        /// It is never handed out.
        Excluded = "excluded",
        /// No node has claimed its block.
        Unclaimed = "unclaimed",
        /// It is in no pool.
        Foreign = "foreign",
        /// Whether somebody has it cannot be known now.
        Unknown = "unknown",
    }
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
    /// What should hold.
    pub invariant: Invariant,
    /// The node that it concerns.
    pub node: Option<NodeName>,
    /// What does not hold.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
    /// Whether it was put right just now.
    pub repaired: bool,
}

words! {
    /// What must hold of a cluster at every moment.
    Invariant {
        /// I1: no two living interfaces of the cluster have the same address.
        Unique = "unique",
        /// I2: a living address is in a block of its node, or reserved for its attachment.
        Owner = "owner",
        /// I3: the counts of a block add up to its size, and count what there is.
        Conservation = "conservation",
        /// I4: what nobody has is not kept from others for ever.
        NoLeak = "no leak",
        /// I5: an address with a living interface is neither free nor another's.
        NoEarlyFree = "no early free",
        /// I6: a freed address rests before somebody else has it.
        CoolDown = "cool-down",
        /// I7: taking one attachment away changes no other, and no later holder of its address.
        StaleDel = "stale DEL",
        /// I8: what was promised is written down.
        Durable = "durable",
        /// I9: a removed node writes nothing but that its pods are gone.
        Fenced = "fenced",
        /// I10: claims do not overlap, and each is a block of its pool.
        BlockTree = "block tree",
        /// I11: what was wired in a living pod is there. The simulation has no pods to look into.
        Wired = "wired",
        /// What only a newer release knows: its nodes answer in the store, and nodes of this one read that. Nothing here finds it.
        #[serde(other)]
        Other = "other",
    }
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
