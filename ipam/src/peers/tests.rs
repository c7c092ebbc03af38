use polder_api::Mac;

use crate::ids::{BootId, MachineId, Nonce};
use crate::record::{PoolRecord, encode};
use crate::store::{Contents, Entry, Update};

use super::*;

/// A cluster of `me`, `a` and `b` with one block each.
struct Cluster {
    entries: Vec<Entry>,
}

fn node(n: u8) -> NodeRecord {
    NodeRecord {
        incarnation: Incarnation::new(format!("i{n}")),
        machine_id: MachineId::new(format!("m{n}")),
        boot_id: BootId::new("b"),
        underlay: vec![IpAddr::from([10, 1, 0, n])],
        gateways: vec![IpAddr::from([10, 244, n, 1])],
        probes: Vec::new(),
        vtep_mac: Mac([2, 0, 0, 0, 0, n]),
        mtu: 1450,
        version: "0".into(),
        kubernetes_uid: None,
    }
}

impl Cluster {
    fn new() -> Self {
        let mut cluster = Self { entries: Vec::new() };
        cluster.put("/polder/v1/pools/p", encode(&PoolRecord::new("10.244.0.0/16".parse().unwrap())));
        for (name, n) in [("me", 0), ("a", 1), ("b", 2)] {
            cluster.node(name, &node(n));
            cluster.block(&format!("10.244.{n}.0/26"), name, n);
        }
        cluster
    }

    fn put(&mut self, key: &str, value: Vec<u8>) {
        self.entries.retain(|entry| entry.key != key);
        let revision = i64::try_from(self.entries.len()).unwrap() + 1;
        self.entries.push(Entry { key: key.to_owned(), value, revision: Revision::new(revision) });
    }

    fn node(&mut self, name: &str, record: &NodeRecord) {
        self.put(&format!("/polder/v1/nodes/{name}"), encode(record));
    }

    fn block(&mut self, block: &str, owner: &str, n: u8) {
        let record = BlockRecord {
            node: owner.parse().unwrap(),
            incarnation: Incarnation::new(format!("i{n}")),
            pool: "p".parse().unwrap(),
            nonce: Nonce::new("x"),
        };
        let key = Key::Block(Block::new(block.parse().unwrap()));
        self.put(&key.to_string(), encode(&record));
    }

    /// The names of the peers with the number of their blocks, and the only problem, if any.
    fn seen(self) -> (Vec<(String, usize)>, String) {
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision: Revision::new(99), entries: self.entries }));
        let validated = validate(&view, &"me".parse().unwrap(), &BTreeSet::new());
        assert!(validated.problems.len() < 2, "{:?}", validated.problems);
        assert_eq!(validated.own_blocks, [Block::new("10.244.0.0/26".parse().unwrap())]);
        let peers = validated.peers.iter().map(|peer| (peer.name.to_string(), peer.blocks.len())).collect();
        (peers, validated.problems.first().map(ToString::to_string).unwrap_or_default())
    }
}

fn both() -> Vec<(String, usize)> {
    vec![("a".to_owned(), 1), ("b".to_owned(), 1)]
}

#[test]
fn only_the_other_nodes_are_peers() {
    assert_eq!(Cluster::new().seen(), (both(), String::new()));
}

#[test]
fn a_node_with_an_address_of_another_node_is_refused() {
    for (change, expected) in [
        (
            NodeRecord { underlay: node(1).underlay, ..node(3) },
            "underlay address 10.1.0.1 is already used by node a",
        ),
        (
            NodeRecord { gateways: node(1).gateways, ..node(3) },
            "gateway address 10.244.1.1 is already used by node a",
        ),
        (
            NodeRecord { vtep_mac: node(1).vtep_mac, ..node(3) },
            "MAC address 02:00:00:00:00:01 is already used by node a",
        ),
        (
            NodeRecord { underlay: node(0).underlay, ..node(3) },
            "underlay address 10.1.0.0 is already used by node me",
        ),
    ] {
        let mut cluster = Cluster::new();
        cluster.node("evil", &change);
        let (peers, problem) = cluster.seen();
        assert_eq!(peers, both());
        assert!(problem.contains("/polder/v1/nodes/evil") && problem.contains(expected), "{problem}");
    }
}

#[test]
fn an_invalid_node_record_is_refused() {
    let multicast = Mac([1, 0, 0, 0, 0, 1]);
    for (change, expected) in [
        (
            NodeRecord { underlay: vec!["127.0.0.1".parse().unwrap()], ..node(3) },
            "underlay address 127.0.0.1 is unspecified, loopback or multicast",
        ),
        (NodeRecord { underlay: vec!["10.244.9.9".parse().unwrap()], ..node(3) }, "inside pool p"),
        (NodeRecord { vtep_mac: multicast, ..node(3) }, "is not a unicast MAC address"),
        (NodeRecord { mtu: 100, ..node(3) }, "its MTU 100"),
        (NodeRecord { underlay: [node(3).underlay, node(4).underlay].concat(), ..node(3) }, "more than one"),
    ] {
        let mut cluster = Cluster::new();
        cluster.node("evil", &change);
        let (peers, problem) = cluster.seen();
        assert_eq!(peers, both());
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn only_the_gateway_outside_all_pools_is_ignored_not_its_node() {
    let mut cluster = Cluster::new();
    let stray =
        NodeRecord { gateways: vec!["10.244.1.1".parse().unwrap(), "fd00::1".parse().unwrap()], ..node(1) };
    cluster.node("a", &stray);
    let (peers, problem) = cluster.seen();
    assert_eq!(peers, both());
    assert!(problem.contains("gateway address fd00::1 is ignored, because it is not in a pool"), "{problem}");
}

#[test]
fn only_a_probe_address_outside_the_nodes_blocks_is_ignored_not_its_node() {
    for (probe, expected) in [
        ("10.244.1.9", ""),
        ("10.244.2.9", "10.244.2.9 is ignored, because it is not in a block"),
        ("10.9.0.1", "10.9.0.1"),
    ] {
        let mut cluster = Cluster::new();
        cluster.node("a", &NodeRecord { probes: vec![probe.parse().unwrap()], ..node(1) });
        let (peers, problem) = cluster.seen();
        assert_eq!(peers, both());
        assert!(problem.contains(expected) && problem.is_empty() == expected.is_empty(), "{problem}");
    }
}

#[test]
fn an_invalid_claim_is_refused_and_gets_no_route() {
    for (block, owner, n, expected) in [
        ("10.9.0.0/26", "a", 1, "not a /26 inside 10.244.0.0/16"),
        ("10.9.0.0/26", "me", 0, "not a /26 inside 10.244.0.0/16"),
        ("10.244.9.0/27", "a", 1, "not a /26 inside 10.244.0.0/16"),
        ("10.244.9.0/26", "nobody", 1, "nobody has no valid node record"),
        ("10.244.9.0/26", "a", 7, "another incarnation of node a"),
    ] {
        let mut cluster = Cluster::new();
        cluster.block(block, owner, n);
        let (peers, problem) = cluster.seen();
        assert_eq!(peers, both());
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn only_a_duplicate_underlay_address_goes_to_the_living_node() {
    let mut cluster = Cluster::new();
    // `b` gets the underlay address of `a`; the record of `b` is newer.
    cluster.node("b", &NodeRecord { underlay: node(1).underlay, ..node(2) });
    let mut view = View::default();
    view.apply(Update::Loaded(Contents { revision: Revision::new(99), entries: cluster.entries.clone() }));
    let names = |view: &View, dead: &[&str]| -> Vec<String> {
        let dead = dead.iter().map(|name| name.parse().unwrap()).collect();
        let validated = validate(view, &"me".parse().unwrap(), &dead);
        validated.peers.iter().map(|peer| peer.name.to_string()).collect()
    };
    assert_eq!(names(&view, &[]), ["a"]);
    assert_eq!(names(&view, &["b"]), ["a"]);
    assert_eq!(names(&view, &["a"]), ["b"]);
    assert_eq!(names(&view, &["a", "b"]), ["a"]);
    // A node that is not alive keeps its gateway address.
    for underlay in [node(2).underlay, node(1).underlay] {
        cluster.node("b", &NodeRecord { underlay, gateways: node(1).gateways, ..node(2) });
        let entries = cluster.entries.clone();
        view.apply(Update::Loaded(Contents { revision: Revision::new(100), entries }));
        assert_eq!(names(&view, &["a"]), ["a"]);
    }
}

#[test]
fn the_older_of_two_overlapping_claims_is_valid() {
    for (first, second) in [("10.244.8.0/26", "10.244.8.0/25"), ("10.244.8.0/25", "10.244.8.64/26")] {
        let mut cluster = Cluster::new();
        cluster.block(first, "a", 1);
        cluster.block(second, "b", 2);
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision: Revision::new(99), entries: cluster.entries }));
        let later = overlapping(&view);
        let (first, second) = (Block::new(first.parse().unwrap()), Block::new(second.parse().unwrap()));
        assert_eq!(later, BTreeMap::from([(second, first)]));
    }
}
