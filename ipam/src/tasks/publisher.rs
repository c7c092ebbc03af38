//! Publishes that the node is alive, and the owner of each of its addresses: for people and tools. An ADD does not wait
//! for it, and nothing relies on it for safety.

use std::time::Duration;

use tracing::debug;

use super::lease::{self, LEASE_TTL, LeaseStore};
use super::race::race;
use super::{Host, OwnNode};
use crate::change::Member;
use crate::key::Key;
use crate::publication::{self, Basis, Publication};
use crate::store::{Outcome, StoreError};

/// Changes within this time are published together.
const BATCH: Duration = Duration::from_millis(100);

/// Delay before another attempt after an error.
const RETRY: Duration = Duration::from_secs(5);

/// The environment of the publisher, in addition to [`Host`].
pub trait PublisherHost: Host {
    /// The access to leases in the datastore.
    type Leases: LeaseStore;

    /// The access to leases in the datastore.
    fn leases(&self) -> &Self::Leases;

    /// The current basis of what the node may publish.
    fn basis(&self) -> Basis;

    /// Waits until the current basis is not `basis` any more.
    fn changed(&self, basis: Basis) -> impl Future<Output = ()>;

    /// Waits until an attachment was added or released since the last call returned.
    fn attachment_signal(&self) -> impl Future<Output = ()>;

    /// Waits for `time`.
    fn pause(&self, time: Duration) -> impl Future<Output = ()>;
}

/// Runs for ever. Restarts whenever the node's own record was written, or the datastore lost records: published records
/// may be among the lost ones, or may have reappeared.
pub async fn run<H: PublisherHost>(host: &H, me: &OwnNode) {
    loop {
        let basis = host.basis();
        let Some(revision) = basis.revision else {
            host.changed(basis).await;
            continue;
        };
        let lease_write = publication::lease_write(&me.name, me.boot(), revision);
        let work = race(lease::hold(host.leases(), &lease_write, LEASE_TTL), publish(host, &lease_write.by));
        // Dropped changes may have been made: the next iteration reads the records again.
        race(host.changed(basis), work).await;
    }
}

/// Publishes addresses as long as the node's record has the revision in `by`.
async fn publish<H: PublisherHost>(host: &H, by: &Member) {
    // The published records; `None` until they are read, and after an error.
    let mut published: Option<Publication> = None;
    loop {
        match synchronize(host, by, published.take()).await {
            Ok(now) => {
                published = Some(now);
                host.attachment_signal().await;
                host.pause(BATCH).await;
            }
            Err(error) => {
                debug!(%error, "cannot publish addresses");
                host.pause(RETRY).await;
            }
        }
    }
}

/// Why the datastore does not match the ledger.
#[derive(Debug, thiserror::Error)]
enum NotPublished {
    /// The datastore failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node was removed or replaced.
    /// Remedy: none, it is retried.
    #[error("the node's record has changed")]
    Replaced,
}

/// Updates the published records to match the ledger. `published` is their last known state; they are read if it is
/// `None`. Returns their new state. Can be dropped at any step.
async fn synchronize<H: Host>(
    host: &H,
    by: &Member,
    published: Option<Publication>,
) -> Result<Publication, NotPublished> {
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
