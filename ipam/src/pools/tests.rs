use crate::Cidr;
use crate::Revision;
use crate::ids::{BootId, Incarnation, MachineId, Nonce};
use crate::key::Key;
use crate::pool::default_block_length;
use crate::record::{BlockRecord, NodeRecord, PoolRecord, ReservationRecord, encode};
use crate::store::{Compare, Contents, Entry, Txn, Update, Write};
use crate::transaction::transaction;

use super::*;

/// A cluster with pool `p`, 10.0.0.0/24.
struct Cluster(Vec<Entry>);

impl Cluster {
    fn new() -> Self {
        let mut cluster = Self(Vec::new());
        cluster.pool("p", &PoolRecord::new("10.0.0.0/24".parse().unwrap()));
        cluster
    }

    fn put(&mut self, key: String, value: Vec<u8>) {
        self.0.retain(|entry| entry.key != key);
        let revision = i64::try_from(self.0.len()).unwrap() + 2;
        self.0.push(Entry { key, value, revision: Revision::new(revision) });
    }

    fn pool(&mut self, name: &str, record: &PoolRecord) {
        self.put(Key::Pool(name.parse().unwrap()).to_string(), encode(record));
    }

    fn block(&mut self, block: &str, node: &str, pool: &str) {
        let record = BlockRecord {
            node: node.parse().unwrap(),
            incarnation: Incarnation::new(node),
            pool: pool.parse().unwrap(),
            nonce: Nonce::new("x"),
        };
        self.put(Key::Block(Block::new(block.parse().unwrap())).to_string(), encode(&record));
    }

    fn node(&mut self, name: &str, underlay: &str) {
        let record = NodeRecord {
            incarnation: Incarnation::new(name),
            machine_id: MachineId::new("m"),
            boot_id: BootId::new("b"),
            underlay: vec![underlay.parse().unwrap()],
            gateways: Vec::new(),
            probes: Vec::new(),
            vtep_mac: polder_api::Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            version: "0".into(),
        };
        self.put(Key::Node(name.parse().unwrap()).to_string(), encode(&record));
    }

    fn reserve(&mut self, address: &str) {
        let record = ReservationRecord { owner: "default/db-0".into(), holder: None, generation: 1 };
        self.put(Key::Reservation(address.parse().unwrap()).to_string(), encode(&record));
    }

    fn view(&self) -> View {
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision: Revision::new(50), entries: self.0.clone() }));
        view
    }
}

fn pool(name: &str, cidr: &str) -> Pool {
    let cidr: Cidr = cidr.parse().unwrap();
    let length = default_block_length(cidr.family()).max(cidr.length());
    Pool::new(name.parse().unwrap(), cidr, length, PoolState::Active).unwrap()
}

fn name(text: &str) -> PoolName {
    text.parse().unwrap()
}

fn txn(change: Result<Decision, NotChanged>) -> Txn {
    match change.unwrap() {
        Decision::Commit { change, .. } => transaction(&change),
        Decision::Already(said) => panic!("{said}"),
    }
}

fn already(change: Result<Decision, NotChanged>) -> String {
    match change.unwrap() {
        Decision::Already(said) => said,
        Decision::Commit { done, .. } => panic!("{done}"),
    }
}

#[test]
fn a_pool_is_added_if_no_other_is_newer_than_what_was_looked_at() {
    let txn = txn(add(&Cluster::new().view(), &pool("two", "10.1.0.0/24")));
    assert!(txn.compares.contains(&Compare::absent(&Key::Pool(name("two")))));
    for range in [
        Key::all_pools(),
        Key::all_nodes(),
        Key::all_reservations(),
        Key::blocks_in("10.1.0.0/24".parse().unwrap()),
    ] {
        assert!(
            txn.compares.contains(&Compare::NothingNewer { range, revision: Revision::new(50) }),
            "{:?}",
            txn.compares
        );
    }
    assert_eq!(txn.writes.len(), 1);
}

#[test]
fn a_pool_that_overlaps_another_is_refused_whichever_is_the_larger() {
    let view = Cluster::new().view();
    for cidr in ["10.0.0.0/24", "10.0.0.64/26", "10.0.0.0/8"] {
        let said = add(&view, &pool("two", cidr)).unwrap_err().to_string();
        assert!(said.contains(&format!("{cidr} overlaps pool p (10.0.0.0/24)")), "{said}");
    }
    assert!(add(&view, &pool("six", "fd00::/64")).is_ok());
}

#[test]
fn a_pool_that_cannot_be_read_may_be_anywhere_and_stands_in_the_way_of_all() {
    let mut cluster = Cluster::new();
    cluster.put("/polder/v1/pools/odd".into(), b"{}".to_vec());
    let said = add(&cluster.view(), &pool("two", "10.1.0.0/24")).unwrap_err().to_string();
    assert!(said.contains("/polder/v1/pools/odd cannot be read"), "{said}");
    assert!(matches!(remove(&cluster.view(), &name("odd")), Err(NotChanged::Unreadable { .. })));
}

#[test]
fn what_is_not_the_pools_must_not_be_inside() {
    let refused = |prepare: &dyn Fn(&mut Cluster)| {
        let mut cluster = Cluster::new();
        prepare(&mut cluster);
        add(&cluster.view(), &pool("two", "10.1.0.0/24")).map(drop).map_err(|error| error.to_string())
    };
    let said = refused(&|cluster| cluster.block("10.1.0.64/26", "n1", "gone")).unwrap_err();
    assert!(said.contains("block 10.1.0.64/26, which was claimed from pool gone"), "{said}");
    let said = refused(&|cluster| cluster.block("10.0.0.0/12", "n1", "gone")).unwrap_err();
    assert!(said.contains("block 10.0.0.0/12"), "one that is larger: {said}");
    let said = refused(&|cluster| {
        let key = Key::Block(Block::new("10.1.0.0/26".parse().unwrap()));
        cluster.put(key.to_string(), b"?".to_vec());
    });
    assert!(said.unwrap_err().contains("block 10.1.0.0/26 is inside"));
    let said = refused(&|cluster| cluster.node("n9", "10.1.0.9")).unwrap_err();
    assert!(said.contains("10.1.0.9, the underlay address of node n9,"), "{said}");
    let said = refused(&|cluster| cluster.reserve("10.1.0.7")).unwrap_err();
    assert!(said.contains("10.1.0.7, which is reserved,"), "{said}");
    refused(&|cluster| cluster.block("10.1.0.64/26", "n1", "two")).expect("its own block, for it was lost");
    refused(&|cluster| cluster.node("n9", "10.2.0.9")).unwrap();
    refused(&|cluster| cluster.reserve("10.2.0.7")).unwrap();
}

#[test]
fn adding_a_pool_again_changes_nothing_and_another_of_that_name_is_refused() {
    let view = Cluster::new().view();
    assert!(already(add(&view, &pool("p", "10.0.0.0/24"))).contains("already exists"));
    let mut other = pool("p", "10.0.0.0/24");
    other.nodes.insert("zone".into(), "a".into());
    for other in [pool("p", "10.9.0.0/24"), pool("p", "10.0.0.0/25"), other] {
        let said = add(&view, &other).unwrap_err().to_string();
        assert!(said.contains("as 10.0.0.0/24 in blocks of /26, for all nodes"), "{said}");
    }
}

#[test]
fn a_pool_that_is_drained_is_active_again_when_it_is_added_again() {
    let mut cluster = Cluster::new();
    let draining =
        encode(&PoolRecord { state: PoolState::Draining, ..PoolRecord::new("10.0.0.0/24".parse().unwrap()) });
    let first = txn(drain(&cluster.view(), &name("p")));
    assert_eq!(
        first.compares,
        [Compare::Unchanged { key: "/polder/v1/pools/p".into(), revision: Revision::new(2) }]
    );
    let put = |value: &[u8]| Write::Put { key: "/polder/v1/pools/p".into(), value: value.to_vec() };
    assert_eq!(first.writes, [put(&draining)]);
    cluster.put("/polder/v1/pools/p".into(), draining);
    assert!(already(drain(&cluster.view(), &name("p"))).contains("is already drained"));
    let again = txn(add(&cluster.view(), &pool("p", "10.0.0.0/24")));
    assert_eq!(again.writes, [put(&encode(&PoolRecord::new("10.0.0.0/24".parse().unwrap())))]);
    assert_eq!(drain(&cluster.view(), &name("q")), Err(NotChanged::Unknown(name("q"))));
}

#[test]
fn draining_the_last_pool_of_a_family_says_what_that_means() {
    let mut cluster = Cluster::new();
    cluster.block("10.0.0.0/26", "n1", "p");
    let said = |cluster: &Cluster| match drain(&cluster.view(), &name("p")).unwrap() {
        Decision::Commit { done, .. } => done,
        Decision::Already(said) => panic!("{said}"),
    };
    assert!(said(&cluster).contains("no other active IPv4 pool"), "{}", said(&cluster));
    cluster.pool("two", &PoolRecord::new("10.1.0.0/24".parse().unwrap()));
    assert!(!said(&cluster).contains("no other active"), "{}", said(&cluster));
}

#[test]
fn a_pool_is_removed_if_nothing_of_it_is_in_use_and_only_then() {
    let mut cluster = Cluster::new();
    let txn = txn(remove(&cluster.view(), &name("p")));
    assert_eq!(
        txn.compares,
        [
            Compare::Unchanged { key: "/polder/v1/pools/p".into(), revision: Revision::new(2) },
            Compare::Empty(Key::blocks_in("10.0.0.0/24".parse().unwrap())),
            Compare::NothingNewer { range: Key::all_reservations(), revision: Revision::new(50) },
        ]
    );
    cluster.block("10.0.0.0/26", "n1", "p");
    cluster.block("10.0.0.64/26", "n1", "p");
    let said = remove(&cluster.view(), &name("p")).unwrap_err().to_string();
    assert!(said.contains("2 blocks are claimed (n1: 2)") && said.contains("drain it first"), "{said}");
    assert_eq!(remove(&cluster.view(), &name("q")), Err(NotChanged::Unknown(name("q"))));
}

#[test]
fn a_reserved_address_keeps_its_pool() {
    let mut cluster = Cluster::new();
    let record = PoolRecord {
        purpose: Purpose::Reservations,
        state: PoolState::Draining,
        ..PoolRecord::new("10.2.0.0/24".parse().unwrap())
    };
    cluster.pool("static", &record);
    cluster.reserve("10.2.0.7");
    let said = remove(&cluster.view(), &name("static")).unwrap_err().to_string();
    assert!(said.contains("e.g. 10.2.0.7") && said.contains("polderctl ipam release"), "{said}");
    assert!(remove(&cluster.view(), &name("p")).is_ok(), "one that it does not concern");
}

#[test]
fn a_pool_over_what_this_node_has_to_reach_is_refused_with_what_that_is() {
    use crate::needed::{Needed, NeededFor};

    let mut view = Cluster::new().view();
    view.own = vec!["10.1.0.1".parse().unwrap()];
    view.needed = vec![
        Needed { range: "10.1.0.0/24".parse().unwrap(), what: NeededFor::Network("eth0".to_owned()) },
        Needed::host("10.1.0.254".parse().unwrap(), NeededFor::Gateway),
        Needed::host(
            "10.9.0.5".parse().unwrap(),
            NeededFor::Store("the address of etcd (etcd.example)".to_owned()),
        ),
    ];
    for (cidr, sign) in [
        ("10.1.0.0/25", "10.1.0.1, this node's own address, is inside 10.1.0.0/25"),
        ("10.1.0.192/26", "10.1.0.254, a gateway of this node's routes, is inside 10.1.0.192/26"),
        ("10.1.0.128/26", "10.1.0.128/26 is inside 10.1.0.0/24, the network of this node's interface eth0: "),
        ("10.9.0.0/16", "10.9.0.5, the address of etcd (etcd.example), is inside 10.9.0.0/16"),
    ] {
        let said = add(&view, &pool("two", cidr)).unwrap_err().to_string();
        assert!(said.contains(sign) && said.contains("choose another"), "{cidr}: {said}");
    }
    assert!(add(&view, &pool("two", "10.2.0.0/24")).is_ok());
}

#[test]
fn a_pool_that_pods_cannot_use_is_not_added_and_one_that_is_there_is_removed() {
    let said = add(&Cluster::new().view(), &pool("two", "ff02::/64")).unwrap_err().to_string();
    assert!(said.contains("ff02::/64 cannot be a pool"), "{said}");
    let mut cluster = Cluster::new();
    cluster.pool("odd", &PoolRecord::new("ff02::/64".parse().unwrap()));
    let view = cluster.view();
    assert!(!view.pools.contains_key(&name("odd")));
    assert_eq!(txn(remove(&view, &name("odd"))).writes.len(), 1);
    // It is in nobody's way but its own.
    assert!(add(&view, &pool("two", "10.1.0.0/24")).is_ok());
    let overlapping = add(&view, &pool("two", "ff02::/72")).unwrap_err().to_string();
    assert!(overlapping.contains("overlaps pool odd"), "{overlapping}");
}
