//! The task that asks the store which agents are alive.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use polder_api::NodeName;
use polder_ipam::view::{Source, View};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::{CONFIRM, Leases, living};
use crate::agent::Agent;

/// The longest time between two questions, in a cluster that is not large.
const LONGEST: Duration = Duration::from_secs(60);

/// What each node adds to that time: together the agents ask for some 20 lists of all leases a second, however many they are.
const FOR_EACH: Duration = Duration::from_millis(50);

/// Runs for ever.
pub async fn run(agent: Arc<Agent>) {
    let mut view = agent.board.view.subscribe();
    // Agents that were started together do not ask together.
    let mut next = Instant::now() + agent.config.resync.min(LONGEST).mul_f64(fraction(&agent.config.node));
    loop {
        if view.wait_for(|view| is_current(view)).await.is_err() {
            return;
        }
        // Cancel-safe, both: nothing is taken by waiting.
        let lost = tokio::select! {
            () = sleep_until(next) => false,
            lost = view.wait_for(|view| !is_current(view)) => lost.is_ok(),
        };
        let now = Instant::now();
        if lost {
            // Leases may be missing for no other reason than that the store was away.
            drop(agent.board.leases.send_replace(Arc::default()));
            next = now + CONFIRM;
            continue;
        }
        let known = Arc::clone(&agent.board.leases.borrow());
        let leases = look(&agent, &known).await;
        log(&known, &leases);
        next = leases.next(pause(&agent), now);
        drop(agent.board.leases.send_replace(Arc::new(leases)));
    }
}

/// Asks the store, if there is anybody to ask for.
async fn look(agent: &Agent, known: &Leases) -> Leases {
    let me = &agent.config.node;
    let others: BTreeSet<NodeName> =
        agent.board.view().nodes.keys().filter(|name| *name != me).cloned().collect();
    let answer = if others.is_empty() { Ok(BTreeSet::new()) } else { living(&agent.store).await };
    let mut leases = Leases::default();
    // Without an answer nothing is known, also of those that were missing before.
    if let Ok(living) = answer {
        leases.clone_from(known);
        leases.take(&others, &living, Instant::now());
    }
    leases
}

/// Whether the records are those of the store as it is.
fn is_current(view: &View) -> bool {
    view.source == Source::Store && view.lost.is_none()
}

/// The time between two questions: the one between two timed passes, or what a large cluster needs.
fn pause(agent: &Agent) -> Duration {
    let nodes = u32::try_from(agent.board.view().nodes.len()).unwrap_or(u32::MAX);
    let pause = agent.config.resync.min(LONGEST).max(FOR_EACH.saturating_mul(nodes));
    pause.mul_f64(0.9 + 0.2 * fraction(&agent.config.node))
}

/// A number from 0 to 1 that differs from node to node.
fn fraction(node: &NodeName) -> f64 {
    // FNV-1a.
    let hash = node
        .as_str()
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    f64::from(hash) / f64::from(u32::MAX)
}

fn log(before: &Leases, now: &Leases) {
    let names = |leases: &Leases| leases.not_alive().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>();
    let (before, after) = (names(before), names(now));
    after.difference(&before).for_each(|node| warn!(%node, "its agent is not alive"));
    if now.are_known() {
        before
            .difference(&after)
            .for_each(|node| info!(%node, "its agent is alive again, or the node is gone"));
    }
}
