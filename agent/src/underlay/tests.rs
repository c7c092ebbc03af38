use polder_netlink::route::NextHop;

use super::*;

fn address(index: u32, address: &str) -> Address {
    Address { index: IfIndex::new(index), address: address.parse().unwrap(), global: true, temporary: false }
}

/// A host with a front interface (`eth0`, default route) and a back interface (`eth1`, the route to a peer).
fn facts() -> UnderlayInputs {
    let lookup = |index, source: &str| RouteLookup {
        index: IfIndex::new(index),
        next_hop: NextHop::Destination,
        source: source.parse().ok(),
        local: false,
    };
    let interface = |index, name: &str, mtu| (IfIndex::new(index), (name.to_owned(), mtu));
    let network = HostNetwork {
        interfaces: [interface(2, "eth0", 1500), interface(3, "eth1", 9000)].into(),
        layer3_interfaces: BTreeSet::new(),
        own: [IfIndex::new(5)].into(),
        service_interfaces: BTreeSet::new(),
        addresses: vec![
            address(5, "10.244.0.1/32"),
            address(1, "127.0.0.1/8"),
            address(2, "192.0.2.7/24"),
            address(3, "10.0.0.7/24"),
            address(3, "10.0.0.8/24"),
            Address { temporary: true, ..address(3, "fd00::bad/64") },
            address(3, "fd00::7/64"),
            Address { global: false, ..address(3, "fe80::7/64") },
        ],
        routes: vec![
            (RouteTo::Node("n2".parse().unwrap()), lookup(3, "10.0.0.7")),
            (RouteTo::World, lookup(2, "192.0.2.7")),
        ],
        configured: Vec::new(),
    };
    UnderlayInputs { network, ..UnderlayInputs::default() }
}

fn chosen(config: &UnderlayConfig, facts: &UnderlayInputs, current: &Underlay) -> Vec<String> {
    let underlay = Underlay::choose(config, facts, current).unwrap();
    let text =
        |uplink: &Uplink| format!("{} on {} by {}", uplink.address, uplink.interface, uplink.chosen_by);
    underlay.uplinks.values().map(text).collect()
}

#[test]
fn the_route_to_a_peer_is_preferred_to_the_default_route() {
    let chosen = chosen(&UnderlayConfig::default(), &facts(), &Underlay::default());
    assert_eq!(
        chosen,
        ["10.0.0.7 on eth1 by the route to node n2", "fd00::7 on eth1 by the only IPv6 address"]
    );
}

#[test]
fn every_other_address_has_a_reason_why_it_was_not_chosen() {
    let mut facts = facts();
    facts.network.addresses.push(address(4, "10.9.0.7/24"));
    let underlay = Underlay::choose(&UnderlayConfig::default(), &facts, &Underlay::default()).unwrap();
    let others: Vec<_> =
        underlay.others.iter().map(|other| format!("{}: {}", other.address, other.reason)).collect();
    assert_eq!(
        others,
        [
            "192.0.2.7: 10.0.0.7 was chosen by the route to node n2",
            "10.0.0.8: 10.0.0.7 was chosen by the route to node n2",
            "fd00::bad: it is temporary, deprecated or a duplicate",
            "fe80::7: its scope is not global",
            "10.9.0.7: its interface is down",
        ]
    );
}

#[test]
fn a_configured_interface_or_address_is_used_and_must_exist() {
    let interface = UnderlayConfig { interface: Some("eth0".to_owned()), addresses: Vec::new() };
    assert_eq!(
        chosen(&interface, &facts(), &Underlay::default()),
        ["192.0.2.7 on eth0 by underlay.interface"]
    );
    let config =
        |address: &str| UnderlayConfig { interface: None, addresses: vec![address.parse().unwrap()] };
    assert_eq!(
        chosen(&config("10.0.0.8"), &facts(), &Underlay::default()),
        ["10.0.0.8 on eth1 by underlay.addresses"]
    );
    let missing =
        Underlay::choose(&config("10.0.0.9"), &facts(), &Underlay::default()).unwrap_err().to_string();
    assert!(missing.contains("10.0.0.9"), "{missing}");
    let temporary =
        Underlay::choose(&config("fd00::bad"), &facts(), &Underlay::default()).unwrap_err().to_string();
    assert!(temporary.contains("not temporary"), "{temporary}");
}

#[test]
fn a_host_prefix_address_is_not_preferred_and_the_recorded_address_is_kept() {
    let mut facts = facts();
    facts.network.addresses.push(address(3, "10.0.0.50/32"));
    facts.network.routes[0].1.source = "10.0.0.50".parse().ok();
    let first =
        |facts: &UnderlayInputs| chosen(&UnderlayConfig::default(), facts, &Underlay::default()).remove(0);
    assert_eq!(first(&facts), "10.0.0.7 on eth1 by the route to node n2");
    // A starting agent keeps the address of its record as long as that exists.
    facts.registered = vec!["10.0.0.8".parse().unwrap()];
    assert_eq!(first(&facts), "10.0.0.8 on eth1 by this node's own record");
    facts.registered = vec!["10.0.0.99".parse().unwrap()];
    assert_eq!(first(&facts), "10.0.0.7 on eth1 by the route to node n2");
    // In some clouds, a host address is the only address.
    facts.network.addresses.retain(|found| found.address.prefix() == 32 || found.index != IfIndex::new(3));
    assert_eq!(first(&facts), "10.0.0.50 on eth1 by the route to node n2");
}

#[test]
fn a_permanent_address_replaces_a_temporary_source_address_of_the_same_interface() {
    let mut facts = facts();
    facts.network.addresses.push(address(3, "fd00::d/128"));
    facts.network.routes[0].1.source = "fd00::bad".parse().ok();
    let chosen = chosen(&UnderlayConfig::default(), &facts, &Underlay::default());
    assert_eq!(chosen[1], "fd00::7 on eth1 by the route to node n2");
}

#[test]
fn an_address_inside_a_pool_is_not_chosen_if_another_exists() {
    let mut facts = facts();
    facts.network.routes.clear();
    facts.network.addresses = vec![address(2, "192.0.2.7/24"), address(3, "10.244.0.1/24")];
    assert!(Underlay::choose(&UnderlayConfig::default(), &facts, &Underlay::default()).is_err());
    facts.pools = vec!["10.244.0.0/16".parse().unwrap()];
    let chosen = chosen(&UnderlayConfig::default(), &facts, &Underlay::default());
    assert_eq!(chosen, ["192.0.2.7 on eth0 by the only IPv4 address"]);
    // If all addresses are in pools, one of them is used: the pool is refused instead.
    facts.pools = vec!["10.244.0.0/16".parse().unwrap(), "192.0.2.0/24".parse().unwrap()];
    facts.network.addresses.remove(1);
    let chosen = self::chosen(&UnderlayConfig::default(), &facts, &Underlay::default());
    assert_eq!(chosen, ["192.0.2.7 on eth0 by the only IPv4 address"]);
}

#[test]
fn the_used_address_is_kept_while_it_exists() {
    let mut facts = facts();
    let first = Underlay::choose(&UnderlayConfig::default(), &facts, &Underlay::default()).unwrap();
    facts.network.routes.remove(0);
    assert_eq!(Underlay::choose(&UnderlayConfig::default(), &facts, &first).unwrap(), first);
    facts.network.addresses.retain(|address| address.address.ip().to_string() != "10.0.0.7");
    let then = Underlay::choose(&UnderlayConfig::default(), &facts, &first).unwrap();
    assert_eq!(then.address(Family::V4).unwrap().to_string(), "192.0.2.7");
}

#[test]
fn an_address_chosen_while_the_right_interface_was_down_is_replaced() {
    let mut facts = facts();
    let (routes, addresses) = (facts.network.routes.clone(), facts.network.addresses.clone());
    facts.network.routes.clear();
    facts.network.addresses = vec![address(4, "198.51.100.7/24")];
    facts.network.interfaces.insert(IfIndex::new(4), ("docker0".to_owned(), 1500));
    let astray = Underlay::choose(&UnderlayConfig::default(), &facts, &Underlay::default()).unwrap();
    assert_eq!(astray.addresses(), ["198.51.100.7".parse::<IpAddr>().unwrap()]);
    // Also after a restart of the agent.
    facts.registered = astray.addresses();
    facts.network.addresses.extend(addresses);
    facts.network.routes = routes;
    for before in [&astray, &Underlay::default()] {
        let then = Underlay::choose(&UnderlayConfig::default(), &facts, before).unwrap();
        assert_eq!(then.address(Family::V4).unwrap().to_string(), "10.0.0.7");
    }
}

#[test]
fn an_address_on_lo_has_the_mtu_of_the_outgoing_interface() {
    let mut facts = facts();
    facts.network.interfaces.insert(IfIndex::new(1), ("lo".to_owned(), 65536));
    facts.network.addresses.push(address(1, "10.255.0.7/32"));
    facts.network.routes[0].1.source = "10.255.0.7".parse().ok();
    let first = Underlay::choose(&UnderlayConfig::default(), &facts, &Underlay::default()).unwrap();
    let uplink = first.uplinks[Family::V4].as_ref().unwrap();
    assert_eq!((uplink.address.to_string().as_str(), uplink.mtu), ("10.255.0.7", 9000));
    assert_eq!(Underlay::choose(&UnderlayConfig::default(), &facts, &first).unwrap(), first);
    // The address may be configured without a route that uses it.
    facts.network.routes[0].1.source = "10.0.0.7".parse().ok();
    let addresses = vec!["10.255.0.7".parse().unwrap()];
    let config = UnderlayConfig { addresses, ..UnderlayConfig::default() };
    let then = Underlay::choose(&config, &facts, &first).unwrap();
    assert_eq!(then.uplinks[Family::V4].as_ref().map(|uplink| uplink.mtu), Some(1500));
}

#[test]
fn a_host_without_routes_gets_the_settings_as_remedy() {
    let mut facts = facts();
    facts.network.routes.clear();
    facts.network.addresses.retain(|address| address.address.is_ipv4());
    let error =
        Underlay::choose(&UnderlayConfig::default(), &facts, &Underlay::default()).unwrap_err().to_string();
    assert!(error.contains("192.0.2.7 on eth0") && error.contains("Set underlay.interface"), "{error}");
}

#[test]
fn the_address_of_the_node_object_is_preferred_to_the_automatic_choice_but_not_to_the_configuration() {
    let automatic = UnderlayConfig::default();
    let addresses = |addresses: &[&str]| addresses.iter().map(|address| address.parse().unwrap()).collect();
    let mut facts = facts();
    let current = Underlay::choose(&automatic, &facts, &Underlay::default()).unwrap();
    // Not on this host, and of a family: the other family is chosen as without it.
    facts.node_object = addresses(&["198.51.100.9", "10.0.0.8"]);
    assert_eq!(
        chosen(&automatic, &facts, &current),
        ["10.0.0.8 on eth1 by InternalIP of the Node object", "fd00::7 on eth1 by the only IPv6 address"]
    );
    let configured = UnderlayConfig { interface: None, addresses: addresses(&["10.0.0.7"]) };
    assert_eq!(chosen(&configured, &facts, &current), ["10.0.0.7 on eth1 by underlay.addresses"]);
    // A pod's range, and an address from which no peer is reached although peers are known.
    for unusable in ["10.0.0.8", "192.0.2.7"] {
        facts.node_object = addresses(&[unusable]);
        facts.pools = vec!["10.0.0.8/32".parse().unwrap()];
        assert!(chosen(&automatic, &facts, &current)[0].starts_with("10.0.0.7 on eth1"), "{unusable}");
    }
}

#[test]
fn the_underlay_stays_when_the_node_object_is_no_longer_known() {
    let (automatic, mut facts) = (UnderlayConfig::default(), facts());
    facts.node_object = vec!["10.0.0.8".parse().unwrap()];
    let by_node = Underlay::choose(&automatic, &facts, &Underlay::default()).unwrap();
    facts.node_object.clear();
    assert_eq!(Underlay::choose(&automatic, &facts, &by_node).unwrap().addresses(), by_node.addresses());
}
