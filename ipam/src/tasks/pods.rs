//! What the tasks that add pods and take them away need of a node, besides what the registrar needs.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use polder_api::message::{Refusal, RefusalKind};
use polder_api::{Attachment, Family};

use super::{Host, Unreserved, Workload};
use crate::cause::HostError;
use crate::claim::NoClaim;
use crate::ledger::{Held, Ledger, LedgerError};
use crate::moment::Moment;
use crate::node::NodeIpam;
use crate::pool::BlockRequest;

/// How long an ADD waits for another block, or for its reserved address.
pub const CLAIM_PATIENCE: Duration = Duration::from_secs(15);

/// What is asked of the registrar for an ADD. Each request is answered within [`CLAIM_PATIENCE`].
pub trait Requests {
    /// Asks for another block, and waits for it.
    fn claim(&self, wanted: BlockRequest) -> impl Future<Output = Result<(), NoClaim>>;

    /// Asks for another block for later. The request may be dropped if there are many.
    fn claim_ahead(&self, wanted: BlockRequest);

    /// Asks for a reserved address for the pod `owner` (`namespace/name`), and waits for it.
    fn reserve(
        &self,
        wanted: Workload,
        owner: String,
        attachment: &Attachment,
    ) -> impl Future<Output = Result<IpAddr, Unreserved>>;
}

/// What the tasks about pods need of the outside.
pub trait PodHost: Host + Requests + Sized {
    /// Keeps everybody else from working on an attachment, until it is dropped.
    type Lock;

    /// Locks the attachment; `None` if somebody else works on it.
    fn try_lock(&self, attachment: &Attachment) -> Option<Self::Lock>;

    /// Locks the attachment as soon as nobody else works on it; `None` if that takes longer than `patience`.
    fn lock(&self, attachment: &Attachment, patience: Duration) -> impl Future<Output = Option<Self::Lock>>;

    /// Whether somebody works on the attachment.
    fn is_locked(&self, attachment: &Attachment) -> bool;

    /// Which of these attachments have no interface any more, or no network namespace where the interface is another
    /// plugin's. What cannot be seen is not gone.
    fn gone(&self, held: Vec<Held>) -> impl Future<Output = Result<BTreeSet<Attachment>, HostError>>;

    /// Lets the pod send and receive under its addresses.
    fn admit(&self, held: &Held) -> impl Future<Output = Result<(), HostError>>;

    /// Deletes the attachment's interface. Succeeds where there is none.
    fn delete_interface(&self, attachment: &Attachment) -> impl Future<Output = Result<(), HostError>>;

    /// Makes the kernel forget an attachment whose interface is gone: its filter entries and its connections. What fails
    /// is made up for by the next pass.
    fn forget(&self, held: &Held) -> impl Future<Output = ()>;

    /// Puts the addresses of an attachment into cool-down, whose interface is gone. Succeeds where there is none.
    fn free(&self, attachment: &Attachment, add: LastAdd) -> impl Future<Output = Result<(), LedgerError>> {
        free(self, attachment, add)
    }

    /// The attachments that plugins have taken down while no agent answered.
    fn tombstones(&self) -> Vec<Attachment>;

    /// Whether a plugin has taken the attachment down while no agent answered.
    fn has_tombstone(&self, attachment: &Attachment) -> bool;

    /// Removes the attachment's tombstone.
    fn remove_tombstone(&self, attachment: &Attachment);

    /// Why no ADD is served now. Empty if it is.
    fn obstacles(&self) -> Vec<String>;

    /// The families of addresses that the kernel can carry.
    fn families(&self) -> &[Family];

    /// The largest MTU of a pod, in bytes; `None` before the node knows it.
    fn mtu(&self) -> Option<u32>;

    /// Waits.
    fn sleep(&self, time: Duration) -> impl Future<Output = ()>;

    /// Tells the publisher that an attachment came or went.
    fn attachments_changed(&self);

    /// Tells the registrar that addresses were freed: it may have something to give back.
    fn addresses_freed(&self);
}

/// What [`PodHost::free`] does where nothing else is said.
pub(super) fn free<H: Host>(
    host: &H,
    attachment: &Attachment,
    add: LastAdd,
) -> impl Future<Output = Result<(), LedgerError>> {
    let attachment = attachment.clone();
    host.ledger(move |ipam, now| add.release(ipam, &attachment, now))
}

/// Whether the last ADD of an attachment that is released can still make an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastAdd {
    /// It has ended, as whoever has locked the attachment knows.
    Ended,
    /// It goes on, as far as is known.
    GoesOn,
}

impl LastAdd {
    /// Frees the addresses of the attachment.
    pub fn release<L: Ledger>(
        self,
        ipam: &mut NodeIpam<L>,
        attachment: &Attachment,
        now: Moment,
    ) -> Result<(), LedgerError> {
        match self {
            Self::Ended => ipam.release(attachment, now),
            Self::GoesOn => ipam.release_before_its_add_ends(attachment, now),
        }
    }
}

/// Refuses, for that reason.
pub fn refuse<T>(kind: RefusalKind, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(kind, message))
}

/// The refusal where the ledger cannot be written.
pub fn ledger_failed(error: &LedgerError) -> Refusal {
    Refusal::new(RefusalKind::Failed, format!("cannot write the ledger: {error}"))
}
