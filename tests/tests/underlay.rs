//! Underlays that are not a plain Ethernet with permanent addresses.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::lab::{POOL4, POOL6};
use polder_tests::matrix::{assert_flat, assert_flat_over};
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

/// The node's addresses on the underlay.
fn underlay(worker: &Worker) -> Vec<String> {
    let status = worker.status();
    let all = status["underlay"].as_array().unwrap();
    all.iter().map(|uplink| uplink["address"].as_str().unwrap().to_owned()).collect()
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn pods(lab: &Lab) -> Vec<Pod> {
    lab.workers.iter().map(|worker| worker.pod("a")).collect()
}

#[test]
fn auto_uses_the_tunnel_on_a_link_without_link_layer_addresses() {
    let mut lab = Lab::build(Topology::one_segment(2));
    // Like a user-space mesh: packets without a link-layer header, in UDP.
    let mut mesh = Vec::new();
    for (number, other) in [(0, 1), (1, 0)] {
        let (own, remote) = (lab.underlay(number, false), lab.underlay(other, false));
        let worker = &lab.workers[number];
        let mut socat = worker.node.command("socat");
        socat.arg(format!("UDP4-DATAGRAM:{remote}:9999,bind={own}:9999"));
        socat.arg(format!("TUN:100.64.0.{}/24,tun-name=mesh0,iff-up", number + 1));
        mesh.push(worker.node.spawn(&mut socat, "mesh.log"));
        wait::until_true("the mesh's interface", || {
            worker.node.shell("ip link set mesh0 mtu 1400 2>&1 || true").is_empty()
        });
        worker.configure(&format!("{}\n[underlay]\ninterface = \"mesh0\"\n", worker.configuration()));
    }
    lab.start_agents();
    assert_eq!(underlay(&lab.workers[0]), ["100.64.0.1"]);
    for (worker, other) in [(0, "n2"), (1, "n1")] {
        assert_eq!(lab.workers[worker].path_to(other, "ipv4"), "vxlan");
    }
    assert_flat(&pods(&lab), 1350);
    // The backend `direct` uses direct routes on this link, too.
    lab.workers[0].ctl(&["cluster", "set", "--backend", "direct"]);
    wait::until_true("a direct path", || lab.workers[0].path_to("n2", "ipv4") == "direct");
}

#[test]
fn auto_uses_the_tunnel_while_the_network_drops_pod_addresses() {
    let mut lab = Lab::build(Topology::one_segment(3).families(Families::DUAL));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.fabric.drop_sources(&lab.workers[0].node, 1, &[POOL4, POOL6]);
    lab.start_agents();
    let paths = |worker: &Worker| {
        let others = ["n1", "n2", "n3"].into_iter().filter(|other| worker.node.name() != *other);
        let paths = others.flat_map(|other| {
            ["ipv4", "ipv6"].map(|family| format!("{other} {}", worker.path_to(other, family)))
        });
        paths.collect::<Vec<_>>()
    };
    let tunnels = ["n2 vxlan", "n2 vxlan", "n3 vxlan", "n3 vxlan"];
    wait::until_true("tunnels from n1", || paths(&lab.workers[0]) == tunnels);
    let all = pods(&lab);
    assert_flat_over(Families::DUAL, &all, 1450);
    let named = |worker: &Worker| {
        let problems = texts(&worker.status()["problems"]);
        problems
            .into_iter()
            .filter(|problem| problem.contains("packets with pods' addresses are dropped"))
            .collect::<Vec<_>>()
    };
    assert!(
        matches!(&named(&lab.workers[0])[..], [one] if one.contains("n2, n3")),
        "{:?}",
        named(&lab.workers[0])
    );
    // Only packets sent by n1 are dropped: n2 and n3 use direct paths to each other.
    assert_eq!(paths(&lab.workers[1])[2..], ["n3 direct", "n3 direct"]);
    // Probes of the direct path keep their source address, although pod packets to the underlay address of a peer
    // behind a tunnel are masqueraded.
    let (own, other) = (all[0].gateway(all[0].v4()), lab.underlay(1, false));
    let test = format!("ping -c 2 -i 0.2 -W 1 -I {own} {other} >/dev/null && echo answered || echo lost");
    assert_eq!(lab.workers[0].node.shell(&test).trim(), "lost");
    // A restarted agent does not use the direct paths for pod packets again.
    lab.workers[0].kill();
    lab.workers[0].start();
    wait::until_true("the first pass", || {
        !lab.workers[0].try_status().unwrap_or_default()["last_pass"].is_null()
    });
    assert_eq!(paths(&lab.workers[0]), tunnels);
    lab.fabric.carry_sources(&lab.workers[0].node);
    wait::within(TIMEOUT * 3, "direct paths from n1", || match paths(&lab.workers[0]) {
        paths if paths.iter().all(|path| path.ends_with("direct")) => Ok(()),
        paths => Err(paths.join(", ")),
    });
    assert_flat_over(Families::DUAL, &all, 1450);
    assert_eq!(named(&lab.workers[0]), Vec::<String>::new());
}

#[test]
fn a_node_with_a_dead_nodes_address_serves_after_that_nodes_lease_expired() {
    let mut lab = Lab::build(Topology::one_segment(3));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let (first, second) = (lab.underlay(0, false), lab.underlay(1, false));
    lab.workers[0].kill();
    lab.workers[1].kill();
    lab.workers[1].node.shell("ip link set eth0 down");
    // Sends an ARP announcement, as DHCP clients do and `ip` does not. Without it, the other nodes send packets for
    // this node to the dead node's MAC address until their kernels remove the neighbour entry.
    lab.workers[0].node.shell(&format!(
        "echo 1 >/proc/sys/net/ipv4/conf/eth0/arp_notify; ip address delete {first}/24 dev eth0; \
         ip address add {second}/24 dev eth0; ip link set eth0 down; ip link set eth0 up"
    ));
    lab.workers[0].start();
    // Each wait can last until the lease has expired and has been missing long enough to treat the agent as dead.
    let max_wait = TIMEOUT * 3;
    wait::within(max_wait, "the node to be ready", || {
        let status = lab.workers[0].try_status()?;
        if status["ready"] == true { Ok(()) } else { Err(status["reasons"].to_string()) }
    });
    assert_eq!(underlay(&lab.workers[0]), [second.to_string()]);
    let third = &lab.workers[2];
    wait::within(max_wait, "n3 to reach the node that is alive", || {
        let nodes = third.ctl(&["node", "list"]);
        let node = nodes.as_array().unwrap().iter().find(|node| node["name"] == "n1").unwrap();
        let path = &node["paths"][0];
        if path["probe"] == "answers" { Ok(()) } else { Err(path.to_string()) }
    });
    assert_flat(&[lab.workers[0].pod("a"), third.pod("a")], 1450);
}

#[test]
fn a_node_keeps_its_recorded_address_although_the_kernel_prefers_a_virtual_one() {
    let mut lab = Lab::build(Topology::one_segment(2).families(Families::V6));
    let (own, vip) = (lab.underlay(0, true), "fd10:1::50");
    lab.workers[0].node.shell(&format!("ip address add {vip}/128 dev eth0 nodad"));
    lab.start_agents();
    assert_eq!(underlay(&lab.workers[0]), [own.to_string()]);
    // The virtual address moves to the other node, and the agent there is restarted.
    lab.workers[0].node.shell(&format!("ip address delete {vip}/128 dev eth0"));
    lab.workers[1].node.shell(&format!("ip address add {vip}/128 dev eth0 nodad"));
    lab.workers[1].kill();
    lab.workers[1].start_and_wait();
    assert_eq!(underlay(&lab.workers[1]), [lab.underlay(1, true).to_string()]);
    assert_flat_over(Families::V6, &pods(&lab), 1430);
}

#[test]
fn pods_have_ipv6_although_the_underlay_mtu_is_too_small_for_tunnels_with_it() {
    let topology = Topology { mtu: 1280, ..Topology::one_segment(2) };
    let lab = Lab::start(topology.families(Families::DUAL).bootstrap("backend = \"direct\""));
    assert_flat_over(Families::DUAL, &pods(&lab), 1280);
    for worker in &lab.workers {
        assert_eq!(texts(&worker.status()["problems"]), Vec::<String>::new());
    }
}

#[test]
fn a_single_node_needs_no_network() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.etcd.kill();
    let worker = &mut lab.workers[0];
    worker.node.shell("ip link delete eth0");
    worker.configure(
        "store = \"embedded\"\ncni_conf_dir = \"/run/cni/net.d\"\n\
         [bootstrap]\npools = [\"10.244.0.0/24\", \"fd00:244::/112\"]\n",
    );
    worker.start_and_wait();
    assert_flat_over(Families::DUAL, &[worker.pod("a"), worker.pod("b")], 1500);
}

#[test]
fn local_state_is_repaired_while_the_node_has_no_network() {
    let mut lab = Lab::build(Topology::one_segment(2));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let worker = &lab.workers[0];
    let pods = [worker.pod("a"), worker.pod("b")];
    let address = lab.underlay(0, false);
    worker.node.shell(&format!("ip address delete {address}/24 dev eth0"));
    worker.wait_for_status("no address on the underlay", |status| {
        status["reasons"].to_string().contains("cannot determine the underlay address").then_some(())
    });
    let gateway = pods[0].gateway(pods[0].v4());
    worker.node.shell(&format!("ip address delete {gateway}/32 dev polder0"));
    wait::until_true("the gateway to be back", || {
        worker.node.run("ip", &["address", "show", "dev", "polder0"]).contains(&format!("{gateway}/32"))
    });
    assert_flat(&pods, 1450);
    worker.node.shell(&format!("ip address add {address}/24 dev eth0"));
    worker.wait_until_ready();
    assert_flat(&[pods[0].clone(), lab.workers[1].pod("c")], 1450);
}

#[test]
fn an_agent_drops_connections_from_a_deleted_address_at_once() {
    let lab = Lab::start(Topology::two_segments());
    let worker = &lab.workers[1];
    let all = pods(&lab);
    let (old, new) = (lab.underlay(1, false), "10.10.1.77");
    worker.node.shell(&format!(
        "sysctl -qw net.ipv4.conf.all.promote_secondaries=1; ip address add {new}/24 dev eth0; \
         ip address delete {old}/24 dev eth0; ip route replace default via 10.10.1.254"
    ));
    wait::until_true("the record to have the new address", || {
        lab.etcd.ctl(&["get", "--print-value-only", "/polder/v1/nodes/n2"]).contains(new)
    });
    let log = worker.log();
    assert!(log.contains("an address of this node was removed"), "{log}");
    assert!(!log.contains("no watch messages for"), "it waited for a connection that carries nothing: {log}");
    assert_flat(&all, 1450);
}

#[test]
fn a_conflicting_foreign_tunnel_is_reported_and_no_repair_is_counted() {
    let mut lab = Lab::build(Topology::two_segments());
    lab.workers[0]
        .node
        .shell("ip link add flannel.1 type vxlan id 1 dstport 8472 local 10.10.1.1 nolearning");
    lab.workers[0].start();
    let worker = &lab.workers[0];
    let reasons = worker.wait_for_status("the device that is in the way", |status| {
        let reasons = texts(&status["reasons"]);
        reasons.iter().any(|reason| reason.contains("flannel.1")).then_some(reasons)
    });
    let reason = reasons.iter().find(|reason| reason.contains("flannel.1")).unwrap();
    assert!(reason.contains("ip link delete flannel.1") && reason.contains("cluster set"), "{reason}");
    assert_eq!(reasons.iter().filter(|reason| reason.contains("polder.vx")).count(), 1, "{reasons:#?}");
    assert_eq!(worker.status()["repair_count"], 0);
    worker.node.shell("ip link delete flannel.1");
    worker.wait_until_ready();
}
