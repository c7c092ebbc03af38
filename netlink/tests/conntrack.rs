//! Connection tracking in the real kernel. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeSet;
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use polder_netlink::nft::FilterSocket;
use polder_netlink::{RouteSocket, link, namespace};

fn addresses<const N: usize>(these: [&str; N]) -> BTreeSet<IpAddr> {
    these.map(|address| address.parse().unwrap()).into()
}

#[test]
fn only_the_tracked_connections_of_the_address_are_deleted() {
    namespace::run_in_new(|| {
        RouteSocket::open().unwrap().execute_all([link::change("lo").up().into()]).unwrap();
        // The kernel tracks connections only if a rule in the namespace needs it.
        let rules = "add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c \
                     ct state new counter";
        assert!(Command::new("nft").arg(rules).status().unwrap().success());
        let mut socket = FilterSocket::open().unwrap();
        for loopback in ["127.0.0.5", "::1"] {
            let tcp = TcpListener::bind((loopback, 7)).unwrap();
            let udp = UdpSocket::bind((loopback, 7)).unwrap();
            let _client = TcpStream::connect((loopback, 7)).unwrap();
            udp.send_to(b"x", (loopback, 9)).unwrap();
            drop(tcp);
            assert_eq!(socket.forget_connections(&addresses(["127.0.0.77", "::77"])).unwrap(), 0);
            let before = socket.connections().unwrap();
            // Several addresses, also of both families, are forgotten together.
            let these = addresses(["127.0.0.77", loopback]);
            let forgotten = socket.forget_connections(&these).unwrap();
            assert!(forgotten >= 2, "{forgotten} connections of {loopback}");
            assert_eq!(socket.connections().unwrap() as usize, before as usize - forgotten);
            assert_eq!(socket.forget_connections(&these).unwrap(), 0, "they are back");
        }
    })
    .unwrap();
}
