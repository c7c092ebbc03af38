//! Tells the store who has which address: for people and tools, behind the ADD, never for safety.

use super::Host;
use crate::change::Member;
use crate::key::Key;
use crate::publication::{self, Published};
use crate::store::{Outcome, StoreError};

/// A node whose agent has not been heard for this long is not alive. Nothing is ever freed for that.
pub const ALIVE_SECONDS: i64 = 10;

/// Why the store does not say what the ledger says.
#[derive(Debug, thiserror::Error)]
pub enum NotPublished {
    /// The store does not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Somebody has removed or replaced the node.
    #[error("the node's record has changed")]
    Replaced,
}

/// Makes the store say what the ledger says, as the node whose record is as of that revision. `published` is what the store says;
/// it is read if that is not known. Returns what it says now.
///
/// It can be ended at any step: what was begun is read back by whoever begins anew.
pub async fn synchronize<H: Host>(
    host: &H,
    by: &Member,
    published: Option<Published>,
) -> Result<Published, NotPublished> {
    let published = match published {
        Some(published) => published,
        None => publication::read(&by.node, &host.range(&Key::addresses_of(&by.node)).await?),
    };
    let wanted = host.ledger(|ipam, _| publication::wanted(ipam.attachments())).await;
    for change in publication::publish(by, &published, &wanted, host.most_records()) {
        if host.commit(&change).await? == Outcome::Refused {
            return Err(NotPublished::Replaced);
        }
    }
    Ok(wanted)
}
