//! What protects each change.

use std::net::IpAddr;

use polder_api::Mac;
use polder_api::ipam::RepairMode;

use super::*;
use crate::Revision;
use crate::change::{Fence, HandOver, RemovedHoldings};
use crate::ids::{BootId, ClusterId, MachineId, Nonce};
use crate::pool::PoolState;
use crate::record::{
    AddressRecord, Alive, AnswerRecord, BlockRecord, ClusterRecord, FenceRecord, InspectionRecord,
    NodeRecord, PodsGone, ReservationRecord,
};

const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 5));

fn name() -> NodeName {
    "n1".parse().unwrap()
}

/// Whose record is of revision 7.
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
    }
}

fn fence_record() -> FenceRecord {
    FenceRecord {
        node: name(),
        machine_id: MachineId::new("m"),
        boot_id: BootId::new("b"),
        pods: PodsGone::ConfirmedByOperator,
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

/// What must hold for the change, in words; and what it writes.
fn rests_on(change: &Change) -> Vec<String> {
    let short = |key: &str| key.trim_start_matches("/polder/v1/").to_owned();
    let words = |compare: &Compare| match compare {
        Compare::Unchanged { key, revision: Revision::ABSENT } => format!("no {}", short(key)),
        Compare::Unchanged { key, revision } => format!("{}@{revision}", short(key)),
        Compare::Empty(range) => format!("nothing in {}", short(&range.start)),
        Compare::NothingNewer { range, revision } => format!("{} until {revision}", short(&range.start)),
    };
    transaction(change).compares.iter().map(words).collect()
}

fn writes(change: &Change) -> Vec<String> {
    let short = |key: &str| key.trim_start_matches("/polder/v1/").to_owned();
    let words = |write: &Write| match write {
        Write::Put { key, .. } => short(key),
        Write::Delete { key } => format!("-{}", short(key)),
    };
    transaction(change).writes.iter().map(words).collect()
}

fn check(change: impl Into<Change>, compared: &[&str], written: &[&str]) {
    let change = change.into();
    assert_eq!((rests_on(&change), writes(&change)), (strings(compared), strings(written)), "{change}");
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
fn what_is_put_is_the_record_of_the_change() {
    let alive = Alive { boot_id: BootId::new("b"), machine_id: MachineId::new("m") };
    let said = AddressRecord { attachment: "net/a/eth0".parse().unwrap(), pod: None };
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
        HandOver { by: me(), address: ADDRESS, record: reservation(), before: None, out_of: None };
    let release_removed =
        RemovedHoldings { by: me(), fence: fence(), blocks: Vec::new(), addresses: vec![released()] };
    let (pool_record, sign) =
        (encode(&PoolRecord::from(&pool())), LeaseWrite { by: me(), alive: alive.clone() });
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
                publish: vec![(ADDRESS, said.clone())],
                withdraw: Vec::new(),
            },
            vec![encode(&said)],
        ),
        (Change::WriteLease(sign.clone()), vec![encode(&alive)]),
        (Change::RestoreLease(sign), vec![encode(&alive)]),
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
fn a_claim_rests_on_node_pool_and_the_absence_of_any_other() {
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
fn a_node_registers_in_place_of_its_record_or_if_it_was_never_removed() {
    let register = |before| Change::RegisterNode { node: name(), record: node(), before };
    check(register(Some(Revision::new(7))), &["nodes/n1@7"], &["nodes/n1"]);
    check(register(None), &["no nodes/n1", "no fences/n1/i"], &["nodes/n1"]);
    let over = Change::TakeOverNode { node: name(), record: node(), before: Revision::new(7) };
    check(over, &["nodes/n1@7"], &["nodes/n1"]);
}

#[test]
fn a_node_is_removed_as_it_was_seen_and_the_word_about_its_pods_is_for_that_fence() {
    let remove =
        Change::RemoveNode { incarnation: incarnation(), revision: Revision::new(7), fence: fence_record() };
    check(remove, &["nodes/n1@7", "no fences/n1/i"], &["-nodes/n1", "fences/n1/i"]);
    let confirmation =
        Confirmation { incarnation: incarnation(), record: fence_record(), revision: Revision::new(3) };
    check(Change::ConfirmRemoval(confirmation.clone()), &["fences/n1/i@3"], &["fences/n1/i"]);
    let other = Confirmation { incarnation: Incarnation::new("j"), ..confirmation.clone() };
    let both = ["fences/n1/i", "fences/n1/j"];
    check(Change::ConfirmByOperator(vec![confirmation, other]), &["fences/n1/i@3", "fences/n1/j@3"], &both);
}

#[test]
fn what_a_removed_node_had_goes_back_by_a_member_and_while_its_fence_says_so() {
    let blocks = vec![(block("10.0.0.0/26"), Revision::new(5))];
    let release_removed = RemovedHoldings { by: me(), fence: fence(), blocks, addresses: vec![released()] };
    check(
        Change::ReleaseRemoved(release_removed),
        &["fences/gone/i@3", "blocks/4-0a000000-26@5", "reservations/10.1.0.5@9", "nodes/n1@7"],
        &["-blocks/4-0a000000-26", "reservations/10.1.0.5"],
    );
    let forget = Change::ForgetFence { by: me(), fence: fence() };
    check(forget, &["fences/gone/i@3", "nodes/n1@7"], &["-fences/gone/i"]);
}

#[test]
fn what_a_node_lets_go_of_rests_on_its_record_and_on_that_it_has_it() {
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
    let give_up = Change::DeleteReservation { address: ADDRESS, revision: Revision::new(9) };
    check(give_up, &["reservations/10.1.0.5@9"], &["-reservations/10.1.0.5"]);
}

#[test]
fn an_address_is_handed_over_to_a_member_by_whoever_has_it_or_out_of_a_pool_as_it_was_seen() {
    let hand_over = HandOver {
        by: me(),
        address: ADDRESS,
        record: reservation(),
        before: Some(Revision::new(9)),
        out_of: None,
    };
    let written = ["reservations/10.1.0.5"];
    check(hand_over.clone(), &["nodes/n1@7", "reservations/10.1.0.5@9"], &written);
    let again = HandOver { before: None, ..hand_over };
    check(again.clone(), &["nodes/n1@7", "no reservations/10.1.0.5"], &written);
    let new = HandOver { out_of: Some(("p".parse().unwrap(), Revision::new(4))), ..again };
    check(new, &["nodes/n1@7", "no reservations/10.1.0.5", "pools/p@4"], &written);
}

#[test]
fn a_pool_rests_on_all_that_could_be_in_its_way() {
    let add = |by| Change::AddPool { by, pool: pool(), as_of: Revision::new(50) };
    let mut compared = vec![
        "no pools/p",
        "pools/ until 50",
        "nodes/ until 50",
        "reservations/ until 50",
        "blocks/4-0a000000 until 50",
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
    let compared = ["pools/p@4", "nothing in blocks/4-0a000000", "reservations/ until 50"];
    check(remove, &compared, &["-pools/p"]);
}

#[test]
fn a_cluster_is_made_where_there_is_none_and_its_pools_where_there_are_none() {
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
fn who_has_an_address_is_said_by_the_node_and_withdrawn_by_others_only_when_it_is_gone() {
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
        withdraw(Writer::Anybody(name()), Some(Revision::new(5))),
        &["no nodes/n1", "addresses/n1/x@5"],
        &written,
    );
    check(withdraw(Writer::Anybody(name()), None), &["no nodes/n1"], &written);
}

#[test]
fn a_sign_of_life_rests_on_the_record_of_whose_it_is() {
    let alive = Alive { boot_id: BootId::new("b"), machine_id: MachineId::new("m") };
    let sign = LeaseWrite { by: me(), alive };
    check(Change::WriteLease(sign.clone()), &["nodes/n1@7"], &["alive/n1"]);
    check(Change::RestoreLease(sign), &["no alive/n1", "nodes/n1@7"], &["alive/n1"]);
}

#[test]
fn an_inspection_is_answered_while_it_is_wished_for_and_its_answers_go_when_none_is() {
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
