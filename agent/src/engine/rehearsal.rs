//! Dry run: computes the first pass of an agent without applying it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use polder_ipam::peers::validate;
use polder_ipam::registration::Registration;
use tokio::time::{Instant, sleep_until};

use super::{Datapath, Engine};

/// Computes the first pass and publishes its results as if it were applied. Waits up to `max_wait` for the
/// registration; after that, returns the remaining obstacles.
pub async fn rehearse<D: Datapath>(
    engine: &mut Engine<D>,
    max_wait: Duration,
) -> Result<Vec<String>, Vec<String>> {
    let deadline = Instant::now() + max_wait;
    let node_state = engine.node_state().clone();
    let mut view = node_state.records.changes();
    let mut membership_changes = node_state.membership.changes();
    let mut registration = node_state.membership.registrations();
    let mut endpoints = engine.tools.store_at.clone();
    loop {
        view.mark_unchanged();
        membership_changes.mark_unchanged();
        endpoints.mark_unchanged();
        let state = registration.borrow_and_update().clone();
        match &state {
            Registration::Conflict(reason) => return Err(vec![reason.to_string()]),
            Registration::Removed(reason) => return Err(vec![reason.to_string()]),
            _ => {}
        }
        let validated = validate(&node_state.view(), &node_state.membership.me().name, &BTreeSet::new());
        engine.choose_underlay(&validated.peers).await;
        let drafted = engine.draft_now().await;
        let reasons = match drafted {
            Ok(pass_plan) => {
                let changes = pass_plan.changes();
                engine.entries.pass.send_replace(Some(Arc::new(pass_plan.pass)));
                match node_state.obstacles() {
                    obstacles if !obstacles.is_empty() => obstacles,
                    _ if state == Registration::Registered => return Ok(changes),
                    _ => vec!["the node is not registered yet".to_owned()],
                }
            }
            Err(reason) => vec![reason.to_string()],
        };
        tokio::select! {
            _ = view.changed() => {}
            _ = membership_changes.changed() => {}
            _ = registration.changed() => {}
            _ = endpoints.changed() => {}
            () = sleep_until(deadline) => return Err(reasons),
        }
    }
}
