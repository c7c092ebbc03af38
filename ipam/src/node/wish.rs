//! What an attachment is to have, and why it does not get it.

use std::net::IpAddr;

use polder_api::{Attachment, Family, Mac, Pod, PoolName};

use crate::allocator::{Counts, Refused};
use crate::ledger::{Held, Kind, LedgerError};

/// A wish for addresses.
#[derive(Debug, Clone)]
pub struct Wish {
    /// For which attachment.
    pub attachment: Attachment,
    /// What it is made of.
    pub kind: Kind,
    /// Where the addresses come from.
    pub source: Source,
    /// The MAC address, if it is not to be made from the first address.
    pub mac: Option<Mac>,
    /// MTU, in bytes.
    pub mtu: u32,
    /// Path of the network namespace.
    pub netns: String,
    /// The pod.
    pub pod: Option<Pod>,
}

/// Where the addresses of an attachment come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// From the node's blocks: one address of each of these families, or none at all.
    Blocks {
        /// The families.
        families: Vec<Family>,
        /// Of this pool alone.
        pool: Option<PoolName>,
        /// These, where there is one of the family.
        requested: Vec<IpAddr>,
        /// These, which are reserved for the pod, where there is one of the family. This node holds them, and expects
        /// them still.
        reserved: Vec<IpAddr>,
    },
    /// From elsewhere: these, which are none of the node's.
    Elsewhere(Vec<IpAddr>),
}

/// What decides which addresses of the node's blocks an attachment gets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Choice<'a> {
    pub(super) pool: Option<&'a PoolName>,
    pub(super) requested: &'a [IpAddr],
    pub(super) reserved: &'a [IpAddr],
    pub(super) attachment: &'a Attachment,
}

/// A wish that was not fulfilled; nothing was allocated.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// The attachment has its addresses already.
    #[error("{} is already attached", .0.attachment)]
    Exists(Box<Held>),
    /// It was released before its ADD had ended, and has to be released again.
    #[error("its last ADD is still running")]
    Overtaken,
    /// There is no address to give.
    #[error("no free {family} address: {} used, {} in cool-down, {} free", counts.used, counts.resting, counts.free)]
    Shortage {
        /// Of that family.
        family: Family,
        /// What has become of the node's addresses, of that family and pool.
        counts: Counts,
    },
    /// The address that was asked for cannot be had.
    #[error("{address} is not available")]
    Refused {
        /// The address.
        address: IpAddr,
        /// Why.
        why: Refused,
        /// Who has it.
        holder: Option<Box<Held>>,
    },
    /// The node has no address of its own of that family, which pods' packets would go to.
    #[error("the node has no {family} gateway address")]
    NoGateway {
        /// The family.
        family: Family,
    },
    /// The MAC address that was asked for is another pod's.
    #[error("MAC address {mac} is used by {holder}")]
    MacTaken {
        /// The MAC address.
        mac: Mac,
        /// Who has it.
        holder: Attachment,
    },
    /// It could not be written down.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}
