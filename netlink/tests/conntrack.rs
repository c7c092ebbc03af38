//! Connection tracking in the real kernel. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeSet;
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use polder_netlink::conntrack::StaleEntries;
use polder_netlink::nft::FilterSocket;
use polder_netlink::{RouteSocket, link, namespace};

fn addresses<const N: usize>(these: [&str; N]) -> BTreeSet<IpAddr> {
    these.map(|address| address.parse().unwrap()).into()
}

fn of<const N: usize>(these: [&str; N]) -> StaleEntries {
    StaleEntries { addresses: addresses(these), ..StaleEntries::default() }
}

/// Runs `check` in a namespace that tracks connections on its loopback interface.
fn with_tracking(check: impl FnOnce(FilterSocket) + Send + 'static) {
    namespace::run_in_new(|| {
        RouteSocket::open().unwrap().execute_all([link::change("lo").up().into()]).unwrap();
        // The kernel tracks connections only if a rule in the namespace needs it.
        let rules = "add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c \
                     ct state new counter";
        assert!(Command::new("nft").arg(rules).status().unwrap().success());
        check(FilterSocket::open().unwrap());
    })
    .unwrap();
}

#[test]
fn only_the_tracked_connections_of_the_address_are_deleted() {
    with_tracking(|mut socket| {
        for loopback in ["127.0.0.5", "::1"] {
            let tcp = TcpListener::bind((loopback, 7)).unwrap();
            let udp = UdpSocket::bind((loopback, 7)).unwrap();
            let _client = TcpStream::connect((loopback, 7)).unwrap();
            udp.send_to(b"x", (loopback, 9)).unwrap();
            drop(tcp);
            assert_eq!(socket.forget_connections(&of(["127.0.0.77", "::77"])).unwrap(), 0);
            let before = socket.connections().unwrap();
            // Several addresses, also of both families, are forgotten together.
            let these = of(["127.0.0.77", loopback]);
            let forgotten = socket.forget_connections(&these).unwrap();
            assert!(forgotten >= 2, "{forgotten} connections of {loopback}");
            assert_eq!(socket.connections().unwrap() as usize, before as usize - forgotten);
            assert_eq!(socket.forget_connections(&these).unwrap(), 0, "they are back");
        }
    });
}

#[test]
fn only_udp_connections_to_the_host_port_that_lead_elsewhere_are_deleted() {
    with_tracking(|mut socket| {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to_port = |port, pod: &str| StaleEntries {
            udp_ports: [(port, addresses([pod]))].into(),
            host: addresses(["127.0.0.5"]),
            ..StaleEntries::default()
        };
        let _tcp = (TcpListener::bind("127.0.0.5:53").unwrap(), TcpStream::connect("127.0.0.5:53").unwrap());
        client.send_to(b"x", "127.0.0.5:53").unwrap();
        assert_eq!(socket.forget_connections(&to_port(54, "10.0.0.5")).unwrap(), 0, "another port");
        assert_eq!(socket.forget_connections(&to_port(53, "127.0.0.5")).unwrap(), 0, "it leads there");
        assert_eq!(socket.forget_connections(&to_port(53, "10.0.0.5")).unwrap(), 1, "it leads elsewhere");
        assert_eq!(socket.forget_connections(&to_port(53, "10.0.0.5")).unwrap(), 0, "it is back");
    });
}
