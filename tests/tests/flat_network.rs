//! The network model of Kubernetes: every pod reaches every other pod at its own address, on any network between the
//! nodes.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::fabric::Families;
use polder_tests::lab::{POOL4, POOL6};
use polder_tests::matrix::assert_flat_over;
use polder_tests::{Lab, Pod, Topology};

/// Two pods on every node.
fn pods(lab: &Lab) -> Vec<Pod> {
    lab.workers
        .iter()
        .flat_map(|worker| ["a", "b"].map(|name| worker.pod(&format!("{}-{name}", worker.name()))))
        .collect()
}

fn assert_flat_on(topology: Topology, overhead: usize, direct: &[&str]) {
    let mtu = topology.mtu as usize - overhead;
    let families = Families::of(&topology.pools);
    let lab = Lab::start(topology);
    let pods = pods(&lab);
    assert_flat_over(families, &pods, mtu);
    for (number, path) in direct.iter().enumerate() {
        let name = lab.workers[number + 1].name();
        for pool in &lab.topology.pools {
            let family = if pool.contains(':') { "ipv6" } else { "ipv4" };
            assert_eq!(
                lab.workers[0].path_to(name, family),
                *path,
                "the path from n1 to {name} for {family}"
            );
        }
    }
}

#[test]
fn pods_on_one_segment_reach_each_other_over_ipv4() {
    assert_flat_on(Topology::one_segment(3), 50, &["direct", "direct"]);
}

#[test]
fn pods_on_one_segment_reach_each_other_over_ipv6() {
    assert_flat_on(Topology::one_segment(3).families(Families::V6), 70, &["direct", "direct"]);
}

#[test]
fn pods_on_one_segment_reach_each_other_over_both_families() {
    assert_flat_on(Topology::one_segment(3).families(Families::DUAL), 50, &["direct", "direct"]);
}

#[test]
fn pods_behind_a_router_reach_each_other_over_ipv4() {
    assert_flat_on(Topology::two_segments(), 50, &["direct", "vxlan"]);
}

#[test]
fn pods_behind_a_router_reach_each_other_over_ipv6() {
    assert_flat_on(Topology::two_segments().families(Families::V6), 70, &["direct", "vxlan"]);
}

#[test]
fn pods_behind_a_router_reach_each_other_over_both_families() {
    assert_flat_on(Topology::two_segments().families(Families::DUAL), 50, &["direct", "vxlan"]);
}

#[test]
fn the_families_of_pods_and_underlay_need_not_be_the_same() {
    let both = Topology { underlay: Families::V4, pools: vec![POOL4, POOL6], ..Topology::two_segments() };
    let lab = Lab::start(both);
    assert_flat_over(Families::DUAL, &pods(&lab), 1450);
    assert_eq!(lab.workers[0].path_to("n2", "ipv4"), "direct");
    assert_eq!(
        lab.workers[0].path_to("n2", "ipv6"),
        "vxlan",
        "there is no IPv6 underlay to go over directly"
    );
}

#[test]
fn pods_with_ipv4_reach_each_other_over_an_underlay_with_ipv6_alone() {
    let topology = Topology { underlay: Families::V6, pools: vec![POOL4], ..Topology::two_segments() };
    assert_flat_on(topology, 70, &["vxlan", "vxlan"]);
}

#[test]
fn every_backend_makes_the_same_flat_network() {
    for (backend, overhead, path) in [("vxlan", 50, "vxlan"), ("direct", 0, "direct")] {
        let topology = Topology::one_segment(2).bootstrap(&format!("backend = \"{backend}\""));
        assert_flat_on(topology, overhead, &[path]);
    }
}

#[test]
fn pods_without_a_bridge_reach_each_other_all_the_same() {
    let topology = Topology::two_segments().families(Families::DUAL).bootstrap("attach = \"routed\"");
    let lab = Lab::start(topology);
    assert_flat_over(Families::DUAL, &pods(&lab), 1450);
    let links = lab.workers[0].node.run("ip", &["-d", "link", "show", "type", "veth"]);
    assert!(!links.contains("master polder0"), "pods hang on the bridge: {links}");
}
