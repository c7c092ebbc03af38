//! A single node without etcd.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat_over;
use polder_tests::{Lab, Topology};

/// A node whose agent stores the cluster's records itself.
fn lab() -> Lab {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.etcd.kill();
    lab.workers[0].configure(
        "store = \"embedded\"\ncni_conf_dir = \"/run/cni/net.d\"\n\
         [bootstrap]\npools = [\"10.244.0.0/24\", \"fd00:244::/112\"]\n",
    );
    lab.workers[0].start_and_wait();
    lab
}

#[test]
fn a_node_without_etcd_serves_its_pods_and_keeps_them_over_a_restart() {
    let mut lab = lab();
    let mut pods = vec![lab.workers[0].pod("a"), lab.workers[0].pod("b")];
    assert_flat_over(Families::DUAL, &pods, 1450);
    lab.workers[0].kill();
    lab.workers[0].start_and_wait();
    assert_eq!(lab.workers[0].status()["pods"], 2);
    pods.push(lab.workers[0].pod("c"));
    assert_flat_over(Families::DUAL, &pods, 1450);
    let nodes = lab.workers[0].ctl(&["node", "list"]);
    assert_eq!(nodes[0]["alive"], true, "{nodes}");
}

#[test]
fn a_node_without_etcd_serves_again_after_a_reboot() {
    let mut lab = lab();
    lab.workers[0].pod("a");
    lab.reboot(0);
    lab.workers[0].start_and_wait();
    let pods = [lab.workers[0].pod("b"), lab.workers[0].pod("c")];
    assert_flat_over(Families::DUAL, &pods, 1450);
}

#[test]
fn a_node_without_etcd_claims_blocks_until_none_is_left() {
    let lab = lab();
    let worker = &lab.workers[0];
    // 256 addresses less the first, the last and one gateway in each of four blocks.
    for number in 0..250 {
        worker.pod(&format!("p{number}"));
    }
    let status = worker.status();
    let blocks = status["blocks"].as_array().unwrap();
    assert_eq!(blocks.iter().filter(|block| block["pool"] == "ipv4").count(), 4, "{status}");
    let error = worker.try_pod("one-too-many", &polder_tests::agent::Worker::netconf("1.1.0")).unwrap_err();
    assert_eq!(error["code"], 100, "{error}");
}
