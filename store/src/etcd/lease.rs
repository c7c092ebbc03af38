//! Leases of etcd: the keys under a lease exist as long as it is renewed.

use std::time::Duration;

use etcd_client::{LeaseKeepAliveStream, LeaseKeeper, PutOptions, TxnOp};
use polder_ipam::store::{Outcome, StoreError, Txn, Write};
use tokio::time::timeout;

use super::{Etcd, compare, write};
use crate::reason::NoReply;
use crate::writes::Written;

/// A granted lease.
#[derive(Debug)]
pub struct Lease {
    id: i64,
    /// The renewal stream; `None` before the first renewal.
    stream: Option<(LeaseKeeper, LeaseKeepAliveStream)>,
}

impl Etcd {
    pub(crate) async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let grant = self.write(Written::lease_record(), |mut client| async move {
            client.lease_grant(seconds, None).await
        });
        Ok(Lease { id: grant.await?.id(), stream: None })
    }

    /// Carries out a transaction. Its puts are deleted when the lease ends.
    pub(crate) async fn commit_under(&self, lease: &Lease, txn: &Txn) -> Result<Outcome, StoreError> {
        let leased = |one: &Write| match one {
            Write::Put { key, value } => {
                let options = PutOptions::new().with_lease(lease.id);
                TxnOp::put(key.as_str(), value.as_slice(), Some(options))
            }
            Write::Delete { .. } => write(one),
        };
        let request = etcd_client::Txn::new()
            .when(txn.compares.iter().map(compare).collect::<Vec<_>>())
            .and_then(txn.writes.iter().map(leased).collect::<Vec<_>>());
        self.transact(Written::from(txn), request).await
    }

    pub(crate) async fn renew(&self, lease: &mut Lease, max_wait: Duration) -> Result<(), StoreError> {
        let id = lease.id;
        let (keeper, answers) = match &mut lease.stream {
            Some(stream) => stream,
            none => {
                let open = self.call(|mut client| async move { client.lease_keep_alive(id).await });
                none.insert(open.await?)
            }
        };
        let renewal = async {
            keeper.keep_alive().await?;
            answers.message().await
        };
        match timeout(max_wait, renewal).await {
            // etcd does not return an error for an expired lease: its time to live is 0.
            Ok(Ok(Some(answer))) if answer.ttl() > 0 => Ok(()),
            Ok(Ok(_)) => Err(self.no_answer(NoReply::LeaseExpired)),
            Ok(Err(error)) => Err(StoreError::NoAnswer { store: self.name(), reason: self.explain(&error) }),
            Err(_) => Err(self.no_answer(NoReply::LeaseNotRenewed)),
        }
    }

    pub(crate) async fn revoke(&self, lease: Lease) {
        // If this fails, the lease expires.
        let _ = self.call(|mut client| async move { client.lease_revoke(lease.id).await }).await;
    }
}
