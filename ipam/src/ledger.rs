//! The node's own durable record of its blocks, attachments and addresses: its contents and changes.
//!
//! Every change is atomic. On a node the ledger is a file (crate `polder-store`); in a simulation of many nodes it is
//! plain data ([`memory`]).

pub mod memory;

use std::error::Error;
use std::net::IpAddr;
use std::str::FromStr;

use polder_api::{Attachment, Mac, Pod, PoolName, PortMapping};

use crate::cause::SharedError;
use crate::ids::{BootId, ClusterId, Incarnation, Nonce};
use crate::moment::Moment;
use crate::pool::Block;

/// The ledger cannot be read or written. A failed write changed nothing.
/// Remedy: check the disk of the agent's state directory: free space, a read-only mount, I/O errors.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("ledger: {0}")]
pub struct LedgerError(SharedError);

impl LedgerError {
    /// An error with this reason.
    pub fn new(reason: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(SharedError::new(reason))
    }

    /// The error of the database.
    pub fn reason(&self) -> &SharedError {
        &self.0
    }
}

/// Identity of the node that the ledger belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeIdentity {
    /// Name under which the node registered.
    pub node: polder_api::NodeName,
    /// Distinguishes successive nodes with this name.
    pub incarnation: Incarnation,
    /// Id of the cluster.
    pub cluster: ClusterId,
    /// Whether the node still belongs to the cluster.
    pub member_state: MemberState,
}

/// Whether a node belongs to its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemberState {
    /// The node belongs to the cluster.
    Member,
    /// The node was removed: it owns no block or address any more.
    Removed,
}

/// A block that the node owns.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OwnedBlock {
    /// The block.
    pub block: Block,
    /// Name of its pool.
    pub pool: PoolName,
    /// Nonce of the claim in the datastore.
    pub nonce: Nonce,
    /// Whether it is being released: nothing is allocated from it any more.
    pub leaving: bool,
}

/// Type of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttachmentKind {
    /// Polder creates the interface in the pod.
    Pod,
    /// Addresses only: another plugin creates the interface.
    Lease,
}

impl AttachmentKind {
    /// Value in the ledger: `pod` or `lease`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Lease => "lease",
        }
    }
}

/// A type of attachment that this release does not know.
/// Remedy: start the release of the agent that wrote the ledger, or a newer one.
#[derive(Debug, thiserror::Error)]
#[error("unknown attachment kind {0:?}")]
pub struct UnknownKind(String);

impl FromStr for AttachmentKind {
    type Err = UnknownKind;
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let known = [Self::Pod, Self::Lease].into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

/// An attachment with its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AttachmentEntry {
    /// Key of the attachment.
    pub attachment: Attachment,
    /// Interface in a pod, or addresses only.
    pub kind: AttachmentKind,
    /// Time of its ADD.
    pub since: Moment,
    /// Its addresses, IPv4 first. Addresses outside the node's blocks are reserved, or come from another IPAM plugin.
    pub addresses: Vec<IpAddr>,
    /// MAC address of the pod's end of the interface pair.
    pub mac: Mac,
    /// MTU of both ends of the interface pair, in bytes.
    pub mtu: u32,
    /// Path of the network namespace, as passed by the runtime.
    pub netns: String,
    /// The pod, if the runtime passed its name.
    pub pod: Option<Pod>,
    /// Whether it is being removed: it keeps its addresses until its interface is gone.
    pub leaving: bool,
    /// The gateways at its creation, if the node's gateways have changed since; otherwise empty.
    pub gateways: Vec<IpAddr>,
    /// The host ports that lead to the pod.
    pub ports: Vec<PortMapping>,
}

impl AttachmentEntry {
    /// Whether Polder has created its interface, or is creating it.
    pub fn has_interface(&self) -> bool {
        self.kind == AttachmentKind::Pod && !self.leaving
    }
}

/// Operations of a ledger. A failed one changes nothing.
pub trait Ledger {
    /// The node's identity; `None` before the first registration.
    fn identity(&self) -> Result<Option<NodeIdentity>, LedgerError>;

    /// Writes the node's identity.
    fn identify(&mut self, identity: &NodeIdentity) -> Result<(), LedgerError>;

    /// Sets the current boot. After a reboot all attachments are void because their interfaces and namespaces are gone:
    /// the cool-down of their addresses starts at this boot. Returns the attachments that became void.
    fn enter_boot(&mut self, id: &BootId) -> Result<Vec<AttachmentEntry>, LedgerError>;

    /// The blocks that the node owns, in the order in which they were added.
    fn blocks(&self) -> Result<Vec<OwnedBlock>, LedgerError>;

    /// Adds a block that the node owns.
    fn add_block(&mut self, owned: &OwnedBlock) -> Result<(), LedgerError>;

    /// Starts the cool-down of these addresses at `freed`, also of those already in cool-down. Used addresses stay
    /// used.
    fn cool_down(&mut self, addresses: &[IpAddr], freed: Moment) -> Result<(), LedgerError>;

    /// Marks the block as being released.
    fn mark_block_leaving(&mut self, block: Block) -> Result<(), LedgerError>;

    /// Removes a block that the node no longer owns, with its addresses in cool-down. Fails if an address of it is
    /// used.
    fn remove_block(&mut self, block: Block) -> Result<(), LedgerError>;

    /// The node's gateway addresses, IPv4 first.
    fn gateways(&self) -> Result<Vec<IpAddr>, LedgerError>;

    /// Allocates a gateway address. It may be in cool-down.
    fn add_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError>;

    /// Releases a gateway address; its cool-down starts at `freed`. Succeeds if it is not a gateway address.
    fn remove_gateway(&mut self, address: IpAddr, freed: Moment) -> Result<(), LedgerError>;

    /// Releases gateway address `old` at `freed` and allocates `new`. Existing attachments keep the gateways of their
    /// creation.
    fn replace_gateway(&mut self, old: IpAddr, new: IpAddr, freed: Moment) -> Result<(), LedgerError>;

    /// The released addresses with the time of their release: for earlier boots, the start of this boot.
    fn resting(&self) -> Result<Vec<(IpAddr, Moment)>, LedgerError>;

    /// All attachments, including the probe endpoint.
    fn attachments(&self) -> Result<Vec<AttachmentEntry>, LedgerError>;

    /// Adds an attachment with its addresses. Fails if the attachment exists or one of the addresses is in use.
    fn add_attachment(&mut self, held: &AttachmentEntry) -> Result<(), LedgerError>;

    /// Marks the attachment as being removed.
    fn mark_leaving(&mut self, attachment: &Attachment) -> Result<(), LedgerError>;

    /// Removes the attachment. The cool-down of its addresses starts at `freed`; those outside the node's blocks are
    /// forgotten. Succeeds if the attachment does not exist.
    fn remove_attachment(&mut self, attachment: &Attachment, freed: Moment) -> Result<(), LedgerError>;

    /// Removes all blocks, gateway addresses and addresses in cool-down. Fails if there is an attachment.
    fn clear(&mut self) -> Result<(), LedgerError>;

    /// Saves the previous value of a kernel setting, unless one is already saved.
    fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError>;

    /// The saved previous values of kernel settings as (path, value), the last changed first.
    fn sysctls(&self) -> Result<Vec<(String, String)>, LedgerError>;
}
