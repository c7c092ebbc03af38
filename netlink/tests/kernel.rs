//! Links, addresses, routes, rules, neighbours and events in the real kernel. Each test runs in its own network
//! namespace. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use common::{POD_MAC, in_a_new_namespace, ip, kernel_release, network, run};
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use polder_api::{Family, IfName, Mac};
use polder_netlink::link::{LinkKind, Port, VethPair, Vxlan};
use polder_netlink::monitor::{Event, EventKind, Monitor};
use polder_netlink::neighbour::{Destination, FdbEntry, Neighbour};
use polder_netlink::route::{DefaultRoute, KernelTarget, OnlinkRoute, Route, RouteTable};
use polder_netlink::rule::RoutingRule;
use polder_netlink::{IfIndex, RouteSocket, address, link, namespace, route};

const BRIDGE_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

/// Creates the bridge `br`, sets it up, and returns its index.
fn bridge(socket: &mut RouteSocket) -> IfIndex {
    bridge_with(socket, 1450)
}

fn bridge_with(socket: &mut RouteSocket, mtu: u32) -> IfIndex {
    socket.execute_all(link::create_bridge("br", BRIDGE_MAC, mtu)).unwrap();
    socket.link("br").unwrap().expect("the bridge").index
}

/// Creates a veth pair: `host` is a port of the bridge, `eth0` is in a new namespace. The pair exists as long as the
/// namespace, and the namespace as long as the returned file is open.
#[must_use]
fn pod(socket: &mut RouteSocket, bridge: IfIndex) -> File {
    let pod = namespace::run_in_new(|| File::open("/proc/thread-self/ns/net")).unwrap().unwrap();
    let (name, peer_name): (IfName, IfName) = ("host".parse().unwrap(), "eth0".parse().unwrap());
    let pair = VethPair {
        name: &name,
        mac: None,
        peer_name: &peer_name,
        peer_mac: POD_MAC,
        peer_namespace: pod.as_fd(),
        mtu: 1450,
        controller: Some(bridge),
    };
    socket.execute_all([link::create_veth(&pair)]).unwrap();
    pod
}

#[test]
fn a_bridge_keeps_its_mac_address_and_gets_no_link_local_address() {
    in_a_new_namespace(|socket| {
        let index = bridge(socket);
        let _pod = pod(socket, index);
        let bridge = socket.link("br").unwrap().unwrap();
        assert_eq!((bridge.kind, bridge.up, bridge.mtu), (LinkKind::Bridge, true, 1450));
        assert_eq!(bridge.mac, Some(BRIDGE_MAC), "the MAC address changed with the ports");
        assert_eq!(bridge.makes_link_local, Some(false));
        assert_eq!(socket.addresses().unwrap(), [], "the interface has a link-local address");
    });
}

#[test]
fn a_bridge_keeps_its_mtu_when_its_ports_change() {
    in_a_new_namespace(|socket| {
        let index = bridge(socket);
        let pod = pod(socket, index);
        let port = socket.link("host").unwrap().unwrap().index;
        socket.execute_all([link::change("host").mtu(1300).into(), link::delete(port)]).unwrap();
        drop(pod);
        assert_eq!(socket.link("br").unwrap().unwrap().mtu, 1450);
    });
}

#[test]
fn the_peer_of_a_veth_pair_is_created_in_the_pod_namespace() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let pod = pod(socket, bridge);
        let host = socket.link("host").unwrap().unwrap();
        assert_eq!((host.kind, host.controller), (LinkKind::Veth, Some(bridge)));
        let mut inside = namespace::within(&pod, RouteSocket::open).unwrap().unwrap();
        let eth0 = inside.link("eth0").unwrap().expect("eth0");
        assert_eq!((eth0.mac, eth0.mtu, eth0.up), (Some(POD_MAC), 1450, false));
        assert!(socket.link("eth0").unwrap().is_none(), "it is here too");
    });
}

#[test]
fn a_pod_port_is_read_back_as_it_was_set() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let _pod = pod(socket, bridge);
        let port = Port::of_pod(true);
        let before = socket.link("host").unwrap().unwrap().port.expect("a port");
        for locked in [true, false] {
            assert!(
                !before.is_set_like(&Port::of_pod(locked)),
                "the default settings are the same: the test proves nothing"
            );
        }
        let change = link::change("host").alias("net/c/eth0 ns/pod").port(&port);
        let up = link::change("host").up().into();
        socket.execute_all([link::without_link_local("host"), change.into(), up]).unwrap();
        let host = socket.link("host").unwrap().unwrap();
        // Kernels before 5.18 ignore the lock, unless it was backported. All other settings are made.
        let locked = kernel_release() >= (5, 18) || host.port.unwrap().locked;
        if !locked {
            println!("this kernel cannot lock bridge ports (Linux 5.18): tested without");
        }
        assert!(host.port.unwrap().is_set_like(&Port::of_pod(locked)), "{:?}", host.port);
        assert_eq!(host.alias.as_deref(), Some("net/c/eth0 ns/pod"));
        assert!(host.up);
    });
}

#[test]
fn a_vxlan_device_is_read_back_as_it_was_created() {
    in_a_new_namespace(|socket| {
        for (name, local) in [("vx4", "10.9.0.1"), ("vx6", "fd09::1")] {
            let vxlan = Vxlan { vni: 77, port: 8472, local: Some(ip(local)), learning: false };
            socket.execute_all(link::create_vxlan(name, &vxlan, POD_MAC, 1430)).unwrap();
            let found = socket.link(name).unwrap().unwrap();
            assert_eq!(found.kind, LinkKind::Vxlan(vxlan));
            assert_eq!((found.mac, found.mtu, found.up), (Some(POD_MAC), 1430, true));
            assert_eq!(socket.addresses().unwrap(), [], "the interface has a link-local address");
        }
    });
}

#[test]
fn a_device_with_an_mtu_too_small_for_ipv6_is_created() {
    for mtu in [1280, 1279, 1000, 65_535] {
        in_a_new_namespace(|socket| {
            let index = bridge_with(socket, mtu);
            let _pod = pod(socket, index);
            let vxlan = Vxlan { vni: 77, port: 8472, local: Some(ip("10.9.0.1")), learning: false };
            socket.execute_all(link::create_vxlan("vx", &vxlan, POD_MAC, mtu)).unwrap();
            for name in ["br", "vx"] {
                let made = socket.link(name).unwrap().unwrap();
                assert_eq!((made.up, made.mtu), (true, mtu));
                // Below an MTU of 1280 bytes, the interface has no IPv6.
                assert_eq!(made.makes_link_local, (mtu >= 1280).then_some(false));
            }
            assert_eq!(socket.addresses().unwrap(), [], "an interface has a link-local address");
        });
    }
}

#[test]
fn only_the_error_marked_as_harmless_is_ignored() {
    in_a_new_namespace(|socket| {
        let missing = || link::delete(IfIndex::new(4711));
        socket.execute_all([missing().harmless_if(Errno::ENODEV)]).unwrap();
        assert!(socket.execute_all([missing().harmless_if(Errno::EEXIST)]).unwrap_err().is_missing());
    });
}

#[test]
fn an_invalid_alias_is_an_error_only_on_our_interfaces() {
    in_a_new_namespace(|socket| {
        bridge(socket);
        run("ip", &["link", "add", "q0", "type", "bridge"]);
        run("sh", &["-ec", r"ip link set q0 alias $(printf 'caf\351')"]);
        let links = socket.links().unwrap();
        assert!(links.contains_key("br") && links["q0"].alias.as_deref() == Some("caf?"), "{links:?}");
        for ours in ["polder9", "pld9"] {
            run("ip", &["link", "set", "q0", "name", ours]);
            let error = socket.links().unwrap_err().to_string();
            assert!(error.contains(ours) && error.contains("UTF-8"), "{error}");
            run("ip", &["link", "set", ours, "name", "q0"]);
        }
        assert!(socket.links().unwrap().contains_key("br"), "an error is left behind");
    });
}

#[test]
fn deleting_a_missing_object_reports_it_as_missing() {
    in_a_new_namespace(|socket| {
        assert_eq!(socket.link("nobody").unwrap(), None);
        assert!(socket.execute_all([link::delete(IfIndex::new(4711))]).unwrap_err().is_missing());
        assert!(socket.execute_all([route::delete(network("10.0.0.0/8"))]).unwrap_err().is_missing());
        let index = bridge(socket);
        let neighbour = Neighbour { index, address: ip("10.0.0.1"), mac: POD_MAC };
        assert!(socket.execute_all([neighbour.delete()]).unwrap_err().is_missing());
        assert!(
            socket.execute_all([address::delete(index, network("10.0.0.1/32"))]).unwrap_err().is_missing()
        );
    });
}

#[test]
fn an_error_contains_the_message_of_the_kernel() {
    in_a_new_namespace(|socket| {
        let vxlan = Vxlan { vni: 77, port: 8472, local: Some(ip("10.9.0.1")), learning: false };
        socket.execute_all(link::create_vxlan("vx1", &vxlan, POD_MAC, 1430)).unwrap();
        let [first, ..] = link::create_vxlan("vx2", &vxlan, POD_MAC, 1430);
        let error = socket.execute_all([first]).unwrap_err();
        assert!(error.is_exists());
        assert_eq!(error.to_string(), "File exists: A VXLAN device with the specified VNI already exists");
    });
}

#[test]
fn every_operation_of_a_batch_has_its_own_outcome() {
    in_a_new_namespace(|socket| {
        let index = bridge(socket);
        let good = |last: u8| address::add(index, IpNetwork::new([10, 0, 0, last].into(), 32).unwrap());
        let operations = (0..200).flat_map(|n| [good(n), link::delete(IfIndex::new(4711))]);
        let outcomes = socket.execute(operations).unwrap();
        assert_eq!(outcomes.len(), 400);
        for pair in outcomes.chunks(2) {
            assert!(pair[0].is_ok(), "{pair:?}");
            assert!(matches!(&pair[1], Err(error) if error.is_missing()), "{pair:?}");
        }
        assert_eq!(socket.addresses().unwrap().len(), 200);
    });
}

#[test]
fn an_ipv6_address_is_usable_immediately() {
    in_a_new_namespace(|socket| {
        let index = bridge(socket);
        socket.execute_all([address::add(index, network("fd00::1/128"))]).unwrap();
        std::net::UdpSocket::bind("[fd00::1]:0").expect("no wait for duplicate address detection");
        let addresses = socket.addresses().unwrap();
        assert_eq!(addresses.len(), 1);
        assert!(addresses[0].global && !addresses[0].temporary);
    });
}

#[test]
fn own_routes_are_read_back_as_they_were_made_without_foreign_ones() {
    in_a_new_namespace(|socket| {
        let index = bridge(socket);
        for own in ["10.1.0.1/32", "fd01::1/128"] {
            socket.execute_all([address::add(index, network(own))]).unwrap();
        }
        let mut made = Vec::new();
        for (link, onlink, none, gateway, own) in [
            ("10.2.0.0/24", "10.3.0.0/26", "10.4.0.0/26", "10.9.9.9", "10.1.0.1"),
            ("fd02::/64", "fd03::/122", "fd04::/122", "fd09::9", "fd01::1"),
        ] {
            let plain = |destination, target| Route { destination, target, source: None, mtu: None };
            made.push(plain(network(link), KernelTarget::Link { index }));
            let target = KernelTarget::Gateway { index, gateway: ip(gateway), onlink: true };
            made.push(Route { source: Some(ip(own)), mtu: Some(1400), ..plain(network(onlink), target) });
            made.push(plain(network(none), KernelTarget::Unreachable));
        }
        socket.execute_all(made.iter().map(route::replace)).unwrap();
        socket.execute_all(made.iter().map(route::replace)).expect("a second time changes nothing");
        let ours = |socket: &mut RouteSocket| {
            let (mut routes, _) = socket.routes().unwrap();
            routes.sort_by_key(|route| route.destination);
            routes
        };
        made.sort_by_key(|route| route.destination);
        assert_eq!(ours(socket), made);

        run("ip", &["route", "add", "10.2.0.0/24", "dev", "br", "metric", "5"]);
        run("ip", &["-6", "route", "add", "fd02::/64", "dev", "br", "metric", "5"]);
        assert_eq!(ours(socket), made, "a foreign route was reported as ours");
        socket.execute_all(made.iter().map(|route| route::delete(route.destination))).unwrap();
        assert_eq!(ours(socket), []);
        assert!(run("ip", &["route"]).contains("10.2.0.0/24 dev br"), "the foreign route is gone too");
    });
}

#[test]
fn an_interface_has_its_own_table_with_a_default_route() {
    in_a_new_namespace(|socket| {
        let index = bridge(socket);
        let own = RouteTable::of_interface(index);
        for (family, address, gateway) in
            [(Family::V4, "10.1.0.1", "10.1.0.254"), (Family::V6, "fd01::1", "fd01::ff")]
        {
            let route = DefaultRoute { index: Some(index), gateway: Some(ip(gateway)) };
            let rule = RoutingRule { source: ip(address), table: own };
            let address = IpNetwork::from(ip(address));
            let add_route = route::onlink(index, ip(gateway), &OnlinkRoute::to_everywhere(own));
            socket.execute_all([address::add(index, address), add_route, rule.add(), rule.add()]).unwrap();
            assert_eq!(socket.default_routes(family, own).unwrap(), [route]);
            assert_eq!(socket.default_routes(family, RouteTable::MAIN).unwrap(), []);
            assert!(socket.rules().unwrap().contains(&rule));
            let again =
                socket.execute_all([route::onlink(index, ip(gateway), &OnlinkRoute::to_everywhere(own))]);
            assert!(again.unwrap_err().is_exists(), "a default route is replaced");
        }
        assert_eq!(socket.rules().unwrap().len(), 2, "a rule is there twice, or is none of ours");
    });
}

#[test]
fn neighbours_and_fdb_entries_are_read_back_as_they_were_made() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let _pod = pod(socket, bridge);
        let port = socket.link("host").unwrap().unwrap().index;
        let vxlan = Vxlan { vni: 1, port: 8472, local: Some(ip("10.9.0.1")), learning: false };
        socket.execute_all(link::create_vxlan("vx", &vxlan, BRIDGE_MAC, 1450)).unwrap();
        let tunnel = socket.link("vx").unwrap().unwrap().index;

        let neighbours = ["10.1.0.5", "fd01::5"].map(|address| Neighbour {
            index: bridge,
            address: ip(address),
            mac: POD_MAC,
        });
        let fdb = [
            FdbEntry { index: port, mac: POD_MAC, to: Destination::Port },
            FdbEntry { index: tunnel, mac: POD_MAC, to: Destination::Remote(ip("10.9.0.2")) },
        ];
        for _ in 0..2 {
            let all = neighbours.iter().map(Neighbour::replace).chain(fdb.iter().map(FdbEntry::replace));
            socket.execute_all(all).unwrap();
            assert_eq!(socket.neighbours().unwrap(), neighbours);
            assert_eq!(sorted(socket.fdb().unwrap()), sorted(fdb.to_vec()));
        }
        let moved = FdbEntry { to: Destination::Remote(ip("10.9.0.3")), ..fdb[1] };
        socket.execute_all([moved.replace()]).unwrap();
        assert_eq!(sorted(socket.fdb().unwrap()), sorted(vec![fdb[0], moved]));
        // Entries of any other kind, created by other programs, are listed and can be deleted.
        socket.execute_all([moved.delete()]).unwrap();
        run("sh", &["-ec", "ip nexthop add id 1 via 10.9.0.3 fdb; ip nexthop add id 2 group 1 fdb"]);
        for odd in [
            "dst 10.9.0.3 port 4790 permanent",
            "dst 10.9.0.3 vni 7 permanent",
            "dst 10.9.0.3 dynamic",
            "nhid 2 permanent",
        ] {
            run("sh", &["-ec", &format!("bridge fdb add {POD_MAC} dev vx {odd} self")]);
            let odd = FdbEntry { to: Destination::Unsupported, ..moved };
            assert_eq!(sorted(socket.fdb().unwrap()), sorted(vec![fdb[0], odd]));
            socket.execute_all([odd.delete()]).unwrap();
            assert_eq!(socket.fdb().unwrap(), fdb[..1]);
        }
        socket.execute_all([moved.replace()]).unwrap();
        socket.execute_all([moved.delete(), fdb[0].delete(), neighbours[0].delete()]).unwrap();
        assert_eq!(socket.fdb().unwrap(), []);
        assert_eq!(socket.neighbours().unwrap(), neighbours[1..]);
    });
}

/// Whether this kernel's bridges support VLANs (`CONFIG_BRIDGE_VLAN_FILTERING`).
fn bridges_know_vlans() -> bool {
    // Kernels without this support report `vlan_filtering`, too, always as 0.
    run("ip", &["-d", "link", "show", "dev", "br"]).contains("vlan_default_pvid")
}

#[test]
fn an_fdb_entry_of_another_vlan_does_not_replace_ours() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let _pod = pod(socket, bridge);
        let port = socket.link("host").unwrap().unwrap().index;
        let ours = FdbEntry { index: port, mac: POD_MAC, to: Destination::Port };
        socket.execute_all([ours.replace()]).unwrap();
        let table = || run("bridge", &["fdb", "show", "dev", "host"]);
        let entry = format!("{POD_MAC} vlan 1 master br static");
        if !bridges_know_vlans() {
            println!(
                "this kernel's bridges know no VLANs (CONFIG_BRIDGE_VLAN_FILTERING): there is one entry, and no other"
            );
            assert_eq!(socket.fdb().unwrap(), [ours]);
            assert!(!table().contains("vlan"), "{}", table());
            return;
        }
        assert!(table().contains(&entry), "the kernel has not repeated it in VLAN 1: {}", table());
        assert_eq!(socket.fdb().unwrap(), [ours]);
        // `bridge` cannot delete the entry of VLAN 0 only: it treats 0 as no VLAN, which means all VLANs. So both
        // entries are deleted, and one is added in VLAN 1.
        socket.execute_all([ours.delete()]).unwrap();
        assert!(!table().contains("static"), "one is left: {}", table());
        run("bridge", &["fdb", "add", &POD_MAC.to_string(), "dev", "host", "master", "static", "vlan", "1"]);
        assert!(table().contains(&entry), "{}", table());
        assert_eq!(socket.fdb().unwrap(), [], "the entry of another VLAN was reported as ours");
        socket.execute_all([ours.replace()]).unwrap();
        assert_eq!(socket.fdb().unwrap(), [ours]);
    });
}

#[test]
fn the_iptables_settings_of_a_bridge_are_read_for_each_family() {
    in_a_new_namespace(|socket| {
        bridge(socket);
        for (v4, v6) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            let command = format!("link set dev br type bridge nf_call_iptables {v4} nf_call_ip6tables {v6}");
            run("ip", &command.split(' ').collect::<Vec<_>>());
            let found = socket.link("br").unwrap().unwrap().calls_iptables;
            assert_eq!((found[Family::V4], found[Family::V6]), (v4 == 1, v6 == 1));
        }
    });
}

#[test]
fn vlan_filtering_of_a_bridge_is_detected_and_switched_off() {
    in_a_new_namespace(|socket| {
        let index = bridge(socket);
        assert!(!socket.link("br").unwrap().unwrap().filters_vlans);
        let knows = bridges_know_vlans();
        if knows {
            run("ip", &["link", "set", "dev", "br", "type", "bridge", "vlan_filtering", "1"]);
        } else {
            println!("this kernel's bridges know no VLANs (CONFIG_BRIDGE_VLAN_FILTERING): none filters them");
        }
        assert_eq!(socket.link("br").unwrap().unwrap().filters_vlans, knows);
        socket.execute_all([link::without_vlans(index)]).unwrap();
        let bridge = socket.link("br").unwrap().unwrap();
        assert_eq!((bridge.filters_vlans, bridge.kind, bridge.mtu), (false, LinkKind::Bridge, 1450));
    });
}

fn sorted(mut fdb: Vec<FdbEntry>) -> Vec<FdbEntry> {
    fdb.sort_by_key(|forward| forward.index);
    fdb
}

#[test]
fn a_group_of_interfaces_is_deleted_in_one_request() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let _pod = pod(socket, bridge);
        socket.execute_all([link::change("host").group(7040).into(), link::delete_group(7040)]).unwrap();
        assert_eq!(socket.link("host").unwrap(), None);
        assert!(socket.link("br").unwrap().is_some());
    });
}

/// The index of the interface `host`, and a monitor that receives all events from now on.
fn listen(socket: &mut RouteSocket) -> (IfIndex, Monitor) {
    let index = socket.link("host").unwrap().unwrap().index;
    let monitor = Monitor::open().unwrap();
    // If an event is lost, the test fails instead of waiting forever.
    monitor.set_timeout(Duration::from_secs(10)).unwrap();
    (index, monitor)
}

#[test]
fn the_monitor_reports_a_port_that_is_no_longer_isolated() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let _pod = pod(socket, bridge);
        let (index, mut monitor) = listen(socket);
        run("bridge", &["link", "set", "dev", "host", "isolated", "off"]);
        let port = Event { what: EventKind::Port { index }, port: 0 };
        while !monitor.wait().unwrap().contains(&port) {}
    });
}

#[test]
fn the_monitor_reports_an_interface_that_stops_forwarding() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let _pod = pod(socket, bridge);
        run("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
        let (index, mut monitor) = listen(socket);
        run("sysctl", &["-qw", "net.ipv4.conf.host.forwarding=0"]);
        let forwarding_stopped = Event { what: EventKind::ForwardingStopped { index }, port: 0 };
        while !monitor.wait().unwrap().contains(&forwarding_stopped) {}
    });
}

#[test]
fn the_monitor_reports_a_deleted_interface_but_not_one_that_leaves_its_bridge() {
    in_a_new_namespace(|socket| {
        let bridge = bridge(socket);
        let _pod = pod(socket, bridge);
        let (index, mut monitor) = listen(socket);
        run("ip", &["link", "set", "host", "nomaster"]);
        run("ip", &["address", "add", "10.1.0.1/24", "dev", "br"]);
        run("ip", &["neigh", "add", "10.1.0.2", "lladdr", "02:00:00:00:00:02", "dev", "br"]);
        run("ip", &["route", "add", "unreachable", "10.9.0.0/16", "proto", "84"]);
        socket.execute_all([link::delete(index)]).unwrap();
        let mut seen: Vec<Event> = Vec::new();
        let saw = |seen: &[Event], what: &EventKind| seen.iter().any(|event| event.what == *what);
        while !saw(&seen, &EventKind::LinkGone { index, name: "host".to_owned() }) {
            seen.extend(monitor.wait().unwrap());
        }
        assert_eq!(
            seen.iter().filter(|event| matches!(event.what, EventKind::LinkGone { .. })).count(),
            1,
            "{seen:?}"
        );
        let address = "10.1.0.2".parse().unwrap();
        let entry = Neighbour { index: bridge, address, mac: Mac([2, 0, 0, 0, 0, 2]) };
        for what in [
            EventKind::Address { index: bridge, global: true },
            EventKind::Neighbour { index: bridge, address, entry: Some(entry) },
            EventKind::ForeignRoute,
            EventKind::OwnRoute { destination: "10.9.0.0/16".parse().unwrap(), index: None, exists: true },
        ] {
            assert!(saw(&seen, &what), "{what:?} is not in {seen:?}");
        }
        let own = socket.port().unwrap();
        let others = seen
            .iter()
            .filter(|event| matches!(event.what, EventKind::OwnRoute { .. } | EventKind::Address { .. }));
        assert!(others.into_iter().all(|event| event.port != 0 && event.port != own), "{seen:?}");
    });
}
