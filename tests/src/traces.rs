//! Traces of attachments on a node and in etcd.

use std::collections::BTreeMap;

use polder_api::PROBE_INTERFACE_ROUTED;
use serde_json::Value;

use crate::agent::Worker;
use crate::{Lab, wait};

/// All objects of attachments, as one text for each place. The text of a place without objects is empty.
pub fn traces(lab: &Lab, worker: &Worker) -> BTreeMap<&'static str, String> {
    let lines = |text: String, pattern: &str| {
        text.lines().filter(|line| line.contains(pattern)).collect::<Vec<_>>().join("\n")
    };
    let run = |program: &str, line: &str| worker.node.run(program, &line.split(' ').collect::<Vec<_>>());
    let status = worker.status();
    // Belongs to the node, not to an attachment.
    let endpoint = endpoint(lab, worker);
    let senders = |set: &str| {
        let listed = run("nft", &format!("list set inet polder {set}")).replace(['\n', '\t'], " ");
        let elements = listed.split("elements = {").nth(1).and_then(|rest| rest.split('}').next());
        not_of(&endpoint, ',', elements.unwrap_or_default())
    };
    let interfaces = lines(run("ip", "-o link show"), ": pld");
    let interfaces = interfaces.lines().filter(|line| !line.contains(PROBE_INTERFACE_ROUTED));
    let more = |count: u64, than: u64| if count > than { count.to_string() } else { String::new() };
    let pods = status["pods"].as_u64().expect("the number of pods");
    let gateways = u64::try_from(lab.topology.pools.len()).expect("few pools");
    BTreeMap::from([
        ("interfaces", interfaces.collect()),
        ("neighbours", not_of(&endpoint, '\n', &run("ip", "neigh show dev polder0 nud permanent"))),
        ("fdb", lines(run("bridge", "fdb show br polder0"), "dev pld")),
        ("senders4", senders("senders4")),
        ("senders6", senders("senders6")),
        ("ledger", more(pods, 0)),
        // The gateways belong to no attachment.
        ("addresses", more(used(&status), gateways)),
        ("etcd", lab.etcd.keys("/polder/v1/addresses/").join("\n")),
    ])
}

/// The addresses of the node's probe endpoint, from its record.
pub fn endpoint(lab: &Lab, worker: &Worker) -> Vec<String> {
    let key = format!("/polder/v1/nodes/{}", worker.name());
    let record: Value = serde_json::from_str(lab.etcd.ctl(&["get", "--print-value-only", &key]).trim())
        .expect("the record of a node");
    let probes = record["probes"].as_array().into_iter().flatten();
    probes.filter_map(|address| address.as_str().map(str::to_owned)).collect()
}

/// The parts of the text without any of the addresses.
fn not_of(addresses: &[String], separator: char, text: &str) -> String {
    let is_other = |part: &&str| !part.split_whitespace().any(|word| addresses.iter().any(|own| own == word));
    let parts = text.split(separator).map(str::trim).filter(|part| !part.is_empty());
    parts.filter(is_other).collect::<Vec<_>>().join("\n")
}

/// Number of used addresses in the node's blocks.
pub fn used(status: &Value) -> u64 {
    let blocks = status["blocks"].as_array().into_iter().flatten();
    blocks.map(|block| block["used"].as_u64().expect("a count")).sum()
}

/// Waits until no trace of an attachment is left. etcd is updated shortly after the other places.
pub fn assert_nothing_left(lab: &Lab, worker: &Worker) {
    wait::until("nothing to be left", || {
        let mut traces = traces(lab, worker);
        traces.retain(|_, found| !found.is_empty());
        if traces.is_empty() { Ok(()) } else { Err(format!("{traces:?}")) }
    });
}
