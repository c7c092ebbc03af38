//! The node's own durable record of its blocks, attachments and addresses: what it says, and how it is changed.
//!
//! Every change is all or nothing. On a node the ledger is a file (of the crate `polder-store`); where many nodes are played
//! through, it is plain data ([`memory`]).

pub mod memory;

use std::error::Error;
use std::net::IpAddr;
use std::str::FromStr;

use polder_api::{Attachment, Mac, Pod, PoolName};

use crate::cause::Cause;
use crate::ids::{BootId, ClusterId, Incarnation, Nonce};
use crate::moment::Moment;
use crate::pool::Block;

/// The ledger cannot be read, or a write did not happen: nothing of it did.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("ledger: {0}")]
pub struct LedgerError(Cause);

impl LedgerError {
    /// For this reason.
    pub fn new(reason: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(Cause::new(reason))
    }
}

/// Whose ledger it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The name under which the node registered.
    pub node: polder_api::NodeName,
    /// Which of the nodes of that name.
    pub incarnation: Incarnation,
    /// In which cluster.
    pub cluster: ClusterId,
    /// Whether it is still in it.
    pub standing: Standing,
}

/// Whether a node belongs to its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It does.
    Member,
    /// It was removed: nothing that it had is its own any more.
    Removed,
}

/// A block that the node owns.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OwnedBlock {
    /// The block.
    pub block: Block,
    /// Its pool.
    pub pool: PoolName,
    /// That of the claim.
    pub nonce: Nonce,
    /// Whether it is being given back: nothing goes out of it any more.
    pub leaving: bool,
}

/// What an attachment is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An interface of ours in the pod.
    Pod,
    /// Addresses alone: another plugin makes the interface.
    Lease,
}

impl Kind {
    /// Its name in the ledger.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Lease => "lease",
        }
    }
}

/// A kind of attachment that no release knows.
#[derive(Debug, thiserror::Error)]
#[error("unknown attachment kind {0:?}")]
pub struct UnknownKind(String);

impl FromStr for Kind {
    type Err = UnknownKind;
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let known = [Self::Pod, Self::Lease].into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

/// An attachment with its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Held {
    /// Which one.
    pub attachment: Attachment,
    /// What it is made of.
    pub kind: Kind,
    /// When it was added.
    pub since: Moment,
    /// Its addresses, IPv4 first. Those in none of the node's blocks are reserved, or come from another IPAM plugin.
    pub addresses: Vec<IpAddr>,
    /// The MAC address of the pod's end.
    pub mac: Mac,
    /// The MTU of both ends, in bytes.
    pub mtu: u32,
    /// Path of the network namespace, as the runtime said it.
    pub netns: String,
    /// The pod, where the runtime named it.
    pub pod: Option<Pod>,
    /// Whether it is being taken away: it holds its addresses until its interface is gone.
    pub leaving: bool,
    /// The gateways that it was made with, where they are not the node's any more.
    pub gateways: Vec<IpAddr>,
}

/// What is kept. After an error nothing has changed.
pub trait Ledger {
    /// Whose ledger it is, if the node has ever registered.
    fn identity(&self) -> Result<Option<Identity>, LedgerError>;

    /// Writes down whose ledger it is.
    fn identify(&mut self, identity: &Identity) -> Result<(), LedgerError>;

    /// Says which boot it is. After another one every attachment is void, for its interface and its namespace are
    /// gone: its addresses rest as if freed when this boot began. Returns the attachments that became void.
    fn enter_boot(&mut self, id: &BootId) -> Result<Vec<Held>, LedgerError>;

    /// The blocks that the node owns.
    fn blocks(&self) -> Result<Vec<OwnedBlock>, LedgerError>;

    /// Adds a block that the node owns.
    fn add_block(&mut self, owned: &OwnedBlock) -> Result<(), LedgerError>;

    /// Lets these addresses rest from that moment, also those that rest already. What is used stays used.
    fn rest(&mut self, addresses: &[IpAddr], freed: Moment) -> Result<(), LedgerError>;

    /// Notes that the block is being given back.
    fn mark_block_leaving(&mut self, block: Block) -> Result<(), LedgerError>;

    /// Removes a block that the node does not own any more, and what rests in it. Fails where an address of it is used.
    fn remove_block(&mut self, block: Block) -> Result<(), LedgerError>;

    /// The node's own addresses, IPv4 first.
    fn gateways(&self) -> Result<Vec<IpAddr>, LedgerError>;

    /// Allocates an address to the node itself. An address that rested is used again.
    fn add_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError>;

    /// Puts the node's own address to rest. Succeeds where it is none.
    fn remove_gateway(&mut self, address: IpAddr, freed: Moment) -> Result<(), LedgerError>;

    /// Puts the node's own address `old` to rest and allocates `new` in its place. The attachments that there are keep the
    /// gateways that they were made with.
    fn replace_gateway(&mut self, old: IpAddr, new: IpAddr, freed: Moment) -> Result<(), LedgerError>;

    /// The addresses that were freed, and when. Those of past boots were freed when this one began.
    fn resting(&self) -> Result<Vec<(IpAddr, Moment)>, LedgerError>;

    /// All attachments.
    fn attachments(&self) -> Result<Vec<Held>, LedgerError>;

    /// Adds an attachment with its addresses. Fails, and changes nothing, where the attachment is there already or
    /// one of the addresses is in use.
    fn add_attachment(&mut self, held: &Held) -> Result<(), LedgerError>;

    /// Notes that the attachment is being taken away.
    fn mark_leaving(&mut self, attachment: &Attachment) -> Result<(), LedgerError>;

    /// Removes the attachment; its addresses rest from `freed` on, those that are not the node's are forgotten.
    /// Succeeds where there is none.
    fn remove_attachment(&mut self, attachment: &Attachment, freed: Moment) -> Result<(), LedgerError>;

    /// Removes all blocks, the node's own addresses and all that rests. Fails where there is an attachment.
    fn clear(&mut self) -> Result<(), LedgerError>;

    /// Notes what a kernel setting was before it was changed, unless that is noted already.
    fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError>;

    /// What kernel settings were before they were changed, the last changed first.
    fn sysctls(&self) -> Result<Vec<(String, String)>, LedgerError>;
}
