//! Types of `polderctl ipam`: show, check and release address allocations.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::pool::{ClaimStatus, PoolStatus};
use crate::words::UnknownWord;
use crate::{Attachment, NodeName, PoolName};

/// Subject of `polderctl ipam show`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// All pools, with the share of each node.
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

/// Answer of `polderctl ipam show`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Shown {
    /// Remarks, as text.
    pub remarks: Vec<String>,
    /// Pools.
    pub pools: Vec<PoolStatus>,
    /// Shares of the nodes.
    pub nodes: Vec<NodeShare>,
    /// Blocks that are claimed.
    pub blocks: Vec<ClaimStatus>,
    /// Addresses.
    pub addresses: Vec<AddressStatus>,
}

/// Share of a node in the address space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeShare {
    /// Node name.
    pub name: NodeName,
    /// Incarnation of the node name.
    pub incarnation: String,
    /// Membership of the node.
    pub standing: NodeShareStanding,
    /// The node's gateway addresses.
    pub gateways: Vec<IpAddr>,
    /// Number of claimed blocks.
    pub blocks: u64,
    /// Number of addresses in use by pods, as published by the node; `None` if the datastore was not reachable.
    pub addresses_used: Option<u64>,
}

/// Whether a node is a member of the cluster. A string in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum NodeShareStanding {
    /// The node is a member.
    Member,
    /// The node was removed.
    Removed(PodsGone),
}

words! {
    /// Whether the pods of a removed node are known to be gone.
    PodsGone {
        /// Not known.
        Unknown = "unknown",
        /// Confirmed by the node, which disconnected them.
        Confirmed = "confirmed",
        /// Declared by an operator (`--dead`).
        ConfirmedByOperator = "vouched",
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

/// An address and its holder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressStatus {
    /// The address.
    pub address: IpAddr,
    /// State of the address.
    pub standing: AddressStanding,
    /// Pool of the address.
    pub pool: Option<PoolName>,
    /// Block of the address, if claimed.
    pub block: Option<IpNetwork>,
    /// Node that owns the address.
    pub node: Option<NodeName>,
    /// Incarnation of the node name.
    pub incarnation: Option<String>,
    /// Attachment that holds the address.
    pub attachment: Option<Attachment>,
    /// Pod as `namespace/name`, if the runtime passed it; for a reserved address, the owning workload.
    pub pod: Option<String>,
    /// Start of this state: an age in seconds, or a datastore revision; as text.
    pub since: Option<String>,
    /// Source and meaning of the state, as text.
    pub why: String,
}

words! {
    /// State of an address.
    AddressStanding {
        /// In use by a pod.
        Used = "used",
        /// Gateway address of a node.
        Gateway = "gateway",
        /// Address of a node's probe endpoint.
        Probe = "probe",
        /// Released, and in cool-down.
        Resting = "resting",
        /// Free.
        Free = "free",
        /// Reserved for a workload.
        Reserved = "reserved",
        /// Never assigned to pods.
        Excluded = "excluded",
        /// In a block that no node has claimed.
        Unclaimed = "unclaimed",
        /// Not in a pool.
        Foreign = "foreign",
        /// State unknown: its owner cannot be asked now.
        Unknown = "unknown",
    }
}

/// Repair mode of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RepairMode {
    /// Check only.
    None,
    /// Repair only what does not affect running pods.
    Safe,
}

/// Result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Checked {
    /// Nodes that answered.
    pub nodes: Vec<NodeChecked>,
    /// Nodes that are alive but did not answer in time.
    pub silent: Vec<NodeName>,
    /// Members of the cluster that are not alive and did not answer.
    pub absent: Vec<NodeName>,
    /// The queried node, if it is not a member of the cluster and therefore was not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unregistered: Option<NodeName>,
    /// Deviations found.
    pub deviations: Vec<DeviationStatus>,
    /// Number of further unrepaired deviations, reported by nodes as a count only.
    pub left_out: u64,
}

/// Check result of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeChecked {
    /// Node name.
    pub name: NodeName,
    /// Number of attachments in the node's ledger.
    pub attachments: u64,
    /// Number of pod interfaces in the node's kernel.
    pub interfaces: u64,
}

/// A deviation from an invariant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviationStatus {
    /// The violated invariant.
    pub invariant: Invariant,
    /// Affected node.
    pub node: Option<NodeName>,
    /// Description of the deviation.
    pub what: String,
    /// Remedy.
    pub remedy: String,
    /// Whether this check repaired it.
    pub repaired: bool,
}

words! {
    /// Invariants of a cluster.
    Invariant {
        /// I1: no two interfaces in the cluster have the same address.
        Unique = "unique",
        /// I2: an address in use is in a block of its node, or reserved for its attachment.
        Owner = "owner",
        /// I3: the counts of a block add up to its size and match its contents.
        Conservation = "conservation",
        /// I4: an unused address is eventually released.
        NoLeak = "no leak",
        /// I5: an address on an interface is neither free nor held by another attachment.
        NoEarlyFree = "no early free",
        /// I6: a released address goes through the cool-down before it is reassigned.
        CoolDown = "cool-down",
        /// I7: releasing an attachment changes no other attachment and no later holder of its address.
        StaleDel = "stale DEL",
        /// I8: an address that was given to a pod is in the ledger.
        Durable = "durable",
        /// I9: a removed node writes only the confirmation that its pods are gone.
        Fenced = "fenced",
        /// I10: claims do not overlap, and each is a block of its pool.
        BlockTree = "block tree",
        /// I11: the wiring inside a running pod is intact. The simulation does not model the inside of pods.
        Wired = "wired",
        /// An invariant of a newer release, read from the answer of a node that runs it. This release never reports it.
        #[serde(other)]
        Other = "other",
    }
}

impl Checked {
    /// Whether every node answered and no unrepaired deviation is left.
    pub fn is_clean(&self) -> bool {
        self.is_complete() && self.left_out == 0 && self.deviations.iter().all(|found| found.repaired)
    }

    /// Whether every node answered, and at least one did.
    pub fn is_complete(&self) -> bool {
        let all = self.silent.is_empty() && self.absent.is_empty() && self.unregistered.is_none();
        all && !self.nodes.is_empty()
    }
}

/// Request to release an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The address.
    pub address: IpAddr,
    /// Whether the operator declares that the pod is permanently gone (`--dead`).
    pub dead: bool,
}
