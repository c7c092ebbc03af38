//! A key that lives as long as its owner.

use std::time::Duration;

use etcd_client::{PutOptions, TxnOp};
use polder_ipam::store::{Compare, StoreError, Txn, Write};
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::{Etcd, compare, write};
use crate::writes::Written;

/// Before a lost lease is taken anew.
const RETRY: Duration = Duration::from_secs(2);

/// How often it is asked whether the store would still take the key. Renewals do not tell: etcd renews leases while it takes
/// no writes, and for who may not write any more.
const ASK_EVERY: Duration = Duration::from_secs(30);

/// Keeps there what the transaction puts. Never ends; when it is dropped, that vanishes within `ttl_seconds`.
pub(super) async fn hold(etcd: &Etcd, txn: &Txn, ttl_seconds: i64) {
    let held = Held { etcd, txn, ttl_seconds };
    loop {
        if let Err(error) = held.once().await {
            debug!(keys = held.keys(), %error, "lease lost");
        }
        sleep(RETRY).await;
    }
}

/// What is held.
struct Held<'a> {
    etcd: &'a Etcd,
    txn: &'a Txn,
    ttl_seconds: i64,
}

impl Held<'_> {
    /// Holds one lease until it is lost.
    async fn once(&self) -> Result<(), StoreError> {
        let (etcd, ttl) = (self.etcd, self.ttl_seconds);
        let grant = etcd
            .write(Written::from(self.txn), |mut client| async move { client.lease_grant(ttl, None).await });
        let id = grant.await?.id();
        let put = self.put(id, &self.txn.compares).await;
        if !matches!(put, Ok(true)) {
            let _ = etcd.call(|mut client| async move { client.lease_revoke(id).await }).await;
        }
        if !put? {
            return Err(etcd.no_answer("somebody else has come to own the key".to_owned()));
        }
        let (mut keeper, mut answers) =
            etcd.call(|mut client| async move { client.lease_keep_alive(id).await }).await?;
        let every = Duration::from_secs(u64::try_from(ttl).unwrap_or(3) / 3);
        let mut asked = Instant::now();
        loop {
            let renewal = async {
                keeper.keep_alive().await?;
                answers.message().await
            };
            match timeout(every, renewal).await {
                // An expired lease is not an error to etcd: its time to live is 0.
                Ok(Ok(Some(answer))) if answer.ttl() > 0 => sleep(every).await,
                Ok(Ok(_)) => return Err(etcd.no_answer("the lease expired".to_owned())),
                Ok(Err(error)) => return Err(etcd.no_answer(etcd.explain(&error))),
                Err(_) => return Err(etcd.no_answer("the lease was not renewed in time".to_owned())),
            }
            if asked.elapsed() >= ASK_EVERY {
                asked = Instant::now();
                self.ask(id).await;
            }
        }
    }

    /// What it puts, for the log.
    fn keys(&self) -> String {
        let key = |write: &Write| match write {
            Write::Put { key, .. } | Write::Delete { key } => key.clone(),
        };
        self.txn.writes.iter().map(key).collect::<Vec<_>>().join(", ")
    }

    /// Puts it, unless a compare does not hold; true if it was put.
    async fn put(&self, id: i64, compares: &[Compare]) -> Result<bool, StoreError> {
        let leased = |one: &Write| match one {
            Write::Put { key, value } => {
                let options = PutOptions::new().with_lease(id);
                TxnOp::put(key.as_str(), value.as_slice(), Some(options))
            }
            Write::Delete { .. } => write(one),
        };
        let txn = etcd_client::Txn::new()
            .when(compares.iter().map(compare).collect::<Vec<_>>())
            .and_then(self.txn.writes.iter().map(leased).collect::<Vec<_>>());
        let answer = self.etcd.write(Written::from(self.txn), |mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        Ok(answer.await?.succeeded())
    }

    /// Asks whether it could be put: etcd refuses a transaction for a put that would not come to be, too. Nothing is
    /// written where it is there, as it should be.
    async fn ask(&self, id: i64) {
        let absent = self.txn.writes.iter().map(|write| match write {
            Write::Put { key, .. } | Write::Delete { key } => {
                Compare::Unchanged { key: key.clone(), revision: 0 }
            }
        });
        let compares: Vec<Compare> = self.txn.compares.iter().cloned().chain(absent).collect();
        match self.put(id, &compares).await {
            Ok(false) => {}
            Ok(true) => debug!(keys = self.keys(), "somebody had deleted it: it is there again"),
            Err(error) => debug!(keys = self.keys(), %error, "it could not be put again"),
        }
    }
}
