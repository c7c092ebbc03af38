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
    // The node's own, and of no attachment.
    let endpoint = endpoint(lab, worker);
    let senders = |set: &str| {
        let listed = run("nft", &format!("list set inet polder {set}")).replace(['\n', '\t'], " ");
        let elements = listed.split("elements = {").nth(1).and_then(|rest| rest.split('}').next());
        not_of(&endpoint, ',', elements.unwrap_or_default())
    };
    let more = |count: u64, than: u64| if count > than { count.to_string() } else { String::new() };
    let pods = status["pods"].as_u64().expect("the number of pods");
    let gateways = u64::try_from(lab.topology.pools.len()).expect("few pools");
    BTreeMap::from([
        ("interfaces", lines(run("ip", "-o link show"), ": pld")),
        ("neighbours", not_of(&endpoint, '\n', &run("ip", "neigh show dev polder0 nud permanent"))),
        ("fdb", lines(run("bridge", "fdb show br polder0"), "dev pld")),
        ("senders4", senders("senders4")),
        ("senders6", senders("senders6")),
        ("ledger", more(pods, 0)),
        // The gateways are of no attachment.
        ("addresses", more(used(&status), gateways)),
        ("etcd", lab.etcd.keys("/polder/v1/addresses/").join("\n")),
    ])
}

/// The addresses of the node's probe endpoint, as its record says.
pub fn endpoint(lab: &Lab, worker: &Worker) -> Vec<String> {
    let key = format!("/polder/v1/nodes/{}", worker.name());
    let record: Value = serde_json::from_str(lab.etcd.ctl(&["get", "--print-value-only", &key]).trim())
        .expect("the record of a node");
    let probes = record["probes"].as_array().into_iter().flatten();
    probes.filter_map(|address| address.as_str().map(str::to_owned)).collect()
}

/// The parts of the text in which none of the addresses is.
fn not_of(addresses: &[String], separator: char, text: &str) -> String {
    let is_other = |part: &&str| !part.split_whitespace().any(|word| addresses.iter().any(|own| own == word));
    let parts = text.split(separator).map(str::trim).filter(|part| !part.is_empty());
    parts.filter(is_other).collect::<Vec<_>>().join("\n")
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
