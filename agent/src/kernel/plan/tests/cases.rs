//! Single cases.

use super::*;

#[test]
fn a_recreated_device_gets_its_addresses_and_routes_back() {
    let world = World { peers: BTreeMap::from([(1, (false, 1))]), ..node_without_peers(&[1]) };
    let mut model = Model::of(&world);
    model.state.links.get_mut(&Device::Bridge).unwrap().kind = DeviceKind::Foreign;
    let changes = model.apply_plan_for(&world, Prune::Yes);
    let done: Vec<_> = changes.iter().map(ToString::to_string).collect();
    for part in
        ["delete polder0", "create polder0", "add address 10.244.0.0/32", "route 10.244.0.0/26 dev polder0"]
    {
        assert!(done.iter().any(|done| done.contains(part)), "{part} is not in {done:#?}");
    }
    assert!(!done.iter().any(|done| done.contains("10.244.1.0")), "the peer is not affected: {done:#?}");
}

#[test]
fn a_bridge_that_filters_vlans_is_adjusted_and_not_recreated() {
    let world = node_without_peers(&[1]);
    let mut model = Model::of(&world);
    model.state.links.get_mut(&Device::Bridge).unwrap().kind = DeviceKind::Bridge { filters_vlans: true };
    let changes = model.apply_plan_for(&world, Prune::Yes);
    assert!(matches!(changes.as_slice(), [KernelChange::AdjustLink(Device::Bridge, _)]), "{changes:?}");
}

#[test]
fn a_route_that_captures_etcd_is_deleted_before_the_records_are_known() {
    let world = node_without_peers(&[]);
    let mut desired = world.desired(&BTreeSet::new());
    let etcd = RequiredRange::host("10.99.0.5".parse().unwrap(), RequiredFor::Store("etcd".to_owned()));
    desired.guard = Guard::new(&[etcd], std::iter::empty());
    let mut actual = Model::of(&world).actual(&desired.table);
    let unreachable = OwnRoute { target: RouteTarget::Unreachable, source: None, mtu: None };
    let [capturing, harmless] = ["10.99.0.0/24", "10.98.0.0/24"].map(|range| range.parse().unwrap());
    actual.state.routes.insert(capturing, unreachable.clone());
    actual.state.routes.insert(harmless, unreachable);
    // With the metric of an earlier release: one beside a desired route has precedence over it.
    let own = *desired.state.routes.keys().next().unwrap();
    let old = [capturing, harmless, own].map(|destination| ConflictingRoute { destination, priority: 84 });
    actual.state.conflicting_routes = old.into();
    let mut changes = plan(&desired, &actual, Prune::No);
    assert_eq!(changes.remove(0), KernelChange::DeleteRoute(capturing));
    changes.sort_by_key(|change| *change != KernelChange::DeleteConflicting(old[0]));
    assert_eq!(changes, [old[0], old[2]].map(KernelChange::DeleteConflicting));
}

#[test]
fn a_host_port_of_another_pod_is_replaced_although_records_may_be_missing() {
    let world = node_without_peers(&[1]);
    let mut model = Model::of(&world);
    let elements = &mut model.filter.as_mut().unwrap().1;
    let port = elements["ports4"].first().cloned().unwrap();
    let earlier = Element::port(None, 6, 8001, "10.244.0.9:80".parse().unwrap());
    assert!(earlier != port && earlier.key() == port.key());
    elements.insert("ports4", [earlier.clone()].into());
    let changes = model.apply_plan_for(&world, Prune::No);
    let replaced = KernelChange::UpdateSet { set: "ports4", add: vec![port], remove: vec![earlier] };
    assert!(changes == [replaced.clone()] && replaced.adds_host_ports(), "{changes:?}");
}
