//! A key that lives as long as its owner.

use std::time::Duration;

use etcd_client::{PutOptions, TxnOp};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::etcd::{Etcd, compare};
use super::{Compare, StoreError};
use crate::key::Key;

/// Before a lost lease is taken anew.
const RETRY: Duration = Duration::from_secs(2);

/// Keeps `key` there, put only where `only_if` holds. Never ends; when it is dropped, the key vanishes within
/// `ttl_seconds`.
pub(super) async fn hold(etcd: &Etcd, key: &Key, value: &[u8], ttl_seconds: i64, only_if: &Compare) {
    let key = key.to_string();
    loop {
        if let Err(error) = hold_once(etcd, &key, value, ttl_seconds, only_if).await {
            debug!(key, %error, "lease lost");
        }
        sleep(RETRY).await;
    }
}

/// Holds one lease until it is lost.
async fn hold_once(
    etcd: &Etcd,
    key: &str,
    value: &[u8],
    ttl_seconds: i64,
    only_if: &Compare,
) -> Result<(), StoreError> {
    let id =
        etcd.call(|mut client| async move { Ok(client.lease_grant(ttl_seconds, None).await?.id()) }).await?;
    let options = PutOptions::new().with_lease(id);
    let put =
        etcd_client::Txn::new().when([compare(only_if)]).and_then([TxnOp::put(key, value, Some(options))]);
    if !etcd.call(|mut client| async move { client.txn(put).await }).await?.succeeded() {
        let _ = etcd.call(|mut client| async move { client.lease_revoke(id).await }).await;
        return Err(etcd.no_answer("somebody else has come to own the key".to_owned()));
    }
    let (mut keeper, mut answers) =
        etcd.call(|mut client| async move { client.lease_keep_alive(id).await }).await?;
    let every = Duration::from_secs(u64::try_from(ttl_seconds).unwrap_or(3) / 3);
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
    }
}
