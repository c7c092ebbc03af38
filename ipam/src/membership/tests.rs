//! Tests: a removed node cannot change records, because every change depends on the node's record.

use std::collections::BTreeMap;

use super::*;
use crate::Cidr;
use crate::allocator::DEFAULT_COOL_DOWN;
use crate::ids::{ClusterId, Incarnation, Nonce};
use crate::pool::{Pool, PoolState};
use crate::record::{BlockRecord, ClusterRecord, FenceRecord, PodsGone, PoolRecord};

mod identity;
use crate::Revision;
use crate::change::MOST_RECORDS;
use crate::key::Key;
use crate::record::encode;
use crate::removal::Quarantine;
use crate::store::{Compare, Contents, Entry, Update};
use crate::transaction::transaction;

const NODE_REVISION: Revision = Revision::new(7);
const LATE: Moment = Moment::from_millis(10_000_000);

fn name() -> NodeName {
    "n1".parse().unwrap()
}

fn presence() -> NodePresence {
    NodePresence {
        underlay: vec!["192.0.2.1".parse().unwrap()],
        vtep_mac: "02:00:00:00:00:01".parse().unwrap(),
        mtu: 1450,
        version: "0".to_owned(),
        node_object: NodeObjectState::NotUsed,
    }
}

fn identity() -> NodeIdentity {
    NodeIdentity {
        node: name(),
        incarnation: Incarnation::new("i1"),
        cluster: ClusterId::new("c"),
        member_state: MemberState::Member,
    }
}

/// The view of a registered node, with additional records.
fn view(more: Vec<(Key, Vec<u8>)>) -> View {
    let cluster = ClusterRecord::new(ClusterId::new("c"));
    let NodePresence { underlay, vtep_mac, mtu, version, .. } = presence();
    let node = NodeRecord {
        incarnation: identity().incarnation,
        machine_id: MachineId::new("m"),
        boot_id: BootId::new("b"),
        underlay,
        gateways: Vec::new(),
        probes: Vec::new(),
        vtep_mac,
        mtu,
        version,
        kubernetes_uid: None,
    };
    let mut records = vec![(Key::Cluster, encode(&cluster)), (Key::Node(name()), encode(&node))];
    records.extend(more);
    let entry = |(key, value): (Key, Vec<u8>)| Entry { key: key.to_string(), value, revision: NODE_REVISION };
    let mut view = View::default();
    let entries = records.into_iter().map(entry).collect();
    view.apply(Update::Loaded(Contents { revision: NODE_REVISION, entries }));
    assert_eq!(view.refused, BTreeMap::new());
    view
}

fn step(view: &View, own: NodeAllocations) -> Step {
    step_of_boot("b", NameConflict::None, view, own)
}

fn step_of_boot(boot_id: &str, double: NameConflict, view: &View, own: NodeAllocations) -> Step {
    step_with(view, &Ok(presence()), boot_id, double, own)
}

fn step_with(
    view: &View,
    presence: &Result<NodePresence, NoPresence>,
    boot_id: &str,
    double: NameConflict,
    own: NodeAllocations,
) -> Step {
    let mut quarantine = Quarantine::new(DEFAULT_COOL_DOWN);
    quarantine.observe(view, Moment::BOOT);
    next(&MembershipInputs {
        me: &name(),
        boot: Boot { machine_id: &MachineId::new("m"), boot_id: &BootId::new(boot_id) },
        proof: Proof::Machine,
        adopted: None,
        labels: &Labels::new(),
        view,
        allocations: &NodeAllocations { identity: Some(identity()), ..own },
        presence,
        double,
        hold_off: false,
        quarantine: &quarantine,
        unclaimable: &PerFamily::NONE,
        fresh: "i2",
        now: LATE,
    })
}

/// The change of a step, if it depends on the node's record.
fn change(step: Step) -> Option<Change> {
    let Step::Commit(change) = step else { return None };
    let own = Compare::Unchanged { key: Key::Node(name()).to_string(), revision: NODE_REVISION };
    transaction(&change).compares.contains(&own).then_some(*change)
}

fn registers(step: &Step) -> bool {
    matches!(step, Step::Commit(change) if matches!(**change, Change::RegisterNode { .. }))
}

fn takes_over(step: &Step) -> bool {
    matches!(step, Step::Commit(change) if matches!(**change, Change::TakeOverNode { .. }))
}

fn claim(block: Block, incarnation: &str) -> (Key, Vec<u8>) {
    let record = BlockRecord {
        node: name(),
        incarnation: Incarnation::new(incarnation),
        pool: "p".parse().unwrap(),
        nonce: Nonce::new("x"),
    };
    (Key::Block(block), encode(&record))
}

fn pool(cidr: &str, purpose: crate::pool::Purpose) -> (Key, Vec<u8>) {
    let record = PoolRecord { purpose, ..PoolRecord::new(cidr.parse().unwrap()) };
    (Key::Pool("p".parse().unwrap()), encode(&record))
}

#[test]
fn the_record_keeps_the_uid_of_a_node_object_that_is_unknown_or_deleted() {
    let with_uid = |uid: Option<&str>| {
        let mut view = view(Vec::new());
        let known = view.nodes.get_mut(&name()).unwrap();
        let kubernetes_uid = uid.map(NodeUid::new);
        known.record = NodeRecord { kubernetes_uid, ..NodeRecord::clone(&known.record) }.into();
        view
    };
    let written = |before: Option<&str>, node_object: NodeObjectState| {
        let presence = Ok(NodePresence { node_object, ..presence() });
        let step =
            step_with(&with_uid(before), &presence, "b", NameConflict::None, NodeAllocations::default());
        match step {
            Step::Commit(change) => match *change {
                Change::RegisterNode { record, .. } => Some(record.kubernetes_uid),
                _ => None,
            },
            _ => None,
        }
    };
    let known = |uid: &str| NodeObjectState::Known(NodeUid::new(uid));
    assert_eq!(written(None, known("u1")), Some(Some(NodeUid::new("u1"))));
    assert_eq!(written(Some("u1"), known("u1")), None, "unchanged: not written");
    assert_eq!(written(Some("u1"), NodeObjectState::Unknown), None, "unchanged: not written");
    assert_eq!(written(Some("u1"), known("u2")), Some(Some(NodeUid::new("u2"))));
    assert_eq!(written(Some("u1"), NodeObjectState::NotUsed), Some(None));
}

#[test]
fn releasing_a_block_requires_the_nodes_own_record() {
    let block = Block::new("10.0.0.0/26".parse().unwrap());
    let (pool, nonce) = ("p".parse().unwrap(), Nonce::new("x"));
    let own = NodeAllocations {
        blocks: vec![OwnedBlock { block, pool, nonce, leaving: true }],
        ..NodeAllocations::default()
    };
    let view = view(vec![claim(block, "i1")]);
    let Some(Change::ReleaseBlocks { blocks, .. }) = change(step(&view, own)) else { panic!("not released") };
    assert_eq!(blocks, [(block, NODE_REVISION)]);
}

#[test]
fn thousands_of_blocks_are_released_in_few_changes() {
    let range: Cidr = "10.0.0.0/14".parse().unwrap();
    let pool = Pool::new("p".parse().unwrap(), range, 26, PoolState::Draining).unwrap();
    let mut blocks: Vec<Block> = (0..3000).map(|number| pool.block(number)).collect();
    let owned = |block: &Block| OwnedBlock {
        block: *block,
        pool: "p".parse().unwrap(),
        nonce: Nonce::new("x"),
        leaving: true,
    };
    let mut changes = 0;
    while !blocks.is_empty() {
        let claimed = view(blocks.iter().map(|block| claim(*block, "i1")).collect());
        let own =
            NodeAllocations { blocks: blocks.iter().map(owned).collect(), ..NodeAllocations::default() };
        let Some(change) = change(step(&claimed, own)) else { panic!("not released") };
        let txn = transaction(&change);
        assert!(txn.writes.len().max(txn.compares.len()) <= MOST_RECORDS, "{}", txn.compares.len());
        let Change::ReleaseBlocks { blocks: back, .. } = change else { panic!("{change}") };
        let back: Vec<Block> = back.into_iter().map(|(block, _)| block).collect();
        // Blocks without a claim are removed from the ledger in one step.
        let own = NodeAllocations { blocks: back.iter().map(owned).collect(), ..NodeAllocations::default() };
        assert_eq!(step(&view(Vec::new()), own), Step::Disown(back.clone()));
        blocks.retain(|block| !back.contains(block));
        changes += 1;
    }
    assert!(changes <= 30, "{changes} changes for 3000 blocks");
}

#[test]
fn restoring_a_lost_pool_requires_the_nodes_own_record() {
    let block = Block::new("10.0.0.0/26".parse().unwrap());
    let claimed = claim(block, "i1");
    let mut view = view(vec![pool("10.0.0.0/24", crate::pool::Purpose::Blocks), claimed.clone()]);
    let kept = [(Key::Cluster, encode(&*view.cluster.as_ref().unwrap().record))];
    let node = encode(&*view.nodes[&name()].record);
    let records = kept.into_iter().chain([(Key::Node(name()), node), claimed]);
    let entry = |(key, value): (Key, Vec<u8>)| Entry { key: key.to_string(), value, revision: NODE_REVISION };
    view.apply(Update::Loaded(Contents {
        revision: Revision::new(9),
        entries: records.map(entry).collect(),
    }));
    let (pool, nonce) = ("p".parse().unwrap(), Nonce::new("x"));
    let own = |leaving| NodeAllocations {
        blocks: vec![OwnedBlock { block, pool: pool_name(), nonce: nonce.clone(), leaving }],
        ..NodeAllocations::default()
    };
    let Some(Change::AddPool { by, pool: back, .. }) = change(step(&view, own(false))) else {
        panic!("not restored")
    };
    assert_eq!((by.map(|by| (by.node, by.revision)), back.name), (Some((name(), NODE_REVISION)), pool));
    let leaves = change(step(&view, own(true)));
    assert!(!matches!(leaves, Some(Change::AddPool { .. })), "no node needs the pool");
}

fn pool_name() -> polder_api::PoolName {
    "p".parse().unwrap()
}

#[test]
fn releasing_a_reserved_address_requires_the_nodes_own_record() {
    let address: IpAddr = "10.1.0.5".parse().unwrap();
    let holder = Holder {
        node: name(),
        incarnation: identity().incarnation,
        boot_id: BootId::new("b"),
        attachment: "net/a/eth0".parse().unwrap(),
    };
    let record = ReservationRecord { owner: "default/db".to_owned(), holder: Some(holder), generation: 1 };
    let view = view(vec![
        pool("10.1.0.0/24", crate::pool::Purpose::Reservations),
        (Key::Reservation(address), encode(&record)),
    ]);
    let Some(Change::ReleaseAddress { released, .. }) = change(step(&view, NodeAllocations::default()))
    else {
        panic!("not released")
    };
    assert_eq!((released.address, released.record.holder), (address, None));
}

#[test]
fn releasing_blocks_of_a_removed_node_requires_the_releasing_nodes_record() {
    let gone: NodeName = "n2".parse().unwrap();
    let fence = FenceRecord {
        node: gone.clone(),
        machine_id: MachineId::new("m2"),
        boot_id: BootId::new("b2"),
        pods: PodsGone::ConfirmedByOperator,
        kubernetes_uid: None,
    };
    let block = Block::new("10.0.0.0/26".parse().unwrap());
    let view =
        view(vec![(Key::Fence(gone.clone(), Incarnation::new("i2")), encode(&fence)), claim(block, "i2")]);
    let Some(Change::ReleaseRemoved(what)) = change(step(&view, NodeAllocations::default())) else {
        panic!("not released")
    };
    assert_eq!((what.fence.node, what.blocks), (gone, vec![(block, NODE_REVISION)]));
}

#[test]
fn a_record_of_another_boot_is_taken_over_only_without_a_living_owner() {
    let view = view(Vec::new());
    let step = |double| step_of_boot("another", double, &view, NodeAllocations::default());
    assert_eq!(step(NameConflict::Unchecked), Step::AskForDouble);
    let alive = LeaseRecord { boot_id: BootId::new("b"), machine_id: MachineId::new("m") };
    assert!(matches!(step(NameConflict::Alive(alive)), Step::Conflict(_)));
    assert!(registers(&step(NameConflict::None)));
}
