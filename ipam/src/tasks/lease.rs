//! Keeps a node's lease record in the datastore, under a lease: it is deleted when the lease expires.
//!
//! The lease record is written only if the node's record is unchanged. Check and write are one transaction, repeated
//! each time that a lease was lost: another machine may have taken over the name while this agent did not run.

use std::time::Duration;

use tracing::debug;

use crate::change::{Change, LeaseWrite};
use crate::store::{Outcome, StoreError};

/// A node whose agent has not renewed its lease for this long is not alive. Nothing is ever freed because of that.
pub const LEASE_TTL: Duration = Duration::from_secs(10);

/// Delay before another lease is granted after a loss.
const RETRY: Duration = Duration::from_secs(2);

/// Interval of the check that the datastore still accepts the record. Renewals do not show that: etcd renews leases
/// while it accepts no writes, and also for a client that may not write any more.
const ASK_EVERY: Duration = Duration::from_secs(30);

/// A datastore that grants leases.
pub trait LeaseStore {
    /// A granted lease.
    type Lease;

    /// Grants a lease. Keys that are put under it are deleted if it is not renewed for `ttl`.
    fn grant(&self, ttl: Duration) -> impl Future<Output = Result<Self::Lease, StoreError>>;

    /// Makes a change of the records. Keys that it puts are deleted with the lease.
    fn put(&self, lease: &Self::Lease, change: &Change) -> impl Future<Output = Result<Outcome, StoreError>>;

    /// Renews the lease for its full TTL. Fails if the lease has expired, or without an answer within `max_wait`.
    fn renew(
        &self,
        lease: &mut Self::Lease,
        max_wait: Duration,
    ) -> impl Future<Output = Result<(), StoreError>>;

    /// Ends the lease, if the datastore is reachable.
    fn revoke(&self, lease: Self::Lease) -> impl Future<Output = ()>;

    /// Waits for `time`.
    fn pause(&self, time: Duration) -> impl Future<Output = ()>;
}

/// Why a lease record is no longer kept.
#[derive(Debug, thiserror::Error)]
enum LeaseLost {
    /// The datastore failed, or the lease has expired.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node's record has changed.
    /// Remedy: none, it is retried.
    #[error("the node's record has changed")]
    Replaced,
}

/// Keeps the record in the datastore. Never ends; after it is dropped, the record is deleted within `ttl`.
pub async fn hold<S: LeaseStore>(store: &S, lease_write: &LeaseWrite, ttl: Duration) {
    loop {
        if let Err(error) = hold_once(store, lease_write, ttl).await {
            debug!(node = %lease_write.by.node, %error, "lease lost");
        }
        store.pause(RETRY).await;
    }
}

/// Keeps the record under one lease, until that lease is lost.
async fn hold_once<S: LeaseStore>(
    store: &S,
    lease_write: &LeaseWrite,
    ttl: Duration,
) -> Result<(), LeaseLost> {
    let every = ttl / 3;
    let mut lease = store.grant(ttl).await?;
    match store.put(&lease, &Change::WriteLease(lease_write.clone())).await {
        Ok(Outcome::Applied { .. }) => {}
        not_put => {
            // It may have been put: revoke the lease to delete it.
            store.revoke(lease).await;
            return Err(not_put.map_or_else(LeaseLost::Store, |_| LeaseLost::Replaced));
        }
    }
    let mut since_asked = Duration::ZERO;
    loop {
        store.renew(&mut lease, every).await?;
        store.pause(every).await;
        since_asked += every;
        if since_asked >= ASK_EVERY {
            since_asked = Duration::ZERO;
            ask(store, &lease, lease_write).await;
        }
    }
}

/// Checks whether the record could be put: etcd also refuses a transaction because of a put that would not take effect.
/// Writes nothing if the record exists.
async fn ask<S: LeaseStore>(store: &S, lease: &S::Lease, lease_write: &LeaseWrite) {
    let node = &lease_write.by.node;
    match store.put(lease, &Change::RestoreLease(lease_write.clone())).await {
        Ok(Outcome::Refused) => {}
        Ok(Outcome::Applied { .. }) => {
            debug!(%node, "the lease record was deleted: restored it");
        }
        Err(error) => debug!(%node, %error, "cannot restore the lease record"),
    }
}
