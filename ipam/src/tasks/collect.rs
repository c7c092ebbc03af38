//! GC: releases the attachments that the runtime no longer lists.

use std::collections::BTreeSet;

use polder_api::Attachment;
use polder_api::message::{Collection, Refusal, RefusalKind, Refuse};
use tracing::info;

use super::teardown::{self, ReleaseOutcome};
use super::{LastAdd, LedgerUnusable, PodHost};
use crate::cause::HostError;
use crate::moment::Moment;
use crate::node::stale;

/// GC could not release every attachment that the runtime no longer lists. The runtime calls GC again.
/// Remedy: correct the cause that is given for each attachment; the agent also retries.
#[derive(Debug, thiserror::Error)]
#[error("not everything was released: {}", joined(.0))]
struct NotCollected(Vec<KeptAttachment>);

/// An attachment that GC did not release completely.
#[derive(Debug, thiserror::Error)]
enum KeptAttachment {
    /// Its interface is deleted, but its addresses cannot be freed in the ledger.
    /// Remedy: check the disk of the agent's state directory; the agent frees the addresses in the next attempt.
    #[error("the addresses of {attachment}: {error}")]
    Addresses {
        /// The attachment.
        attachment: Attachment,
        /// The error of the ledger.
        error: LedgerUnusable,
    },
    /// Its interface cannot be deleted, so its addresses stay in use.
    /// Remedy: check the error of the kernel in the text; the agent retries.
    #[error("{attachment}: {error}")]
    Interface {
        /// The attachment.
        attachment: Attachment,
        /// The error of the kernel.
        error: HostError,
    },
}

impl Refuse for NotCollected {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Failed
    }
}

fn joined(kept: &[KeptAttachment]) -> String {
    let all: Vec<String> = kept.iter().map(ToString::to_string).collect();
    all.join("; ")
}

/// Releases every attachment of the network that is not listed as valid and was added before the call began. Continues
/// after a failure, and reports all failures.
pub async fn collect<H: PodHost>(host: &H, collection: Collection) -> Result<(), Refusal> {
    let valid: BTreeSet<Attachment> = collection.valid.into_iter().collect();
    let (network, began) = (collection.network, Moment::from_millis(collection.began_ms));
    let stale: Vec<Attachment> = host
        .ledger(move |ipam, _| {
            stale(ipam.attachments().filter(|held| held.attachment.network == network), began, &valid)
        })
        .await;
    let mut kept = Vec::new();
    for attachment in stale {
        // A running ADD or DEL takes precedence.
        let Some(_lock) = host.try_lock(&attachment) else { continue };
        info!(%attachment, "the runtime no longer lists this attachment: releasing it");
        match teardown::release(host, &attachment, LastAdd::Ended).await {
            Ok(ReleaseOutcome::Freed) => {}
            Ok(ReleaseOutcome::Kept(error)) => {
                kept.push(KeptAttachment::Addresses { attachment, error: error.into() });
            }
            Err(error) => kept.push(KeptAttachment::Interface { attachment, error }),
        }
    }
    if kept.is_empty() { Ok(()) } else { Err(NotCollected(kept).into()) }
}
