//! The routes of all nodes to all blocks.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::agent::Worker;
use crate::{Lab, wait};

/// The destinations of Polder's routes on a node that are blocks.
fn routed(worker: &Worker) -> BTreeSet<String> {
    let routes = worker.node.shell("ip route show proto 84; ip -6 route show proto 84");
    let blocks = routes.lines().filter(|line| !line.starts_with("unreachable"));
    blocks.filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

/// The claimed blocks.
fn claimed(worker: &Worker) -> Result<BTreeSet<String>, String> {
    let blocks = worker.try_ctl(&["block", "list"])?;
    let blocks = blocks.as_array().into_iter().flatten();
    Ok(blocks.filter_map(|block| block["block"].as_str()).map(str::to_owned).collect())
}

/// Waits until every node has routes to all claimed blocks, and to no other.
pub fn wait_for_routes(lab: &Lab, max_wait: Duration) {
    wait::within(max_wait, "all nodes to know all blocks and no other", || {
        let claimed = claimed(&lab.workers[0])?;
        let mut all = lab.workers.iter().map(|worker| (worker, routed(worker)));
        match all.find(|(_, routed)| *routed != claimed) {
            Some((worker, routed)) => {
                Err(format!("{} has routes to {routed:?}, and claimed are {claimed:?}", worker.name()))
            }
            None => Ok(()),
        }
    });
}
