//! Filters as other software creates them.

use polder_netlink::nft::foreign::{ForeignRule, PacketQueues};

use super::*;

fn rule(conditions: &[RuleCondition], verdict: ForeignVerdict) -> ForeignRule {
    ForeignRule { conditions: conditions.to_vec(), verdict }
}

fn from(name: &str) -> RuleCondition {
    RuleCondition::Input(vec![NamePattern::Exactly(name.to_owned())])
}

fn to(name: &str) -> RuleCondition {
    RuleCondition::Output(vec![NamePattern::Exactly(name.to_owned())])
}

fn jump(chain: &str) -> ForeignRule {
    rule(&[], ForeignVerdict::Jump(chain.to_owned()))
}

fn accept(condition: RuleCondition) -> ForeignRule {
    rule(&[condition], ForeignVerdict::Accept)
}

fn filter(
    (family, table, name): (TableFamily, &str, &str),
    policy: Policy,
    chains: &[(&str, Vec<ForeignRule>)],
) -> Filter {
    let chains = chains.iter().map(|(name, rules)| ((*name).to_owned(), rules.clone())).collect();
    let base = BaseChain { family, table: table.to_owned(), name: name.to_owned(), policy };
    Filter { base, chains }
}

const FORWARD: (TableFamily, &str, &str) = (TableFamily::Ip, "filter", "FORWARD");

/// Docker's filter: it accepts packets of its own bridge, and has a chain for the operator.
fn docker(user: Vec<ForeignRule>) -> Filter {
    let forward = vec![
        jump("DOCKER-USER"),
        rule(&[to("docker0"), RuleCondition::Other], ForeignVerdict::Accept),
        rule(&[to("docker0")], ForeignVerdict::Jump("DOCKER".to_owned())),
        accept(from("docker0")),
    ];
    filter(FORWARD, Policy::Drop, &[("FORWARD", forward), ("DOCKER-USER", user)])
}

#[test]
fn a_drop_policy_is_reported_with_its_chain_and_the_accept_commands() {
    let bare = filter(FORWARD, Policy::Drop, &[("FORWARD", Vec::new())]);
    let problem = bare.problem(AttachMode::Bridge, false).unwrap();
    for words in [
        "chain FORWARD of table ip filter",
        "packets from or to pods",
        "`iptables -I FORWARD -i polder0 -j ACCEPT` and `iptables -I FORWARD -o polder0 -j ACCEPT`",
    ] {
        assert!(problem.contains(words), "{problem}");
    }
    let routed = bare.problem(AttachMode::Routed, false).unwrap();
    assert!(routed.contains("-i pld+ -j ACCEPT"), "{routed}");
    let v6 = filter((TableFamily::Ip6, "filter", "FORWARD"), Policy::Drop, &[]);
    assert!(v6.problem(AttachMode::Bridge, false).unwrap().contains("`ip6tables -I FORWARD -i polder0"));
    let own = filter((TableFamily::Inet, "mine", "fwd"), Policy::Drop, &[]);
    let problem = own.problem(AttachMode::Routed, false).unwrap();
    assert!(problem.contains("`nft insert rule inet mine fwd iifname 'pld*' accept`"), "{problem}");
}

#[test]
fn a_chain_that_accepts_one_direction_is_reported_for_the_other_only() {
    let with = |rules: Vec<ForeignRule>| filter(FORWARD, Policy::Drop, &[("FORWARD", rules)]);
    let both = with(vec![accept(from("polder0")), accept(to("polder0"))]);
    assert_eq!(both.problem(AttachMode::Bridge, false), None);
    assert!(both.problem(AttachMode::Routed, false).is_some(), "the interfaces of pods are others");
    let one = with(vec![accept(from("polder0"))]).problem(AttachMode::Bridge, false).unwrap();
    assert!(one.contains("packets to pods") && !one.contains("-i polder0"), "{one}");
    let all = NamePattern::Prefixed("pld".to_owned());
    let routed = with(vec![
        accept(RuleCondition::Input(vec![NamePattern::Exactly("eth0".to_owned()), all.clone()])),
        accept(RuleCondition::Output(vec![all])),
    ]);
    assert_eq!(routed.problem(AttachMode::Routed, false), None);
    assert_eq!(with(vec![rule(&[], ForeignVerdict::Accept)]).problem(AttachMode::Bridge, false), None);
    let narrow = with(vec![rule(&[from("polder0"), to("polder0")], ForeignVerdict::Accept)]);
    assert!(narrow.problem(AttachMode::Bridge, false).is_some(), "only what stays on the node is accepted");
}

#[test]
fn a_chain_that_passes_pod_packets_to_a_program_does_not_drop_them_by_default() {
    let queue = ForeignVerdict::Queue(PacketQueues { first: 0, count: 1, bypass: false });
    let with = |conditions: &[RuleCondition]| {
        let rules = vec![rule(conditions, queue.clone()), rule(&[], ForeignVerdict::Drop)];
        filter(FORWARD, Policy::Drop, &[("FORWARD", rules)]).problem(AttachMode::Bridge, false)
    };
    assert_eq!(with(&[]), None);
    assert!(with(&[from("docker0")]).is_some(), "only packets of another interface are queued");
}

#[test]
fn docker_and_ufw_filters_get_commands_for_their_own_chains() {
    let problem = docker(vec![rule(&[], ForeignVerdict::Return)]).problem(AttachMode::Bridge, false).unwrap();
    assert!(problem.contains("`iptables -I DOCKER-USER -i polder0 -j ACCEPT`"), "{problem}");
    let extended =
        docker(vec![accept(from("polder0")), accept(to("polder0")), rule(&[], ForeignVerdict::Return)]);
    assert_eq!(extended.problem(AttachMode::Bridge, false), None);
    let ufw = |user: Vec<ForeignRule>| {
        let chains = [
            ("FORWARD", vec![jump("ufw-before-forward")]),
            ("ufw-before-forward", vec![accept(RuleCondition::Other), jump("ufw-user-forward")]),
            ("ufw-user-forward", user),
        ];
        filter(FORWARD, Policy::Drop, &chains).problem(AttachMode::Bridge, false)
    };
    let problem = ufw(Vec::new()).unwrap();
    assert!(
        problem.contains("`ufw route allow in on polder0` and `ufw route allow out on polder0`"),
        "{problem}"
    );
    assert_eq!(ufw(vec![accept(from("polder0")), accept(to("polder0"))]), None);
}

#[test]
fn a_chain_with_a_final_drop_rule_drops_despite_an_accept_policy() {
    let firewalld = |policies: Vec<ForeignRule>, zones: Vec<ForeignRule>| {
        let refuse = rule(&[], ForeignVerdict::Drop);
        let chains = [
            (
                "filter_FORWARD",
                vec![accept(RuleCondition::Other), jump("filter_FORWARD_ZONES"), refuse.clone()],
            ),
            (
                "filter_FORWARD_ZONES",
                [zones, vec![rule(&[], ForeignVerdict::Goto("public".to_owned()))]].concat(),
            ),
            ("public", vec![jump("policies"), refuse]),
            ("policies", policies),
            ("trusted", vec![rule(&[], ForeignVerdict::Accept)]),
        ];
        let base = (TableFamily::Inet, "firewalld", "filter_FORWARD");
        filter(base, Policy::Accept, &chains).problem(AttachMode::Bridge, false)
    };
    let problem = firewalld(Vec::new(), Vec::new()).unwrap();
    assert!(
        problem.contains("table inet firewalld") && problem.contains("firewall-cmd --reload"),
        "{problem}"
    );
    let zones = vec![rule(&[from("polder0")], ForeignVerdict::Goto("trusted".to_owned()))];
    assert!(firewalld(Vec::new(), zones.clone()).unwrap().contains("no rule that accepts packets to pods"));
    assert_eq!(firewalld(vec![accept(to("polder0"))], zones), None);
}

#[test]
fn the_evaluation_of_chains_that_jump_in_a_circle_ends() {
    let circle = [("FORWARD", vec![jump("a")]), ("a", vec![jump("FORWARD")])];
    assert!(filter(FORWARD, Policy::Drop, &circle).problem(AttachMode::Bridge, false).is_some());
}

#[test]
fn legacy_iptables_is_reported_with_the_commands_to_check_and_accept() {
    let said = legacy_iptables_problem(Family::V6, AttachMode::Bridge);
    for words in ["/proc/net/ip6_tables_names", "`ip6tables-legacy -S FORWARD`", "-o polder0 -j ACCEPT"] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn an_input_chain_that_drops_is_reported_with_the_command_that_accepts_tunnels() {
    let input = |table, name, user: &str| {
        let chains =
            [(name, vec![accept(from("lo")), accept(RuleCondition::Other), jump(user)]), (user, Vec::new())];
        filter((TableFamily::Ip, table, name), Policy::Drop, &chains)
            .tunnel_problem(8472, &["eth1".to_owned()].into(), &BTreeSet::new())
            .unwrap()
    };
    assert!(input("filter", "INPUT", "x").contains("`iptables -I INPUT -p udp --dport 8472 -j ACCEPT`"));
    assert!(input("filter", "INPUT", "ufw-user-input").contains("`ufw allow 8472/udp`"));
    assert!(input("firewalld", "filter_INPUT", "x").contains("--zone=ZONE --add-port=8472/udp"));
    assert!(input("mine", "in", "x").contains("`nft insert rule ip mine in udp dport 8472 accept`"));
    let open = filter((TableFamily::Inet, "mine", "in"), Policy::Accept, &[("in", vec![jump("x")])]);
    assert_eq!(open.tunnel_problem(8472, &["eth1".to_owned()].into(), &BTreeSet::new()), None);
}

fn pods() -> PodTraffic {
    PodTraffic {
        pools: vec![("10.244.0.0/16".parse().unwrap(), 26)],
        ingress_interfaces: BTreeSet::from(["eth0".to_owned()]),
        ..PodTraffic::default()
    }
}

fn destination(network: &str) -> RuleCondition {
    RuleCondition::Destination(network.parse().unwrap())
}

#[test]
fn a_rule_that_drops_packets_between_pods_is_reported_with_an_accept_command() {
    for (conditions, base_hook, command) in [
        (
            vec![destination("10.244.0.0/16")],
            BaseHook::Forwarded,
            "insert rule inet mine c ip saddr 10.244.0.0/16",
        ),
        (
            vec![destination("10.0.0.0/8")],
            BaseHook::Incoming,
            "insert rule inet mine c ip saddr 10.244.0.0/16",
        ),
        (
            vec![destination("10.244.3.0/24")],
            BaseHook::Outgoing,
            "insert rule inet mine c ip saddr 10.244.0.0/16",
        ),
        (
            vec![from("eth0"), to("polder0")],
            BaseHook::Forwarded,
            "insert rule inet mine c ip daddr 10.244.0.0/16",
        ),
        (vec![from("polder.vx")], BaseHook::Incoming, "insert rule inet mine c ip daddr 10.244.0.0/16"),
    ] {
        let drop = rule(&conditions, ForeignVerdict::Drop);
        let filter = filter((TableFamily::Inet, "mine", "c"), Policy::Accept, &[("c", vec![drop])]);
        let problem = filter.pod_rule_problem(base_hook, AttachMode::Bridge, &pods()).unwrap_or_default();
        assert!(problem.contains(command), "{conditions:?}: {problem}");
    }
}

#[test]
fn rules_that_do_not_drop_packets_between_pods_are_not_reported() {
    for (conditions, base_hook) in [
        (vec![destination("192.0.2.0/24")], BaseHook::Forwarded),
        (vec![destination("10.244.1.7/32")], BaseHook::Forwarded),
        (vec![destination("10.244.0.0/16"), RuleCondition::Other], BaseHook::Forwarded),
        (vec![destination("10.244.0.0/16"), RuleCondition::Family(Family::V6)], BaseHook::Forwarded),
        (vec![from("docker0")], BaseHook::Forwarded),
        (vec![from("eth0"), to("docker0")], BaseHook::Forwarded),
        (vec![to("polder0")], BaseHook::Incoming),
    ] {
        let drop = rule(&conditions, ForeignVerdict::Drop);
        let filter = filter((TableFamily::Inet, "mine", "c"), Policy::Accept, &[("c", vec![drop])]);
        assert_eq!(filter.pod_rule_problem(base_hook, AttachMode::Bridge, &pods()), None, "{conditions:?}");
    }
    // A packet that an earlier rule accepts is not dropped.
    let rules = vec![accept(destination("10.244.0.0/16")), rule(&[], ForeignVerdict::Drop)];
    let filter = filter((TableFamily::Inet, "mine", "c"), Policy::Accept, &[("c", rules)]);
    assert_eq!(filter.pod_rule_problem(BaseHook::Forwarded, AttachMode::Bridge, &pods()), None);
}
