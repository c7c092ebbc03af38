//! Status of nodes, for `polderctl` and its JSON output.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{Backend, Family, NodeName, PoolName};

/// Status of a node, reported by its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Node name.
    pub node: NodeName,
    /// Release of the agent.
    pub version: String,
    /// Whether the node can run new pods; if not, `reasons` explains why.
    pub ready: bool,
    /// Why the node is not ready, each with its remedy.
    pub reasons: Vec<String>,
    /// Problems that do not make the node unready: refused records, unreachable peers, interference of other software
    /// on the host.
    pub problems: Vec<String>,
    /// Cluster settings; `None` until they are known.
    pub cluster: Option<ClusterStatus>,
    /// Datastore of the cluster.
    pub store: StoreStatus,
    /// Underlay addresses of the node, with the reason for each.
    pub underlay: Vec<UnderlayStatus>,
    /// Other addresses of the node, with the reason why each is not used.
    pub not_underlay: Vec<NotUnderlayStatus>,
    /// MTU of new pods, in bytes.
    pub mtu: Option<u32>,
    /// The blocks that the node owns.
    pub blocks: Vec<BlockStatus>,
    /// Number of attachments in the ledger.
    pub pods: usize,
    /// Kernel features and checks that Polder uses and that are not available on this node.
    pub missing_features: Vec<String>,
    /// Whether pods' packets skip the host's IP stack.
    #[serde(default)]
    pub fast_path: FastPathStatus,
    /// The last reconcile pass over the kernel state.
    pub last_pass: Option<PassStatus>,
    /// Repairs of Polder's kernel state after changes by other programs, most recent last.
    pub repairs: Vec<RepairStatus>,
    /// Number of repairs since the agent started.
    pub repair_count: u64,
    /// Writes that the datastore refuses at present. `problems` has consequences and remedy.
    #[serde(default)]
    pub refused_writes: Vec<RefusedWrites>,
    /// Removed nodes whose removal is not complete.
    #[serde(default)]
    pub removed: Vec<RemovedStatus>,
}

/// A removed node whose removal is not complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedStatus {
    /// Node name.
    pub node: NodeName,
    /// State of the node's blocks, and the condition for their release, as text.
    pub standing: String,
}

/// Writes that the datastore repeatedly refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedWrites {
    /// Reason given by the datastore.
    pub reason: String,
    /// First refusal, in seconds since 1970.
    pub since: u64,
    /// Number of refused writes of this node since then.
    pub count: u64,
}

impl Status {
    /// Whether the node is ready, its datastore is reachable, its last pass had no failures, and `problems` is empty.
    /// Missing kernel features and repairs are not problems.
    pub fn is_well(&self) -> bool {
        self.ready
            && self.problems.is_empty()
            && matches!(self.store, StoreStatus::Connected { .. })
            && self.last_pass.as_ref().is_none_or(|pass| pass.failures.is_empty())
    }
}

/// Cluster settings, shared by all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Random ID, generated when the cluster was created.
    pub id: String,
    /// Backend between the nodes.
    pub backend: Backend,
    /// How pods are attached to their node.
    pub attach: AttachMode,
    /// UDP port of VXLAN tunnels, 1 to 65535.
    pub vxlan_port: u16,
    /// VXLAN network identifier (VNI), 1 to 16777215.
    pub vxlan_vni: u32,
    /// Whether traffic of pods to destinations outside the cluster gets the node's source address.
    pub masquerade: bool,
    /// Destinations that are exempt from masquerading, besides the pools.
    pub masquerade_except: Vec<IpNetwork>,
}

/// A change of cluster settings: `None` leaves a setting unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SettingsChange {
    /// Backend between the nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// How pods are attached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attach: Option<AttachMode>,
    /// UDP port of VXLAN tunnels, 1 to 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// VXLAN network identifier (VNI), 1 to 16777215.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// Whether traffic of pods to destinations outside the cluster gets the node's source address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<bool>,
    /// Destinations that are exempt from masquerading, besides the pools; replaces the whole list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub except: Option<Vec<IpNetwork>>,
}

words! {
    /// How pods are attached to their node.
    #[derive(Default)]
    AttachMode {
        /// As ports of a bridge.
        #[default]
        Bridge = "bridge",
        /// With a host route each.
        Routed = "routed",
    }
}

/// State of the connection to the datastore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum StoreStatus {
    /// Connected: the records are current as of this revision.
    Connected {
        /// Name of the datastore, with its endpoints.
        store: String,
        /// Datastore revision of the records.
        revision: i64,
    },
    /// Unreachable: the last known records are used.
    Disconnected {
        /// Name of the datastore, with its endpoints.
        store: String,
        /// Reason and remedy.
        reason: String,
    },
}

/// An underlay address of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderlayStatus {
    /// The address.
    pub address: IpAddr,
    /// The interface with this address.
    pub interface: String,
    /// MTU of that interface, in bytes.
    pub mtu: u32,
    /// Why the address was chosen.
    pub chosen_by: String,
}

/// An address of the node that is not an underlay address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotUnderlayStatus {
    /// The address.
    pub address: IpAddr,
    /// The interface with this address; `None` if the interface is down or belongs to Polder.
    pub interface: Option<String>,
    /// Why it was not chosen.
    pub reason: String,
}

/// A block and the number of its addresses by state. The four counts add up to the size of the block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStatus {
    /// The block.
    pub block: IpNetwork,
    /// Pool of the block.
    pub pool: PoolName,
    /// Allocated to an attachment or to the node itself.
    pub used: u64,
    /// In cool-down.
    pub resting: u64,
    /// Ready to be allocated.
    pub free: u64,
    /// Never allocated: the first and last address of the pool.
    pub excluded: u64,
}

/// A reconcile pass over the kernel state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassStatus {
    /// Number of passes since the agent started.
    pub count: u64,
    /// Kernel writes of the last pass: 0 if there was no drift.
    pub writes: usize,
    /// Kernel writes of all passes since the agent started.
    pub written: u64,
    /// Duration in microseconds.
    pub took_us: u64,
    /// Changes that failed.
    pub failures: Vec<String>,
}

words! {
    /// Whether packets of pods skip the host's IP stack.
    #[derive(Default)]
    FastPathState {
        /// They do: those of flows that the host has just forwarded unchanged.
        On = "on",
        /// All packets take the normal path.
        #[default]
        Off = "off",
    }
}

/// The fast path, and the packets on both paths.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FastPathStatus {
    /// Whether it is used.
    pub state: FastPathState,
    /// Why it is not used, or not for all pods.
    pub reason: Option<String>,
    /// Packets since the agent started, by the path that they took and the reason. Empty if it was never used.
    pub packets: Vec<PacketCount>,
}

impl FastPathStatus {
    /// The number of packets on that path.
    pub fn total(&self, path: PacketPath) -> u64 {
        self.packets.iter().filter(|counted| counted.path == path).map(|counted| counted.packets).sum()
    }
}

words! {
    /// The path of a packet through the host.
    PacketPath {
        /// From interface to interface, by a BPF program.
        Fast = "fast",
        /// Through the host's IP stack.
        Normal = "normal",
    }
}

/// Packets that took a path for the same reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketCount {
    /// The path.
    pub path: PacketPath,
    /// For the fast path, where the packets went. For the normal path, why they took it.
    pub reason: String,
    /// Their number. Segments that the kernel handles together count as one.
    pub packets: u64,
}

/// A repair of Polder's kernel state after a change by another program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairStatus {
    /// Time of the repair, in seconds since 1970.
    pub at: u64,
    /// The first changes that were made.
    pub changes: Vec<String>,
    /// Number of further changes.
    pub more: usize,
    /// Processes that made the repaired change, if the kernel reports them.
    pub by: Vec<String>,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Node name.
    pub name: NodeName,
    /// Membership of the node.
    pub standing: NodeStanding,
    /// Underlay addresses in the node's record; empty for a removed node.
    pub underlay: Vec<IpAddr>,
    /// Gateway addresses in the node's record.
    pub gateways: Vec<IpAddr>,
    /// Blocks that the node has claimed; empty for a removed node.
    pub blocks: Vec<IpNetwork>,
    /// Paths from this node to that node, at most one per family.
    pub paths: Vec<PathStatus>,
    /// Whether the node's lease is valid; `None` for a removed node, or if the leases cannot be read.
    pub alive: Option<bool>,
    /// Release of the node's agent; empty for a removed node.
    pub version: String,
}

/// Whether a node is a member of the cluster. A string in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum NodeStanding {
    /// The node is a member.
    Member,
    /// The node was removed; with the state of its blocks as text.
    Removed(String),
}

/// The string for [`NodeStanding::Member`].
const MEMBER: &str = "member";

impl fmt::Display for NodeStanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Member => MEMBER,
            Self::Removed(text) => text,
        })
    }
}

impl From<NodeStanding> for String {
    fn from(standing: NodeStanding) -> Self {
        standing.to_string()
    }
}

impl From<String> for NodeStanding {
    fn from(text: String) -> Self {
        if text == MEMBER { Self::Member } else { Self::Removed(text) }
    }
}

/// The path to a node's pods, for one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Family of the pod addresses.
    pub family: Family,
    /// Kind of the path.
    pub path: PathKind,
    /// The peer's underlay address, or the reason why the pods are unreachable; empty for this node.
    pub via: String,
    /// Result of the probes of this path.
    pub probe: ProbeState,
}

words! {
    /// Which path packets take to the pods of a node.
    PathKind {
        /// None: they are on this node.
        Local = "local",
        /// By a route to the peer's address on the same link.
        Direct = "direct",
        /// Through a VXLAN tunnel to the peer.
        Vxlan = "vxlan",
        /// There is no path.
        Unreachable = "unreachable",
    }
}

words! {
    /// What probes of a path have shown.
    ProbeState {
        /// Nothing yet, or the path is not probed.
        Unknown = "",
        /// The peer answers, to packets of every size.
        Answers = "answers",
        /// It answers to small packets only.
        Narrow = "narrow",
        /// It does not answer.
        Silent = "silent",
        /// The peer answers, and what is forwarded to its pods does not arrive, or the answer does not.
        Dropped = "dropped",
    }
}
