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
            kubernetes_uid: None,
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
        Decision::NothingToDo(message) => panic!("{message}"),
    }
}

fn already(change: Result<Decision, NotChanged>) -> String {
    match change.unwrap() {
        Decision::NothingToDo(message) => message,
        Decision::Commit { success_message, .. } => panic!("{success_message}"),
    }
}

#[test]
fn adding_a_pool_compares_all_ranges_with_the_view_revision() {
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
fn a_pool_that_overlaps_another_is_refused() {
    let view = Cluster::new().view();
    for cidr in ["10.0.0.0/24", "10.0.0.64/26", "10.0.0.0/8"] {
        let message = add(&view, &pool("two", cidr)).unwrap_err().to_string();
        assert!(message.contains(&format!("{cidr} overlaps pool p (10.0.0.0/24)")), "{message}");
    }
    assert!(add(&view, &pool("six", "fd00::/64")).is_ok());
}

#[test]
fn an_unreadable_pool_record_blocks_every_new_pool() {
    let mut cluster = Cluster::new();
    cluster.put("/polder/v1/pools/odd".into(), b"{}".to_vec());
    let message = add(&cluster.view(), &pool("two", "10.1.0.0/24")).unwrap_err().to_string();
    assert!(message.contains("/polder/v1/pools/odd cannot be read"), "{message}");
    assert!(matches!(remove(&cluster.view(), &name("odd")), Err(NotChanged::Unreadable { .. })));
}

#[test]
fn a_pool_must_not_contain_foreign_blocks_or_addresses() {
    let refused = |prepare: &dyn Fn(&mut Cluster)| {
        let mut cluster = Cluster::new();
        prepare(&mut cluster);
        add(&cluster.view(), &pool("two", "10.1.0.0/24")).map(drop).map_err(|error| error.to_string())
    };
    let message = refused(&|cluster| cluster.block("10.1.0.64/26", "n1", "gone")).unwrap_err();
    assert!(message.contains("block 10.1.0.64/26, which was claimed from pool gone"), "{message}");
    let message = refused(&|cluster| cluster.block("10.0.0.0/12", "n1", "gone")).unwrap_err();
    assert!(message.contains("block 10.0.0.0/12"), "one that is larger: {message}");
    let message = refused(&|cluster| {
        let key = Key::Block(Block::new("10.1.0.0/26".parse().unwrap()));
        cluster.put(key.to_string(), b"?".to_vec());
    });
    assert!(message.unwrap_err().contains("block 10.1.0.0/26 is inside"));
    let message = refused(&|cluster| cluster.node("n9", "10.1.0.9")).unwrap_err();
    assert!(message.contains("10.1.0.9, the underlay address of node n9,"), "{message}");
    let message = refused(&|cluster| cluster.reserve("10.1.0.7")).unwrap_err();
    assert!(message.contains("10.1.0.7, which is reserved,"), "{message}");
    refused(&|cluster| cluster.block("10.1.0.64/26", "n1", "two"))
        .expect("a block of the same pool name is allowed: the pool record was lost");
    refused(&|cluster| cluster.node("n9", "10.2.0.9")).unwrap();
    refused(&|cluster| cluster.reserve("10.2.0.7")).unwrap();
}

#[test]
fn a_pool_name_can_be_added_again_only_with_the_same_parameters() {
    let view = Cluster::new().view();
    assert!(already(add(&view, &pool("p", "10.0.0.0/24"))).contains("already exists"));
    let mut other = pool("p", "10.0.0.0/24");
    other.nodes.insert("zone".into(), "a".into());
    for other in [pool("p", "10.9.0.0/24"), pool("p", "10.0.0.0/25"), other] {
        let message = add(&view, &other).unwrap_err().to_string();
        assert!(message.contains("as 10.0.0.0/24 in blocks of /26, for all nodes"), "{message}");
    }
}

#[test]
fn adding_a_drained_pool_again_makes_it_active() {
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
fn draining_the_last_active_pool_of_a_family_shows_a_warning() {
    let mut cluster = Cluster::new();
    cluster.block("10.0.0.0/26", "n1", "p");
    let message = |cluster: &Cluster| match drain(&cluster.view(), &name("p")).unwrap() {
        Decision::Commit { success_message, .. } => success_message,
        Decision::NothingToDo(message) => panic!("{message}"),
    };
    assert!(message(&cluster).contains("no other active IPv4 pool"), "{}", message(&cluster));
    cluster.pool("two", &PoolRecord::new("10.1.0.0/24".parse().unwrap()));
    assert!(!message(&cluster).contains("no other active"), "{}", message(&cluster));
}

#[test]
fn only_an_unused_pool_is_removed() {
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
    let message = remove(&cluster.view(), &name("p")).unwrap_err().to_string();
    assert!(
        message.contains("2 blocks are claimed (n1: 2)") && message.contains("drain it first"),
        "{message}"
    );
    assert_eq!(remove(&cluster.view(), &name("q")), Err(NotChanged::Unknown(name("q"))));
}

#[test]
fn a_pool_with_a_reserved_address_is_not_removed() {
    let mut cluster = Cluster::new();
    let record = PoolRecord {
        purpose: Purpose::Reservations,
        state: PoolState::Draining,
        ..PoolRecord::new("10.2.0.0/24".parse().unwrap())
    };
    cluster.pool("static", &record);
    cluster.reserve("10.2.0.7");
    let message = remove(&cluster.view(), &name("static")).unwrap_err().to_string();
    assert!(message.contains("e.g. 10.2.0.7") && message.contains("polderctl ipam release"), "{message}");
    assert!(remove(&cluster.view(), &name("p")).is_ok(), "a pool without that reservation is removed");
}

#[test]
fn a_pool_that_covers_a_needed_address_is_refused_with_the_reason() {
    use crate::needed::{RequiredFor, RequiredRange};

    let mut view = Cluster::new().view();
    view.own_addresses = vec!["10.1.0.1".parse().unwrap()];
    view.needed = vec![
        RequiredRange {
            range: "10.1.0.0/24".parse().unwrap(),
            what: RequiredFor::Network("eth0".to_owned()),
        },
        RequiredRange::host("10.1.0.254".parse().unwrap(), RequiredFor::Gateway),
        RequiredRange::host(
            "10.9.0.5".parse().unwrap(),
            RequiredFor::Store("the address of etcd (etcd.example)".to_owned()),
        ),
    ];
    for (cidr, expected) in [
        ("10.1.0.0/25", "10.1.0.1, this node's own address, is inside 10.1.0.0/25"),
        ("10.1.0.192/26", "10.1.0.254, a gateway of this node's routes, is inside 10.1.0.192/26"),
        ("10.1.0.128/26", "10.1.0.128/26 is inside 10.1.0.0/24, the network of this node's interface eth0: "),
        ("10.9.0.0/16", "10.9.0.5, the address of etcd (etcd.example), is inside 10.9.0.0/16"),
    ] {
        let message = add(&view, &pool("two", cidr)).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("choose another"), "{cidr}: {message}");
    }
    assert!(add(&view, &pool("two", "10.2.0.0/24")).is_ok());
}

#[test]
fn a_pool_of_a_special_range_is_not_added_but_can_be_removed() {
    let message = add(&Cluster::new().view(), &pool("two", "ff02::/64")).unwrap_err().to_string();
    assert!(message.contains("ff02::/64 cannot be a pool"), "{message}");
    let mut cluster = Cluster::new();
    cluster.pool("odd", &PoolRecord::new("ff02::/64".parse().unwrap()));
    let view = cluster.view();
    assert!(!view.pools.contains_key(&name("odd")));
    assert_eq!(txn(remove(&view, &name("odd"))).writes.len(), 1);
    // It conflicts only with pools that overlap it.
    assert!(add(&view, &pool("two", "10.1.0.0/24")).is_ok());
    let overlapping = add(&view, &pool("two", "ff02::/72")).unwrap_err().to_string();
    assert!(overlapping.contains("overlaps pool odd"), "{overlapping}");
}
