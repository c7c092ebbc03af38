use polder_netlink::IfIndex;

use super::*;

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn route(table: u32, destination: &str, priority: u32) -> AnyRoute {
    AnyRoute {
        destination: net(destination),
        table,
        priority,
        action: RouteAction::Forward,
        index: Some(IfIndex::new(2)),
        gateway: Some("192.0.2.9".parse().unwrap()),
        ours: false,
    }
}

fn rule(priority: u32, action: RuleTarget) -> AnyRule {
    AnyRule {
        family: Family::V4,
        priority,
        source: None,
        destination: None,
        input: None,
        otherwise: RuleCoverage::Always,
        inverted: false,
        action,
    }
}

fn lookup(priority: u32, table: u32) -> AnyRule {
    rule(priority, RuleTarget::Table(table, None))
}

fn pods() -> PodTraffic {
    PodTraffic {
        pools: vec![("10.244.0.0/16".parse().unwrap(), 26)],
        leased: vec!["10.244.9.5".parse().unwrap()],
        ingress_interfaces: BTreeSet::from(["eth0".to_owned()]),
    }
}

/// Polder's route to a block and the default rules, with further routes and rules.
fn routing(routes: Vec<AnyRoute>, rules: Vec<AnyRule>) -> Routing {
    let mut rules = [vec![lookup(0, LOCAL), lookup(32766, MAIN), lookup(32767, 253)], rules].concat();
    rules.sort_by_key(|rule| rule.priority);
    Routing {
        own: BTreeSet::from([net("10.244.1.0/26"), net("10.244.0.0/16")]),
        routes,
        rules,
        interfaces: [(2, "eth0"), (7, "polder0")]
            .map(|(index, name)| (IfIndex::new(index), name.to_owned()))
            .into(),
        addresses: Vec::new(),
    }
}

fn said(routes: Vec<AnyRoute>, rules: Vec<AnyRule>) -> Vec<String> {
    problems(&routing(routes, rules), &pods())
}

#[test]
fn a_foreign_route_that_precedes_ours_is_reported_with_the_delete_command() {
    for (route, command) in [
        (route(MAIN, "10.244.1.16/28", 0), "`ip route del 10.244.1.16/28 via 192.0.2.9 dev eth0`"),
        (route(MAIN, "10.244.1.7/32", 500), "`ip route del 10.244.1.7/32 via 192.0.2.9 dev eth0 metric 500`"),
        (route(MAIN, "10.244.1.0/26", 20), "`ip route del 10.244.1.0/26 via 192.0.2.9 dev eth0 metric 20`"),
        (
            AnyRoute {
                action: RouteAction::Drop("blackhole"),
                gateway: None,
                ..route(MAIN, "10.244.1.7/32", 0)
            },
            "`ip route del blackhole 10.244.1.7/32`",
        ),
    ] {
        let said = said(vec![route], Vec::new());
        assert!(said.len() == 1 && said[0].contains(command), "{said:?}");
    }
}

#[test]
fn routes_that_do_not_affect_pod_packets_are_not_reported() {
    let quiet = [
        route(MAIN, "0.0.0.0/0", 0),
        route(MAIN, "10.0.0.0/8", 0),
        route(MAIN, "10.244.0.0/18", 0),
        route(MAIN, "10.244.1.0/26", 100),
        route(100, "10.244.1.7/32", 0),
        // The route of another plugin whose interface has the address.
        route(MAIN, "10.244.9.5/32", 0),
        AnyRoute { ours: true, ..route(MAIN, "10.244.1.7/32", 0) },
        AnyRoute {
            action: RouteAction::Local,
            index: Some(IfIndex::new(7)),
            gateway: None,
            ..route(LOCAL, "10.244.1.1/32", 0)
        },
    ];
    assert_eq!(said(quiet.into(), Vec::new()), Vec::<String>::new());
}

#[test]
fn of_many_routes_eight_are_reported_and_the_rest_counted() {
    let many = (0..30).map(|number| route(MAIN, &format!("10.244.1.{number}/32"), 0)).collect();
    let said = said(many, Vec::new());
    assert!(said.len() == 9 && said[8].contains("22 more problems"), "{said:?}");
}

#[test]
fn a_rule_that_diverts_pod_packets_is_reported_with_the_delete_command() {
    let everywhere = || vec![route(100, "0.0.0.0/0", 0)];
    let from_pool = AnyRule { source: Some(net("10.244.0.0/16")), ..lookup(50, 100) };
    let said_of = said(everywhere(), vec![from_pool.clone()]);
    assert!(said_of[0].contains("`ip rule del pref 50 from 10.244.0.0/16 lookup 100`"), "{said_of:?}");
    for rule in [
        lookup(50, 100),
        AnyRule { destination: Some(net("10.244.1.0/26")), ..lookup(50, 100) },
        AnyRule { input: Some("polder0".to_owned()), ..lookup(50, 100) },
        AnyRule { input: Some("eth0".to_owned()), ..lookup(50, 100) },
        // A rule as wg-quick creates it, without the rule before it.
        AnyRule { otherwise: RuleCoverage::Never, inverted: true, ..lookup(50, 100) },
        rule(50, RuleTarget::Drop("blackhole")),
    ] {
        assert_eq!(said(everywhere(), vec![rule.clone()]).len(), 1, "{rule:?}");
    }
}

#[test]
fn rules_that_do_not_affect_pod_packets_are_not_reported() {
    let everywhere = || vec![route(100, "0.0.0.0/0", 0), route(MAIN, "0.0.0.0/0", 0)];
    for rules in [
        vec![lookup(33000, 100)],
        vec![AnyRule { source: Some(net("192.0.2.7/32")), ..lookup(50, 100) }],
        vec![AnyRule { input: Some("lo".to_owned()), ..lookup(50, 100) }],
        vec![AnyRule { otherwise: RuleCoverage::Never, ..lookup(50, 100) }],
        // The table has no route for pods.
        vec![lookup(50, 101)],
        // An earlier rule sends packets to pods to the main table.
        vec![rule(40, RuleTarget::Table(MAIN, Some(0))), lookup(50, 100)],
        vec![
            AnyRule { destination: Some(net("10.0.0.0/8")), ..lookup(40, MAIN) },
            AnyRule { source: Some(net("10.244.0.0/16")), ..lookup(50, 100) },
        ],
        vec![rule(50, RuleTarget::Table(100, Some(0)))],
    ] {
        assert_eq!(said(everywhere(), rules.clone()), Vec::<String>::new(), "{rules:?}");
    }
}

#[test]
fn a_missing_rule_for_the_main_table_is_reported_with_the_add_command() {
    let mut routing = routing(Vec::new(), Vec::new());
    routing.rules.retain(|rule| rule.priority != USUAL_PRIORITY);
    let said = problems(&routing, &pods());
    assert!(said.len() == 1 && said[0].contains("`ip rule add pref 32766 lookup main`"), "{said:?}");
    let jumped = Routing {
        rules: vec![
            lookup(0, LOCAL),
            rule(10, RuleTarget::Goto(32767)),
            lookup(32766, MAIN),
            lookup(32767, 253),
        ],
        ..routing
    };
    assert_eq!(problems(&jumped, &pods()).len(), 1);
}
