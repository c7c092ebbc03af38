//! How a node is, for `polderctl` and whoever reads its JSON.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{Backend, Family, NodeName, PoolName};

/// One node as its agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: NodeName,
    /// The agent's release.
    pub version: String,
    /// Whether pods should come to the node; `reasons` say why not.
    pub ready: bool,
    /// What stands in the way of being ready, each with its remedy.
    pub reasons: Vec<String>,
    /// What is wrong or degraded although the node serves: refused records, unreachable peers, what others on the
    /// host do.
    pub problems: Vec<String>,
    /// The cluster, once known.
    pub cluster: Option<ClusterStatus>,
    /// The store behind it.
    pub store: StoreStatus,
    /// The node's own addresses on the underlay, and how each was chosen.
    pub underlay: Vec<UnderlayStatus>,
    /// The node's other addresses, and why each was not chosen.
    pub not_underlay: Vec<NotUnderlayStatus>,
    /// MTU that new pods get, in bytes.
    pub mtu: Option<u32>,
    /// The blocks that the node owns.
    pub blocks: Vec<BlockStatus>,
    /// Attachments in the ledger.
    pub pods: usize,
    /// What this kernel lacks of what Polder uses.
    pub missing_features: Vec<String>,
    /// The last pass over the kernel's state.
    pub last_pass: Option<PassStatus>,
    /// What others have changed of ours in the kernel and was put right, the last at the end.
    pub repairs: Vec<RepairStatus>,
    /// How often that was, since the agent started.
    pub repair_count: u64,
    /// What the store refuses to write, and has not written since. `problems` say what that means and what helps.
    #[serde(default)]
    pub refused_writes: Vec<RefusedWrites>,
    /// The nodes that were removed and that something is still waited for.
    #[serde(default)]
    pub removed: Vec<RemovedStatus>,
}

/// A node that was removed, as long as something of it rests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedStatus {
    /// Its name.
    pub node: NodeName,
    /// What rests, and what it waits for.
    pub standing: String,
}

/// Writes that the store refuses again and again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedWrites {
    /// Why, in the store's words.
    pub reason: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// How many writes of this node were refused since then.
    pub count: u64,
}

impl Status {
    /// Whether the node is ready, its store answers, its last pass did all, and no problem is named. What the kernel lacks and
    /// what was repaired is no problem.
    pub fn is_well(&self) -> bool {
        self.ready
            && self.problems.is_empty()
            && matches!(self.store, StoreStatus::Connected { .. })
            && self.last_pass.as_ref().is_none_or(|pass| pass.failures.is_empty())
    }
}

/// The settings that all nodes share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Random identity, made when the cluster was.
    pub id: String,
    /// How the nodes reach each other's pods.
    pub backend: Backend,
    /// How pods hang on their node.
    pub attach: AttachMode,
    /// The UDP port of VXLAN tunnels.
    pub vxlan_port: u16,
    /// The VXLAN network identifier.
    pub vxlan_vni: u32,
    /// Whether pods leave the cluster with their node's address.
    pub masquerade: bool,
    /// Where they keep their own address nevertheless, besides the pools.
    pub masquerade_except: Vec<IpNetwork>,
}

/// A wish for other settings: what is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SettingsChange {
    /// How the nodes reach each other's pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// How pods are attached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attach: Option<AttachMode>,
    /// The UDP port of VXLAN tunnels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The VXLAN network identifier, 24 bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// Whether pods leave the cluster with their node's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<bool>,
    /// Where they keep their own address nevertheless: all such ranges, besides the pools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub except: Option<Vec<IpNetwork>>,
}

words! {
    /// How pods hang on their node.
    #[derive(Default)]
    AttachMode {
        /// As ports of a bridge.
        #[default]
        Bridge = "bridge",
        /// With a host route each.
        Routed = "routed",
    }
}

/// Where the cluster's records come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum StoreStatus {
    /// Records are current as of this store revision.
    Connected {
        /// The store.
        store: String,
        /// Revision of the last record seen.
        revision: i64,
    },
    /// The store cannot be reached; the last known records are in force.
    Disconnected {
        /// The store.
        store: String,
        /// Why, and what to look at.
        reason: String,
    },
}

/// One address of the node that peers reach it at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderlayStatus {
    /// The address.
    pub address: IpAddr,
    /// The interface that has it.
    pub interface: String,
    /// The MTU of that interface, in bytes.
    pub mtu: u32,
    /// Why this one.
    pub chosen_by: String,
}

/// One address of the node that peers do not reach it at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotUnderlayStatus {
    /// The address.
    pub address: IpAddr,
    /// The interface that has it, if that is up.
    pub interface: Option<String>,
    /// Why it was not chosen.
    pub reason: String,
}

/// One block and what has become of its addresses. The four counts add up to the block's size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStatus {
    /// The block.
    pub block: IpNetwork,
    /// Its pool.
    pub pool: PoolName,
    /// Allocated to an attachment or to the node itself.
    pub used: u64,
    /// Freed less than the cool-down ago.
    pub resting: u64,
    /// Ready to be allocated.
    pub free: u64,
    /// Never allocated: the first and last address of the pool.
    pub excluded: u64,
}

/// One pass over the kernel's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassStatus {
    /// How many passes there were since the agent started.
    pub count: u64,
    /// Writes of the last one: 0 says that the kernel was as it should be.
    pub writes: usize,
    /// Writes of all passes since the agent started.
    pub written: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
    /// What could not be done.
    pub failures: Vec<String>,
}

/// Something of ours that somebody else has changed in the kernel, and that was put right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairStatus {
    /// When, in seconds since 1970.
    pub at: u64,
    /// What was done, the first of it.
    pub changes: Vec<String>,
    /// How much more was done.
    pub more: usize,
    /// Who made it necessary, where the kernel tells.
    pub by: Vec<String>,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: NodeName,
    /// Whether it is a member.
    pub standing: NodeStanding,
    /// Where peers reach it.
    pub underlay: Vec<IpAddr>,
    /// Its gateway addresses.
    pub gateways: Vec<IpAddr>,
    /// The blocks that it owns.
    pub blocks: Vec<IpNetwork>,
    /// How this node reaches it.
    pub paths: Vec<PathStatus>,
    /// Whether its lease is alive; `None` where the store could not be asked.
    pub alive: Option<bool>,
    /// The release of its agent.
    pub version: String,
}

/// Whether a node is a member of the cluster. A string in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum NodeStanding {
    /// It is.
    Member,
    /// It was removed: what its blocks wait for.
    Removed(String),
}

/// What JSON says of a member.
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

/// How the blocks of one family of a peer are reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// The family of the pods' addresses.
    pub family: Family,
    /// Which way its packets take.
    pub path: PathKind,
    /// The peer's underlay address that is used, or why there is none.
    pub via: String,
    /// What probes over it have shown.
    pub probe: ProbeState,
}

words! {
    /// Which way packets take to the pods of a node.
    PathKind {
        /// None: they are on this node.
        Local = "local",
        /// By a route to the peer's address on the same link.
        Direct = "direct",
        /// Through a VXLAN tunnel to the peer.
        Vxlan = "vxlan",
        /// There is no way.
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
