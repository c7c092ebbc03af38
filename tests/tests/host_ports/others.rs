//! Host ports beside the rules of kube-proxy.

use std::net::IpAddr;

use polder_tests::agent::Worker;
use polder_tests::probe::{self, PORT};
use polder_tests::{Node, Pod, wait};

use super::site::{
    BOTH, HOST_PORT, assert_all, assert_reached, is_refused, node_address, of_node, one_node, outsider,
    pod_with, seen_through, serve, with_both_attachments,
};

/// The port of a service at all nodes.
const NODE_PORT: u16 = 30080;

/// The chains of kube-proxy in iptables mode, with one service with a node port. `PREFIX` is 32 or 128.
const IPTABLES: &str = "\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-EXT-A - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport NODE_PORT -j KUBE-EXT-A
-A KUBE-EXT-A -j KUBE-MARK-MASQ
-A KUBE-EXT-A -j KUBE-SVC-A
-A KUBE-SVC-A -j KUBE-SEP-A
-A KUBE-SEP-A -s ADDRESS/PREFIX -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination BACKEND
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

/// The table of kube-proxy in nftables mode, with the same service. `FAMILY` is ip or ip6.
const NFTABLES: &str = "\
table FAMILY kube-proxy {
    map service-nodeports {
        type inet_proto . inet_service : verdict
        elements = { tcp . NODE_PORT : goto external-a }
    }
    set nodeport-ips {
        type TYPE
        elements = { NODE }
    }
    chain nat-prerouting {
        type nat hook prerouting priority -100
        jump services
    }
    chain nat-output {
        type nat hook output priority -100
        jump services
    }
    chain nat-postrouting {
        type nat hook postrouting priority 100
        jump masquerading
    }
    chain filter-forward {
        type filter hook forward priority -110
        ct state invalid drop
    }
    chain services {
        FAMILY daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }
    chain masquerading {
        meta mark & 0x4000 == 0 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random
    }
    chain mark-for-masquerade {
        meta mark set meta mark | 0x4000
    }
    chain external-a {
        jump mark-for-masquerade
        goto service-a
    }
    chain service-a {
        FAMILY saddr ADDRESS jump mark-for-masquerade
        meta l4proto tcp dnat to BACKEND
    }
}
";

/// Installs the rules, once for each family, with the backend as the only one of the service.
fn install(worker: &Worker, mode: &str, backend: &Pod) {
    for own in backend.addresses() {
        let v6 = own.is_ipv6();
        let to = std::net::SocketAddr::new(own, PORT).to_string();
        let rules = if mode == "iptables" { IPTABLES } else { NFTABLES };
        let rules = rules
            .replace("NODE_PORT", &NODE_PORT.to_string())
            .replace("NODE", &node_address(v6).to_string())
            .replace("ADDRESS", &own.to_string())
            .replace("BACKEND", &to)
            .replace("PREFIX", if v6 { "128" } else { "32" })
            .replace("FAMILY", if v6 { "ip6" } else { "ip" })
            .replace("TYPE", if v6 { "ipv6_addr" } else { "ipv4_addr" });
        worker.node.write("/run/kube-proxy.rules", &rules);
        worker.node.shell(match (mode, v6) {
            ("iptables", false) => "iptables-nft-restore < /run/kube-proxy.rules",
            ("iptables", true) => "ip6tables-nft-restore < /run/kube-proxy.rules",
            _ => "nft -f /run/kube-proxy.rules",
        });
    }
}

/// The source address that the backend of the service sees, by the node port.
fn through_node_port(client: &Node, to: IpAddr) -> Result<IpAddr, String> {
    client.within(|| probe::tcp_at(to, NODE_PORT, 100_000))
}

fn assert_works_beside(mode: &str, bootstrap: &str) {
    let lab = one_node(bootstrap);
    let (worker, host) = (&lab.workers[0], outsider(&lab));
    let (server, backend, client) =
        (pod_with(worker, "server", &BOTH), worker.pod("backend"), worker.pod("client"));
    // The node port is a host port, too. This pod has no server: kube-proxy precedes.
    pod_with(worker, "loser", &["30080:80/tcp"]);
    let _echo = [serve(&server), serve(&backend)];
    // Once with the rules of kube-proxy made last, and once with those of Polder: the order of chains with the same
    // priority depends on it.
    for round in ["kube-proxy", "Polder"] {
        if round == "kube-proxy" {
            install(worker, mode, &backend);
        } else {
            worker.node.run("nft", &["delete", "table", "inet", "polder"]);
            wait::until("the host port to be back", || host.within(|| seen_through(node_address(true))));
        }
        assert_reached(host, &format!("beside {mode}, {round} was last"));
        let mut outcomes = Vec::new();
        for own in server.addresses() {
            let v6 = own.is_ipv6();
            let (node, gateway) = (node_address(v6), server.gateway(own));
            for (who, seen, expected) in [
                ("the node", worker.node.within(|| seen_through(node)), node),
                ("a pod", client.within(|| seen_through(node)), client.address_like(own)),
                ("the pod itself", of_node(server.within(|| seen_through(node)), gateway), gateway),
            ] {
                outcomes.push((format!("{who} to {node}:{HOST_PORT}"), seen, Ok(expected)));
            }
            // kube-proxy masquerades what comes through a node port.
            let what = format!("outside to {node}:{NODE_PORT}");
            outcomes.push((what, of_node(through_node_port(host, node), gateway), Ok(gateway)));
        }
        assert_all(outcomes);
    }
}

#[test]
fn host_ports_and_node_ports_work_beside_kube_proxy_in_iptables_mode() {
    with_both_attachments(|bootstrap| assert_works_beside("iptables", bootstrap));
}

#[test]
fn host_ports_and_node_ports_work_beside_kube_proxy_in_nftables_mode() {
    with_both_attachments(|bootstrap| assert_works_beside("nftables", bootstrap));
}

#[test]
fn service_addresses_on_interfaces_of_the_node_have_no_host_ports() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let (server, client) = (pod_with(worker, "server", &BOTH), worker.pod("client"));
        let _echo = serve(&server);
        // Bridges without ports: not every kernel has dummy interfaces.
        let services = ["10.96.0.10", "169.254.20.10", "fd00:10:96::a"];
        worker.node.shell(&format!(
            "for name in kube-ipvs0 nodelocaldns; do ip link add $name type bridge; ip link set $name up; done
             ip address add {}/32 dev kube-ipvs0; ip address add {}/32 dev nodelocaldns
             ip address add {}/128 dev kube-ipvs0 nodad",
            services[0], services[1], services[2]
        ));
        // When the agent has seen these, it has seen the others, too.
        let later = [IpAddr::from([10, 10, 1, 101]), IpAddr::from([0xfd10, 1, 0, 0, 0, 0, 0, 0x101])];
        worker.node.shell(&format!(
            "ip address add {}/24 dev eth0; ip address add {}/64 dev eth0 nodad",
            later[0], later[1]
        ));
        for to in later {
            wait::until(&format!("the host port to be at {to}"), || host.within(|| seen_through(to)));
        }
        for to in services.map(|text| text.parse::<IpAddr>().unwrap()) {
            for (who, seen) in [
                ("a pod", client.within(|| probe::tcp_at(to, HOST_PORT, 10))),
                ("the node", worker.node.within(|| probe::tcp_at(to, HOST_PORT, 10))),
            ] {
                assert!(is_refused(&seen), "{who} to {to}: {seen:?}");
            }
        }
    });
}
