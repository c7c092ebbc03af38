//! ADD: locks the attachment, allocates its addresses, and permits it to send from them.

use polder_api::Attachment;
use polder_api::message::{AddRequest, Refusal, RefusalKind};
use tracing::info;

use super::allocation::{Allocated, Allocation};
use super::{LastAdd, Me, PodHost, refuse, teardown, tombstones};
use crate::ledger::{AttachmentEntry, Kind};
use crate::readiness::smallest_mtu;
use crate::registration::Registration;

/// The client of a request. It may disconnect while the request is served.
pub trait Caller {
    /// Whether the client no longer waits for the answer.
    fn is_gone(&self) -> bool;
}

/// Locks the attachment for an ADD, if the node serves ADDs.
async fn admit<H: PodHost>(
    host: &H,
    attachment: &Attachment,
    caller: &impl Caller,
) -> Result<H::Lock, Refusal> {
    let Some(lock) = host.try_lock(attachment) else {
        let problem = format!("another ADD or DEL of {attachment} is running");
        return refuse(RefusalKind::TryAgain, problem);
    };
    // The DEL of this attachment may have been served before this ADD, and is not repeated.
    if caller.is_gone() {
        info!(%attachment, "the caller of this ADD has disconnected");
        return refuse(RefusalKind::Failed, "the caller has disconnected");
    }
    let obstacles = host.obstacles();
    if !obstacles.is_empty() {
        let is_removed = matches!(host.registration(), Registration::Removed(_));
        let kind = if is_removed { RefusalKind::Removed } else { RefusalKind::TryAgain };
        return refuse(kind, format!("this node is not ready: {}", obstacles.join("; ")));
    }
    tombstones::apply(host, attachment).await;
    Ok(lock)
}

/// Allocates addresses to the attachment and permits it to use them. The caller keeps the lock until the interface is
/// created.
pub async fn add<H: PodHost>(
    host: &H,
    me: &Me,
    request: AddRequest,
    caller: &impl Caller,
) -> Result<(AttachmentEntry, H::Lock), Refusal> {
    let attachment = request.attachment.clone();
    let lock = admit(host, &attachment, caller).await?;
    let view = host.view();
    let Some(largest) = host.mtu() else {
        return refuse(RefusalKind::TryAgain, "this node is not ready");
    };
    let mtu = request.mtu.unwrap_or(largest);
    let smallest = smallest_mtu(&view.families());
    if !(smallest..=largest).contains(&mtu) {
        let problem = format!("mtu {mtu} is out of range: this node supports {smallest} to {largest}");
        return refuse(RefusalKind::Invalid, problem);
    }
    let allocation = Allocation { host, me, caller, view: &view };
    let held = match allocation.allocate(Kind::Pod, request, mtu).await? {
        Allocated::New(held) => held,
        Allocated::Exists(held) => already_there(host, held).await?,
    };
    if let Err(error) = host.admit(&held).await {
        let _ = teardown::release(host, &attachment, LastAdd::Ended).await;
        return refuse(
            RefusalKind::Failed,
            format!("cannot permit {attachment} to send from its address: {error}"),
        );
    }
    host.attachments_changed();
    info!(%attachment, addresses = ?held.addresses, pod = held.pod.as_ref().map(ToString::to_string), "added");
    Ok((held, lock))
}

/// The answer to a second ADD of the same attachment: a refusal if its interface exists. If the first ADD left no
/// interface, the second one continues with the same addresses.
async fn already_there<H: PodHost>(host: &H, held: AttachmentEntry) -> Result<AttachmentEntry, Refusal> {
    let attachment = held.attachment.clone();
    if held.leaving {
        return refuse(RefusalKind::TryAgain, format!("{attachment} is being released"));
    }
    if held.kind != Kind::Pod {
        let problem = format!(
            "{attachment} has addresses for the interface of another plugin: it needs a DEL before another \
             ADD"
        );
        return refuse(RefusalKind::Exists, problem);
    }
    match teardown::is_gone(host, held.clone()).await {
        Ok(true) => Ok(held),
        Ok(false) => refuse(
            RefusalKind::Exists,
            format!("{attachment} is already attached: it needs a DEL before another ADD"),
        ),
        Err(error) => {
            refuse(RefusalKind::Failed, format!("cannot check the interface of {attachment}: {error}"))
        }
    }
}

/// Allocates addresses for an interface that another plugin creates. They are released by a DEL, or after the network
/// namespace is gone.
pub async fn lease<H: PodHost>(
    host: &H,
    me: &Me,
    request: AddRequest,
    caller: &impl Caller,
) -> Result<(AttachmentEntry, H::Lock), Refusal> {
    let attachment = request.attachment.clone();
    let lock = admit(host, &attachment, caller).await?;
    let view = host.view();
    let allocation = Allocation { host, me, caller, view: &view };
    let held = match allocation.allocate(Kind::Lease, request, 0).await? {
        Allocated::New(held) => held,
        Allocated::Exists(_) => {
            let problem = format!("{attachment} already has addresses: it needs a DEL before another ADD");
            return refuse(RefusalKind::Exists, problem);
        }
    };
    host.attachments_changed();
    info!(%attachment, addresses = ?held.addresses, "leased");
    Ok((held, lock))
}
