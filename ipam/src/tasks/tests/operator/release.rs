//! Addresses that operators release.

use std::net::IpAddr;

use polder_api::ipam::Release;
use polder_api::message::{Refusal, RefusalKind};

use super::super::fake::*;
use super::super::*;
use crate::key::Key;
use crate::pool::Purpose;
use crate::record::{AddressRecord, Holder, PoolRecord, ReservationRecord, encode};
use crate::store::refusal::RefusalCause;

const RESERVED: &str = "10.9.0.1";

fn release(fake: &Fake, address: &str, dead: bool) -> Result<String, Refusal> {
    let release = Release { address: address.parse().unwrap(), dead };
    at_once(crate::tasks::operator::release(fake, &me(), fake, release))
}

fn refused(fake: &Fake, address: &str, dead: bool) -> String {
    release(fake, address, dead).unwrap_err().message
}

fn put(state: &mut State, key: &Key, value: Vec<u8>) {
    state.revision = state.revision.next();
    state.put(&key.to_string(), value);
}

fn key() -> Key {
    Key::Reservation(RESERVED.parse().unwrap())
}

/// Reserves the address for that workload. If a node is given, a pod of its first boot holds the address.
fn reserve(state: &mut State, owner: &str, node: Option<&str>) {
    let identity = state.ipam.identity().unwrap().unwrap();
    let holder = node.map(|node| Holder {
        node: node.parse().unwrap(),
        incarnation: identity.incarnation,
        boot_id: BootId::new("b1"),
        attachment: attachment("c1"),
    });
    put(state, &key(), encode(&ReservationRecord { owner: owner.to_owned(), holder, generation: 1 }));
}

fn with_reservation(node: Option<&str>) -> Fake {
    let (fake, _) = registered();
    let mut pool = pool_of("kept", "10.9.0.0/28", 28);
    pool.purpose = Purpose::Reservations;
    fake.with(|state| {
        put(state, &Key::Pool(pool.name.clone()), encode(&PoolRecord::from(&pool)));
        reserve(state, "d/web", node);
    });
    fake
}

fn owner(fake: &Fake) -> Option<String> {
    let owner = |found: &Key, value: &[u8]| {
        (*found == key()).then(|| serde_json::from_slice::<ReservationRecord>(value).unwrap().owner)
    };
    fake.records(owner).pop()
}

#[test]
fn a_reservation_without_holder_is_deleted_even_if_the_answer_is_lost() {
    let fates = [
        Fate::Lost,
        Fate::Unanswered,
        Fate::MadeAndRefused(RefusalCause::NoSpace),
        // A pod has just released it.
        Fate::After(Box::new(|state| reserve(state, "d/web", None))),
    ];
    for fate in fates {
        let fake = with_reservation(None);
        fake.with(|state| state.fates.push_back(fate));
        let message = release(&fake, RESERVED, false).unwrap();
        assert!(
            message.contains("the reservation of 10.9.0.1") && message.contains("is deleted"),
            "{message}"
        );
        assert_eq!(owner(&fake), None);
    }
    let fake = with_reservation(None);
    fake.with(|state| state.fates.push_back(Fate::Refused(RefusalCause::Permission)));
    assert!(refused(&fake, RESERVED, false).contains("cannot delete"));
    assert_eq!(owner(&fake).as_deref(), Some("d/web"));
}

#[test]
fn a_held_reservation_is_deleted_only_with_confirmation_and_without_an_interface() {
    let fake = with_reservation(Some("n1"));
    assert!(refused(&fake, RESERVED, false).contains("add --dead"));
    // An existing interface, or the report of a node that is alive, overrides the operator's confirmation.
    fake.with(|state| state.interfaces.insert(attachment("c1")));
    assert!(refused(&fake, RESERVED, true).contains("its interface exists"));
    fake.with(|state| {
        state.interfaces.clear();
        let record = AddressRecord { attachment: attachment("c1"), pod: None };
        put(state, &Key::Address(me().name, RESERVED.parse().unwrap()), encode(&record));
        put(state, &Key::Lease(me().name), b"{}".to_vec());
    });
    assert!(refused(&fake, RESERVED, true).contains("is alive and reports it"));
    fake.with(|state| state.entries.remove(&Key::Lease(me().name).to_string()));
    release(&fake, RESERVED, true).unwrap();
    assert_eq!(owner(&fake), None);
}

#[test]
fn a_release_does_not_apply_to_a_pod_that_got_the_address_meanwhile() {
    let fake = with_reservation(Some("n1"));
    let again = |state: &mut State| reserve(state, "d/web", Some("n2"));
    fake.with(|state| state.fates.push_back(Fate::UnansweredAnd(Box::new(again))));
    assert!(refused(&fake, RESERVED, true).contains("has changed"));
    assert_eq!(owner(&fake).as_deref(), Some("d/web"));
    // The owner is another workload now, so the reservation was deleted.
    let other = |state: &mut State| reserve(state, "d/db", Some("n2"));
    fake.with(|state| {
        reserve(state, "d/web", Some("n1"));
        state.fates.push_back(Fate::UnansweredAnd(Box::new(other)));
    });
    assert!(release(&fake, RESERVED, true).unwrap().contains("is deleted"));
    assert_eq!(owner(&fake).as_deref(), Some("d/db"));
}

#[test]
fn a_pod_address_is_released_only_without_interface_and_running_call() {
    let (fake, _) = registered();
    let pod = attachment("c1");
    let address: IpAddr = fake.with(|state| {
        state.allocate("c1");
        state.interfaces.insert(pod.clone());
        state.ipam.get(&pod).unwrap().addresses[0]
    });
    let address = address.to_string();
    assert!(refused(&fake, &address, true).contains("which is running"));
    fake.with(|state| state.interfaces.clear());
    let lock = fake.try_lock(&pod).unwrap();
    let busy = release(&fake, &address, false).unwrap_err();
    assert_eq!(busy.kind, RefusalKind::TryAgain);
    drop(lock);
    assert_eq!(
        release(&fake, &address, false).unwrap(),
        format!("{pod} is released: {address} is in cool-down")
    );
    assert!(release(&fake, &address, false).unwrap().contains("there is nothing to release"));
}

#[test]
fn an_address_without_a_pod_is_not_released() {
    let (fake, _) = registered();
    let gateway = fake.with(|state| state.allocations.gateways[0]).to_string();
    assert!(refused(&fake, &gateway, true).contains("the gateway address of this node"));
    let missing = release(&fake, "10.200.0.1", true).unwrap_err();
    assert_eq!(missing.kind, RefusalKind::Missing);
}
