//! The preconditions of each change.

use std::net::IpAddr;

use polder_api::Mac;
use polder_api::ipam::RepairMode;

use super::*;
use crate::Revision;
use crate::change::{Fence, HandOver, RemovedAllocations};
use crate::ids::{BootId, ClusterId, MachineId, Nonce};
use crate::pool::PoolState;
use crate::record::{
    AddressRecord, AnswerRecord, BlockRecord, ClusterRecord, FenceRecord, InspectionRecord, LeaderRecord,
    LeaseRecord, NodeRecord, PodsGone, ReservationRecord,
};

const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 5));

fn name() -> NodeName {
    "n1".parse().unwrap()
}

/// A member whose node record has revision 7.
fn me() -> Member {
    Member { node: name(), revision: Revision::new(7) }
}

fn incarnation() -> Incarnation {
    Incarnation::new("i")
}

fn block(cidr: &str) -> Block {
    Block::new(cidr.parse().unwrap())
}

fn pool() -> Pool {
    Pool::new("p".parse().unwrap(), "10.0.0.0/24".parse().unwrap(), 26, PoolState::Active).unwrap()
}

fn node() -> NodeRecord {
    NodeRecord {
        incarnation: incarnation(),
        machine_id: MachineId::new("m"),
        boot_id: BootId::new("b"),
        underlay: Vec::new(),
        gateways: Vec::new(),
        probes: Vec::new(),
        vtep_mac: Mac([2; 6]),
        mtu: 1450,
        version: "0".to_owned(),
        kubernetes_uid: None,
    }
}

fn fence_record() -> FenceRecord {
    FenceRecord {
        node: name(),
        machine_id: MachineId::new("m"),
        boot_id: BootId::new("b"),
        pods: PodsGone::ConfirmedByOperator,
        kubernetes_uid: None,
    }
}

fn fence() -> Fence {
    Fence { node: "gone".parse().unwrap(), incarnation: incarnation(), revision: Revision::new(3) }
}

fn reservation() -> ReservationRecord {
    ReservationRecord { owner: "default/db".to_owned(), holder: None, generation: 1 }
}

fn released() -> AddressRelease {
    AddressRelease { address: ADDRESS, record: reservation(), revision: Revision::new(9) }
}

fn cluster() -> ClusterRecord {
    ClusterRecord::new(ClusterId::new("c"))
}

/// The comparisons of the change's transaction, as text.
fn preconditions(change: &Change) -> Vec<String> {
    let short = |key: &str| key.trim_start_matches("/polder/v1/").to_owned();
    let describe = |compare: &Compare| match compare {
        Compare::Unchanged { key, revision: Revision::ABSENT } => format!("no {}", short(key)),
        Compare::Unchanged { key, revision } => format!("{}@{revision}", short(key)),
        Compare::Empty(range) => format!("nothing in {}", short(&range.start)),
        Compare::NothingNewer { range, revision } => {
            format!("nothing in {} newer than {revision}", short(&range.start))
        }
    };
    transaction(change).compares.iter().map(describe).collect()
}

fn writes(change: &Change) -> Vec<String> {
    let short = |key: &str| key.trim_start_matches("/polder/v1/").to_owned();
    let describe = |write: &Write| match write {
        Write::Put { key, .. } => short(key),
        Write::Delete { key } => format!("-{}", short(key)),
    };
    transaction(change).writes.iter().map(describe).collect()
}

fn check(change: impl Into<Change>, compared: &[&str], written: &[&str]) {
    let change = change.into();
    assert_eq!((preconditions(&change), writes(&change)), (strings(compared), strings(written)), "{change}");
}

fn strings(all: &[&str]) -> Vec<String> {
    all.iter().map(|one| (*one).to_owned()).collect()
}

fn claim() -> Claim {
    Claim {
        by: me(),
        block: block("10.0.0.192/26"),
        record: BlockRecord {
            node: name(),
            incarnation: incarnation(),
            pool: "p".parse().unwrap(),
            nonce: Nonce::new("x"),
        },
        pool: pool().cidr(),
        pool_revision: Revision::new(3),
    }
}

#[test]
fn a_transaction_writes_the_record_of_its_change() {
    let alive = LeaseRecord { boot_id: BootId::new("b"), machine_id: MachineId::new("m") };
    let address_record = AddressRecord { attachment: "net/a/eth0".parse().unwrap(), pod: None };
    let inspection = InspectionRecord { id: Nonce::new("x"), repairs: RepairMode::None };
    let answered = AnswerRecord {
        id: Nonce::new("x"),
        attachments: 1,
        interfaces: 2,
        deviations: Vec::new(),
        left_out: 0,
    };
    let confirmation =
        Confirmation { incarnation: incarnation(), record: fence_record(), revision: Revision::new(3) };
    let hand_over =
        HandOver { by: me(), address: ADDRESS, record: reservation(), before: None, source_pool: None };
    let release_removed =
        RemovedAllocations { by: me(), fence: fence(), blocks: Vec::new(), addresses: vec![released()] };
    let (pool_record, lease) =
        (encode(&PoolRecord::from(&pool())), LeaseWrite { by: me(), record: alive.clone() });
    let changes: Vec<(Change, Vec<Vec<u8>>)> = vec![
        (claim().into(), vec![encode(&claim().record)]),
        (Change::RegisterNode { node: name(), record: node(), before: None }, vec![encode(&node())]),
        (
            Change::TakeOverNode { node: name(), record: node(), before: Revision::new(7) },
            vec![encode(&node())],
        ),
        (
            Change::RemoveNode {
                incarnation: incarnation(),
                revision: Revision::new(7),
                fence: fence_record(),
                lease: RequiredLease::Any,
            },
            vec![encode(&fence_record())],
        ),
        (Change::ConfirmRemoval(confirmation.clone()), vec![encode(&fence_record())]),
        (Change::ConfirmByOperator(vec![confirmation]), vec![encode(&fence_record())]),
        (Change::ReleaseRemoved(release_removed), vec![encode(&reservation())]),
        (Change::ReleaseAddress { by: me(), released: released() }, vec![encode(&reservation())]),
        (hand_over.into(), vec![encode(&reservation())]),
        (Change::AddPool { by: None, pool: pool(), as_of: Revision::new(50) }, vec![pool_record.clone()]),
        (Change::ReplacePool { pool: pool(), revision: Revision::new(4) }, vec![pool_record.clone()]),
        (
            Change::MakeCluster { record: cluster(), pools: Some(vec![pool()]) },
            vec![encode(&cluster()), pool_record],
        ),
        (Change::ReplaceSettings { record: cluster(), revision: Revision::new(4) }, vec![encode(&cluster())]),
        (
            Change::PublishAddresses {
                by: me(),
                publish: vec![(ADDRESS, address_record.clone())],
                withdraw: Vec::new(),
            },
            vec![encode(&address_record)],
        ),
        (Change::WriteLease(lease.clone()), vec![encode(&alive)]),
        (Change::RestoreLease(lease), vec![encode(&alive)]),
        (Change::AskInspection(inspection.clone()), vec![encode(&inspection)]),
        (
            Change::AnswerInspection { node: name(), record: answered.clone(), asked: Revision::new(8) },
            vec![encode(&answered)],
        ),
    ];
    for (change, records) in changes {
        let value = |write: Write| match write {
            Write::Put { value, .. } => Some(value),
            Write::Delete { .. } => None,
        };
        let put: Vec<Vec<u8>> = transaction(&change).writes.into_iter().filter_map(value).collect();
        assert_eq!(put, records, "{change}");
    }
}

#[test]
fn a_claim_compares_node_pool_and_overlapping_claims() {
    let absent = |cidr: &str| Compare::absent(&Key::Block(block(cidr)));
    assert_eq!(
        transaction(&claim().into()).compares,
        [
            Compare::Unchanged { key: "/polder/v1/nodes/n1".into(), revision: Revision::new(7) },
            Compare::Unchanged { key: "/polder/v1/pools/p".into(), revision: Revision::new(3) },
            Compare::Empty(Key::blocks_in("10.0.0.192/26".parse().unwrap())),
            absent("10.0.0.0/24"),
            absent("10.0.0.128/25"),
        ]
    );
    assert_eq!(writes(&claim().into()), ["blocks/4-0a0000c0-26"]);
}

#[test]
fn registration_compares_the_own_record_or_requires_no_fence() {
    let register = |before| Change::RegisterNode { node: name(), record: node(), before };
    check(register(Some(Revision::new(7))), &["nodes/n1@7"], &["nodes/n1"]);
    check(register(None), &["no nodes/n1", "no fences/n1/i"], &["nodes/n1"]);
    let take_over = Change::TakeOverNode { node: name(), record: node(), before: Revision::new(7) };
    check(take_over, &["nodes/n1@7"], &["nodes/n1"]);
}

#[test]
fn removal_compares_the_node_and_confirmation_compares_the_fence() {
    let remove = |lease| Change::RemoveNode {
        incarnation: incarnation(),
        revision: Revision::new(7),
        fence: fence_record(),
        lease,
    };
    let written = ["-nodes/n1", "fences/n1/i"];
    check(remove(RequiredLease::Any), &["nodes/n1@7", "no fences/n1/i"], &written);
    let without_lease = ["no alive/n1", "nodes/n1@7", "no fences/n1/i"];
    check(remove(RequiredLease::Absent), &without_lease, &written);
    let confirmation =
        Confirmation { incarnation: incarnation(), record: fence_record(), revision: Revision::new(3) };
    check(Change::ConfirmRemoval(confirmation.clone()), &["fences/n1/i@3"], &["fences/n1/i"]);
    let other = Confirmation { incarnation: Incarnation::new("j"), ..confirmation.clone() };
    let both = ["fences/n1/i", "fences/n1/j"];
    check(Change::ConfirmByOperator(vec![confirmation, other]), &["fences/n1/i@3", "fences/n1/j@3"], &both);
}

#[test]
fn release_for_a_removed_node_compares_member_and_fence() {
    let blocks = vec![(block("10.0.0.0/26"), Revision::new(5))];
    let release_removed =
        RemovedAllocations { by: me(), fence: fence(), blocks, addresses: vec![released()] };
    check(
        Change::ReleaseRemoved(release_removed),
        &["fences/gone/i@3", "blocks/4-0a000000-26@5", "reservations/10.1.0.5@9", "nodes/n1@7"],
        &["-blocks/4-0a000000-26", "reservations/10.1.0.5"],
    );
    let forget = Change::ForgetFence { by: me(), fence: fence() };
    check(forget, &["fences/gone/i@3", "nodes/n1@7"], &["-fences/gone/i"]);
}

#[test]
fn release_compares_the_node_record_and_the_claim() {
    let blocks = vec![(block("10.0.0.0/26"), Revision::new(5)), (block("10.0.0.64/26"), Revision::new(6))];
    check(
        Change::ReleaseBlocks { by: me(), blocks },
        &["blocks/4-0a000000-26@5", "blocks/4-0a000040-26@6", "nodes/n1@7"],
        &["-blocks/4-0a000000-26", "-blocks/4-0a000040-26"],
    );
    check(
        Change::ReleaseAddress { by: me(), released: released() },
        &["reservations/10.1.0.5@9", "nodes/n1@7"],
        &["reservations/10.1.0.5"],
    );
    let delete = Change::DeleteReservation { address: ADDRESS, revision: Revision::new(9) };
    check(delete, &["reservations/10.1.0.5@9"], &["-reservations/10.1.0.5"]);
}

#[test]
fn hand_over_compares_member_reservation_and_pool() {
    let hand_over = HandOver {
        by: me(),
        address: ADDRESS,
        record: reservation(),
        before: Some(Revision::new(9)),
        source_pool: None,
    };
    let written = ["reservations/10.1.0.5"];
    check(hand_over.clone(), &["nodes/n1@7", "reservations/10.1.0.5@9"], &written);
    let again = HandOver { before: None, ..hand_over };
    check(again.clone(), &["nodes/n1@7", "no reservations/10.1.0.5"], &written);
    let new = HandOver { source_pool: Some(("p".parse().unwrap(), Revision::new(4))), ..again };
    check(new, &["nodes/n1@7", "no reservations/10.1.0.5", "pools/p@4"], &written);
}

#[test]
fn a_pool_change_compares_everything_that_could_conflict() {
    let add = |by| Change::AddPool { by, pool: pool(), as_of: Revision::new(50) };
    let mut compared = vec![
        "no pools/p",
        "nothing in pools/ newer than 50",
        "nothing in nodes/ newer than 50",
        "nothing in reservations/ newer than 50",
        "nothing in blocks/4-0a000000 newer than 50",
    ];
    check(add(None), &compared, &["pools/p"]);
    compared.push("nodes/n1@7");
    check(add(Some(me())), &compared, &["pools/p"]);
    check(Change::ReplacePool { pool: pool(), revision: Revision::new(4) }, &["pools/p@4"], &["pools/p"]);
    let remove = Change::RemovePool {
        name: pool().name,
        cidr: pool().cidr(),
        revision: Revision::new(4),
        as_of: Revision::new(50),
    };
    let compared = ["pools/p@4", "nothing in blocks/4-0a000000", "nothing in reservations/ newer than 50"];
    check(remove, &compared, &["-pools/p"]);
}

#[test]
fn first_settings_and_pools_are_written_only_where_none_exist() {
    let make = |pools| Change::MakeCluster { record: cluster(), pools };
    check(make(None), &["no cluster"], &["cluster"]);
    check(make(Some(vec![pool()])), &["no cluster", "nothing in pools/"], &["cluster", "pools/p"]);
    check(
        Change::ReplaceSettings { record: cluster(), revision: Revision::new(4) },
        &["cluster@4"],
        &["cluster"],
    );
}

#[test]
fn other_nodes_withdraw_addresses_only_after_the_nodes_removal() {
    let record = AddressRecord { attachment: "net/a/eth0".parse().unwrap(), pod: None };
    let stray = || Name::from("/polder/v1/addresses/n1/x");
    check(
        Change::PublishAddresses { by: me(), publish: vec![(ADDRESS, record)], withdraw: vec![stray()] },
        &["nodes/n1@7"],
        &["-addresses/n1/x", "addresses/n1/10.1.0.5"],
    );
    let withdraw = |by, revision| Change::WithdrawAddresses { by, records: vec![(stray(), revision)] };
    let written = ["-addresses/n1/x"];
    check(
        withdraw(Writer::Node(me()), Some(Revision::new(5))),
        &["nodes/n1@7", "addresses/n1/x@5"],
        &written,
    );
    check(
        withdraw(Writer::AnyNode(name()), Some(Revision::new(5))),
        &["no nodes/n1", "addresses/n1/x@5"],
        &written,
    );
    check(withdraw(Writer::AnyNode(name()), None), &["no nodes/n1"], &written);
}

#[test]
fn a_lease_write_compares_the_node_record() {
    let alive = LeaseRecord { boot_id: BootId::new("b"), machine_id: MachineId::new("m") };
    let lease = LeaseWrite { by: me(), record: alive };
    check(Change::WriteLease(lease.clone()), &["nodes/n1@7"], &["alive/n1"]);
    check(Change::RestoreLease(lease), &["no alive/n1", "nodes/n1@7"], &["alive/n1"]);
}

#[test]
fn there_is_one_leader_and_it_compares_its_node_record() {
    let record = LeaderRecord::new(name(), BootId::new("b"));
    let write = |before| Change::WriteLeader { by: me(), record: record.clone(), before };
    check(write(None), &["nodes/n1@7", "no leader"], &["leader"]);
    check(write(Some(Revision::new(9))), &["nodes/n1@7", "leader@9"], &["leader"]);
}

#[test]
fn answers_compare_the_inspection_and_are_deleted_without_one() {
    let id = || Nonce::new("x");
    let ask = Change::AskInspection(InspectionRecord { id: id(), repairs: RepairMode::None });
    check(ask, &[], &["inspection"]);
    let record =
        AnswerRecord { id: id(), attachments: 0, interfaces: 0, deviations: Vec::new(), left_out: 0 };
    let answer = Change::AnswerInspection { node: name(), record, asked: Revision::new(8) };
    check(answer, &["inspection@8"], &["answers/n1"]);
    check(Change::EndInspection { revision: Revision::new(8) }, &["inspection@8"], &["-inspection"]);
    let names = vec![Name::Key(Key::Answer(name()))];
    check(Change::ForgetAnswers(names), &["no inspection"], &["-answers/n1"]);
}
