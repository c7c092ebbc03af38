//! The environment of the publisher ([`polder_ipam::tasks::publisher`]) on a simulated node.

use std::time::Duration;

use polder_ipam::change::Change;
use polder_ipam::publication::Basis;
use polder_ipam::store::{Outcome, StoreError};
use polder_ipam::tasks::lease::LeaseStore;
use polder_ipam::tasks::publisher::PublisherHost;
use polder_ipam::transaction::transaction;

use super::SimHost;
use super::host::millis;
use crate::etcd::LeaseId;
use crate::store_request::{StoreOperation, StoreReply};
use crate::task::Wait;

/// Counted event: the publisher abandons a change because the node's record has changed.
pub const CANCELLED: &str = "publishing cancelled";

impl PublisherHost for SimHost {
    type Leases = Self;

    fn leases(&self) -> &Self {
        self
    }

    fn basis(&self) -> Basis {
        self.with(|world| world.machines[self.machine].basis()).expect("a task of an agent ends with it")
    }

    async fn changed(&self, basis: Basis) {
        self.wait(Wait::Basis(basis)).await;
    }

    async fn attachment_signal(&self) {
        self.wait(Wait::Unpublished).await;
        self.agent(|agent| agent.is_unpublished = false);
    }

    async fn pause(&self, time: Duration) {
        self.sleep(millis(time)).await;
    }
}

impl LeaseStore for SimHost {
    type Lease = LeaseId;

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        match self.call_store(StoreOperation::Grant(ttl.as_secs())).await? {
            StoreReply::Lease(Some(lease)) => Ok(lease),
            other => Err(other.error()),
        }
    }

    async fn put(&self, lease: &LeaseId, change: &Change) -> Result<Outcome, StoreError> {
        match self.call_store(StoreOperation::Put(*lease, transaction(change))).await? {
            StoreReply::Outcome(outcome) => Ok(outcome),
            other => Err(other.error()),
        }
    }

    async fn renew(&self, lease: &mut LeaseId, _: Duration) -> Result<(), StoreError> {
        match self.call_store(StoreOperation::Renew(*lease)).await? {
            StoreReply::Lease(Some(_)) => Ok(()),
            other => Err(other.error()),
        }
    }

    async fn revoke(&self, lease: LeaseId) {
        let _ = self.call_store(StoreOperation::Revoke(lease)).await;
    }

    async fn pause(&self, time: Duration) {
        self.sleep(millis(time)).await;
    }
}
