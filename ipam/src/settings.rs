//! How the settings of a cluster change.
//!
//! Pure: from all records as of one revision.

use polder_api::Backend;

use crate::change::Change;
use crate::key::Key;
use crate::pools::{Decision, NotChanged};
use crate::record::ClusterRecord;
use crate::view::View;

/// Lets the nodes reach each other's pods in this way. All of them take in packets that come the other way, so that it does
/// not matter who hears of it first.
pub fn change_backend(view: &View, backend: Backend) -> Result<Decision, NotChanged> {
    let key = Key::Cluster.to_string();
    if let Some(reason) = view.refused.get(&key) {
        return Err(NotChanged::Unreadable { key, reason: reason.clone() });
    }
    let Some(known) = &view.cluster else { return Err(NotChanged::NoCluster) };
    let before = known.record.backend;
    if before == backend {
        return Ok(Decision::Already(format!("the backend is {backend} already")));
    }
    let record = ClusterRecord { backend, ..(*known.record).clone() };
    Ok(Decision::Commit {
        change: Box::new(Change::ReplaceSettings { record, revision: known.revision }),
        done: format!("the backend is {backend}, and was {before}"),
    })
}
