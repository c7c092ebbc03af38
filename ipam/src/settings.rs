//! How the settings of a cluster change.
//!
//! Pure: from all records as of one revision. The record is compared in the transaction.

use polder_api::Backend;

use crate::key::Key;
use crate::pools::{Change, NotChanged};
use crate::record::{ClusterRecord, encode};
use crate::store::{Compare, Txn, Write};
use crate::view::View;

/// Lets the nodes reach each other's pods in this way. All of them take in packets that come the other way, so that it does
/// not matter who hears of it first.
pub fn change_backend(view: &View, backend: Backend) -> Result<Change, NotChanged> {
    let key = Key::Cluster.to_string();
    if let Some(reason) = view.refused.get(&key) {
        return Err(NotChanged::Unreadable { key, reason: reason.clone() });
    }
    let Some(known) = &view.cluster else { return Err(NotChanged::NoCluster) };
    let before = known.record.backend;
    if before == backend {
        return Ok(Change::Already(format!("the backend is {backend} already")));
    }
    let record = ClusterRecord { backend, ..(*known.record).clone() };
    Ok(Change::Commit {
        txn: Txn {
            compares: vec![Compare::Unchanged { key: key.clone(), revision: known.revision }],
            writes: vec![Write::Put { key, value: encode(&record) }],
        },
        done: format!("the backend is {backend}, and was {before}"),
    })
}
