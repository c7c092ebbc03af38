//! The environment of the tasks that add and release pods.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use polder_api::message::{RefusalKind, Refuse};
use polder_api::{Attachment, Family};

use super::{Host, NotHandedOver, ReservationRequest};
use crate::cause::HostError;
use crate::claim::NoClaim;
use crate::ledger::{AttachmentEntry, Ledger, LedgerError};
use crate::moment::Moment;
use crate::node::NodeIpam;
use crate::pool::BlockRequest;

/// The longest time that an ADD waits for another block, or for its reserved address.
pub const CLAIM_TIMEOUT: Duration = Duration::from_secs(15);

/// Requests to the registrar for an ADD. Each request is answered within [`CLAIM_TIMEOUT`].
pub trait Requests {
    /// Requests another block, and waits for it.
    fn claim(&self, wanted: BlockRequest) -> impl Future<Output = Result<(), NoClaim>>;

    /// Requests another block for later. The request may be dropped if many are pending.
    fn claim_ahead(&self, wanted: BlockRequest);

    /// Requests a reserved address for the pod `owner` (`namespace/name`), and waits for it.
    fn reserve(
        &self,
        wanted: ReservationRequest,
        owner: String,
        attachment: &Attachment,
    ) -> impl Future<Output = Result<IpAddr, NotHandedOver>>;
}

/// The environment of the tasks that add and release pods, in addition to [`Host`].
pub trait PodHost: Host + Requests + Sized {
    /// The lock of one attachment, released when it is dropped.
    type Lock;

    /// The future result of [`Self::admit`].
    type Permission;

    /// Locks the attachment; `None` if it is locked.
    fn try_lock(&self, attachment: &Attachment) -> Option<Self::Lock>;

    /// Locks the attachment as soon as it is unlocked; `None` after `max_wait`.
    fn lock(&self, attachment: &Attachment, max_wait: Duration) -> impl Future<Output = Option<Self::Lock>>;

    /// Whether the attachment is locked.
    fn is_locked(&self, attachment: &Attachment) -> bool;

    /// The attachments among `held` that have no interface any more; if another plugin creates the interface, no
    /// network namespace. An attachment that cannot be checked is not included.
    fn gone(
        &self,
        held: Vec<AttachmentEntry>,
    ) -> impl Future<Output = Result<BTreeSet<Attachment>, HostError>>;

    /// Begins to permit the pod to send and receive with its addresses.
    fn admit(&self, held: &AttachmentEntry) -> impl Future<Output = Result<Self::Permission, HostError>>;

    /// Deletes the attachment's interface, and the neighbour entries and routes to its addresses. Succeeds if they do
    /// not exist. `held` is its entry in the ledger, if it has one.
    fn delete_interface(
        &self,
        attachment: &Attachment,
        held: Option<&AttachmentEntry>,
    ) -> impl Future<Output = Result<(), HostError>>;

    /// Lets the filter entries of an attachment be deleted whose interface is gone, before its addresses are permitted
    /// again; the next pass repeats what fails. Its tracked connections are deleted later, before its addresses go to
    /// another attachment.
    fn forget(&self, held: &AttachmentEntry) -> impl Future<Output = ()>;

    /// Starts the cool-down of the addresses of an attachment whose interface is gone. Succeeds if it has no addresses.
    fn free(&self, attachment: &Attachment, add: LastAdd) -> impl Future<Output = Result<(), LedgerError>> {
        free(self, attachment, add)
    }

    /// The attachments that have a tombstone: a plugin deleted them while no agent answered.
    fn tombstones(&self) -> Vec<Attachment>;

    /// Whether the attachment has a tombstone.
    fn has_tombstone(&self, attachment: &Attachment) -> bool;

    /// Removes the attachment's tombstone.
    fn remove_tombstone(&self, attachment: &Attachment);

    /// The reasons why no ADD is served now; empty if ADDs are served.
    fn obstacles(&self) -> Vec<String>;

    /// The address families that the kernel supports.
    fn families(&self) -> &[Family];

    /// The largest MTU of a pod, in bytes; `None` until it is known.
    fn mtu(&self) -> Option<u32>;

    /// Waits for `time`.
    fn sleep(&self, time: Duration) -> impl Future<Output = ()>;

    /// Notifies the publisher that an attachment was added or released.
    fn attachments_changed(&self);

    /// Notifies the registrar that addresses were freed: blocks or reservations may be ready for release.
    fn addresses_freed(&self);
}

/// The default implementation of [`PodHost::free`].
pub(super) fn free<H: Host>(
    host: &H,
    attachment: &Attachment,
    add: LastAdd,
) -> impl Future<Output = Result<(), LedgerError>> {
    let attachment = attachment.clone();
    host.ledger(move |ipam, now| add.release(ipam, &attachment, now))
}

/// Whether the last ADD of a released attachment can still create an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastAdd {
    /// It has ended: the caller holds the lock of the attachment.
    Ended,
    /// It may still be running.
    StillRunning,
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
            Self::StillRunning => ipam.release_before_its_add_ends(attachment, now),
        }
    }
}

/// The node's ledger cannot be read or written. The request changed nothing in it.
/// Remedy: check the disk of the agent's state directory: free space, a read-only mount, I/O errors in the kernel log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use the ledger: {}", .0.reason())]
pub struct LedgerUnusable(#[from] pub LedgerError);

impl Refuse for LedgerUnusable {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Failed
    }
}
