//! GC deletes attachments that are missing in the runtime's list, and nothing else. Only version 1.1.0 has it.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::cni::{WITH_GC, conf, message};
use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat_over;
use polder_tests::probe;
use polder_tests::scripted::ScriptedIpam;
use polder_tests::traces::assert_nothing_left;
use polder_tests::{Lab, Pod, Topology};
use serde_json::{Value, json};

/// Runs GC of a network with these valid attachments, or without a list.
fn gc(worker: &Worker, network: &Value, valid: Option<&[&Pod]>) -> Result<Value, Value> {
    let mut conf = conf(WITH_GC, network);
    if let Some(valid) = valid {
        let valid = valid.iter().map(|pod| json!({ "containerID": pod.name(), "ifname": "eth0" }));
        conf["cni.dev/valid-attachments"] = valid.collect();
    }
    worker.cni("GC", "", "", &conf)
}

#[test]
fn gc_deletes_only_attachments_that_the_runtime_does_not_list() {
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
fn gc_keeps_attachments_that_were_added_after_it_began() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let _old = worker.pod("old");
    let path = Worker::cni_path();
    // The runtime has made its list and started the plugin, but has not passed the list to it yet.
    let plugin = worker.pending(&[("CNI_COMMAND", "GC"), ("CNI_PATH", &path)]);
    let new = worker.pod("new");
    assert!(plugin.finish(&conf(WITH_GC, &json!({ "cni.dev/valid-attachments": [] })).to_string()));
    assert_eq!(worker.status()["pods"], 1, "the old one went, and the new one did not");
    probe::ping(worker.node.command("ping"), new.v4(), 56).unwrap();
}

/// Replaces the host's end of each pair with something of the same name that the kernel does not delete: an alternative
/// name of the loopback interface.
fn block_deletion(worker: &Worker, pods: &[&Pod]) {
    for name in pods.iter().map(|pod| pod.host_interface()) {
        worker.node.shell(&format!("ip link del {name}; ip link property add dev lo altname {name}"));
    }
}

fn unblock_deletion(worker: &Worker, pods: &[&Pod]) {
    for name in pods.iter().map(|pod| pod.host_interface()) {
        worker.node.shell(&format!("ip link property del dev lo altname {name}"));
    }
}

/// The error must name all attachments in `failed`, and none in `others`.
#[track_caller]
fn assert_names(error: &str, network: &str, failed: &[&Pod], others: &[&Pod]) {
    let names = |pod: &&Pod| error.contains(&format!("{network}/{}/eth0", pod.name()));
    assert!(failed.iter().all(names) && !others.iter().any(names), "{error}");
}

#[test]
fn gc_continues_after_failures_and_reports_all_of_them() {
    let lab = Lab::start(Topology::one_segment(1).families(Families::DUAL));
    let worker = &lab.workers[0];
    // GC deletes in the order of the names: each attachment that fails is followed by one that succeeds.
    let [a, b, c, d, kept] = ["a", "b", "c", "d", "kept"].map(|name| worker.pod(name));
    block_deletion(worker, &[&a, &c]);
    let error = message(gc(worker, &json!({}), Some(&[&kept])));
    assert_names(&error, "polder", &[&a, &c], &[&b, &d, &kept]);
    assert_eq!(error.matches("Operation not supported").count(), 2, "the kernel's own words: {error}");
    let links = worker.node.run("ip", &["-o", "link"]);
    for gone in [&b, &d] {
        assert!(!links.contains(&format!(": {}@", gone.host_interface())), "{links}");
    }
    assert_eq!(worker.status()["pods"], 3, "those that failed keep their addresses");
    probe::ping(worker.node.command("ping"), kept.v4(), 56).unwrap();

    unblock_deletion(worker, &[&a, &c]);
    assert_eq!(gc(worker, &json!({}), Some(&[&kept])), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 1);
    worker.delete(&kept);
    assert_nothing_left(&lab, worker);
}

#[test]
fn gc_reports_every_address_that_the_ledger_does_not_release() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.workers[0].node.shell("mkdir -p /var/lib/polder; mount -t tmpfs -o size=1m none /var/lib/polder");
    lab.start_agents();
    let worker = &lab.workers[0];
    let [a, b, kept] = ["a", "b", "kept"].map(|name| worker.pod(name));
    worker.node.shell("dd if=/dev/zero of=/var/lib/polder/full bs=4k 2>/dev/null || true");
    let error = message(gc(worker, &json!({}), Some(&[&kept])));
    assert_names(&error, "polder", &[&a, &b], &[&kept]);
    assert!(error.contains("cannot use the ledger"), "{error}");
    let links = worker.node.run("ip", &["-o", "link"]);
    assert_eq!(links.matches(": pld").count(), 1, "the interfaces are gone nevertheless: {links}");
    worker.node.run("rm", &["/var/lib/polder/full"]);
    assert_eq!(gc(worker, &json!({}), Some(&[&kept])), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 1);
}

#[test]
fn gc_is_forwarded_to_the_ipam_plugin_whether_or_not_either_side_fails() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let scripted = ScriptedIpam::new(&worker.node);
    let mut other = ScriptedIpam::conf();
    other["name"] = "other".into();
    let [a, b, c] =
        [("a", "192.168.7.1/24"), ("b", "192.168.7.2/24"), ("c", "192.168.7.3/24")].map(|(name, address)| {
            scripted.gives(WITH_GC, &[address]);
            worker.pod_with(name, &conf(WITH_GC, &other))
        });
    let own = worker.pod("own");
    assert_eq!(scripted.take_calls(), "ADD ADD ADD");

    // Both fail independently: both are reported, and everything else is deleted.
    scripted.fails(r#"{"code": 5, "msg": "no way", "details": "today"}"#);
    block_deletion(worker, &[&a]);
    let error = message(gc(worker, &other, Some(&[&c])));
    assert_names(&error, "other", &[&a], &[&b, &c]);
    assert!(error.contains("scripted-ipam: no way: today"), "{error}");
    assert_eq!(scripted.take_calls(), "GC");
    assert_eq!(worker.status()["pods"], 3);

    // Only the IPAM plugin fails.
    unblock_deletion(worker, &[&a]);
    let error = message(gc(worker, &other, Some(&[&c])));
    assert_names(&error, "other", &[], &[&a, &b, &c]);
    assert!(error.contains("scripted-ipam: no way: today"), "{error}");
    assert_eq!(worker.status()["pods"], 2);

    // Only Polder fails, then neither.
    scripted.recovers();
    block_deletion(worker, &[&c]);
    assert_names(&message(gc(worker, &other, Some(&[]))), "other", &[&c], &[&own]);
    unblock_deletion(worker, &[&c]);
    assert_eq!(gc(worker, &other, Some(&[])), Ok(Value::Null));
    assert_eq!(scripted.take_calls(), "GC GC GC");
    assert_eq!(worker.status()["pods"], 1);
    // Without a list, Polder deletes nothing; the IPAM plugin decides for itself.
    assert_eq!(gc(worker, &other, None), Ok(Value::Null));
    assert_eq!(scripted.take_calls(), "GC");
    probe::ping(worker.node.command("ping"), own.v4(), 56).unwrap();
}
