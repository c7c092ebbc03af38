//! ADD: locks the attachment, allocates its addresses, and permits it to send from them.

use polder_api::Attachment;
use polder_api::message::{AddRequest, Refusal, RefusalKind, Refuse};
use tracing::info;

use super::allocation::{Allocated, Allocation};
use super::{LastAdd, OwnNode, PodHost, teardown, tombstones};
use crate::cause::HostError;
use crate::ledger::{AttachmentEntry, AttachmentKind};
use crate::readiness::smallest_mtu;
use crate::registration::Registration;

/// The client of a request. It may disconnect while the request is served.
pub trait Caller {
    /// Whether the client no longer waits for the answer.
    fn is_gone(&self) -> bool;
}

/// The plugin disconnected before its ADD was served, for example because the runtime stopped it.
/// Remedy: none, the runtime repeats the ADD.
#[derive(Debug, thiserror::Error)]
#[error("the caller has disconnected")]
pub(super) struct CallerGone;

impl Refuse for CallerGone {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Failed
    }
}

/// Why an attachment is not added, apart from its addresses.
#[derive(Debug, thiserror::Error)]
enum NotAdded {
    /// The attachment is locked by another request.
    /// Remedy: none, the runtime repeats the ADD.
    #[error("another ADD or DEL of {0} is running")]
    Busy(Attachment),
    /// The node serves no ADD, for the reasons in the text.
    /// Remedy: correct the reasons that polderctl status shows; the runtime repeats the ADD.
    #[error("this node is not ready: {}", obstacles.join("; "))]
    NotReady {
        /// The reasons.
        obstacles: Vec<String>,
        /// Whether the node was removed from the cluster.
        is_removed: bool,
    },
    /// The MTU of the node is not known yet.
    /// Remedy: none, the runtime repeats the ADD; if it persists, see polderctl status.
    #[error("this node is not ready")]
    NoMtu,
    /// The network configuration requests an MTU that this node cannot provide.
    /// Remedy: set an mtu in that range in the network configuration, or omit it.
    #[error("mtu {mtu} is out of range: this node supports {smallest} to {largest}")]
    Mtu {
        /// The requested MTU, in bytes.
        mtu: u32,
        /// The smallest MTU, in bytes.
        smallest: u32,
        /// The largest MTU, in bytes.
        largest: u32,
    },
    /// The attachment still exists, and its release has begun.
    /// Remedy: none, the runtime repeats the ADD.
    #[error("{0} is being released")]
    Leaving(Attachment),
    /// The attachment has addresses from an earlier request, whose interface another plugin created.
    #[error("{0} has addresses for the interface of another plugin: it needs a DEL before another ADD")]
    OtherPlugin(Attachment),
    /// The attachment has an interface of an earlier ADD.
    #[error("{0} is already attached: it needs a DEL before another ADD")]
    Attached(Attachment),
    /// The kernel did not list the pods' interfaces.
    /// Remedy: check the error of the kernel in the text; the runtime repeats the ADD.
    #[error("cannot check the interface of {attachment}: {error}")]
    NotChecked {
        /// The attachment.
        attachment: Attachment,
        /// The error of the kernel.
        #[source]
        error: HostError,
    },
    /// The attachment has addresses of an earlier request.
    #[error("{0} already has addresses: it needs a DEL before another ADD")]
    Leased(Attachment),
}

impl Refuse for NotAdded {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::NotReady { is_removed: true, .. } => RefusalKind::Removed,
            Self::Busy(_) | Self::NotReady { .. } | Self::NoMtu | Self::Leaving(_) => RefusalKind::TryAgain,
            Self::Mtu { .. } => RefusalKind::Invalid,
            Self::NotChecked { .. } => RefusalKind::Failed,
            Self::OtherPlugin(_) | Self::Attached(_) | Self::Leased(_) => RefusalKind::Exists,
        }
    }
}

/// The kernel refused the entries that permit the pod to send.
///
/// Remedy: check the error of the kernel in the text; the addresses are released, and the runtime repeats the ADD.
#[derive(Debug, thiserror::Error)]
#[error("cannot permit {attachment} to send from its address: {error}")]
pub struct NotPermitted {
    /// The attachment.
    pub attachment: Attachment,
    /// The error of the kernel.
    #[source]
    pub error: HostError,
}

impl Refuse for NotPermitted {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Failed
    }
}

/// An attachment whose interface can be created.
#[derive(Debug)]
pub struct Added<Lock, Permission> {
    /// Its entry in the ledger.
    pub held: AttachmentEntry,
    /// Its lock, which the caller keeps until the interface is created.
    pub lock: Lock,
    /// The permission to use its addresses. If it is not given, the plugin requests a DEL.
    pub permission: Permission,
}

/// Locks the attachment for an ADD, if the node serves ADDs.
async fn admit<H: PodHost>(
    host: &H,
    attachment: &Attachment,
    caller: &impl Caller,
) -> Result<H::Lock, Refusal> {
    let Some(lock) = host.try_lock(attachment) else {
        return Err(NotAdded::Busy(attachment.clone()).into());
    };
    // The DEL of this attachment may have been served before this ADD, and is not repeated.
    if caller.is_gone() {
        info!(%attachment, "the caller of this ADD has disconnected");
        return Err(CallerGone.into());
    }
    let obstacles = host.obstacles();
    if !obstacles.is_empty() {
        let is_removed = matches!(host.registration(), Registration::Removed(_));
        return Err(NotAdded::NotReady { obstacles, is_removed }.into());
    }
    tombstones::apply(host, attachment).await;
    Ok(lock)
}

/// Allocates addresses to the attachment, and begins to permit it to use them.
pub async fn add<H: PodHost>(
    host: &H,
    me: &OwnNode,
    request: AddRequest,
    caller: &impl Caller,
) -> Result<Added<H::Lock, H::Permission>, Refusal> {
    let attachment = request.attachment.clone();
    let lock = admit(host, &attachment, caller).await?;
    let view = host.view();
    let Some(largest) = host.mtu() else { return Err(NotAdded::NoMtu.into()) };
    let mtu = request.mtu.unwrap_or(largest);
    let smallest = smallest_mtu(&view.families());
    if !(smallest..=largest).contains(&mtu) {
        return Err(NotAdded::Mtu { mtu, smallest, largest }.into());
    }
    let allocation = Allocation { host, me, caller, view: &view };
    let held = match allocation.allocate(AttachmentKind::Pod, request, mtu).await? {
        Allocated::New(held) => held,
        Allocated::Exists(held) => already_there(host, held).await?,
    };
    let permission = match host.admit(&held).await {
        Ok(permission) => permission,
        Err(error) => {
            let _ = teardown::release(host, &attachment, LastAdd::Ended).await;
            return Err(NotPermitted { attachment, error }.into());
        }
    };
    host.attachments_changed();
    info!(%attachment, addresses = ?held.addresses, pod = held.pod.as_ref().map(ToString::to_string), "added");
    Ok(Added { held, lock, permission })
}

/// The answer to a second ADD of the same attachment: a refusal if its interface exists. If the first ADD left no
/// interface, the second one continues with the same addresses.
async fn already_there<H: PodHost>(host: &H, held: AttachmentEntry) -> Result<AttachmentEntry, NotAdded> {
    let attachment = held.attachment.clone();
    if held.leaving {
        return Err(NotAdded::Leaving(attachment));
    }
    if held.kind != AttachmentKind::Pod {
        return Err(NotAdded::OtherPlugin(attachment));
    }
    match teardown::is_gone(host, held.clone()).await {
        Ok(true) => Ok(held),
        Ok(false) => Err(NotAdded::Attached(attachment)),
        Err(error) => Err(NotAdded::NotChecked { attachment, error }),
    }
}

/// Allocates addresses for an interface that another plugin creates. They are released by a DEL, or after the network
/// namespace is gone.
pub async fn lease<H: PodHost>(
    host: &H,
    me: &OwnNode,
    request: AddRequest,
    caller: &impl Caller,
) -> Result<(AttachmentEntry, H::Lock), Refusal> {
    let attachment = request.attachment.clone();
    let lock = admit(host, &attachment, caller).await?;
    let view = host.view();
    let allocation = Allocation { host, me, caller, view: &view };
    let held = match allocation.allocate(AttachmentKind::Lease, request, 0).await? {
        Allocated::New(held) => held,
        Allocated::Exists(_) => {
            return Err(NotAdded::Leased(attachment).into());
        }
    };
    host.attachments_changed();
    info!(%attachment, addresses = ?held.addresses, "leased");
    Ok((held, lock))
}
