//! What goes wrong where the records are in a file of the node itself: what befalls its disk.

use polder_ipam::allocator::SHORTEST_REST;
use polder_ipam::invariants::history::History;

use crate::Follower;
use crate::world::{Agent, Keeping, TAIL, World};

/// What is counted when an agent dies whose store is a file.
pub const CRASHED_OVER_A_FILE: &str = "agent crashed over a store in a file";

/// Loses all of it.
pub(super) fn lose(world: &mut World) {
    if world.keeping == Keeping::Embedded {
        world.earlier.clear();
        world.etcd.empty();
        begin_anew(world);
    }
}

/// Loses the last writes, as many as chance has it: what a power cut does to a file that is not synchronized at each.
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

/// What the pods before had, nobody has any more.
fn begin_anew(world: &mut World) {
    world.history = History::new(SHORTEST_REST);
    world.store_was_set_back();
}

/// A follower that is too far behind reads everything again.
pub(super) fn fall_behind(agent: &mut Agent) {
    agent.follower = Follower::new(agent.follower.range().clone());
}
