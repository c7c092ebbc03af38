//! Host ports: ports of the node that lead to ports of a pod, as a runtime requests them in the CNI capability
//! `portMappings`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod host_ports {
    mod changes;
    mod others;
    pub(crate) mod site;
}

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};
use std::time::Duration;

use polder_api::Mac;
use polder_tests::agent::{CNI_CONF, Worker};
use polder_tests::cni::{code, message};
use polder_tests::fabric::Families;
use polder_tests::frame::{self, Capture, FrameSender, Mark, Sctp};
use polder_tests::probe::{self, PORT, ask, asker};
use polder_tests::traces::traces;
use polder_tests::{Lab, Node, Pod, Topology, wait};
use serde_json::{Value, json};

use host_ports::site::{
    BOTH, HOST_PORT, LOCALHOST, Spelling, assert_all, assert_reached, conf_spelled, conf_with, is_refused,
    node_address, of_node, one_node, outside_address, outsider, pod_with, port_at, seen_through, serve,
    wait_until_refused, with_both_attachments,
};

/// Asks the pod behind a host port of the first node from all places, and compares the address that it sees.
/// `masquerades`: whether packets of pods to nodes behind a router are masqueraded.
fn assert_reached_from_everywhere(bootstrap: &str, masquerades: bool) {
    let lab = Lab::start(Topology::two_segments().families(Families::DUAL).bootstrap(bootstrap));
    let [n1, n2, n3] = &lab.workers[..] else { panic!("three nodes") };
    let world = lab.world.as_ref().unwrap();
    // Without that, a runtime does not pass the ports.
    let conflist: Value = serde_json::from_str(&n1.node.read(CNI_CONF).unwrap()).unwrap();
    assert_eq!(conflist["plugins"][0]["capabilities"]["portMappings"], true, "{conflist}");
    let server = pod_with(n1, "server", &BOTH);
    let (beside, near, far) = (n1.pod("beside"), n2.pod("near"), n3.pod("far"));
    let _echo = serve(&server);
    let mut outcomes = Vec::new();
    for own in server.addresses() {
        let v6 = own.is_ipv6();
        let (node, gateway) = (lab.underlay(0, v6), server.gateway(own));
        let hosts: [(&str, &Node, IpAddr, IpAddr); 5] = [
            ("a host outside the cluster", world, node, Lab::world_address(v6)),
            ("a node on the link", &n2.node, node, lab.underlay(1, v6)),
            ("a node behind a router", &n3.node, node, lab.underlay(2, v6)),
            ("the node, by its own address", &n1.node, node, node),
            ("the node, by the gateway address", &n1.node, gateway, gateway),
        ];
        outcomes.extend(hosts.map(|(who, host, to, expected)| {
            (format!("{who} to {to}"), host.within(|| seen_through(to)), Ok(expected))
        }));
        // The underlay has no routes to pods behind a router.
        let of_far = if masquerades { lab.underlay(2, v6) } else { far.address_like(own) };
        let pods: [(&str, &Pod, IpAddr, IpAddr); 6] = [
            ("a pod on the node", &beside, node, beside.address_like(own)),
            ("a pod on the node", &beside, gateway, beside.address_like(own)),
            ("a pod on the link", &near, node, near.address_like(own)),
            ("a pod on the link", &near, gateway, near.address_like(own)),
            ("a pod behind a router", &far, node, of_far),
            ("a pod behind a router", &far, gateway, far.address_like(own)),
        ];
        outcomes.extend(pods.map(|(who, pod, to, expected)| {
            (format!("{who} to {to}"), pod.within(|| seen_through(to)), Ok(expected))
        }));
        outcomes.extend([node, gateway].map(|to| {
            let seen = of_node(server.within(|| seen_through(to)), gateway);
            (format!("the pod itself to {to}"), seen, Ok(gateway))
        }));
    }
    let gateway = server.gateway(server.v4());
    let seen = of_node(n1.node.within(|| seen_through(LOCALHOST)), gateway);
    outcomes.push(("the node to 127.0.0.1".to_owned(), seen, Ok(gateway)));
    assert_all(outcomes);
    // The kernel does not forward packets from these addresses: a translation would end in a time-out.
    let seen = n1.node.within(|| probe::tcp_at(Ipv6Addr::LOCALHOST.into(), HOST_PORT, 10));
    assert!(is_refused(&seen), "the node to [::1]: {seen:?}");
    let seen = n2.node.within(|| connect_link_local(n1, n2));
    assert!(seen.as_ref().is_err_and(|error| error.contains("refused")), "by link-local address: {seen:?}");
    assert_eq!(n1.status()["problems"], json!([]));
}

/// Connects from a node to the host port at the link-local address of another one.
fn connect_link_local(to: &Worker, from: &Worker) -> Result<(), String> {
    let listed = to.node.run("ip", &["-6", "-o", "address", "show", "dev", "eth0", "scope", "link"]);
    let address = listed.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
    let index = from.node.shell("cat /sys/class/net/eth0/ifindex").trim().parse().unwrap();
    let place = SocketAddrV6::new(address.parse().unwrap(), HOST_PORT, 0, index);
    let outcome = TcpStream::connect_timeout(&place.into(), wait::scaled(Duration::from_secs(3)));
    outcome.map(drop).map_err(|error| error.to_string())
}

#[test]
fn a_host_port_is_reached_from_everywhere_and_the_pod_sees_the_client_with_bridge() {
    assert_reached_from_everywhere("attach = \"bridge\"", true);
}

#[test]
fn a_host_port_is_reached_from_everywhere_and_the_pod_sees_the_client_with_routed() {
    assert_reached_from_everywhere("attach = \"routed\"", true);
}

#[test]
fn a_host_port_is_reached_from_everywhere_without_masquerading() {
    assert_reached_from_everywhere("masquerade = false", false);
}

fn json_of(node: &Node, arguments: &[&str]) -> Value {
    serde_json::from_str(&node.run("ip", &[&["-j"], arguments].concat())).unwrap()
}

/// The MAC address of the node's uplink.
fn uplink_mac(node: &Node) -> Mac {
    json_of(node, &["link", "show", "dev", "eth0"])[0]["address"].as_str().unwrap().parse().unwrap()
}

/// The MAC addresses of the pod's `eth0` and of its gateway.
fn macs(pod: &Pod) -> (Mac, Mac) {
    let read = |arguments: &[&str], key: &str| -> Mac {
        let found: Value = serde_json::from_str(&pod.run("ip", arguments)).unwrap();
        found[0][key].as_str().unwrap().parse().unwrap()
    };
    let gateway = pod.gateway(pod.v4()).to_string();
    (
        read(&["-j", "link", "show", "dev", "eth0"], "address"),
        read(&["-j", "neigh", "show", &gateway], "lladdr"),
    )
}

#[test]
fn sctp_packets_reach_the_pod_at_its_port_and_replies_come_from_the_host_port() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let server = pod_with(worker, "server", &["8080:7007/sctp"]);
        let ((own_mac, gateway_mac), node_mac, host_mac) =
            (macs(&server), uplink_mac(&worker.node), uplink_mac(host));
        for own in server.addresses() {
            let v6 = own.is_ipv6();
            let [client, node, pod] =
                [(outside_address(v6), 5000), (node_address(v6), HOST_PORT), (own, PORT)]
                    .map(SocketAddr::from);
            let (mut in_pod, mut at_host) = (server.within(Capture::open), host.within(Capture::open));
            let (init, reply) = (Mark::new(), Mark::new());
            let packet = frame::sctp(Sctp::Init, client, node, init);
            let sender = host.within(|| FrameSender::towards(node.ip()));
            sender.send(&frame::ip_frame(node_mac, host_mac, &packet));
            in_pod.wait_for_any(&format!("an INIT from {client} at {pod}"), |frame| {
                Mark::find(frame) == Some(init) && frame::sctp_ends(frame) == Some((client, pod))
            });
            let packet = frame::sctp(Sctp::InitAck, pod, client, reply);
            let sender = server.within(|| FrameSender::towards(server.gateway(own)));
            sender.send(&frame::ip_frame(gateway_mac, own_mac, &packet));
            at_host.wait_for_any(&format!("an INIT ACK from {node} at {client}"), |frame| {
                Mark::find(frame) == Some(reply) && frame::sctp_ends(frame) == Some((node, client))
            });
        }
    });
}

#[test]
fn a_host_port_with_a_host_address_is_at_that_address_only() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let [first, second] = [[1, 1], [101, 0x101]].map(|hosts| {
            let v4 = IpAddr::from([10, 10, 1, u8::try_from(hosts[0]).unwrap()]);
            [v4, IpAddr::from([0xfd10, 1, 0, 0, 0, 0, 0, hosts[1]])]
        });
        let ports_at = |addresses: [IpAddr; 2]| {
            let of = |address| ["tcp", "udp"].map(|protocol| port_at(address, HOST_PORT, protocol));
            addresses.map(of).concat()
        };
        let pod_at = |name: &str, addresses: [IpAddr; 2]| {
            let ports = ports_at(addresses);
            pod_with(worker, name, &ports.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let assert_at = |what: &str, reached: [IpAddr; 2], refused: [IpAddr; 2]| {
            for (to, other) in reached.into_iter().zip(refused) {
                for (who, client, expected) in
                    [("outside", host, outside_address(to.is_ipv6())), ("the node", &worker.node, to)]
                {
                    let seen = wait::until(&format!("{what}: {who} to reach the pod at {to}"), || {
                        client.within(|| seen_through(to))
                    });
                    // The node itself may use another address of its own.
                    let is_expected = seen == expected || (who == "the node" && first.contains(&seen));
                    assert!(is_expected, "{what}: {who} to {to} is seen as {seen}");
                    let seen = client.within(|| probe::tcp_at(other, HOST_PORT, 10));
                    assert!(is_refused(&seen), "{what}: {who} to {other}: {seen:?}");
                }
            }
        };
        let a = pod_at("a", second);
        let echo = serve(&a);
        // It is no address of the node yet.
        worker.node.shell(&format!("ip address add {}/24 dev eth0", second[0]));
        worker.node.shell(&format!("ip address add {}/64 dev eth0 nodad", second[1]));
        assert_at("one pod", second, first);
        // Only one of the two has a server at a time, so that the answers are its own.
        let b = pod_at("b", first);
        assert_at("the first of two pods", second, first);
        drop(echo);
        let echo = serve(&b);
        assert_at("the second of two pods", first, second);
        drop(echo);
        worker.delete(&a);
        worker.delete(&b);
        // All addresses of one family.
        let c = pod_with(worker, "c", &["0.0.0.0:8080:7007/tcp", "[::]:8081:7007/tcp"]);
        let _echo = serve(&c);
        for [v4, v6] in [first, second] {
            let connect = |to, port| host.within(|| probe::tcp_at(to, port, 10));
            assert_eq!(connect(v4, HOST_PORT), Ok(outside_address(false)));
            assert_eq!(connect(v6, HOST_PORT + 1), Ok(outside_address(true)));
            assert!(is_refused(&connect(v6, HOST_PORT)) && is_refused(&connect(v4, HOST_PORT + 1)));
        }
        // Only for the node itself.
        let d = pod_with(worker, "d", &["127.0.0.1:8082:7007/tcp"]);
        let _echo = serve(&d);
        let connect = |client: &Node, to| client.within(|| probe::tcp_at(to, 8082, 10));
        let gateway = d.gateway(d.v4());
        assert_eq!(of_node(connect(&worker.node, LOCALHOST), gateway), Ok(gateway));
        for client in [&worker.node, host] {
            let seen = connect(client, first[0]);
            assert!(is_refused(&seen), "{} to {}: {seen:?}", client.name(), first[0]);
        }
    });
}

#[test]
fn packets_to_the_same_port_of_other_hosts_are_not_translated() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let client = worker.pod("client");
        // The pods with the ports have no server: a translated packet would be refused.
        let at_host = [false, true]
            .map(|v6| ["tcp", "udp"].map(|protocol| port_at(outside_address(v6), PORT, protocol)))
            .concat();
        let at_host: Vec<&str> = at_host.iter().map(String::as_str).collect();
        for (what, ports) in
            [("the address of another host", &at_host[..]), ("all", &["7007:80/tcp", "7007:80/udp"])]
        {
            let holder = pod_with(worker, "holder", ports);
            for v6 in [false, true] {
                let to = outside_address(v6);
                let _echo = host.within(|| probe::Echo::start(to));
                let outcomes = [("a pod", None), ("the node", Some(&worker.node))].map(|(who, node)| {
                    let job = || (probe::tcp(to, 1000), ask(&asker(SocketAddr::new(to, PORT))));
                    let seen = node.map_or_else(|| client.within(job), |node| node.within(job));
                    // The pod's packets to hosts that are no nodes are masqueraded.
                    let expected = node_address(v6);
                    (format!("{who} to {to}, host port at {what}"), seen, (Ok(expected), Ok(expected)))
                });
                assert_all(outcomes.into());
            }
            worker.delete(&holder);
        }
    });
}

#[test]
fn packets_from_outside_to_localhost_reach_neither_the_pod_nor_the_host() {
    /// The port of a server on the node itself.
    const OWN: u16 = 8473;
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let (worker, host) = (&lab.workers[0], outsider(&lab));
        let (server, beside) = (pod_with(worker, "server", &BOTH), worker.pod("beside"));
        let _echo = serve(&server);
        assert!(worker.node.within(|| seen_through(LOCALHOST)).is_ok(), "the node uses its 127.0.0.1");
        let node = lab.underlay(0, false);
        let listen = |address: IpAddr| {
            let socket = worker.node.within(|| std::net::UdpSocket::bind((address, OWN))).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let [at_localhost, at_node] = [LOCALHOST, node].map(listen);
        let received = |socket: &std::net::UdpSocket| {
            let mut buffer = [0; 2048];
            std::iter::from_fn(move || {
                let length = socket.recv(&mut buffer).ok()?;
                Some(Mark::find(&buffer[..length]))
            })
            .flatten()
            .collect::<Vec<_>>()
        };
        let mut in_server = server.within(Capture::open);
        let ((pod_mac, gateway_mac), node_mac, host_mac) =
            (macs(&beside), uplink_mac(&worker.node), uplink_mac(host));
        let senders = [
            (
                "a pod",
                beside.within(|| FrameSender::towards(beside.gateway(beside.v4()))),
                beside.v4(),
                gateway_mac,
                pod_mac,
            ),
            (
                "outside",
                host.within(|| FrameSender::towards(node)),
                outside_address(false),
                node_mac,
                host_mac,
            ),
        ];
        for (who, sender, from, to_mac, from_mac) in senders {
            // The genuine packets are sent last, on the same path: when they have arrived, the others would have, too.
            let [forged, forged_port, genuine_port, genuine] =
                [(LOCALHOST, OWN), (LOCALHOST, HOST_PORT), (node, HOST_PORT), (node, OWN)].map(|to| {
                    let mark = Mark::new();
                    let packet = frame::udp(SocketAddr::new(from, 5000), to.into(), &mark.bytes());
                    sender.send(&frame::ip_frame(to_mac, from_mac, &packet));
                    mark
                });
            wait::until_true(&format!("the node to receive the packet of {who}"), || {
                received(&at_node).contains(&genuine)
            });
            in_server.wait_for(&format!("the pod to receive the packet of {who}"), genuine_port);
            assert!(
                !received(&at_localhost).contains(&forged),
                "the host has a packet of {who} to 127.0.0.1"
            );
            assert!(!in_server.has_received(forged_port), "the pod has a packet of {who} to 127.0.0.1");
        }
    });
}

#[test]
fn a_host_port_that_another_pod_has_is_refused_with_its_name_and_leaves_nothing() {
    with_both_attachments(|bootstrap| {
        let lab = one_node(bootstrap);
        let worker = &lab.workers[0];
        let a = pod_with(worker, "a", &BOTH);
        let _echo = serve(&a);
        wait::until_true("etcd to be told", || lab.etcd.keys("/polder/v1/addresses/n1/").len() == 2);
        let before = (traces(&lab, worker), host_ports::site::table(worker));
        let refuse = |conf: &Value| {
            let error = worker.try_pod("b", conf).unwrap_err();
            worker.node.run("ip", &["netns", "delete", "b"]);
            (code(Err(error.clone())), message(Err(error)))
        };
        for spelling in [Spelling::Conventions, Spelling::Go] {
            for taken in ["8080:80/tcp", "8080:80/udp", "10.10.1.1:8080:80/tcp", "[fd10:1::1]:8080:80/udp"] {
                let (code, text) = refuse(&conf_spelled(&["8081:7007/tcp", taken], spelling));
                assert_eq!(code, 101, "{text}");
                assert!(text.contains(&format!("host port {taken} is used by polder/a/eth0")), "{text}");
            }
            let (code, text) = refuse(&conf_spelled(&["8081:7007/tcp", "8472:80/udp"], spelling));
            assert!(code == 7 && text.contains("host port 8472:80/udp"), "{code}: {text}");
        }
        assert_eq!((traces(&lab, worker), host_ports::site::table(worker)), before);
        assert_reached(outsider(&lab), "after the refusals");
        for v6 in [false, true] {
            let to = lab.underlay(0, v6);
            let other = outsider(&lab).within(|| probe::tcp_at(to, HOST_PORT + 1, 10));
            assert!(is_refused(&other), "the port of a refused pod answers: {other:?}");
        }
        // The other protocol, another port, and the tunnels' number for another protocol are free.
        let free = ["8081:7007/tcp", "8080:7007/sctp", "8472:7007/tcp"];
        let free = worker.pod_with("free", &conf_spelled(&free, Spelling::Go));
        let echo = serve(&free);
        for port in [HOST_PORT + 1, 8472] {
            let seen = outsider(&lab).within(|| probe::tcp_at(lab.underlay(0, false), port, 10));
            assert_eq!(seen, Ok(outside_address(false)), "port {port}, spelled like Go does");
        }
        drop(echo);
        drop(worker.cni("DEL", "a", a.netns(), a.conf()));
        wait_until_refused(outsider(&lab), "after the DEL");
        let b = worker.pod_with("b", &conf_with(&BOTH));
        let _echo = serve(&b);
        assert_reached(outsider(&lab), "the next pod with the port");
    });
}
