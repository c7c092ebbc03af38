//! Pods and hosts that are not pods: their own node, other nodes, and a host outside the cluster.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::net::IpAddr;

use polder_api::Family;
use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::probe::{self, Dialogue, Echo};
use polder_tests::{Lab, Node, Pod, Topology, wait};

fn lab(bootstrap: &str) -> Lab {
    Lab::start(Topology::two_segments().families(Families::DUAL).bootstrap(bootstrap))
}

/// The address from which the server sees the pod, over UDP and TCP.
fn seen_by(server: &Node, address: IpAddr, pod: &Pod) -> IpAddr {
    let _echo = server.within(|| Echo::start(address));
    let own = pod.address_like(address);
    pod.within(|| {
        let udp = probe::udp(own, address, 100).unwrap().0;
        assert_eq!(udp, probe::tcp(address, 100_000).unwrap(), "UDP and TCP are seen differently");
        udp
    })
}

/// The address from which the pod sees the client.
fn seen_by_pod(pod: &Pod, client: &Node, from: IpAddr) -> IpAddr {
    let address = pod.address_like(from);
    let _echo = pod.within(|| Echo::start(address));
    client.within(|| probe::tcp(address, 100_000).unwrap())
}

#[test]
fn a_pod_and_its_own_node_see_each_others_own_addresses() {
    let lab = lab("");
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    for own in pod.addresses() {
        let gateway = pod.gateway(own);
        assert_eq!(seen_by(&worker.node, gateway, &pod), own);
        assert_eq!(seen_by(&worker.node, lab.underlay(0, own.is_ipv6()), &pod), own);
        assert_eq!(seen_by_pod(&pod, &worker.node, own), gateway, "the node speaks from its own address");
    }
}

#[test]
fn a_pod_and_other_nodes_reach_each_other_without_nat_where_the_underlay_carries_it() {
    let lab = lab("");
    let pod = lab.workers[0].pod("a");
    for own in pod.addresses() {
        let v6 = own.is_ipv6();
        assert_eq!(
            seen_by(&lab.workers[1].node, lab.underlay(1, v6), &pod),
            own,
            "node 2 is on the same link"
        );
        // The router has no route to pods: a node behind it must see the node's address instead.
        assert_eq!(seen_by(&lab.workers[2].node, lab.underlay(2, v6), &pod), lab.underlay(0, v6));
        assert_eq!(seen_by_pod(&pod, &lab.workers[1].node, own), lab.underlay(1, v6));
        let gateway = lab.workers[2].pod(&format!("c{v6}")).gateway(own);
        assert_eq!(
            seen_by_pod(&pod, &lab.workers[2].node, own),
            gateway,
            "through the tunnel a node is a pod's gateway"
        );
    }
}

#[test]
fn the_world_sees_the_nodes_address_unless_masquerading_is_off() {
    for (bootstrap, masqueraded) in [("", true), ("masquerade = false", false)] {
        let lab = lab(bootstrap);
        let pod = lab.workers[0].pod("a");
        route_back(&lab, &pod);
        for own in pod.addresses() {
            let v6 = own.is_ipv6();
            let expected = if masqueraded { lab.underlay(0, v6) } else { own };
            let world = lab.world.as_ref().unwrap();
            assert_eq!(seen_by(world, Lab::world_address(v6), &pod), expected, "with {bootstrap:?}");
        }
    }
}

#[test]
fn connections_to_the_world_outlive_a_ruleset_flush_only_with_keep_nat() {
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL));
    let keeping = format!("{}\n[nftables]\nkeep_nat = true\n", lab.workers[1].configuration());
    lab.workers[1].configure(&keeping);
    lab.start_agents();
    let world = lab.world.as_ref().unwrap();
    let outlives = |worker: &Worker| {
        let pod = worker.pod("a");
        route_back(&lab, &pod);
        let dialogues: Vec<_> = [false, true]
            .into_iter()
            .map(|v6| Dialogue::start(&pod, world, Lab::world_address(v6)))
            .collect();
        worker.node.run("nft", &["flush", "ruleset"]);
        wait::until_true("the table to be back", || {
            worker.node.run("nft", &["list", "tables"]).contains("table inet polder\n")
        });
        dialogues.into_iter().map(|dialogue| dialogue.finish().is_ok()).collect::<Vec<_>>()
    };
    assert_eq!(outlives(&lab.workers[0]), [false, false], "then the setting is of no use");
    assert_eq!(outlives(&lab.workers[1]), [true, true]);
    assert!(lab.workers[1].node.run("nft", &["list", "tables"]).contains("table inet polder_nat"));
    lab.workers[1].kill();
    wait::until_true("the table to go with its agent", || {
        !lab.workers[1].node.run("nft", &["list", "tables"]).contains("polder_nat")
    });
}

#[test]
fn an_excepted_destination_sees_the_pods_address() {
    let lab = lab(r#"masquerade_except = ["10.10.9.0/24"]"#);
    let pod = lab.workers[0].pod("a");
    route_back(&lab, &pod);
    for own in pod.addresses() {
        let v6 = own.is_ipv6();
        let expected = if v6 { lab.underlay(0, v6) } else { own };
        assert_eq!(seen_by(lab.world.as_ref().unwrap(), Lab::world_address(v6), &pod), expected);
    }
}

#[test]
fn the_world_reaches_a_pod_by_a_route_and_the_pod_sees_its_address() {
    let lab = lab("");
    let pod = lab.workers[0].pod("a");
    route_back(&lab, &pod);
    for own in pod.addresses() {
        let world = Lab::world_address(own.is_ipv6());
        assert_eq!(seen_by_pod(&pod, lab.world.as_ref().unwrap(), own), world);
    }
}

#[test]
fn a_packet_that_is_too_large_for_a_pod_is_answered_with_the_mtu() {
    let lab = lab("");
    let pod = lab.workers[0].pod("a");
    route_back(&lab, &pod);
    let world = lab.world.as_ref().unwrap();
    for own in pod.addresses() {
        let (headers, expected) = if own.is_ipv4() { (28, "mtu = 1450") } else { (48, "mtu=1450") };
        wait::until("the largest packet that fits", || {
            probe::ping(world.command("ping"), own, 1450 - headers)
        });
        let answer =
            probe::ping(world.command("ping"), own, 1500 - headers).expect_err("a packet that does not fit");
        assert!(answer.contains(expected), "ping says {answer:?}");
    }
}

#[test]
fn a_packet_that_is_too_large_for_a_peers_pods_is_answered_by_the_senders_node() {
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL));
    for number in 1..3 {
        lab.workers[number].configure_also("mtu = 1400");
    }
    lab.start_agents();
    let pod = lab.workers[0].pod("a");
    for (number, path) in [(1, "direct"), (2, "vxlan")] {
        let small = lab.workers[number].pod("b");
        for (family, headers, expected) in [(Family::V4, 28, "mtu = 1400"), (Family::V6, 48, "mtu=1400")] {
            let to = small.address_of(family);
            let name = family.to_string().to_lowercase();
            assert_eq!(lab.workers[0].path_to(lab.workers[number].name(), &name), path);
            wait::until("the largest packet that fits", || {
                probe::ping(pod.command("ping"), to, 1400 - headers)
            });
            let answer =
                probe::ping(pod.command("ping"), to, 1450 - headers).expect_err("a packet that does not fit");
            assert!(answer.contains(expected), "{family} over {path}, ping says {answer:?}");
        }
    }
}

#[test]
fn packets_to_an_unclaimed_pool_address_are_rejected_by_the_node() {
    let lab = lab("");
    let pod = lab.workers[0].pod("a");
    let answer =
        probe::ping(pod.command("ping"), "10.244.77.77".parse().unwrap(), 56).expect_err("nobody has it");
    assert!(
        answer.contains(&format!("From {}", pod.gateway(pod.v4()))),
        "its own node does not say so: {answer}"
    );
    assert!(answer.contains("Unreachable"), "{answer}");
}

#[test]
fn a_node_sends_no_redirects_to_its_pods() {
    let lab = lab("");
    let worker = &lab.workers[0];
    let (a, b) = (worker.pod("a"), worker.pod("b"));
    for own in a.addresses() {
        let to = b.address_like(own);
        for _ in 0..5 {
            probe::ping(a.command("ping"), to, 56).unwrap();
        }
    }
    // The pod's kernel counts the redirects that it receives.
    let counters = a.run("cat", &["/proc/net/snmp", "/proc/net/snmp6"]);
    let icmp: Vec<Vec<&str>> = counters
        .lines()
        .filter(|line| line.starts_with("Icmp: "))
        .map(|line| line.split_whitespace().collect())
        .collect();
    let column = icmp[0].iter().position(|name| *name == "InRedirects").unwrap();
    assert_eq!(icmp[1][column], "0", "redirects over IPv4");
    let v6 = counters.lines().find(|line| line.starts_with("Icmp6InRedirects")).unwrap();
    assert_eq!(v6.split_whitespace().nth(1), Some("0"), "redirects over IPv6");
}

/// Adds routes to the pod through the first node, on the router.
fn route_back(lab: &Lab, pod: &Pod) {
    for own in pod.addresses() {
        let via = lab.underlay(0, own.is_ipv6()).to_string();
        lab.fabric.node().run("ip", &["route", "add", &own.to_string(), "via", &via]);
    }
}
