//! Faults of an embedded store: its file shares the disk of the node.

use polder_ipam::allocator::SHORTEST_COOL_DOWN;
use polder_ipam::invariants::history::History;

use crate::Watcher;
use crate::world::{Agent, StoreKind, TAIL, World};

/// Counted event: an agent with an embedded store crashes.
pub const CRASHED_WITH_EMBEDDED_STORE: &str = "agent with an embedded store crashed";

/// Loses all records.
pub(super) fn lose(world: &mut World) {
    if world.store_kind == StoreKind::Embedded {
        world.earlier.clear();
        world.etcd.empty();
        reset_history(world);
    }
}

/// Loses a random number of the last writes, as a power failure does if writes are not synchronized to disk.
pub(super) fn lose_tail(world: &mut World) {
    if world.store_kind != StoreKind::Embedded {
        return;
    }
    let mut lost = None;
    for _ in 0..world.random.below(TAIL) {
        lost = world.earlier.pop().or(lost);
    }
    if let Some(earlier) = lost {
        world.etcd.restore(&earlier);
        reset_history(world);
    }
}

/// Starts a new history: all earlier pods have lost their addresses.
fn reset_history(world: &mut World) {
    world.history = History::new(SHORTEST_COOL_DOWN);
    world.note_store_loss();
}

/// A follower that falls too far behind must read everything again.
pub(super) fn fall_behind(agent: &mut Agent) {
    agent.watcher = Watcher::new(agent.watcher.range().clone());
}
