//! GC: releases the attachments that the runtime no longer lists.

use std::collections::BTreeSet;

use polder_api::Attachment;
use polder_api::message::{Collection, Refusal, RefusalKind};
use tracing::info;

use super::teardown::{self, ReleaseOutcome};
use super::{LastAdd, PodHost, ledger_failed};
use crate::moment::Moment;
use crate::node::stale;

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
    let mut problems = Vec::new();
    for attachment in stale {
        // A running ADD or DEL takes precedence.
        let Some(_lock) = host.try_lock(&attachment) else { continue };
        info!(%attachment, "the runtime no longer lists this attachment: releasing it");
        match teardown::release(host, &attachment, LastAdd::Ended).await {
            Ok(ReleaseOutcome::Freed) => {}
            Ok(ReleaseOutcome::Kept(error)) => {
                let reason = ledger_failed(&error);
                problems.push(format!("the addresses of {attachment}: {reason}"));
            }
            Err(error) => problems.push(format!("{attachment}: {error}")),
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Refusal::new(RefusalKind::Failed, format!("not everything was released: {}", problems.join("; "))))
}
