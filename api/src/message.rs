//! What the plugin and the ctl ask, and what the agent answers.
//!
//! A connection carries any number of requests, each answered before the next is read. An [`Request::Add`] holds
//! its attachment until the connection ends: that is how the agent knows that the plugin is still wiring, and a
//! plugin that dies on the way gives the attachment back by dying.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::credentials::EtcdCredentials;
use crate::ipam::{Checked, Release, Repairs, Shown, Subject};
use crate::pool::{ClaimStatus, PoolChange, PoolStatus};
use crate::status::{NodeStatus, SettingsChange, Status};
use crate::{Attachment, IfName, Mac, NetworkName, NodeName, Pod, PoolName};

/// A request as it goes over the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// What ties it to the runtime's call in a trace (W3C Trace Context), for the logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// What to show to etcd for it instead of what the agent shows, where it changes the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<EtcdCredentials>,
    /// The request.
    pub request: Request,
}

/// What is wanted of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Give the attachment addresses, and say how to wire it.
    Add(AddRequest),
    /// Take the attachment's interface away, then its addresses. Succeeds where there is nothing.
    Del(Attachment),
    /// Say how the attachment should be wired.
    Check(Attachment),
    /// Give the attachment addresses, for an interface that another plugin makes.
    Lease(AddRequest),
    /// Say which addresses the attachment has, for an interface that another plugin has made.
    Leased(Attachment),
    /// Take away every attachment of a network that is not among the valid ones.
    Collect(Collection),
    /// Say whether an ADD would be served.
    Health(HealthRequest),
    /// How this node is.
    Status,
    /// Whether the agent does its work.
    Live,
    /// What the next pass over the kernel would change.
    Plan,
    /// The nodes of the cluster, as this node sees them.
    Nodes,
    /// Remove a node from the cluster.
    RemoveNode(Removal),
    /// Let this machine take the place of another that is gone, as this node.
    AdoptNode(NodeName),
    /// The pools of the cluster, as this node sees them.
    Pools,
    /// The blocks that are claimed, as this node sees them.
    Blocks,
    /// Change the cluster's pools.
    ChangePool(PoolChange),
    /// Change settings of the cluster.
    ChangeSettings(SettingsChange),
    /// Say who has which address, and why.
    Show(Subject),
    /// Check the records of the cluster, and ledger and kernel of every node.
    Inspect(Repairs),
    /// Give an address up.
    Release(Release),
}

/// A node that is to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Removal {
    /// Its name.
    pub node: NodeName,
    /// Whether whoever asks knows that it and its pods are gone for good: nobody waits for it to confirm that.
    pub dead: bool,
    /// How many pods whoever asks knows to be disconnected by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disconnect_pods: Option<u64>,
    /// Whether that is said of machines that had the name before and were removed, and not of the one that has it now.
    #[serde(default)]
    pub earlier: bool,
}

/// A new attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// Which interface of which container.
    pub attachment: Attachment,
    /// Path of the container's network namespace, for the record.
    pub netns: String,
    /// The pod, where the runtime named it.
    pub pod: Option<Pod>,
    /// Where the addresses come from.
    pub source: AddressSource,
    /// Use this MAC address instead of one made from the address.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Use this MTU instead of the node's, in bytes.
    pub mtu: Option<u32>,
}

/// Where the addresses of an attachment come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AddressSource {
    /// From the node's blocks, one of each family of the cluster.
    Pools {
        /// From this pool alone.
        pool: Option<PoolName>,
        /// These, where there is one of the family.
        addresses: Vec<IpAddr>,
    },
    /// From another IPAM plugin, which has given these.
    Delegated(Vec<IpAddr>),
}

/// What is left of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collection {
    /// The network.
    pub network: NetworkName,
    /// Its attachments that are there.
    pub valid: Vec<Attachment>,
    /// When the call began, in milliseconds since boot (`CLOCK_BOOTTIME`): what was added later is not known to whoever
    /// said what is valid.
    pub began_ms: u64,
}

/// What an ADD would need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthRequest {
    /// Whether it would need addresses of the node's blocks, and of which pool.
    pub pools: Needed,
}

/// Whether addresses of the node's blocks are needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Needed {
    /// One of each family; of this pool alone, if one is named.
    Addresses(Option<PoolName>),
    /// None: another IPAM plugin has them.
    Nothing,
}

/// Whether an ADD would be served, and whether running pods are well.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Why an ADD would not be served. Empty, too, while interfaces of other plugins have addresses of this node: their pods
    /// would be evicted for it.
    pub unavailable: Vec<String>,
    /// Which of that may cut off pods that run.
    pub limited: Vec<String>,
}

/// An address that was given for an interface of another plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeasedAddress {
    /// The address, with the length of the block that it is from: its neighbours are on this node.
    pub address: IpNetwork,
    /// The block's own gateway.
    pub gateway: IpAddr,
}

/// An answer of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To Add and Check: what the wiring is to be.
    Wiring(Wiring),
    /// To Lease and Leased.
    Leased(Vec<LeasedAddress>),
    /// To Del: interface and addresses are gone. To Collect: those of all that were not valid are.
    Deleted,
    /// To Health.
    Health(Health),
    /// To Status.
    Status(Box<Status>),
    /// To Live: the threads that stand still, in words.
    Live(Vec<String>),
    /// To Plan: the changes, in order.
    Planned(Vec<String>),
    /// To Nodes.
    Nodes(Vec<NodeStatus>),
    /// To Pools.
    Pools(Vec<PoolStatus>),
    /// To Blocks.
    Blocks(Vec<ClaimStatus>),
    /// To Show.
    Shown(Box<Shown>),
    /// To Inspect.
    Checked(Box<Checked>),
    /// To what an operator wants changed: what has come of it, in words.
    Done(String),
    /// To `RemoveNode`: nothing was done, because the node is alive and has pods. The request has to say how many.
    Unconfirmed {
        /// What would happen, and how to confirm it.
        message: String,
        /// How many pods would be disconnected.
        pods: u64,
    },
    /// It could not be done, and nothing was.
    Refused(Refusal),
}

/// All that the plugin needs to wire one pod interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wiring {
    /// Name of the host's end.
    pub host_interface: IfName,
    /// Its `ifalias`.
    pub alias: String,
    /// What the host's end is joined to.
    pub attach: Attach,
    /// MAC address of the pod's end.
    pub mac: Mac,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// The pod's addresses, at most one of a family.
    pub addresses: Vec<PodAddress>,
    /// The MAC address that answers for every gateway.
    pub gateway_mac: Mac,
    /// Which of the addresses no block of the node has: the host needs a route to each.
    pub strays: Vec<IpAddr>,
}

/// One address of a pod, as a host prefix, and the gateway of its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodAddress {
    /// The pod's own.
    pub address: IpAddr,
    /// The node's, on `polder0`.
    pub gateway: IpAddr,
}

/// How pods hang on the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Attach {
    /// A port of the bridge.
    Bridge {
        /// Whether the kernel can lock the port to the pod's MAC address (Linux 5.18).
        locked: bool,
    },
    /// A host route to the interface, without the bridge.
    Routed,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Refusal {
    /// What the caller can do with it.
    pub kind: RefusalKind,
    /// What is wrong, and the remedy.
    pub message: String,
}

/// The kinds of refusal that a caller can tell apart. The plugin gives each its CNI error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The request itself is wrong.
    Invalid,
    /// The agent or its store is not ready, or the same attachment is being worked on: try again.
    TryAgain,
    /// No address is free, and no block can be claimed.
    PoolExhausted,
    /// An address that was asked for is not to be had.
    AddressTaken,
    /// The node was removed from the cluster.
    Removed,
    /// The attachment is there already.
    Exists,
    /// The attachment is not there.
    Missing,
    /// The kernel or the ledger said no.
    Failed,
}

impl Refusal {
    /// A refusal of `kind`, with the reason in words.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A refusal where another attempt may help.
    pub fn try_again(message: impl fmt::Display) -> Self {
        Self::new(RefusalKind::TryAgain, message.to_string())
    }
}
