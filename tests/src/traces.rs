//! What attachments leave on a node and in etcd, wherever it is.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::agent::Worker;
use crate::{Lab, wait};

/// Everything that belongs to attachments, by where it is. Each is empty if there are none.
pub fn traces(lab: &Lab, worker: &Worker) -> BTreeMap<&'static str, String> {
    let lines = |text: String, sign: &str| {
        text.lines().filter(|line| line.contains(sign)).collect::<Vec<_>>().join("\n")
    };
    let run = |program: &str, line: &str| worker.node.run(program, &line.split(' ').collect::<Vec<_>>());
    let status = worker.status();
    let more = |count: u64, than: u64| if count > than { count.to_string() } else { String::new() };
    let pods = status["pods"].as_u64().expect("the number of pods");
    let gateways = u64::try_from(lab.topology.pools.len()).expect("few pools");
    BTreeMap::from([
        ("interfaces", lines(run("ip", "-o link show"), ": pld")),
        ("neighbours", run("ip", "neigh show dev polder0 nud permanent")),
        ("fdb", lines(run("bridge", "fdb show br polder0"), "dev pld")),
        ("senders4", lines(run("nft", "list set inet polder senders4"), "elements")),
        ("senders6", lines(run("nft", "list set inet polder senders6"), "elements")),
        ("ledger", more(pods, 0)),
        // The gateways are of no attachment.
        ("addresses", more(used(&status), gateways)),
        ("etcd", lab.etcd.keys("/polder/v1/addresses/").join("\n")),
    ])
}

/// How many addresses of the node's blocks are out.
pub fn used(status: &Value) -> u64 {
    let blocks = status["blocks"].as_array().into_iter().flatten();
    blocks.map(|block| block["used"].as_u64().expect("a count")).sum()
}

/// Waits until there is nothing of any attachment. etcd is told a moment later than all others.
pub fn assert_nothing_left(lab: &Lab, worker: &Worker) {
    wait::until("nothing to be left", || {
        let mut traces = traces(lab, worker);
        traces.retain(|_, found| !found.is_empty());
        if traces.is_empty() { Ok(()) } else { Err(format!("{traces:?}")) }
    });
}
