//! Requests for addresses, and the reasons for refusing them.

use std::net::IpAddr;

use polder_api::{Attachment, Family, Mac, Pod, PoolName, PortMapping};

use crate::allocator::{AddressRefusal, Counts};
use crate::ledger::{AttachmentEntry, AttachmentKind, LedgerError};

/// Request for the addresses of one attachment.
#[derive(Debug, Clone)]
pub struct AllocationRequest {
    /// Key of the attachment.
    pub attachment: Attachment,
    /// Interface in a pod, or addresses only.
    pub kind: AttachmentKind,
    /// Source of the addresses.
    pub source: AllocationSource,
    /// Requested MAC address; `None` to derive it from the first address.
    pub mac: Option<Mac>,
    /// MTU, in bytes.
    pub mtu: u32,
    /// Path of the network namespace; empty if there is none.
    pub netns: String,
    /// Pod name and namespace, if known.
    pub pod: Option<Pod>,
    /// Host ports that lead to the pod.
    pub ports: Vec<PortMapping>,
}

/// Source of the addresses of an attachment.
#[derive(Debug, Clone)]
pub enum AllocationSource {
    /// From the node's blocks: one address of each family, or none at all.
    Blocks {
        /// Families, one address of each.
        families: Vec<Family>,
        /// The only pool to use; `None` for any.
        pool: Option<PoolName>,
        /// Requested addresses, at most one per family; used instead of the next free one.
        requested: Vec<IpAddr>,
        /// Addresses reserved for the pod, at most one per family. This node must hold and still expect them.
        reserved: Vec<IpAddr>,
    },
    /// From another IPAM plugin: addresses outside the node's blocks.
    OtherPlugin(Vec<IpAddr>),
}

/// The criteria for choosing addresses from the node's blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choice<'a> {
    pub(super) pool: Option<&'a PoolName>,
    pub(super) requested: &'a [IpAddr],
    pub(super) reserved: &'a [IpAddr],
    pub(super) attachment: &'a Attachment,
}

/// Reason for refusing a request; nothing was allocated.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// The attachment already has addresses.
    /// Remedy: none, the runtime sends a DEL before another ADD.
    #[error("{} is already attached", .0.attachment)]
    Exists(Box<AttachmentEntry>),
    /// It was released before its ADD ended, and must be released again.
    /// Remedy: none, it is retried.
    #[error("its last ADD is still running")]
    DeletedDuringAdd,
    /// No address is free.
    /// Remedy: add a pool with polderctl pool add.
    #[error("no free {family} address: {} used, {} in cool-down, {} free", counts.used, counts.resting, counts.free)]
    Shortage {
        /// Family of the missing address.
        family: Family,
        /// State of the node's addresses of that family and pool.
        counts: Counts,
    },
    /// The requested address is not available.
    /// Remedy: request another address.
    #[error("{address} is not available")]
    Refused {
        /// Requested address.
        address: IpAddr,
        /// Reason.
        why: AddressRefusal,
        /// Attachment that uses the address, if any.
        holder: Option<Box<AttachmentEntry>>,
    },
    /// The node has no gateway address of that family, the next hop of the pods.
    /// Remedy: none, the agent claims a block; if it persists, see polderctl status.
    #[error("the node has no {family} gateway address")]
    NoGateway {
        /// Family without a gateway.
        family: Family,
    },
    /// Another pod uses the requested MAC address.
    /// Remedy: request another MAC address, or delete that pod.
    #[error("MAC address {mac} is used by {holder}")]
    MacTaken {
        /// Requested MAC address.
        mac: Mac,
        /// Attachment that uses the address.
        holder: Attachment,
    },
    /// Another pod has the requested host port.
    /// Remedy: request another host port, or delete that pod.
    #[error("host port {port} is used by {}", holder.attachment)]
    PortTaken {
        /// Requested host port.
        port: PortMapping,
        /// Attachment that has the port.
        holder: Box<AttachmentEntry>,
    },
    /// The ledger could not be read or written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}
