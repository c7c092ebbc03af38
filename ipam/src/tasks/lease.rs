//! Keeps a node's sign of life in the store, under a lease: it vanishes when nobody renews that.
//!
//! A node is only said to be alive as long as its record is as it was: the sign is put in one transaction with that condition, each
//! time that a lease was lost. Somebody else may have come to own the name while this could not run.

use std::time::Duration;

use tracing::debug;

use crate::change::{Change, Sign};
use crate::store::{Outcome, StoreError};

/// A node whose agent has not been heard for this long is not alive. Nothing is ever freed for that.
pub const ALIVE: Duration = Duration::from_secs(10);

/// Before a lease that was lost is granted anew.
const RETRY: Duration = Duration::from_secs(2);

/// How often it is asked whether the store would still take the sign. Renewals do not tell: etcd renews leases while it takes
/// no writes, and for who may not write any more.
const ASK_EVERY: Duration = Duration::from_secs(30);

/// A store that grants leases.
pub trait LeaseStore {
    /// A lease that was granted.
    type Lease;

    /// Has a lease granted. What is put under it vanishes when it was not renewed for `ttl`.
    fn grant(&self, ttl: Duration) -> impl Future<Output = Result<Self::Lease, StoreError>>;

    /// Makes a change of the records. What it puts vanishes with the lease.
    fn put(&self, lease: &Self::Lease, change: &Change) -> impl Future<Output = Result<Outcome, StoreError>>;

    /// Lets the lease last its whole time from now on. Fails where it has ended, or nothing is heard for `patience`.
    fn renew(
        &self,
        lease: &mut Self::Lease,
        patience: Duration,
    ) -> impl Future<Output = Result<(), StoreError>>;

    /// Ends the lease, if the store can be reached.
    fn revoke(&self, lease: Self::Lease) -> impl Future<Output = ()>;

    /// Waits.
    fn pause(&self, time: Duration) -> impl Future<Output = ()>;
}

/// Why a sign of life is not kept any more.
#[derive(Debug, thiserror::Error)]
enum Lost {
    /// The store does not do it, or the lease has ended.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node's record is another one.
    #[error("the node's record has changed")]
    Replaced,
}

/// Keeps the sign in the store. Never ends; when it is dropped, the sign vanishes within `ttl`.
pub async fn hold<S: LeaseStore>(store: &S, sign: &Sign, ttl: Duration) {
    loop {
        if let Err(error) = hold_once(store, sign, ttl).await {
            debug!(node = %sign.by.node, %error, "lease lost");
        }
        store.pause(RETRY).await;
    }
}

/// Keeps the sign under one lease, until that is lost.
async fn hold_once<S: LeaseStore>(store: &S, sign: &Sign, ttl: Duration) -> Result<(), Lost> {
    let every = ttl / 3;
    let mut lease = store.grant(ttl).await?;
    match store.put(&lease, &Change::SignOfLife(sign.clone())).await {
        Ok(Outcome::Applied { .. }) => {}
        not_put => {
            // It may have been put: nothing is to keep it there.
            store.revoke(lease).await;
            return Err(not_put.map_or_else(Lost::Store, |_| Lost::Replaced));
        }
    }
    let mut since_asked = Duration::ZERO;
    loop {
        store.renew(&mut lease, every).await?;
        store.pause(every).await;
        since_asked += every;
        if since_asked >= ASK_EVERY {
            since_asked = Duration::ZERO;
            ask(store, &lease, sign).await;
        }
    }
}

/// Asks whether the sign could be put: etcd refuses a transaction for a put that would not come to be, too. Nothing is written where
/// it is there, as it should be.
async fn ask<S: LeaseStore>(store: &S, lease: &S::Lease, sign: &Sign) {
    let node = &sign.by.node;
    match store.put(lease, &Change::RestoreSignOfLife(sign.clone())).await {
        Ok(Outcome::Refused) => {}
        Ok(Outcome::Applied { .. }) => {
            debug!(%node, "the sign of life was deleted: restored it");
        }
        Err(error) => debug!(%node, %error, "cannot restore the sign of life"),
    }
}
