//! nftables in the real kernel. Each test runs in its own network namespace. Needs root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod common;

use std::time::Duration;

use common::{POD_MAC, in_a_new_namespace, ip, network, run};
use polder_api::Family;
use polder_netlink::nft::{
    Chain, Element, ElementKey, Elements, FilterMonitor, FilterSocket, Hook, InterfaceMatch, Match, PortMap,
    Rule, Set, SetMatch, Table, TableKind, TableState, Verdict,
};

fn table() -> Table {
    let tunnel_sources = ElementKey::TunnelSource(Family::V4, Family::V6);
    let bridge = Match::Input(InterfaceMatch::Named("br"));
    Table {
        name: "lab",
        sets: vec![
            Set { table: TableKind::Ip, name: "networks", key: ElementKey::Network(Family::V4) },
            Set { table: TableKind::Ip, name: "senders", key: ElementKey::Sender(Family::V6) },
            Set { table: TableKind::Ip, name: "peers", key: ElementKey::Address(Family::V6) },
            Set { table: TableKind::Ip, name: "bearers", key: tunnel_sources },
            Set { table: TableKind::Ip, name: "neighbours", key: ElementKey::Sender(Family::V4) },
            Set { table: TableKind::Arp, name: "neighbours", key: ElementKey::Sender(Family::V4) },
            Set { table: TableKind::Ip, name: "ports", key: ElementKey::Port(Family::V4) },
            Set { table: TableKind::Ip, name: "ports_at", key: ElementKey::AddressPort(Family::V6) },
            Set { table: TableKind::Ip, name: "pairs", key: ElementKey::AddressPair(Family::V4) },
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
                        Match::Sender(SetMatch::NotSet(Family::V6, "senders")),
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
                        Match::Source(SetMatch::NotSet(Family::V6, "peers")),
                    ],
                    verdict: Verdict::Drop,
                }],
            },
            Chain {
                name: "carried",
                hook: Hook::Input,
                rules: vec![
                    Rule {
                        comment: "from its own network",
                        matches: vec![
                            Match::UdpTo(8472),
                            Match::Family(Family::V4),
                            Match::InnerFamily(Family::V6),
                            Match::TunnelSource {
                                inner: Family::V6,
                                length: 122,
                                set: SetMatch::Set(Family::V4, "bearers"),
                            },
                        ],
                        verdict: Verdict::Accept,
                    },
                    Rule { comment: "answers", matches: vec![Match::Icmpv6(136)], verdict: Verdict::Drop },
                ],
            },
            Chain { name: "answers", hook: Hook::ArpInput, rules: answers(bridge) },
            Chain {
                name: "masquerading",
                hook: Hook::SourceNat,
                rules: vec![Rule {
                    comment: "to the world",
                    matches: vec![
                        Match::Input(InterfaceMatch::Prefixed("pld")),
                        Match::Output(InterfaceMatch::Prefixed("eth")),
                        Match::NotOutput(InterfaceMatch::Named("br")),
                        Match::Family(Family::V4),
                        Match::Source(SetMatch::Set(Family::V4, "networks")),
                        Match::Destination(SetMatch::NotSet(Family::V4, "networks")),
                        Match::Unicast,
                    ],
                    verdict: Verdict::Masquerade,
                }],
            },
            Chain { name: "ports", hook: Hook::DestinationNat, rules: ports() },
            Chain { name: "local_ports", hook: Hook::LocalDestinationNat, rules: ports() },
        ],
    }
}

/// Rules for ARP packets from that interface.
fn answers(bridge: Match) -> Vec<Rule> {
    vec![
        Rule {
            comment: "no answers",
            matches: vec![bridge.clone(), Match::ArpReply],
            verdict: Verdict::Drop,
        },
        Rule {
            comment: "nobody else",
            matches: vec![bridge, Match::ArpSender(SetMatch::NotSet(Family::V4, "neighbours"))],
            verdict: Verdict::Drop,
        },
    ]
}

/// Rules that translate destinations, and conditions on loopback addresses.
fn ports() -> Vec<Rule> {
    vec![
        Rule {
            comment: "one address",
            matches: vec![Match::Family(Family::V6), Match::Local],
            verdict: Verdict::TranslateDestination(PortMap::ByAddressAndPort(Family::V6, "ports_at")),
        },
        Rule {
            comment: "pairs",
            matches: vec![
                Match::Family(Family::V4),
                Match::AddressPair(SetMatch::Set(Family::V4, "pairs")),
                Match::FromLoopback,
            ],
            verdict: Verdict::Accept,
        },
        Rule {
            comment: "all addresses",
            matches: vec![Match::Family(Family::V4), Match::ToLoopback],
            verdict: Verdict::TranslateDestination(PortMap::ByPort(Family::V4, "ports")),
        },
    ]
}

fn elements() -> Elements {
    Elements::from([
        (
            "networks",
            Element::networks([network("10.1.0.0/16"), network("10.9.0.0/24")]).into_iter().collect(),
        ),
        ("senders", (1..=1500).map(|n| Element::sender(POD_MAC, ip(&format!("fd00::{n:x}")))).collect()),
        ("peers", [Element::address(ip("fd09::1"))].into()),
        ("bearers", [Element::tunnel_source(ip("10.9.0.1"), network("fd00::40/122"))].into()),
        ("neighbours", [Element::sender(POD_MAC, ip("10.1.0.5"))].into()),
        ("ports", [Element::port(None, 6, 8080, (ip("10.1.0.5"), 80).into())].into()),
        ("ports_at", [Element::port(Some(ip("fd09::1")), 132, 8080, (ip("fd00::5"), 80).into())].into()),
        ("pairs", [Element::address_pair(ip("10.1.0.5"), ip("10.1.0.6"))].into()),
    ])
}

/// Checks that the kernel has the table with these elements.
fn assert_found(filter: &mut FilterSocket, table: &Table, expected: &Elements) {
    let TableState::Intact(found) = filter.table_state(table).unwrap() else { panic!("the table differs") };
    let differ = |set: &&&str| found.get(**set) != expected.get(**set);
    // A failure prints only the names of the sets: there are over 1500 elements.
    let differing: Vec<_> = expected.keys().chain(found.keys()).filter(differ).collect();
    assert!(differing.is_empty(), "sets that are not as expected: {differing:?}");
}

#[test]
fn a_new_table_is_intact_and_nft_lists_it_correctly() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let table = table();
        assert!(matches!(filter.table_state(&table).unwrap(), TableState::Different(_)));
        for _ in 0..2 {
            filter.commit(table.install(&elements())).unwrap();
            assert_found(&mut filter, &table, &elements());
        }
        let text = run("nft", &["list", "table", "inet", "lab"]);
        for rule in [
            r#"iifname "br" ether saddr . ip6 saddr != @senders counter packets 0 bytes 0 drop comment "not its own address""#,
            "udp dport 8472 @th,96,24 0x1 ip6 saddr != @peers counter packets 0 bytes 0 drop",
            r#"iifname "pld*" oifname "eth*" oifname != "br" ip saddr @networks ip daddr != @networks fib daddr type unicast counter packets 0 bytes 0 masquerade fully-random"#,
            "elements = { 10.1.0.0/16, 10.9.0.0/24 }",
            "elements = { fd09::1 }",
            "elements = { 10.9.0.1 . 0xfd000000000000000000000000000040 }",
            r#"icmpv6 type nd-neighbor-advert counter packets 0 bytes 0 drop comment "answers""#,
            "type filter hook prerouting priority raw; policy accept;",
            "type filter hook input priority filter; policy accept;",
            "type nat hook postrouting priority srcnat; policy accept;",
            "type inet_proto . inet_service : ipv4_addr . inet_service",
            "elements = { tcp . 8080 : 10.1.0.5 . 80 }",
            "type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service",
            "elements = { fd09::1 . sctp . 8080 : fd00::5 . 80 }",
            "elements = { 10.1.0.5 . 10.1.0.6 }",
            "ip saddr . ip daddr @pairs ip saddr 127.0.0.0/8 counter packets 0 bytes 0 accept",
            "ip daddr 127.0.0.0/8 counter packets 0 bytes 0 dnat ip to meta l4proto . th dport map @ports",
            "meta nfproto ipv6 fib daddr type local counter packets 0 bytes 0 dnat ip6 to ip6 daddr . meta l4proto . th dport map @ports_at",
            "type nat hook prerouting priority dstnat + 1; policy accept;",
            "type nat hook output priority -99; policy accept;",
        ] {
            assert!(text.contains(rule), "nft does not show {rule:?} but\n{text}");
        }
        let text = run("nft", &["list", "table", "arp", "lab"]);
        for rule in [
            r#"iifname "br" arp operation reply counter packets 0 bytes 0 drop comment "no answers""#,
            r#"arp saddr ether . arp saddr ip != @neighbours counter packets 0 bytes 0 drop comment "nobody else""#,
            "type filter hook input priority filter; policy accept;",
        ] {
            assert!(text.contains(rule), "nft does not show {rule:?} but\n{text}");
        }
    });
}

#[test]
fn the_ruleset_that_nft_lists_can_be_loaded_again() {
    let listed = || run("nft", &["list", "ruleset"]);
    in_a_new_namespace(|_| {
        FilterSocket::open().unwrap().commit(table().install(&elements())).unwrap();
        let saved = listed();
        let again = "saved=$(nft list ruleset); nft flush ruleset; printf '%s\\n' \"$saved\" | nft -f -";
        run("sh", &["-ec", again]);
        assert!(saved.contains("typeof ip saddr . @th,304,128"), "{saved}");
        assert_eq!(listed(), saved);
    });
}

#[test]
fn set_elements_change_without_the_rest_of_the_table() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let table = table();
        filter.commit(table.install(&elements())).unwrap();
        let (old, new) = (Element::address(ip("fd09::1")), Element::address(ip("fd09::2")));
        filter.commit(table.change("peers", [&new], [&old])).unwrap();
        let networks: std::collections::BTreeSet<_> =
            Element::networks([network("10.1.0.0/17")]).into_iter().collect();
        filter.commit(table.refill("networks", &networks)).unwrap();
        let port = |pod: &str| Element::port(None, 6, 8080, (ip(pod), 80).into());
        filter.commit(table.change("ports", [&port("10.1.0.6")], [&port("10.1.0.5")])).unwrap();
        let error = filter.commit(table.change("ports", [&port("10.1.0.7")], [])).unwrap_err();
        assert!(error.is_exists(), "a port that leads elsewhere is not replaced: {error}");
        let mut expected = elements();
        expected.insert("ports", [port("10.1.0.6")].into());
        expected.insert("peers", [new].into());
        expected.insert("networks", networks);
        assert_found(&mut filter, &table, &expected);
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
        assert_found(&mut filter, &table, &elements());
        for _ in 0..2 {
            filter.commit(table.delete()).unwrap();
            assert!(!filter.has(&table).unwrap());
        }
    });
}

#[test]
fn a_table_changed_by_another_program_is_not_intact() {
    for change in [
        "delete table inet lab",
        "delete table arp lab",
        "flush chain arp lab answers",
        "flush set arp lab neighbours",
        "flush chain inet lab raw",
        "add rule inet lab raw drop",
        "chain inet lab input { policy drop; }",
        "flush chain inet lab input; delete chain inet lab input",
    ] {
        in_a_new_namespace(|_| {
            let mut filter = FilterSocket::open().unwrap();
            filter.commit(table().install(&elements())).unwrap();
            run("nft", &[change]);
            assert!(matches!(filter.table_state(&table()).unwrap(), TableState::Different(_)), "{change}");
        });
    }
}

#[test]
fn a_table_without_one_of_its_sets_is_not_intact() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let mut table = table();
        // A set that no rule uses can be deleted without any other change of the table.
        table.sets.push(Set { table: TableKind::Ip, name: "spare", key: ElementKey::Address(Family::V4) });
        filter.commit(table.install(&Elements::new())).unwrap();
        assert!(matches!(filter.table_state(&table).unwrap(), TableState::Intact(_)));
        run("nft", &["delete set inet lab spare"]);
        assert_eq!(
            filter.table_state(&table).unwrap(),
            TableState::Different("a part of the table is missing".to_owned())
        );
    });
}

#[test]
fn the_monitor_reports_the_originator_of_a_table_change_and_ignores_other_tables() {
    in_a_new_namespace(|_| {
        let mut filter = FilterSocket::open().unwrap();
        let table = table();
        filter.commit(table.install(&elements())).unwrap();
        let mut monitor = FilterMonitor::open("lab").unwrap();
        monitor.set_timeout(Duration::from_secs(10)).unwrap();
        run("nft", &["add", "table", "inet", "another"]);
        run("nft", &["add", "table", "ip", "lab"]);
        run("nft", &["delete", "element", "inet", "lab", "peers", "{ fd09::1 }"]);
        filter.commit(table.install(&elements())).unwrap();
        let mut originators = Vec::new();
        while originators.len() < 2 {
            originators.extend(monitor.wait().unwrap());
        }
        let [other, own] = originators.try_into().unwrap();
        assert_eq!(other.name.as_deref(), Some("nft"));
        assert_eq!(own.port, filter.port().unwrap());
        assert_ne!((other.port, other.thread), (own.port, own.thread));
    });
}
