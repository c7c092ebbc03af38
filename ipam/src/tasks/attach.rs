//! What becomes of an ADD: the attachment is locked, gets its addresses, and may send under them.

use polder_api::Attachment;
use polder_api::message::{AddRequest, Refusal, RefusalKind};
use tracing::info;

use super::allocation::{Allocated, Allocation};
use super::{LastAdd, Me, PodHost, refuse, teardown, tombstones};
use crate::ledger::{Held, Kind};
use crate::readiness::smallest_mtu;
use crate::registration::Registration;

/// Who has asked, and may have died since.
pub trait Caller {
    /// Whether nobody waits for the answer any more.
    fn is_gone(&self) -> bool;
}

/// Locks the attachment for somebody who wants to add it, if the node serves.
async fn admit<H: PodHost>(
    host: &H,
    attachment: &Attachment,
    caller: &impl Caller,
) -> Result<H::Lock, Refusal> {
    let Some(lock) = host.try_lock(attachment) else {
        let problem = format!("another ADD or DEL of {attachment} is running");
        return refuse(RefusalKind::TryAgain, problem);
    };
    // Its DEL may have been served before it, and will not come again.
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

/// Gives the attachment its addresses, and lets it use them. Whoever wires it keeps the lock until that is done.
pub async fn add<H: PodHost>(
    host: &H,
    me: &Me,
    request: AddRequest,
    caller: &impl Caller,
) -> Result<(Held, H::Lock), Refusal> {
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

/// What a second ADD of the same attachment gets: a refusal, if the first one is in place. One that came to nothing
/// is taken up again with the addresses that it has.
async fn already_there<H: PodHost>(host: &H, held: Held) -> Result<Held, Refusal> {
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

/// Gives the attachment addresses for an interface that another plugin makes. What ends it is its DEL, or the end of
/// its network namespace.
pub async fn lease<H: PodHost>(
    host: &H,
    me: &Me,
    request: AddRequest,
    caller: &impl Caller,
) -> Result<(Held, H::Lock), Refusal> {
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
