//! Services as kube-proxy implements them, with NAT on every node: a pod's packet must pass the node's IP stack once,
//! and the server sees the sender's address.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::net::IpAddr;
use std::path::Path;

use polder_tests::agent::Worker;
use polder_tests::fabric::{Families, address};
use polder_tests::node::within;
use polder_tests::probe::{self, Echo, PORT};
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

/// With `br_netfilter`, rules of the IP stack also process packets on bridges. The settings are 1 in a new network
/// namespace, and Kubernetes installers set them to 1 too.
const BRIDGE_CALLS: [&str; 2] = ["net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"];

fn lab(bootstrap: &str) -> Lab {
    Lab::start(Topology::two_segments().families(Families::DUAL).bootstrap(bootstrap))
}

fn service(v6: bool) -> IpAddr {
    if v6 { "fd00:10:96::1".parse().unwrap() } else { "10.96.0.1".parse().unwrap() }
}

/// Creates the service on that node, and replaces the previous one: one address, one pod behind it. Only packets from a
/// pod to itself are masqueraded.
fn serve(worker: &Worker, pod: &Pod) {
    for own in pod.addresses() {
        let v6 = own.is_ipv6();
        let (table, to) =
            if v6 { ("ip6", format!("[{own}]:{PORT}")) } else { ("ip", format!("{own}:{PORT}")) };
        let dnat = format!("{table} daddr {} tcp dport 80 dnat to {to}", service(v6));
        worker.node.write(
            "/run/service.nft",
            &format!(
                "table {table} nat {{}}\ndelete table {table} nat\ntable {table} nat {{\n\
                 chain prerouting {{\ntype nat hook prerouting priority -100\n{dnat}\n}}\n\
                 chain output {{\ntype nat hook output priority -100\n{dnat}\n}}\n\
                 chain postrouting {{\ntype nat hook postrouting priority 100\n\
                 {table} saddr {own} {table} daddr {own} masquerade\n}}\n}}\n"
            ),
        );
        worker.node.run("nft", &["-f", "/run/service.nft"]);
    }
}

/// Pods behind the service on the same node, on a node on the same link, and on a node behind a router: all are
/// reachable from a pod and from the node, and the first also from itself.
fn assert_services_work(lab: &Lab, round: &str) {
    let worker = &lab.workers[0];
    let client = worker.pod(&format!("client{round}"));
    for (number, place) in ["the same node", "the same link", "behind a router"].iter().enumerate() {
        let server = lab.workers[number].pod(&format!("server{round}"));
        serve(worker, &server);
        for own in server.addresses() {
            let _echo = server.within(|| Echo::start(own));
            let (v6, address) = (own.is_ipv6(), service(own.is_ipv6()));
            let seen = client.within(|| probe::tcp_at(address, 80, 300_000));
            assert_eq!(seen, Ok(client.address_like(own)), "a pod to one on {place}, {round}");
            let seen = worker.node.within(|| probe::tcp_at(address, 80, 300_000));
            assert_eq!(seen, Ok(lab.underlay(0, v6)), "the node to a pod on {place}, {round}");
            if number == 0 {
                let seen = server.within(|| probe::tcp_at(address, 80, 300_000)).expect("a pod to itself");
                let of_node = [server.gateway(own), lab.underlay(0, v6)];
                assert!(of_node.contains(&seen), "a pod sees itself as {seen}, {round}");
            }
        }
        lab.workers[number].delete(&server);
    }
    worker.delete(&client);
}

/// The settings of `br_netfilter`. `None` if this kernel does not have it, with a message that this is not tested.
fn bridge_calls(worker: &Worker) -> Option<[String; 2]> {
    // The settings are per network namespace: read them in the node.
    let read = |setting| worker.node.shell(&format!("sysctl -n {setting}")).trim().to_owned();
    let is_there = worker.node.shell("ls /proc/sys/net").lines().any(|folder| folder == "bridge");
    if !is_there {
        eprintln!("NOT TESTED: this kernel has no br_netfilter, so that it cannot be in the way of services");
    }
    is_there.then(|| BRIDGE_CALLS.map(read))
}

fn switch_on_bridge_calls(worker: &Worker) {
    BRIDGE_CALLS.iter().for_each(|setting| drop(worker.node.run("sysctl", &["-w", &format!("{setting}=1")])));
}

#[test]
fn services_are_reachable_from_pods_and_nodes_with_br_netfilter() {
    let lab = lab("");
    let worker = &lab.workers[0];
    assert_services_work(&lab, "-1");
    if bridge_calls(worker).is_some() {
        switch_on_bridge_calls(worker);
        wait::until("br_netfilter to be switched off", || match bridge_calls(worker) {
            Some(found) if found == ["0", "0"] => Ok(()),
            found => Err(format!("{found:?}")),
        });
        assert_services_work(&lab, "-2");
    }
}

/// A bridge of other software with two containers, as the plugin `bridge` creates it.
fn other_bridge(worker: &Worker) {
    worker.node.shell(
        "sysctl -w net.ipv4.ip_forward=1; ip link add other0 type bridge; ip address add 10.9.0.1/24 dev other0; \
         ip -6 address add fd00:9::1/64 dev other0 nodad; ip link set other0 up; \
         for c in 2 3; do ip netns add c$c; ip link add o$c type veth peer name eth0 netns c$c; \
         ip link set o$c master other0 up; ip -n c$c link set eth0 up; ip -n c$c link set lo up; \
         ip -n c$c address add 10.9.0.$c/24 dev eth0; ip -n c$c address add fd00:9::$c/64 dev eth0 nodad; \
         ip -n c$c route add default via 10.9.0.1; ip -n c$c -6 route add default via fd00:9::1; done",
    );
}

/// Whether one container of the other bridge reaches the other one through a service, in each family.
fn others_reach_a_service(worker: &Worker) -> [bool; 2] {
    let container = |name: &str| worker.node.path_on_host(&Path::new("/run/netns").join(name));
    ["10.9.0.3", "fd00:9::3"].map(|server| {
        let server: IpAddr = server.parse().unwrap();
        let v6 = server.is_ipv6();
        let (table, to) =
            if v6 { ("ip6", format!("[{server}]:{PORT}")) } else { ("ip", format!("{server}:{PORT}")) };
        worker.node.shell(&format!(
            "nft 'add table {table} other; flush table {table} other; \
             add chain {table} other c {{ type nat hook prerouting priority -100; }}; \
             add rule {table} other c {table} daddr {} tcp dport 80 dnat to {to}'",
            service(v6)
        ));
        let _echo = within(&container("c3"), || Echo::start(server));
        within(&container("c2"), || probe::tcp_at(service(v6), 80, 100_000)).is_ok()
    })
}

#[test]
fn another_bridge_whose_services_need_br_netfilter_is_reported_with_a_working_command() {
    let mut lab = Lab::build(Topology::one_segment(1).families(Families::DUAL));
    let worker = &lab.workers[0];
    if bridge_calls(worker).is_none() {
        return;
    }
    worker.configure_also("resync_seconds = 1");
    switch_on_bridge_calls(worker);
    other_bridge(worker);
    assert_eq!(others_reach_a_service(worker), [true, true], "before the agent");
    lab.start_agents();
    let worker = &lab.workers[0];
    let words = "between the ports of bridge other0";
    let problem = worker.wait_for_status("the problem of the other bridge", |status| {
        let mut problems = status["problems"].as_array()?.iter().filter_map(Value::as_str);
        problems.find(|text| text.contains(words)).map(str::to_owned)
    });
    assert_eq!(others_reach_a_service(worker), [false, false], "{problem}");
    worker.node.shell(problem.split('`').nth(1).unwrap());
    assert_eq!(others_reach_a_service(worker), [true, true], "{problem}");
    worker.wait_for_status("no problem", |status| status["problems"].as_array()?.is_empty().then_some(()));
    assert_eq!(bridge_calls(worker).unwrap(), ["0", "0"]);
}

#[test]
fn without_a_bridge_br_netfilter_is_left_alone_and_services_work() {
    let lab = lab("attach = \"routed\"");
    let worker = &lab.workers[0];
    let is_there = bridge_calls(worker).is_some();
    if is_there {
        switch_on_bridge_calls(worker);
    }
    assert_services_work(&lab, "-routed");
    if is_there {
        assert_eq!(bridge_calls(worker).unwrap(), ["1", "1"]);
    }
}

#[test]
fn a_node_with_other_addresses_reaches_tunnelled_pods_through_services() {
    let lab = lab("");
    let (worker, server) = (&lab.workers[0], lab.workers[2].pod("server"));
    let gateway = |own: IpAddr| worker.pod(&format!("client{}", own.is_ipv6())).gateway(own);
    serve(worker, &server);
    for (own, v6) in [("192.0.2.9", false), ("2001:db8:9::9", true)] {
        let router = address(1, 254, v6);
        worker.node.shell(&format!(
            "ip address add {own} dev lo nodad; ip route replace default via {router} dev eth0 src {own}"
        ));
    }
    // Traffic from outside gets an address of the node, as kube-proxy does it for node ports.
    worker.node.shell(
        "nft 'add table inet nodeport; add chain inet nodeport c { type nat hook postrouting priority 100; }; \
         add rule inet nodeport c iifname eth0 ct status dnat masquerade'",
    );
    let world = lab.world.as_ref().unwrap();
    for own in server.addresses() {
        let (v6, service, gateway) = (own.is_ipv6(), service(own.is_ipv6()), gateway(own));
        let _echo = server.within(|| Echo::start(own));
        let seen = worker.node.within(|| probe::tcp_at(service, 80, 300_000));
        assert_eq!(seen, Ok(gateway), "the node itself");
        let family = if v6 { "-6" } else { "-4" };
        let node = lab.underlay(0, v6).to_string();
        lab.fabric.node().run("ip", &[family, "route", "add", &service.to_string(), "via", &node]);
        let seen = world.within(|| probe::tcp_at(service, 80, 300_000));
        assert_eq!(seen, Ok(gateway), "from outside");
    }
}
