//! Rules as firewalld 1.3.3 creates them with each backend.

use polder_api::BRIDGE;
use polder_ipam::record::AttachMode;
use polder_netlink::nft::foreign::{BaseHook, ForeignRule, NamePattern, Policy};

use super::*;
use crate::host::routing::PodTraffic;

fn rule(conditions: &[RuleCondition], verdict: ForeignVerdict) -> ForeignRule {
    ForeignRule { conditions: conditions.to_vec(), verdict }
}

fn jump(chain: &str) -> ForeignRule {
    rule(&[], ForeignVerdict::Jump(chain.to_owned()))
}

fn goto(conditions: &[RuleCondition], chain: &str) -> ForeignRule {
    rule(conditions, ForeignVerdict::Goto(chain.to_owned()))
}

fn input(name: &str) -> RuleCondition {
    RuleCondition::Input(vec![NamePattern::Exactly(name.to_owned())])
}

fn output(name: &str) -> RuleCondition {
    RuleCondition::Output(vec![NamePattern::Exactly(name.to_owned())])
}

fn source(network: &str) -> RuleCondition {
    RuleCondition::Source(network.parse().unwrap())
}

fn destination(network: &str) -> RuleCondition {
    RuleCondition::Destination(network.parse().unwrap())
}

/// A backend of firewalld.
#[derive(Debug, Clone, Copy)]
enum Backend {
    Nftables,
    Iptables,
}

const BACKENDS: [Backend; 2] = [Backend::Nftables, Backend::Iptables];

impl Backend {
    /// The condition of a rule for a source network. The nftables backend uses table `inet`.
    fn sources(self, network: &str) -> Vec<RuleCondition> {
        match self {
            Self::Nftables => vec![RuleCondition::Family(Family::V4), source(network)],
            Self::Iptables => vec![source(network)],
        }
    }

    /// The chain at the hook (`INPUT` or `FORWARD`), with zones selected by these rules.
    fn filter(self, hook: &str, zones: &[(&str, Vec<ForeignRule>)], selection: Vec<ForeignRule>) -> Filter {
        let beginning = match self {
            Self::Nftables => "filter_",
            Self::Iptables => "",
        };
        let name = format!("{beginning}{hook}");
        let selecting = format!("{name}_ZONES");
        let mut base = vec![
            rule(&[RuleCondition::Other], ForeignVerdict::Accept),
            rule(&[input("lo")], ForeignVerdict::Accept),
            rule(&[RuleCondition::Other], ForeignVerdict::Drop),
        ];
        if let Self::Iptables = self {
            base.push(jump(&format!("{hook}_direct")));
        }
        base.extend([jump(&selecting), rule(&[], ForeignVerdict::Drop)]);
        let zones = zones.iter().map(|(zone, rules)| (self.zone(hook, zone), rules.clone()));
        let chains = zones.chain([(name.clone(), base), (selecting, selection)]).collect();
        let (family, table) = match self {
            Self::Nftables => (TableFamily::Inet, "firewalld"),
            Self::Iptables => (TableFamily::Ip, "filter"),
        };
        Filter { base: BaseChain { family, table: table.to_owned(), name, policy: Policy::Accept }, chains }
    }

    /// The chain of a zone.
    fn zone(self, hook: &str, zone: &str) -> String {
        let direction = if hook == "INPUT" { "IN" } else { "FWD" };
        match self {
            Self::Nftables => format!("filter_{direction}_{zone}"),
            Self::Iptables => format!("{direction}_{zone}"),
        }
    }
}

/// A zone that accepts only some packets.
fn rejecting() -> Vec<ForeignRule> {
    vec![rule(&[RuleCondition::Other], ForeignVerdict::Accept), rule(&[], ForeignVerdict::Drop)]
}

/// A zone with target ACCEPT.
fn accepting() -> Vec<ForeignRule> {
    vec![rule(&[], ForeignVerdict::Accept)]
}

fn port_remedy(backend: Backend, selection: Vec<ForeignRule>) -> String {
    let zones = [("internal", rejecting()), ("public", rejecting())];
    let filter = backend.filter("INPUT", &zones, selection);
    let peers = BTreeSet::from(["10.10.1.2".parse().unwrap(), "10.10.2.3".parse().unwrap()]);
    filter.tunnel_problem(8472, &["eth1".to_owned()].into(), &peers).unwrap()
}

fn open_in(zone: &str) -> String {
    format!(
        "`firewall-cmd --zone={zone} --add-port=8472/udp` and `firewall-cmd --permanent --zone={zone} \
         --add-port=8472/udp`"
    )
}

#[test]
fn the_port_is_opened_in_the_zones_of_the_peers_packets_and_without_a_reload() {
    for backend in BACKENDS {
        let zone = |zone| backend.zone("INPUT", zone);
        let by_interface = vec![goto(&[input("eth1")], &zone("internal")), goto(&[], &zone("public"))];
        let text = port_remedy(backend, by_interface);
        assert!(text.ends_with(&open_in("internal")), "{text}");
        let by_default = vec![goto(&[input("eth0")], &zone("internal")), goto(&[], &zone("public"))];
        let text = port_remedy(backend, by_default);
        assert!(text.ends_with(&open_in("public")) && !text.contains("--reload"), "{text}");
        let by_source = vec![
            goto(&backend.sources("10.10.1.0/24"), &zone("internal")),
            goto(&[input("eth1")], &zone("public")),
        ];
        let text = port_remedy(backend, by_source);
        assert!(text.ends_with(&format!("{}, {}", open_in("internal"), open_in("public"))), "{text}");
    }
}

#[test]
fn a_zone_of_an_ipset_or_a_mac_address_is_left_to_the_operator() {
    for backend in BACKENDS {
        let zone = |zone| backend.zone("INPUT", zone);
        let uncertain =
            vec![goto(&[RuleCondition::Other], &zone("internal")), goto(&[input("eth1")], &zone("public"))];
        for selection in [uncertain, Vec::new()] {
            let text = port_remedy(backend, selection);
            for words in ["--zone=ZONE --add-port=8472/udp`", "--get-active-zones", "with interface eth1"] {
                assert!(text.contains(words), "{text}");
            }
        }
    }
}

#[test]
fn the_iptables_backend_gets_the_remedy_of_firewalld_and_not_of_iptables() {
    for backend in BACKENDS {
        let selection = vec![goto(&[], &backend.zone("FORWARD", "public"))];
        let filter = backend.filter("FORWARD", &[("public", rejecting())], selection);
        assert!(filter.is_firewalld());
        let text = filter.problem(AttachMode::Bridge, false).unwrap();
        for words in ["zones/polder.xml", "policies/polder-pods.xml", "such as the zone of an interface"] {
            assert!(text.contains(words), "{text}");
        }
        assert!(!text.contains("iptables -I"), "{text}");
    }
}

/// The forward chain with the files in `deploy/host/firewalld`, and with the source of another zone.
fn with_source(backend: Backend, network: &str, zone: Vec<ForeignRule>) -> Filter {
    let name = |zone| backend.zone("FORWARD", zone);
    let to_pods = vec![rule(&[output(BRIDGE)], ForeignVerdict::Accept)];
    let zone = [to_pods.clone(), zone].concat();
    let selection = vec![
        goto(&backend.sources(network), &name("other")),
        goto(&[input(BRIDGE)], &name("polder")),
        goto(&[], &name("public")),
    ];
    let zones = [("polder", accepting()), ("public", [to_pods, rejecting()].concat()), ("other", zone)];
    backend.filter("FORWARD", &zones, selection)
}

fn pools() -> Vec<(Cidr, u8)> {
    vec![("fd00:244::/56".parse().unwrap(), 122), ("10.244.0.0/16".parse().unwrap(), 26)]
}

#[test]
fn a_zone_with_the_addresses_of_pods_as_a_source_is_reported_with_the_command_that_removes_it() {
    for backend in BACKENDS {
        for network in ["10.244.0.0/16", "10.0.0.0/8", "10.244.3.64/26"] {
            // The zone forwards between its own addresses (`--add-forward`).
            let forwarding =
                [vec![rule(&[destination(network)], ForeignVerdict::Accept)], rejecting()].concat();
            for zone in [forwarding, rejecting()] {
                let filter = with_source(backend, network, zone);
                assert_eq!(filter.problem(AttachMode::Bridge, true), None);
                let text = filter.source_zone_problem(&pools()).unwrap();
                for command in ["", "--permanent "] {
                    let command = format!("`firewall-cmd {command}--zone=other --remove-source={network}`");
                    assert!(text.contains(&command), "{text}");
                }
            }
        }
        for other in ["192.0.2.0/24", "10.244.3.7/32"] {
            assert_eq!(with_source(backend, other, rejecting()).source_zone_problem(&pools()), None);
        }
        let mut unread = with_source(backend, "10.0.0.0/8", rejecting());
        unread.chains.remove(&backend.zone("FORWARD", "other"));
        assert_eq!(unread.source_zone_problem(&pools()), None, "the rules of the zone are unknown");
        let filter = with_source(backend, "10.0.0.0/8", accepting());
        assert_eq!(filter.source_zone_problem(&pools()), None, "the zone accepts all packets");
    }
}

#[test]
fn a_zone_after_one_that_accepts_all_pods_is_not_reported() {
    let backend = Backend::Nftables;
    let name = |zone| backend.zone("FORWARD", zone);
    for (first, is_reported) in [("10.244.0.0/16", false), ("10.244.3.64/26", true)] {
        let selection = vec![
            goto(&backend.sources(first), &name("trusted")),
            goto(&backend.sources("10.0.0.0/8"), &name("work")),
        ];
        let zones = [("trusted", accepting()), ("work", rejecting())];
        let filter = backend.filter("FORWARD", &zones, selection);
        assert_eq!(filter.source_zone_problem(&pools()).is_some(), is_reported, "{first}");
    }
}

#[test]
fn a_rule_of_firewalld_that_drops_pods_packets_is_removed_with_firewalld() {
    let drop = rule(&[destination("10.244.0.0/16")], ForeignVerdict::Drop);
    let zones = [("public", vec![drop])];
    let filter = Backend::Nftables.filter("FORWARD", &zones, vec![goto(&[], "filter_FWD_public")]);
    let pods = PodTraffic { pools: pools(), ..PodTraffic::default() };
    let text = filter.pod_rule_problem(BaseHook::Forwarded, AttachMode::Bridge, &pods).unwrap();
    assert!(text.contains("Remove that rule from firewalld") && !text.contains("nft insert"), "{text}");
}

#[test]
fn a_reverse_path_filter_of_either_backend_is_reported_with_the_setting_of_firewalld() {
    let base = |family, table: &str, name: &str| BaseChain {
        family,
        table: table.to_owned(),
        name: name.to_owned(),
        policy: Policy::Accept,
    };
    let discovery = rule(&[RuleCondition::Other], ForeignVerdict::Accept);
    let nftables = [RuleCondition::Family(Family::V6), RuleCondition::OtherReversePath];
    let nftables = vec![discovery.clone(), rule(&nftables, ForeignVerdict::Drop)];
    let iptables = vec![
        discovery,
        rule(&[RuleCondition::OtherReversePath], ForeignVerdict::Drop),
        jump("PREROUTING_direct"),
        jump("PREROUTING_ZONES"),
    ];
    let name = "filter_PREROUTING";
    let chains = [(name.to_owned(), nftables)].into();
    let nftables = Filter { base: base(TableFamily::Inet, "firewalld", name), chains };
    let chains = [("PREROUTING".to_owned(), iptables), ("PREROUTING_ZONES".to_owned(), Vec::new())].into();
    let iptables = Filter { base: base(TableFamily::Ip6, "mangle", "PREROUTING"), chains };
    for filter in [nftables, iptables] {
        assert_eq!(filter.reverse_path_problem(&[Family::V4].into()), None);
        let text = filter.reverse_path_problem(&[Family::V6].into()).unwrap();
        assert!(text.contains("IPv6_rpfilter=no") && text.contains("drops IPv6 packets"), "{text}");
    }
}
