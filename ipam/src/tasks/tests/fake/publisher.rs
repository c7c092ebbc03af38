//! The fake node as the environment of the publisher.

use std::future::poll_fn;

use super::*;
use crate::Revision;
use crate::publication::Basis;
use crate::tasks::lease::LeaseStore;
use crate::tasks::publisher::PublisherHost;

impl Fake {
    /// The revision in the publisher's current basis.
    pub(in crate::tasks::tests) fn basis_revision(&self) -> Option<Revision> {
        self.basis().revision
    }

    async fn until(&self, is_so: impl Fn(&State) -> bool) {
        poll_fn(|_| if self.with(|state| is_so(state)) { Poll::Ready(()) } else { Poll::Pending }).await;
    }
}

fn basis(state: &State) -> Basis {
    let me = me();
    let identity = state.ipam.identity().unwrap();
    Basis::of(&state.view, &me.name, identity.as_ref(), me.boot())
}

impl PublisherHost for Fake {
    type Leases = Self;

    fn leases(&self) -> &Self {
        self
    }

    fn basis(&self) -> Basis {
        self.with(|state| basis(state))
    }

    async fn changed(&self, from: Basis) {
        self.until(|state| basis(state) != from).await;
    }

    async fn attachment_signal(&self) {
        self.until(|state| state.has_change_notice).await;
        self.with(|state| state.has_change_notice = false);
    }

    async fn pause(&self, time: Duration) {
        self.until(|state| state.sleeps > 0).await;
        self.with(|state| state.sleeps -= 1);
        self.pass(time);
    }
}

/// A datastore in which leases never expire.
impl LeaseStore for Fake {
    type Lease = ();

    async fn grant(&self, _: Duration) -> Result<(), StoreError> {
        Ok(())
    }

    async fn put(&self, (): &(), change: &Change) -> Result<Outcome, StoreError> {
        self.with(|state| {
            if let Change::WriteLease(lease_write) = change {
                state.lease_writes.push(lease_write.by.revision);
            }
            Ok(state.commit(&transaction(change)))
        })
    }

    async fn renew(&self, (): &mut (), _: Duration) -> Result<(), StoreError> {
        Ok(())
    }

    async fn revoke(&self, (): ()) {}

    async fn pause(&self, _: Duration) {
        std::future::pending::<()>().await;
    }
}
