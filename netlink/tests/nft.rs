//! nftables in the real kernel, each test in a network namespace of its own. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{POD_MAC, in_a_new_namespace, ip, network, run};
use polder_api::Family;
use polder_netlink::nft::{
    Chain, Element, Elements, FilterMonitor, FilterSocket, Found, Hook, Interface, Key, Match, Rule, Set,
    Table, Verdict, Within,
};

fn table() -> Table {
    let bridge = Match::Input(Interface::Named("br"));
    Table {
        name: "lab",
        sets: vec![
            Set { name: "networks", key: Key::Network(Family::V4) },
            Set { name: "senders", key: Key::Sender(Family::V6) },
            Set { name: "peers", key: Key::Address(Family::V6) },
        ],
        chains: vec![
            Chain {
                name: "raw",
                hook: Hook::Raw,
                rules: vec![Rule {
                    comment: "not its own address",
                    matches: vec![
                        bridge.clone(),
                        Match::Family(Family::V6),
                        Match::Sender(Within::NotSet(Family::V6, "senders")),
                    ],
                    verdict: Verdict::Drop,
                }],
            },
            Chain {
                name: "input",
                hook: Hook::Input,
                rules: vec![Rule {
                    comment: "tunnel of a stranger",
                    matches: vec![
                        Match::UdpTo(8472),
                        Match::VxlanOf(1),
                        Match::Family(Family::V6),
                        Match::Source(Within::NotSet(Family::V6, "peers")),
                    ],
                    verdict: Verdict::Drop,
                }],
            },
            Chain {
                name: "masquerade",
                hook: Hook::SourceNat,
                rules: vec![Rule {
                    comment: "to the world",
                    matches: vec![
                        Match::Input(Interface::Prefixed("pld")),
                        Match::NotOutput(Interface::Named("br")),
                        Match::Family(Family::V4),
                        Match::Source(Within::Set(Family::V4, "networks")),
                        Match::Destination(Within::NotSet(Family::V4, "networks")),
                        Match::Unicast,
                    ],
                    verdict: Verdict::Masquerade,
                }],
            },
        ],
    }
}

fn elements() -> Elements {
    Elements::from([
        (
            "networks",
            Element::networks([network("10.1.0.0/16"), network("10.9.0.0/24")]).into_iter().collect(),
        ),
        ("senders", (1..=1500).map(|n| Element::sender(POD_MAC, ip(&format!("fd00::{n:x}")))).collect()),
        ("peers", [Element::address(ip("fd09::1"))].into()),
    ])
}

#[test]
fn a_table_is_found_intact_as_it_was_made_and_nft_reads_it_in_the_same_way() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let table = table();
        assert!(matches!(filter.find(&table).unwrap(), Found::Different(_)));
        for _ in 0..2 {
            filter.commit(table.install(&elements())).unwrap();
            assert_eq!(filter.find(&table).unwrap(), Found::Intact(elements()));
        }
        let text = run("nft", &["list", "table", "inet", "lab"]);
        for rule in [
            r#"iifname "br" ether saddr . ip6 saddr != @senders counter packets 0 bytes 0 drop comment "not its own address""#,
            "udp dport 8472 @th,96,24 0x1 ip6 saddr != @peers counter packets 0 bytes 0 drop",
            r#"iifname "pld*" oifname != "br" ip saddr @networks ip daddr != @networks fib daddr type unicast counter packets 0 bytes 0 masquerade fully-random"#,
            "elements = { 10.1.0.0/16, 10.9.0.0/24 }",
            "elements = { fd09::1 }",
            "type filter hook prerouting priority raw; policy accept;",
            "type filter hook input priority filter; policy accept;",
            "type nat hook postrouting priority srcnat; policy accept;",
        ] {
            assert!(text.contains(rule), "nft does not show {rule:?} but\n{text}");
        }
    });
}

#[test]
fn elements_come_and_go_without_the_rest_of_the_table() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let table = table();
        filter.commit(table.install(&elements())).unwrap();
        let (old, new) = (Element::address(ip("fd09::1")), Element::address(ip("fd09::2")));
        filter.commit(table.change("peers", [&new], [&old])).unwrap();
        let networks: std::collections::BTreeSet<_> =
            Element::networks([network("10.1.0.0/17")]).into_iter().collect();
        filter.commit(table.refill("networks", &networks)).unwrap();
        let mut expected = elements();
        expected.insert("peers", [new].into());
        expected.insert("networks", networks);
        assert_eq!(filter.find(&table).unwrap(), Found::Intact(expected));
    });
}

#[test]
fn a_transaction_that_fails_in_the_middle_changes_nothing() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let table = table();
        filter.commit(table.install(&elements())).unwrap();
        let (new, missing) = (Element::address(ip("fd09::2")), Element::address(ip("fd09::3")));
        let error = filter.commit(table.change("peers", [&new], [&missing])).unwrap_err();
        assert!(error.is_missing(), "{error}");
        assert_eq!(filter.find(&table).unwrap(), Found::Intact(elements()));
        filter.commit(table.delete()).unwrap();
        assert!(filter.commit(table.delete()).unwrap_err().is_missing());
    });
}

#[test]
fn a_table_that_somebody_changed_is_not_intact() {
    for change in [
        "delete table inet lab",
        "flush chain inet lab raw",
        "add rule inet lab raw drop",
        "chain inet lab input { policy drop; }",
        "flush chain inet lab input; delete chain inet lab input",
    ] {
        in_a_new_namespace(|_| {
            let mut filter = FilterSocket::open().unwrap();
            filter.commit(table().install(&elements())).unwrap();
            run("nft", &[change]);
            assert!(matches!(filter.find(&table()).unwrap(), Found::Different(_)), "{change}");
        });
    }
}

#[test]
fn a_dump_that_the_kernel_refuses_is_an_error_and_not_an_empty_table() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let mut table = table();
        // A set that no rule needs can go without anything else that would tell.
        table.sets.push(Set { name: "spare", key: Key::Address(Family::V4) });
        filter.commit(table.install(&Elements::new())).unwrap();
        assert!(matches!(filter.find(&table).unwrap(), Found::Intact(_)));
        run("nft", &["delete set inet lab spare"]);
        assert_eq!(filter.find(&table).unwrap(), Found::Different("a part of it is missing".to_owned()));
    });
}

#[test]
fn the_monitor_tells_who_has_changed_the_table_and_nothing_of_other_tables() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let table = table();
        filter.commit(table.install(&elements())).unwrap();
        let mut monitor = FilterMonitor::open("lab").unwrap();
        monitor.set_patience(Duration::from_secs(10)).unwrap();
        run("nft", &["add", "table", "inet", "another"]);
        run("nft", &["add", "table", "ip", "lab"]);
        run("nft", &["delete", "element", "inet", "lab", "peers", "{ fd09::1 }"]);
        filter.commit(table.install(&elements())).unwrap();
        let mut authors = Vec::new();
        while authors.len() < 2 {
            authors.extend(monitor.wait().unwrap());
        }
        let [other, own] = authors.try_into().unwrap();
        assert_eq!(other.name.as_deref(), Some("nft"));
        assert_eq!(own.port, filter.port().unwrap());
        assert_ne!((other.port, other.thread), (own.port, own.thread));
    });
}
