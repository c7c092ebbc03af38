use super::*;

use crate::Revision;

fn entry(key: &str, value: &str, revision: Revision) -> Entry {
    Entry { key: format!("/polder/v1/{key}"), value: value.into(), revision }
}

fn changed(revision: Revision, key: &str, value: Option<&str>) -> Update {
    let entry = value.map(|value| entry(key, value, revision));
    Update::Changed { revision, changes: vec![KeyChange { key: format!("/polder/v1/{key}"), entry }] }
}

/// The key of pool p.
const P: &str = "/polder/v1/pools/p";

const POOL: &str = r#"{"cidr":"10.0.0.0/16","block_length":26,"state":"active"}"#;

fn loaded() -> View {
    let mut view = View::default();
    view.apply(Update::Loaded(Contents {
        revision: Revision::new(7),
        entries: vec![entry("pools/p", POOL, Revision::new(5))],
    }));
    view
}

#[test]
fn the_last_valid_version_of_an_unreadable_record_stays_in_use() {
    let mut view = loaded();
    view.apply(changed(Revision::new(8), "pools/p", Some("{}")));
    assert!(view.refused[P].to_string().contains("missing field"));
    assert_eq!(view.pools.len(), 1);
    let entries = vec![entry("pools/p", "{}", Revision::new(8))];
    view.apply(Update::Loaded(Contents { revision: Revision::new(8), entries }));
    assert_eq!((view.pools.len(), view.refused.len()), (1, 1), "after another load, too");
    view.apply(changed(Revision::new(9), "pools/p", Some(POOL)));
    assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
    view.apply(changed(Revision::new(10), "pools/p", None));
    assert!(view.pools.is_empty());
}

#[test]
fn the_settings_of_a_lost_cluster_are_remembered() {
    const CLUSTER: &str = r#"{"id":"c","backend":"auto","attach":"bridge","vxlan":{"vni":1,"port":8472},
        "masquerade":{"enabled":true,"except":[]}}"#;
    let mut view = loaded();
    view.apply(changed(Revision::new(8), "cluster", Some(CLUSTER)));
    let settings = view.settings().unwrap();
    assert_eq!((settings.cluster.id.to_string().as_str(), settings.pools.len()), ("c", 1));
    let empty = || Update::Loaded(Contents { revision: Revision::new(1), entries: Vec::new() });
    view.apply(empty());
    view.apply(empty());
    assert_eq!((view.cluster.is_none(), view.settings()), (true, Some(settings)));
}

#[test]
fn only_records_lost_without_a_deletion_are_counted() {
    const CLAIM: &str = r#"{"node":"n","incarnation":"i","pool":"p","nonce":"x"}"#;
    let mut view = loaded();
    view.apply(changed(Revision::new(8), "blocks/4-0a000000-26", Some(CLAIM)));
    assert_eq!((view.blocks.len(), view.losses), (1, 0), "{:?}", view.refused);
    let empty = || Update::Loaded(Contents { revision: Revision::new(9), entries: Vec::new() });
    view.apply(empty());
    assert_eq!(view.losses, 1);
    view.apply(empty());
    view.apply(changed(Revision::new(10), "blocks/4-0a000000-26", Some(CLAIM)));
    view.apply(changed(Revision::new(11), "blocks/4-0a000000-26", None));
    assert_eq!(view.losses, 1, "a claim that is deleted is not lost");
}

#[test]
fn an_older_state_of_the_datastore_counts_as_a_loss() {
    let reservation = |generation: u64| format!(r#"{{"owner":"d/a","generation":{generation}}}"#);
    let load = |revision, generation| {
        let reservation = entry("reservations/10.9.0.1", &reservation(generation), revision);
        Update::Loaded(Contents {
            revision,
            entries: vec![entry("pools/p", POOL, Revision::new(5)), reservation],
        })
    };
    let mut view = loaded();
    view.apply(load(Revision::new(8), 2));
    assert_eq!(view.losses, 0);
    view.apply(load(Revision::new(9), 1));
    assert_eq!(view.losses, 1, "an earlier hand-over");
    view.apply(load(Revision::new(8), 1));
    assert_eq!(view.losses, 2, "an earlier revision");
}

#[test]
fn a_new_load_replaces_everything() {
    let mut view = loaded();
    view.apply(changed(Revision::new(8), "strange", Some("{}")));
    view.apply(Update::Loaded(Contents { revision: Revision::new(3), entries: Vec::new() }));
    assert_eq!((view.pools.len(), view.refused.len(), view.revision.number()), (0, 0, 3));
}

#[test]
fn the_view_stays_while_the_datastore_is_unreachable() {
    let mut view = loaded();
    let gone = Interruption::Cancelled { reason: "gone".to_owned() };
    view.apply(Update::Lost { reason: gone.clone() });
    assert_eq!((view.pools.len(), view.lost.clone()), (1, Some(gone)));
    view.apply(Update::Back { revision: Revision::new(7) });
    assert_eq!(view.lost, None);
}

#[test]
fn pods_get_an_address_of_each_family_with_an_active_pool() {
    let mut view = loaded();
    assert_eq!(view.families(), [Family::V4].into());
    view.apply(changed(
        Revision::new(8),
        "pools/six",
        Some(r#"{"cidr":"fd00::/64","block_length":122,"state":"draining"}"#),
    ));
    assert_eq!(view.families(), [Family::V4].into());
    view.apply(changed(
        Revision::new(9),
        "pools/six",
        Some(r#"{"cidr":"fd00::/64","block_length":122,"state":"active"}"#),
    ));
    assert_eq!(view.families(), [Family::V4, Family::V6].into());
}

#[test]
fn a_pool_is_refused_while_it_contains_the_nodes_own_address() {
    let mut view = loaded();
    view.set_addresses_in_use(vec!["10.0.9.9".parse().unwrap()], Vec::new());
    assert!(view.pools.is_empty());
    assert!(view.refused[P].to_string().contains("this node's own address 10.0.9.9"));
    view.apply(changed(Revision::new(8), "pools/p", Some(POOL)));
    assert!(view.pools.is_empty(), "a new revision does not change that");
    view.set_addresses_in_use(vec!["10.1.9.9".parse().unwrap()], Vec::new());
    assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
}

#[test]
fn an_unreadable_record_of_an_unusable_pool_is_reported_until_it_can_be_decoded() {
    let mut view = loaded();
    let inside = vec!["10.0.9.9".parse().unwrap()];
    view.set_addresses_in_use(inside.clone(), Vec::new());
    view.apply(changed(Revision::new(8), "pools/p", Some("{}")));
    assert!(view.refused[P].to_string().contains("missing field"), "{}", view.refused[P]);
    view.set_addresses_in_use(vec!["10.1.9.9".parse().unwrap()], Vec::new());
    assert_eq!(view.pools.len(), 1, "the last valid version is usable");
    assert!(view.refused[P].to_string().contains("missing field"), "{}", view.refused[P]);
    view.set_addresses_in_use(inside, Vec::new());
    assert!(view.pools.is_empty());
    assert!(view.refused[P].to_string().contains("missing field"), "{}", view.refused[P]);
    view.apply(changed(Revision::new(9), "pools/p", Some(POOL)));
    assert!(view.refused[P].to_string().contains("this node's own address"), "{}", view.refused[P]);
    view.set_addresses_in_use(Vec::new(), Vec::new());
    assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
}

fn needing(address: &str) -> Vec<RequiredRange> {
    let what = needed::RequiredFor::Store("the address of etcd".to_owned());
    vec![RequiredRange::host(address.parse().unwrap(), what)]
}

const CLAIM: &str = r#"{"node":"n","incarnation":"i","pool":"p","nonce":"x"}"#;

fn node(address: &str) -> String {
    format!(
        r#"{{"incarnation":"i","machine_id":"m","boot_id":"b","underlay":["{address}"],"gateways":[],
            "vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0"}}"#
    )
}

#[test]
fn a_pool_that_contains_a_needed_address_is_refused_with_the_remedy() {
    let mut view = loaded();
    view.set_addresses_in_use(Vec::new(), needing("10.0.9.9"));
    assert!(view.pools.is_empty() && view.families().is_empty());
    let reason = view.refused[P].to_string();
    for expected in ["10.0.9.9, the address of etcd", "polderctl pool remove p"] {
        assert!(reason.contains(expected), "{reason}");
    }
    assert!(view.any_pool(&"p".parse().unwrap()).is_some());
    view.set_addresses_in_use(Vec::new(), needing("10.1.9.9"));
    assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
}

#[test]
fn a_claimed_pool_with_a_needed_address_stays_in_use_with_a_warning() {
    let mut view = loaded();
    view.apply(changed(Revision::new(8), "blocks/4-0a000000-26", Some(CLAIM)));
    view.set_addresses_in_use(Vec::new(), needing("10.0.9.9"));
    assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
    assert!(view.doubtful[P].to_string().contains("10.0.9.9, the address of etcd"));
    view.apply(changed(Revision::new(9), "blocks/4-0a000000-26", None));
    assert_eq!((view.pools.len(), view.refused.len(), view.doubtful.len()), (0, 1, 0));
}

#[test]
fn a_pool_around_an_underlay_address_is_used_only_if_it_is_claimed() {
    let mut view = loaded();
    view.apply(changed(Revision::new(8), "nodes/n", Some(&node("10.0.0.7"))));
    assert!(view.pools.is_empty(), "no node has claimed a block of the pool");
    assert!(view.refused[P].to_string().contains("the underlay address of node n"));
    view.apply(changed(Revision::new(9), "nodes/n", Some(&node("10.1.0.7"))));
    assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
    view.apply(changed(Revision::new(10), "blocks/4-0a000000-26", Some(CLAIM)));
    view.apply(changed(Revision::new(11), "nodes/n", Some(&node("10.0.0.7"))));
    assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
}

#[test]
fn a_pool_of_a_special_range_is_refused_even_if_it_is_claimed() {
    let multicast = r#"{"cidr":"ff02::/64","block_length":122,"state":"active"}"#;
    let claim = CLAIM.replace(r#""p""#, r#""odd""#);
    let mut view = loaded();
    view.apply(changed(Revision::new(8), "pools/odd", Some(multicast)));
    view.apply(changed(Revision::new(9), "blocks/6-ff020000000000000000000000000000-122", Some(&claim)));
    assert_eq!((view.pools.len(), view.blocks.len()), (1, 1), "{:?}", view.refused);
    let reason = view.refused["/polder/v1/pools/odd"].to_string();
    assert!(reason.contains("multicast") && reason.contains("polderctl pool remove odd"), "{reason}");
    assert_eq!(view.families(), [Family::V4].into());
}
