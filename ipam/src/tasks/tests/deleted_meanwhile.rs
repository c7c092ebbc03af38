//! Attachments that are released before their ADD has ended.

use polder_api::Pod;
use polder_api::message::{AddRequest, AddressSource};

use super::fake::*;
use super::*;
use crate::key::Key;
use crate::pool::Purpose;
use crate::record::{PoolRecord, ReservationRecord, encode};

struct Waits;

impl Caller for Waits {
    fn is_gone(&self) -> bool {
        false
    }
}

/// A node with a pod that has a reserved address and was released by a DEL while its ADD is running. The lock stands
/// for the plugin.
fn deleted_meanwhile() -> (Fake, Registrar<'static, Fake>, Lock) {
    let (fake, registrar) = registered();
    let mut pool = pool_of("kept", "10.9.0.0/28", 28);
    pool.purpose = Purpose::Reservations;
    fake.with(|state| {
        state.revision = state.revision.next();
        state.put(&Key::Pool(pool.name.clone()).to_string(), encode(&PoolRecord::from(&pool)));
        state.load();
    });
    let lock = at_once(add(&fake, &me(), request("c1"), &Waits)).unwrap().lock;
    at_once(teardown::del(&fake, &attachment("c1"))).unwrap();
    fake.with(|state| {
        assert!(state.ipam.get(&attachment("c1")).is_none());
        state.load();
    });
    (fake, registrar, lock)
}

/// An ADD of a pod with a reserved address.
fn request(container: &str) -> AddRequest {
    AddRequest {
        attachment: attachment(container),
        netns: String::new(),
        pod: Some(Pod { namespace: "d".to_owned(), name: "web".to_owned(), uid: None }),
        source: AddressSource::Pools { pool: "kept".parse().ok(), addresses: Vec::new() },
        mac: None,
        mtu: None,
        ports: Vec::new(),
    }
}

/// The plugin creates the interface after all.
fn make(fake: &Fake) {
    fake.with(|state| state.interfaces.insert(attachment("c1")));
}

fn has_interface(fake: &Fake) -> bool {
    fake.with(|state| state.interfaces.contains(&attachment("c1")))
}

fn is_held(fake: &Fake) -> bool {
    let holder = |key: &Key, value: &[u8]| match key {
        Key::Reservation(_) => serde_json::from_slice::<ReservationRecord>(value).unwrap().holder,
        _ => None,
    };
    !fake.records(holder).is_empty()
}

/// The reserved address is still held, and not handed over to another pod, because the ADD is running.
fn assert_kept_for_its_add(fake: &Fake, registrar: &mut Registrar<'static, Fake>) {
    at_once(registrar.run_once());
    assert!(is_held(fake));
    let wanted = ReservationRequest::Pool("kept".parse().unwrap());
    let refused = at_once(registrar.hand_over(&wanted, "d/web", &attachment("c2"))).unwrap_err();
    assert_eq!(refused, RetryReason::AddStillRunning(attachment("c1")).into());
}

#[test]
fn an_interface_made_after_its_del_is_deleted_when_the_plugin_ends() {
    let (fake, mut registrar, lock) = deleted_meanwhile();
    assert_kept_for_its_add(&fake, &mut registrar);
    make(&fake);
    at_once(teardown::abandoned(&fake, &attachment("c1")));
    drop(lock);
    assert!(!has_interface(&fake));
    at_once(registrar.run_once());
    assert!(!is_held(&fake));
}

#[test]
fn the_orphan_collector_deletes_the_interface_after_the_add_has_ended() {
    let (fake, mut registrar, lock) = deleted_meanwhile();
    make(&fake);
    let sweep = || {
        fake.with(|state| state.sleeps = 1);
        until_it_waits(orphan_collector::run(&fake, Vec::new(), Duration::from_secs(30)));
    };
    sweep();
    assert!(has_interface(&fake));
    drop(lock);
    sweep();
    assert!(!has_interface(&fake));
    at_once(registrar.run_once());
    assert!(!is_held(&fake));
}

#[test]
fn the_interface_of_a_second_add_stays() {
    let (fake, _, lock) = deleted_meanwhile();
    make(&fake);
    drop(lock);
    let lock = at_once(add(&fake, &me(), request("c1"), &Waits)).unwrap().lock;
    assert!(!has_interface(&fake), "what the first plugin has made is not the second one's");
    make(&fake);
    at_once(teardown::abandoned(&fake, &attachment("c1")));
    drop(lock);
    fake.with(|state| state.sleeps = 1);
    until_it_waits(orphan_collector::run(&fake, Vec::new(), Duration::from_secs(30)));
    assert!(has_interface(&fake) && fake.with(|state| state.ipam.get(&attachment("c1")).is_some()));
}

#[test]
fn a_second_del_after_the_add_deletes_the_interface() {
    let (fake, mut registrar, lock) = deleted_meanwhile();
    make(&fake);
    drop(lock);
    at_once(teardown::del(&fake, &attachment("c1"))).unwrap();
    assert!(!has_interface(&fake));
    at_once(registrar.run_once());
    assert!(!is_held(&fake));
}

#[test]
fn a_removed_node_confirms_only_when_no_add_is_running() {
    let (fake, mut registrar, lock) = deleted_meanwhile();
    fake.with(State::remove_node);
    at_once(registrar.run_once());
    assert!(!fake.is_confirmed(), "its plugin can still make the interface");
    make(&fake);
    drop(lock);
    at_once(registrar.run_once());
    assert!(fake.is_confirmed() && !has_interface(&fake));
}

/// The node after a restart of its agent, while the plugin is still running.
fn restarted() -> (Fake, Registrar<'static, Fake>) {
    let (fake, registrar, lock) = deleted_meanwhile();
    drop(lock);
    fake.with(|state| {
        // The agent lost this with its memory.
        state.ipam.release(&attachment("c1"), Moment::BOOT).unwrap();
        state.wired_by_earlier_process.insert(attachment("c1"));
    });
    (fake, registrar)
}

#[test]
fn a_restarted_agent_keeps_the_reserved_address_while_the_plugin_runs() {
    let (fake, mut registrar) = restarted();
    fake.with(|state| state.tombstones.insert(attachment("c1")));
    at_once(tombstones::apply_all(&fake));
    assert_eq!(fake.tombstones(), [attachment("c1")]);
    assert_kept_for_its_add(&fake, &mut registrar);
    make(&fake);
    assert!(fake.try_lock(&attachment("c1")).is_none());
    // The plugin ends, and deletes its interface.
    fake.with(|state| {
        state.wired_by_earlier_process.clear();
        state.interfaces.clear();
    });
    at_once(registrar.run_once());
    assert!(!is_held(&fake));
}

#[test]
fn a_removed_node_does_not_confirm_while_an_earlier_plugin_runs() {
    let (fake, mut registrar) = restarted();
    fake.with(State::remove_node);
    at_once(registrar.run_once());
    assert!(!fake.is_confirmed());
    fake.with(|state| state.wired_by_earlier_process.clear());
    at_once(registrar.run_once());
    assert!(fake.is_confirmed());
}
