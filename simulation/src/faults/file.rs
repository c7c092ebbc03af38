//! Faults of an embedded store: its file shares the disk of the node.

use polder_ipam::allocator::SHORTEST_COOL_DOWN;
use polder_ipam::invariants::history::History;

use crate::Watcher;
use crate::world::{Agent, Keeping, TAIL, World};

/// Counted event: an agent with an embedded store crashes.
pub const CRASHED_OVER_A_FILE: &str = "agent crashed over a store in a file";

/// Loses all records.
pub(super) fn lose(world: &mut World) {
    if world.keeping == Keeping::Embedded {
        world.earlier.clear();
        world.etcd.empty();
        begin_anew(world);
    }
}

/// Loses a random number of the last writes, as a power failure does if writes are not synchronized to disk.
pub(super) fn lose_tail(world: &mut World) {
    if world.keeping != Keeping::Embedded {
        return;
    }
    let mut lost = None;
    for _ in 0..world.random.below(TAIL) {
        lost = world.earlier.pop().or(lost);
    }
    if let Some(earlier) = lost {
        world.etcd.restore(&earlier);
        begin_anew(world);
    }
}

/// Starts a new history: all earlier pods have lost their addresses.
fn begin_anew(world: &mut World) {
    world.history = History::new(SHORTEST_COOL_DOWN);
    world.store_was_set_back();
}

/// A follower that falls too far behind must read everything again.
pub(super) fn fall_behind(agent: &mut Agent) {
    agent.watcher = Watcher::new(agent.watcher.range().clone());
}
