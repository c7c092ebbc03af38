//! Requests of the plugin and of polderctl, and replies of the agent.
//!
//! A connection carries any number of requests. The agent answers each one before it reads the next. A [`Request::Add`]
//! has two replies ([`Permission::Follows`]), and holds its attachment until the connection ends: the agent detects that
//! the plugin is still wiring, and releases the attachment if the plugin dies.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::credentials::EtcdCredentials;
use crate::ipam::{Checked, Release, RepairMode, Shown, Subject};
use crate::pool::{ClaimStatus, PoolChange, PoolStatus};
use crate::status::{NodeStatus, SettingsChange, Status};
use crate::{Attachment, IfName, Mac, NetworkName, NodeName, Pod, PoolName, PortMapping};

/// A request as sent over the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// Trace context of the runtime's call (W3C Trace Context), for the logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// etcd credentials for a request that changes the cluster, instead of the agent's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<EtcdCredentials>,
    /// The request.
    pub request: Request,
}

/// The requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Allocate addresses for the attachment and return its wiring.
    Add(AddRequest),
    /// The interface of this connection's ADD is ready. Ends the lock of the attachment. Has no reply.
    Attached,
    /// Delete the attachment's interface, then release its addresses. Succeeds if nothing exists.
    Del(Attachment),
    /// Return the expected wiring of the attachment.
    Check(Attachment),
    /// Allocate addresses for an interface that another plugin creates.
    Lease(AddRequest),
    /// Return the addresses of an attachment whose interface another plugin created.
    Leased(Attachment),
    /// Release every attachment of a network that is not in the list of valid attachments.
    Collect(Collection),
    /// Return whether an ADD would succeed.
    Health(HealthRequest),
    /// Status of this node.
    Status,
    /// Liveness of the agent.
    Live,
    /// Kernel changes that the next pass would make.
    Plan,
    /// The nodes of the cluster, as known to this node.
    Nodes,
    /// Remove a node from the cluster.
    RemoveNode(Removal),
    /// Confirm that this machine replaces a lost machine as the node of that name.
    AdoptNode(NodeName),
    /// The pools of the cluster, as known to this node.
    Pools,
    /// The claimed blocks, as known to this node.
    Blocks,
    /// Change the cluster's pools.
    ChangePool(PoolChange),
    /// Change settings of the cluster.
    ChangeSettings(SettingsChange),
    /// Show address allocations.
    Show(Subject),
    /// Check the records of the cluster, and ledger and kernel of every node.
    Inspect(RepairMode),
    /// Release an address.
    Release(Release),
}

/// Request to remove a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Removal {
    /// Node name.
    pub node: NodeName,
    /// Whether the operator declares that the node and its pods are permanently gone (`--dead`). The removal then does
    /// not wait for the node's confirmation.
    pub dead: bool,
    /// Number of pods that the operator accepts to disconnect (`--disconnect-pods`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disconnect_pods: Option<u64>,
    /// Whether `dead` applies to earlier, removed machines of that name only, not to the current one (`--earlier`).
    #[serde(default)]
    pub earlier: bool,
}

/// A new attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddRequest {
    /// The attachment.
    pub attachment: Attachment,
    /// Path of the container's network namespace, recorded in the ledger.
    pub netns: String,
    /// The pod, if the runtime passed it.
    pub pod: Option<Pod>,
    /// Source of the addresses.
    pub source: AddressSource,
    /// MAC address of the pod interface; default: derived from the address.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// MTU in bytes; default: that of the node.
    pub mtu: Option<u32>,
    /// The host ports that lead to the pod. An agent of an earlier release refuses a request with host ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortMapping>,
}

/// Source of the addresses of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AddressSource {
    /// The node's blocks, one address per family of the cluster.
    Pools {
        /// Restricts the allocation to this pool.
        pool: Option<PoolName>,
        /// Requested addresses, at most one per family.
        addresses: Vec<IpAddr>,
    },
    /// Addresses that another IPAM plugin has assigned.
    Delegated(Vec<IpAddr>),
}

/// Arguments of [`Request::Collect`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collection {
    /// The network.
    pub network: NetworkName,
    /// Valid attachments of the network.
    pub valid: Vec<Attachment>,
    /// Start of the call, in milliseconds since boot (`CLOCK_BOOTTIME`). Attachments that were added later are kept.
    pub began_ms: u64,
}

/// Needs of an ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthRequest {
    /// Whether the ADD needs addresses of the node's blocks, and from which pool.
    pub pools: Needed,
}

/// Whether addresses of the node's blocks are needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Needed {
    /// One address per family; from this pool only, if given.
    Addresses(Option<PoolName>),
    /// No addresses: another IPAM plugin assigns them.
    Nothing,
}

/// Whether an ADD would succeed, and problems that can affect running pods.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// Why an ADD would fail. Also empty while interfaces of other plugins have addresses of this node: otherwise their
    /// pods would be evicted.
    pub unavailable: Vec<String>,
    /// The subset of these problems that can affect running pods.
    pub limited: Vec<String>,
}

/// An address for an interface of another plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeasedAddress {
    /// The address, with the prefix length of its block: all addresses of the block belong to this node.
    pub address: IpNetwork,
    /// Gateway address of the block.
    pub gateway: IpAddr,
}

/// The replies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To Add and Check: the wiring.
    Wiring(Wiring),
    /// To Add, after the wiring: the packet filter lets the pod send and receive.
    Permitted,
    /// To Lease and Leased: the addresses.
    Leased(Vec<LeasedAddress>),
    /// To Del: interface deleted and addresses released. To Collect: the same for all attachments that were not valid.
    Deleted,
    /// To Health.
    Health(Health),
    /// To Status.
    Status(Box<Status>),
    /// To Live: the stuck threads, as text.
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
    /// To a change by an operator: the result, as text.
    Done(String),
    /// To `RemoveNode`: nothing was done, because the node is alive and has pods. The request must give their number.
    Unconfirmed {
        /// Consequences, and how to confirm.
        message: String,
        /// Number of pods that would be disconnected.
        pods: u64,
    },
    /// The request failed, and nothing was changed.
    Refused(Refusal),
}

/// The parameters for wiring one pod interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wiring {
    /// Name of the host-side interface.
    pub host_interface: IfName,
    /// `ifalias` of the host-side interface.
    pub alias: String,
    /// How the host-side interface is attached.
    pub attach: Attach,
    /// MAC address of the pod-side interface.
    pub mac: Mac,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// The pod's addresses, at most one per family.
    pub addresses: Vec<PodAddress>,
    /// MAC address of all gateways.
    pub gateway_mac: Mac,
    /// Addresses outside the node's blocks: the host needs a route to each.
    pub strays: Vec<IpAddr>,
    /// Whether the packet filter lets the pod send and receive.
    #[serde(default, skip_serializing_if = "Permission::is_given")]
    pub permission: Permission,
}

/// Whether the packet filter lets a pod send and receive with its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Permission {
    /// It does. Agents of earlier releases answer an ADD when it does.
    #[default]
    Given,
    /// The filter is being changed, while the plugin creates the interface. A second reply follows:
    /// [`Reply::Permitted`], or [`Reply::Refused`].
    Follows,
}

impl Permission {
    fn is_given(&self) -> bool {
        *self == Self::Given
    }
}

/// One address of a pod, as a host prefix, and the gateway of its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodAddress {
    /// Address of the pod.
    pub address: IpAddr,
    /// Gateway address of the node, on `polder0`.
    pub gateway: IpAddr,
}

/// How pods are attached to the node.
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

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Refusal {
    /// Kind of the refusal.
    pub kind: RefusalKind,
    /// Problem and remedy.
    pub message: String,
}

/// The kinds of refusal that a caller can distinguish. The plugin maps each to a CNI error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The request itself is wrong.
    Invalid,
    /// Agent or datastore not ready, or another operation on the attachment is running: try again.
    TryAgain,
    /// No address is free, and no block can be claimed.
    PoolExhausted,
    /// A requested address is not available.
    AddressTaken,
    /// The node was removed from the cluster.
    Removed,
    /// The attachment already exists.
    Exists,
    /// The attachment does not exist.
    Missing,
    /// The kernel or the ledger returned an error.
    Failed,
}

/// An error that is reported to the caller of a request: its text is the message of the refusal.
///
/// Refusals are made from errors, so that each text is in an `#[error]` attribute, and in `docs/errors.md`.
pub trait Refuse: fmt::Display {
    /// The kind of the refusal.
    fn kind(&self) -> RefusalKind;
}

impl<E: Refuse> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self { kind: error.kind(), message: error.to_string() }
    }
}
