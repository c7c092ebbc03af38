//! What the plugin and the ctl ask, and what the agent answers.
//!
//! A connection carries any number of requests, each answered before the next is read. An [`Request::Add`] holds
//! its attachment until the connection ends: that is how the agent knows that the plugin is still wiring, and a
//! plugin that dies on the way gives the attachment back by dying.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::status::{NodeStatus, Status};
use crate::{Attachment, IfName, Mac, Pod, PoolName};

/// A question to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Give the attachment addresses, and say how to wire it.
    Add(AddRequest),
    /// Take the attachment's interface away, then its addresses. Succeeds where there is nothing.
    Del(Attachment),
    /// Say how the attachment should be wired.
    Check(Attachment),
    /// How this node is.
    Status,
    /// The nodes of the cluster, as this node sees them.
    Nodes,
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
    /// Take the addresses from this pool alone.
    pub pool: Option<PoolName>,
    /// Use this MTU instead of the node's, in bytes.
    pub mtu: Option<u32>,
}

/// An answer of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To Add and Check: what the wiring is to be.
    Wiring(Wiring),
    /// To Del: interface and addresses are gone.
    Deleted,
    /// To Status.
    Status(Box<Status>),
    /// To Nodes.
    Nodes(Vec<NodeStatus>),
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
}
