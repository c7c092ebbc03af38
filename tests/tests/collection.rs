//! GC: it takes away what the runtime does not know any more, and nothing else. There is only one version with it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use polder_tests::agent::Worker;
use polder_tests::cni::{WITH_GC, conf};
use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat_over;
use polder_tests::probe;
use polder_tests::{Lab, Pod, Topology};
use serde_json::{Value, json};

/// GC of a network, with these valid attachments, or without a list.
fn gc(worker: &Worker, network: &Value, valid: Option<&[&Pod]>) -> Result<Value, Value> {
    let mut conf = conf(WITH_GC, network);
    if let Some(valid) = valid {
        let valid = valid.iter().map(|pod| json!({ "containerID": pod.name(), "ifname": "eth0" }));
        conf["cni.dev/valid-attachments"] = valid.collect();
    }
    worker.cni("GC", "", "", &conf)
}

#[test]
fn gc_takes_away_what_the_runtime_does_not_know_and_nothing_else() {
    let lab = Lab::start(Topology::one_segment(1).families(Families::DUAL));
    let worker = &lab.workers[0];
    let (kept, stale) = (worker.pod("kept"), worker.pod("stale"));
    let other = worker.pod_with("other", &conf(WITH_GC, &json!({ "name": "other-network" })));
    assert_eq!(gc(worker, &json!({}), None), Ok(Value::Null), "no list is no knowledge");
    assert_eq!(worker.status()["pods"], 3);
    assert_eq!(gc(worker, &json!({}), Some(&[&kept])), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 2);
    assert!(!worker.node.run("ip", &["-o", "link"]).contains(&stale.host_interface()));
    assert_flat_over(Families::DUAL, &[kept, other.clone()], 1450);
    assert_eq!(gc(worker, &json!({}), Some(&[])), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 1, "the other network's is left");
    probe::ping(worker.node.command("ping"), other.v4(), 56).unwrap();
}

#[test]
fn gc_spares_what_was_added_after_it_began() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let _old = worker.pod("old");
    let path = Worker::cni_path();
    // The runtime has made its list, and started the plugin, which does not have it yet.
    let plugin = worker.pending(&[("CNI_COMMAND", "GC"), ("CNI_PATH", &path)]);
    let new = worker.pod("new");
    assert!(plugin.finish(&conf(WITH_GC, &json!({ "cni.dev/valid-attachments": [] })).to_string()));
    assert_eq!(worker.status()["pods"], 1, "the old one went, and the new one did not");
    probe::ping(worker.node.command("ping"), new.v4(), 56).unwrap();
}
