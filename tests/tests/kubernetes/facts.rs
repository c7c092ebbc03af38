//! What the agent takes from its Node: labels and addresses.

use std::net::IpAddr;

use polder_tests::agent::Worker;
use polder_tests::{Topology, wait};
use serde_json::{Value, json};

use super::site::Site;

fn of_pool(pool: &str) -> Value {
    let mut conf = Worker::netconf("1.1.0");
    conf["pool"] = json!(pool);
    conf
}

#[test]
fn labels_of_the_node_object_select_pools() {
    let mut site = Site::build(Topology::one_segment(2));
    site.api.label("n1", "topology.kubernetes.io/zone", Some("a"));
    site.api.label("n2", "topology.kubernetes.io/zone", Some("b"));
    site.lab.start_agents();
    let [first, second] = site.lab.workers.as_slice() else { panic!("two nodes") };
    let selector = "topology.kubernetes.io/zone=a";
    first.ctl(&["pool", "add", "zone-a", "10.245.0.0/24", "--block-length", "28", "--nodes", selector]);
    let pod = wait::until("a pod of the pool", || {
        first.try_pod("a", &of_pool("zone-a")).map_err(|error| {
            first.node.run("ip", &["netns", "delete", "a"]);
            error.to_string()
        })
    });
    assert!(pod.v4().to_string().starts_with("10.245.0."), "{}", pod.v4());
    let error = second.try_pod("b", &of_pool("zone-a")).unwrap_err().to_string();
    assert!(error.contains("pool zone-a is for nodes with the labels"), "{error}");

    // A label that changes later counts, too.
    site.api.label("n2", "topology.kubernetes.io/zone", Some("a"));
    let late = wait::until("a pod of the pool on the other node", || {
        second.try_pod("late", &of_pool("zone-a")).map_err(|error| {
            second.node.run("ip", &["netns", "delete", "late"]);
            error.to_string()
        })
    });
    assert!(late.v4().to_string().starts_with("10.245.0."), "{}", late.v4());
    assert_eq!(pod.address_of(polder_api::Family::V4), pod.v4());
}

#[test]
fn the_address_of_the_node_object_is_a_candidate_for_the_underlay() {
    let mut site = Site::build(Topology::one_segment(2));
    let chosen: IpAddr = "10.10.1.101".parse().unwrap();
    site.lab.workers[0].node.run("ip", &["address", "add", "10.10.1.101/24", "dev", "eth0"]);
    site.api.set_addresses("n1", &[chosen]);
    site.api.set_addresses("n2", &[site.lab.underlay(1, false)]);
    site.lab.start_agents();
    let underlay = |worker: &Worker| worker.status()["underlay"].clone();
    wait::until("the node's own address to be that of its Node", || {
        let seen = underlay(&site.lab.workers[0]);
        if seen[0]["address"] == json!(chosen) { Ok(()) } else { Err(seen.to_string()) }
    });
    polder_tests::matrix::assert_flat(&[site.lab.workers[0].pod("a"), site.lab.workers[1].pod("b")], 1450);
}
