//! Tells the store that the node is alive, and who has which of its addresses: for people and tools, behind the ADD, never for
//! safety.

use std::time::Duration;

use tracing::debug;

use super::lease::{self, ALIVE, LeaseStore};
use super::race::race;
use super::{Host, Me};
use crate::change::Member;
use crate::key::Key;
use crate::publication::{self, Basis, Published};
use crate::store::{Outcome, StoreError};

/// What happens within this time goes together.
const BATCH: Duration = Duration::from_millis(100);

/// Before another attempt.
const RETRY: Duration = Duration::from_secs(5);

/// What the publisher needs besides.
pub trait PublisherHost: Host {
    /// The store, to what keeps a lease there.
    type Leases: LeaseStore;

    /// The store, to what keeps a lease there.
    fn leases(&self) -> &Self::Leases;

    /// What the node may say rests on this now.
    fn basis(&self) -> Basis;

    /// Waits until it rests on something else.
    fn changed(&self, basis: Basis) -> impl Future<Output = ()>;

    /// Waits until an attachment came or went, since this was waited for the last time.
    fn rung(&self) -> impl Future<Output = ()>;

    /// Waits.
    fn pause(&self, time: Duration) -> impl Future<Output = ()>;
}

/// Runs for ever. Begins anew whenever the node's own record was written, or the store has lost records: what was published may be
/// among them, or be there again.
pub async fn run<H: PublisherHost>(host: &H, me: &Me) {
    loop {
        let basis = host.basis();
        let Some(revision) = basis.revision else {
            host.changed(basis).await;
            continue;
        };
        let sign = publication::sign_of_life(&me.name, me.life(), revision);
        let work = race(lease::hold(host.leases(), &sign, ALIVE), publish(host, &sign.by));
        // What was begun is read back by the next round.
        race(host.changed(basis), work).await;
    }
}

/// Publishes as the node whose record is as of that revision.
async fn publish<H: PublisherHost>(host: &H, by: &Member) {
    // What the store says; `None` before it was read, and after a doubt.
    let mut published: Option<Published> = None;
    loop {
        match synchronize(host, by, published.take()).await {
            Ok(now) => {
                published = Some(now);
                host.rung().await;
                host.pause(BATCH).await;
            }
            Err(error) => {
                debug!(%error, "cannot publish addresses");
                host.pause(RETRY).await;
            }
        }
    }
}

/// Why the store does not say what the ledger says.
#[derive(Debug, thiserror::Error)]
enum NotPublished {
    /// The store does not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Somebody has removed or replaced the node.
    #[error("the node's record has changed")]
    Replaced,
}

/// Makes the store say what the ledger says. `published` is what the store says; it is read if that is not known. Returns what it
/// says now. It can be ended at any step.
async fn synchronize<H: Host>(
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
