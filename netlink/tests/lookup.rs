//! Route lookups in the real kernel. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod common;

use common::{in_a_new_namespace, ip, run};
use polder_netlink::RouteSocket;
use polder_netlink::route::NextHop;

/// An interface `near` with a carrier.
fn interface() {
    run("ip", &["link", "add", "dev", "near", "type", "veth", "peer", "name", "far"]);
    run("ip", &["link", "set", "dev", "near", "up"]);
    run("ip", &["link", "set", "dev", "far", "up"]);
}

#[test]
fn a_lookup_distinguishes_on_link_routed_and_unreachable_destinations() {
    in_a_new_namespace(|socket| {
        interface();
        run("ip", &["address", "add", "10.1.0.1/24", "dev", "near"]);
        run("ip", &["route", "add", "10.2.0.0/24", "via", "10.1.0.254"]);
        let near = socket.look_up(ip("10.1.0.2")).unwrap().unwrap();
        let on_link = (NextHop::Destination, Some(ip("10.1.0.1")), false);
        assert_eq!((near.next_hop, near.source, near.local), on_link);
        let far = socket.look_up(ip("10.2.0.2")).unwrap().unwrap();
        assert_eq!(far.next_hop, NextHop::Router(ip("10.1.0.254")));
        assert!(socket.look_up(ip("10.1.0.1")).unwrap().unwrap().local);
        assert_eq!(socket.look_up(ip("10.3.0.1")).unwrap(), None);
        assert_eq!(socket.look_up(ip("fd00::1")).unwrap(), None);
    });
}

#[test]
fn a_lookup_reports_no_routed_destination_as_on_link() {
    in_a_new_namespace(|socket| {
        interface();
        run("ip", &["address", "add", "10.1.0.1/24", "dev", "near"]);
        run("ip", &["address", "add", "fd01::1/64", "dev", "near", "nodad"]);
        let next_hop =
            |socket: &mut RouteSocket, to: &str| socket.look_up(ip(to)).unwrap().map(|found| found.next_hop);
        // A router with an address of the other family (`RTA_VIA`).
        run("ip", &["route", "add", "10.2.0.0/24", "via", "inet6", "fd01::fe"]);
        assert_eq!(next_hop(socket, "10.2.0.2"), Some(NextHop::Router(ip("fd01::fe"))));
        // Several routers.
        let several = ["nexthop", "via", "10.1.0.253", "nexthop", "via", "10.1.0.254"];
        run("ip", &[&["route", "add", "10.3.0.0/24"][..], &several].concat());
        assert!(!matches!(next_hop(socket, "10.3.0.2"), None | Some(NextHop::Destination)));
        // A next hop object, with and without a router.
        run("ip", &["nexthop", "add", "id", "7", "via", "10.1.0.254", "dev", "near"]);
        run("ip", &["route", "add", "10.4.0.0/24", "nhid", "7"]);
        assert_eq!(next_hop(socket, "10.4.0.2"), Some(NextHop::Router(ip("10.1.0.254"))));
        run("ip", &["nexthop", "add", "id", "8", "dev", "near"]);
        run("ip", &["route", "add", "10.5.0.0/24", "nhid", "8"]);
        assert_ne!(next_hop(socket, "10.5.0.2"), None);
        for (kind, to) in [("unreachable", "10.6.0.1"), ("blackhole", "10.7.0.1"), ("prohibit", "10.8.0.1")] {
            run("ip", &["route", "add", kind, to]);
            assert_eq!(next_hop(socket, to), None, "{kind}");
        }
        for kind in ["unreachable", "blackhole", "prohibit"] {
            run("ip", &["-6", "route", "replace", kind, "fd09::/64"]);
            assert_eq!(next_hop(socket, "fd09::1"), None, "{kind}");
        }
    });
}

#[test]
fn a_tun_interface_has_no_neighbours() {
    in_a_new_namespace(|socket| {
        interface();
        run("ip", &["tuntap", "add", "mesh", "mode", "tun"]);
        let has_neighbours =
            |socket: &mut RouteSocket, name: &str| socket.link(name).unwrap().unwrap().has_neighbours;
        assert!(has_neighbours(socket, "near"));
        assert!(!has_neighbours(socket, "mesh"));
    });
}
