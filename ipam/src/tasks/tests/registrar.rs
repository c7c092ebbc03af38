//! The registrar and its claims.

use polder_api::Family;

use super::fake::*;
use super::*;
use crate::claim::{NoClaim, Unavailable, next_block};
use crate::ids::{Incarnation, Nonce};
use crate::key::Key;
use crate::pool::{Block, BlockRequest, Purpose};
use crate::record::{BlockRecord, NodeRecord, PoolRecord, ReservationRecord, encode};
use crate::reservation::HandOverDenied;
use crate::tasks::registrar::LOSS_HOLD_OFF;

#[test]
fn the_first_node_writes_settings_claims_a_block_and_registers() {
    let (fake, _) = registered();
    assert_eq!(fake.blocks_of("n1"), 1);
    let gateways: Vec<_> = fake.records(|key, value| match key {
        Key::Node(_) => Some(serde_json::from_slice::<NodeRecord>(value).unwrap().gateways),
        _ => None,
    });
    assert_eq!(gateways, [fake.with(|state| state.allocations.gateways.clone())]);
    assert_eq!(gateways[0].len(), 1);
    assert!(fake.view().cluster.is_some() && fake.view().pools.len() == 1);
}

#[test]
fn a_node_does_not_serve_in_the_round_that_waited_for_records() {
    let (fake, mut registrar) = node();
    fake.with(|state| {
        state.view = Arc::default();
        state.meanwhile = Some(Box::new(State::load));
    });
    at_once(registrar.run_once());
    assert!(matches!(fake.registration(), Registration::Unproven(_)), "{:?}", fake.registration());
    at_once(registrar.run_once());
    assert_eq!(fake.registration(), Registration::Registered);
}

#[test]
fn an_unanswered_claim_is_detected_and_not_repeated() {
    let (fake, registrar) = registered();
    fake.with(|state| state.fates.push_back(Fate::Unanswered));
    let before = fake.with(|state| state.ipam.blocks().len());
    at_once(registrar.claim(any())).unwrap();
    assert_eq!(fake.blocks_of("n1"), before + 1);
    assert_eq!(fake.with(|state| state.ipam.blocks().len()), before + 1);
}

#[test]
fn a_claim_of_unknown_outcome_is_used_only_after_its_record_is_read() {
    let (fake, mut registrar) = registered();
    fake.with(|state| {
        state.fates.push_back(Fate::Unanswered);
        state.fault = Some(NodeFault::Unreadable);
    });
    let refused = at_once(registrar.claim(any())).unwrap_err();
    assert!(matches!(refused, NoClaim::Unavailable(_)), "{refused}");
    let owned = |fake: &Fake| fake.with(|state| state.ipam.blocks().len());
    assert_eq!((fake.blocks_of("n1"), owned(&fake)), (2, 1));
    fake.with(|state| {
        state.fault = None;
        state.load();
    });
    at_once(registrar.run_once());
    assert_eq!(owned(&fake), 2);
}

#[test]
fn the_remedy_for_a_claimed_block_depends_on_the_lease_of_the_other_node() {
    let (fake, mut registrar) = registered();
    let n2: NodeName = "n2".parse().unwrap();
    fake.with(|state| {
        let block = state.ipam.blocks()[0].block;
        let mut node: NodeRecord =
            serde_json::from_slice(&state.entries[&Key::Node(me().name).to_string()].value).unwrap();
        node.incarnation = Incarnation::new("other");
        node.machine_id = MachineId::new("other");
        state.revision = state.revision.next();
        state.put(&Key::Node(n2.clone()).to_string(), encode(&node));
        state.put(&Key::Block(block).to_string(), other_claim());
        state.load();
    });
    let mut reason = || {
        at_once(registrar.run_once());
        let Registration::Conflict(reason) = fake.registration() else { panic!("{:?}", fake.registration()) };
        reason.to_string()
    };
    let missing = reason();
    assert!(missing.contains("The agent of n2 is not alive"), "{missing}");
    fake.with(|state| state.put(&Key::Lease(n2.clone()).to_string(), Vec::new()));
    let held = reason();
    assert!(held.contains("The agent of n2 is alive"), "{held}");
    fake.with(|state| state.fault = Some(NodeFault::Unreadable));
    let unreadable = reason();
    assert!(unreadable.contains("If n2 is permanently gone"), "{unreadable}");
    // A restored etcd has leases from the time of the backup.
    fake.with(|state| {
        state.fault = None;
        Arc::make_mut(&mut state.view).losses += 1;
    });
    let restored = reason();
    assert!(restored.contains("If n2 is permanently gone"), "{restored}");
    fake.with(|state| state.clock += 1000 * LOSS_HOLD_OFF.as_secs());
    let settled = reason();
    assert!(settled.contains("The agent of n2 is alive"), "{settled}");
}

/// The block that the node would claim next.
fn next(fake: &Fake) -> Block {
    let owned = fake.with(|state| state.ipam.blocks().iter().map(|owned| owned.block).collect());
    next_block(&fake.view(), &me().name, &Labels::new(), &any(), &owned).unwrap().1
}

fn any() -> BlockRequest {
    BlockRequest::Any(Family::V4, None)
}

#[test]
fn a_claim_that_was_not_made_is_repeated() {
    let (fake, registrar) = registered();
    fake.with(|state| state.fates.push_back(Fate::Lost));
    at_once(registrar.claim(any())).unwrap();
    assert_eq!(fake.blocks_of("n1"), 2);
}

#[test]
fn a_block_claimed_by_another_node_meanwhile_stays_with_that_node() {
    let (fake, registrar) = registered();
    let key = Key::Block(next(&fake));
    fake.with(|state| state.fates.push_back(Fate::Late(key, other_claim())));
    at_once(registrar.claim(any())).unwrap();
    assert_eq!((fake.blocks_of("n1"), fake.blocks_of("n2")), (2, 1));
}

#[test]
fn after_a_loss_of_records_claims_and_hand_overs_are_delayed() {
    let (fake, mut registrar) = registered();
    fake.with(|state| Arc::make_mut(&mut state.view).losses += 1);
    let refused = at_once(registrar.claim(any())).unwrap_err();
    assert_eq!(refused, Unavailable::HoldOff.into());
    let wanted = ReservationRequest::Address("10.9.0.1".parse().unwrap());
    let refused = at_once(registrar.hand_over(&wanted, "d/web", &attachment("c1"))).unwrap_err();
    assert_eq!(refused, RetryReason::Unavailable(Unavailable::HoldOff).into());
    at_once(registrar.run_once());
    fake.with(|state| state.clock += 1000 * LOSS_HOLD_OFF.as_secs() - 1);
    assert!(at_once(registrar.claim(any())).is_err(), "owners are putting them back");
    fake.with(|state| state.clock += 1);
    at_once(registrar.claim(any())).unwrap();
}

/// The name of the pool of reserved addresses.
const RESERVED: &str = "reserved";

/// A node in a cluster that has a pool of reserved addresses.
fn with_reserved_pool() -> (Fake, Registrar<'static, Fake>) {
    let (fake, registrar) = registered();
    let mut reserved = pool_of(RESERVED, "10.9.0.0/28", 28);
    reserved.purpose = Purpose::Reservations;
    fake.with(|state| {
        state.revision = state.revision.next();
        state.put(&Key::Pool(reserved.name.clone()).to_string(), encode(&PoolRecord::from(&reserved)));
        state.load();
    });
    (fake, registrar)
}

#[test]
fn a_reserved_address_is_expected_only_after_a_successful_hand_over() {
    let (fake, registrar) = with_reserved_pool();
    let wanted = ReservationRequest::Pool(RESERVED.parse().unwrap());
    let hand_over = |name: &str| at_once(registrar.hand_over(&wanted, name, &attachment("c1")));
    let expected = || {
        fake.with(|state| state.ipam.allocations(Moment::from_millis(state.clock)).unwrap().expected.len())
    };
    fake.with(|state| state.fates.push_back(Fate::Lost));
    assert!(matches!(hand_over("d/web"), Err(NotHandedOver::TryAgain(_))));
    assert_eq!(expected(), 0);
    fake.with(|state| state.fates.push_back(Fate::Unanswered));
    let address = hand_over("d/web").unwrap();
    assert_eq!(expected(), 1);
    fake.with(State::load);
    let other = ReservationRequest::Address(address);
    let refused = at_once(registrar.hand_over(&other, "d/db", &attachment("c2"))).unwrap_err();
    assert!(matches!(refused, NotHandedOver::Denied(HandOverDenied::Foreign { .. })), "{refused}");
}

#[test]
fn a_reserved_address_too_late_for_its_add_is_released() {
    let (fake, mut registrar) = with_reserved_pool();
    let wanted = ReservationRequest::Pool(RESERVED.parse().unwrap());
    let pod = attachment("c1");
    let holders = || {
        fake.records(|key, value| match key {
            Key::Reservation(_) => Some(serde_json::from_slice::<ReservationRecord>(value).unwrap().holder),
            _ => None,
        })
    };
    let mut answered = None;
    at_once(registrar.serve_reservation(&wanted, "d/web", &pod, |result| {
        answered = Some(result);
        false
    }));
    assert!(answered.unwrap().is_ok() && holders()[0].is_some());
    fake.with(State::load);
    at_once(registrar.run_once());
    assert_eq!(holders(), [None], "another node could not have it as long as this one seems to");
}

#[test]
fn a_removed_node_deletes_its_interfaces_and_addresses_and_stops_serving() {
    let (fake, mut registrar) = registered();
    let pod = attachment("c1");
    fake.with(|state| {
        state.allocate("c1");
        state.interfaces.insert(pod.clone());
        state.remove_node();
    });
    at_once(registrar.run_once());
    assert!(matches!(fake.registration(), Registration::Removed(_)), "{:?}", fake.registration());
    fake.with(|state| {
        assert!(state.interfaces.is_empty() && state.ipam.get(&pod).is_none());
        assert!(!state.has_gateways && state.ipam.blocks().is_empty());
    });
    // After an error during the confirmation, the node still does not serve.
    fake.with(|state| state.fates.extend([Fate::Lost, Fate::Lost]));
    at_once(registrar.run_once());
    assert!(fake.registration().not_serving_reason().is_some(), "{:?}", fake.registration());
    // A restarted agent reports the removal, although it cannot change the kernel.
    fake.with(|state| (state.registration, state.is_read_only) = (Registration::default(), true));
    let me = me();
    at_once(Registrar::new(&fake, &me).run_once());
    assert!(matches!(fake.registration(), Registration::Removed(_)), "{:?}", fake.registration());
}

#[test]
fn a_proven_node_serves_while_the_datastore_accepts_no_writes() {
    let (fake, _) = registered();
    fake.with(|state| {
        state.registration = Registration::default();
        let node = Key::Node(me().name).to_string();
        let mut record: NodeRecord = serde_json::from_slice(&state.entries[&node].value).unwrap();
        record.mtu = 1400;
        state.revision = state.revision.next();
        state.put(&node, encode(&record));
        state.load();
        state.fates.push_back(Fate::Lost);
    });
    let me = me();
    at_once(Registrar::new(&fake, &me).run_once());
    assert!(matches!(fake.registration(), Registration::Waiting(_)), "{:?}", fake.registration());
    // It also served during the write to the datastore, which can take long.
    assert_eq!(
        fake.with(|state| state.registration_during_change.not_serving_reason().map(ToString::to_string)),
        None
    );
}

fn other_claim() -> Vec<u8> {
    encode(&BlockRecord {
        node: "n2".parse().unwrap(),
        incarnation: Incarnation::new("other"),
        pool: pool().name,
        nonce: Nonce::new("other"),
    })
}

#[test]
fn labels_that_change_open_and_close_pools_to_the_node() {
    let (fake, mut registrar) = registered();
    let mut zoned = pool_of("zoned", "10.9.0.0/24", 28);
    zoned.nodes = [("zone".to_owned(), "a".to_owned())].into();
    fake.with(|state| {
        state.revision = state.revision.next();
        state.put(&Key::Pool(zoned.name.clone()).to_string(), encode(&PoolRecord::from(&zoned)));
        state.load();
    });
    let of_zoned = |fake: &Fake| {
        fake.with(|state| state.ipam.blocks().iter().filter(|owned| owned.pool == zoned.name).count())
    };
    let from_zoned = BlockRequest::Any(Family::V4, Some(zoned.name.clone()));
    assert!(at_once(registrar.claim(from_zoned.clone())).is_err());
    fake.with(|state| state.labels = zoned.nodes.clone());
    at_once(registrar.claim(from_zoned.clone())).unwrap();
    fake.pass(Duration::from_secs(3600));
    at_once(registrar.run_once());
    assert_eq!(of_zoned(&fake), 1);
    // No pod has an address of its block: the block is released. A block with pods is kept until they end.
    fake.with(|state| state.labels.clear());
    fake.pass(Duration::from_secs(3600));
    at_once(registrar.run_once());
    assert_eq!((of_zoned(&fake), fake.blocks_of("n1")), (0, 1));
    assert!(at_once(registrar.claim(from_zoned)).is_err());
}
