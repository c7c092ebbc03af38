//! The fast path: packets of flows that the host has just forwarded go from interface to interface. It must change no
//! packet's fate, only its cost.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod fastpath {
    pub(crate) mod site;
}

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use polder_tests::probe::{self, PORT};
use polder_tests::traffic::without_packet_loss;
use polder_tests::wait;

use fastpath::site::{Site, count, wait_until_attached, with_both_attachments};

#[test]
fn established_flows_take_the_fast_path_between_all_pods_and_keep_their_addresses() {
    with_both_attachments(|site| {
        for (place, reasons, server, number) in site.servers() {
            for to in server.addresses() {
                let client = &site.client;
                let before = [
                    count(site.n1(), "fast", reasons[0]),
                    count(&site.lab.workers[number], "fast", reasons[1]),
                ];
                let seen = client.within(|| probe::tcp(to, 20_000_000));
                assert_eq!(seen, Ok(client.address_like(to)), "{place}");
                let after = [
                    count(site.n1(), "fast", reasons[0]),
                    count(&site.lab.workers[number], "fast", reasons[1]),
                ];
                // In GSO packets of up to 64 KiB, and many acknowledgements.
                assert!(
                    after[0] > before[0] + 100,
                    "{place} {to}: {before:?}, {after:?}: {}",
                    site.n1().status()["fast_path"]
                );
                assert!(after[1] > before[1] + 100, "{place} {to}: {before:?}, {after:?}");
                let seen =
                    client.within(|| probe::udp(client.address_like(to), to, 100)).map(|(seen, _)| seen);
                assert_eq!(seen, Ok(client.address_like(to)), "{place}");
            }
        }
    });
}

#[test]
fn a_change_of_the_backend_loses_no_packet_of_flows_on_the_fast_path() {
    let site = Site::start("bridge");
    let [near, far] = [1, 2].map(|number| site.lab.workers[number].pod("new"));
    let streams = [site.lab.workers[0].pod("sender"), near, far];
    for (number, pod) in streams.iter().enumerate() {
        wait_until_attached(&site.lab.workers[number], &[pod]);
    }
    let before = count(site.n1(), "fast", "pod_to_node");
    without_packet_loss(&streams, || {
        for (backend, path) in
            [("vxlan", "vxlan"), ("auto", "direct"), ("vxlan", "vxlan"), ("auto", "direct")]
        {
            site.n1().ctl(&["cluster", "set", "--backend", backend]);
            for (worker, peer) in [(0, "n2"), (1, "n1")] {
                wait::until_true(&format!("the path to {peer} to be {path}"), || {
                    site.lab.workers[worker].path_to(peer, "ipv4") == path
                });
            }
        }
    });
    let fast = count(site.n1(), "fast", "pod_to_node") - before;
    assert!(fast > 60, "{fast} packets on the fast path");
}

#[test]
fn a_rule_that_drops_packets_applies_to_a_flow_on_the_fast_path_and_its_removal_too() {
    with_both_attachments(|site| {
        for (place, reasons, server, _) in site.servers() {
            for to in server.addresses() {
                let from = site.client.address_like(to);
                let socket = site.client.within(|| UdpSocket::bind((from, 0)).unwrap());
                socket.connect((to, PORT)).unwrap();
                socket.set_nonblocking(true).unwrap();
                // Whether a datagram arrived and came back, after others that are still on the way.
                let passes = || {
                    let mut buffer = [0; 64];
                    while socket.recv(&mut buffer).is_ok() {}
                    let _ = socket.send(b"does it pass?");
                    std::thread::park_timeout(Duration::from_millis(20));
                    socket.recv(&mut buffer).is_ok()
                };
                let before = count(site.n1(), "fast", reasons[0]);
                wait::until_true("the flow to take the fast path", || {
                    passes() && count(site.n1(), "fast", reasons[0]) > before + 10
                });
                let family = if to.is_ipv4() { "ip" } else { "ip6" };
                site.n1().node.shell(&format!(
                    "nft 'table inet isolation {{ chain forward {{ type filter hook forward priority 0; {family} daddr {to} udp dport {PORT} drop; }}; }}'"
                ));
                wait::until_true(&format!("the rule to apply {place}"), || !passes());
                let dropped = Instant::now();
                while dropped.elapsed() < Duration::from_millis(1500) {
                    assert!(!passes(), "{place}: a packet passed after the rule applied");
                }
                site.n1().node.shell("nft delete table inet isolation");
                let before = count(site.n1(), "fast", reasons[0]);
                wait::until_true(&format!("the flow to take the fast path again {place}"), || {
                    passes() && count(site.n1(), "fast", reasons[0]) > before + 10
                });
            }
        }
    });
}
