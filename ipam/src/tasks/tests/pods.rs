//! ADD, DEL, and the release of attachments without a DEL.

use std::fmt::Debug;

use polder_api::message::{AddRequest, AddressSource, Collection, Refusal, RefusalKind};
use polder_api::{Family, Pod};

use super::fake::*;
use super::*;
use crate::claim::Unavailable;
use crate::key::Key;
use crate::ledger::{AttachmentEntry, AttachmentKind, Ledger as _};
use crate::pool::Purpose;
use crate::record::{PoolRecord, ReservationRecord, encode};
use crate::registration::RemovalProgress;

/// The client of an ADD: waiting, or disconnected.
struct Plugin {
    is_gone: bool,
}

impl Caller for Plugin {
    fn is_gone(&self) -> bool {
        self.is_gone
    }
}

fn request(container: &str) -> AddRequest {
    AddRequest {
        attachment: attachment(container),
        netns: String::new(),
        pod: None,
        source: AddressSource::Pools { pool: None, addresses: Vec::new() },
        mac: None,
        mtu: None,
        ports: Vec::new(),
    }
}

fn add(fake: &Fake, container: &str) -> Result<(AttachmentEntry, Lock), Refusal> {
    let added = at_once(super::add(fake, &me(), request(container), &Plugin { is_gone: false }));
    added.map(|added| (added.held, added.lock))
}

/// Adds a pod and its interface.
fn added(fake: &Fake, container: &str) -> AttachmentEntry {
    let (held, _) = add(fake, container).unwrap();
    fake.with(|state| state.interfaces.insert(held.attachment.clone()));
    held
}

fn kind(result: Result<impl Debug, Refusal>) -> RefusalKind {
    result.unwrap_err().kind
}

fn del(fake: &Fake, container: &str) -> Result<(), Refusal> {
    at_once(teardown::del(fake, &attachment(container)))
}

fn has(fake: &Fake, container: &str) -> bool {
    fake.with(|state| state.ipam.get(&attachment(container)).is_some())
}

fn free(fake: &Fake) -> u64 {
    fake.with(|state| state.ipam.total(Family::V4, None, Moment::from_millis(state.clock)).free)
}

/// Runs `looks` checks of the orphan collector, a third of the grace period apart.
fn sweep(fake: &Fake, leaving: &[&str], looks: usize) {
    fake.with(|state| state.sleeps = looks);
    let leaving = leaving.iter().map(|container| attachment(container)).collect();
    until_it_waits(orphan_collector::run(fake, leaving, Duration::from_secs(30)));
}

#[test]
fn an_add_locks_its_attachment_until_the_interface_is_made() {
    let (fake, _) = registered();
    let (held, lock) = add(&fake, "c1").unwrap();
    assert_eq!(held.addresses.len(), 1);
    assert_eq!(kind(add(&fake, "c1")), RefusalKind::TryAgain);
    drop(lock);
    // The first ADD created no interface: the second one continues with its addresses.
    assert_eq!(add(&fake, "c1").unwrap().0.addresses, held.addresses);
    fake.with(|state| state.interfaces.insert(attachment("c1")));
    assert_eq!(kind(add(&fake, "c1")), RefusalKind::Exists);
}

#[test]
fn an_add_is_refused_if_the_node_is_not_ready_or_the_caller_is_gone() {
    let (fake, _) = registered();
    let gone = at_once(super::add(&fake, &me(), request("c1"), &Plugin { is_gone: true }));
    assert_eq!(kind(gone), RefusalKind::Failed);
    fake.with(|state| state.obstacles.push("the kernel is not made yet".to_owned()));
    let refusal = add(&fake, "c1").unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::TryAgain);
    assert!(refusal.message.contains("the kernel is not made yet"), "{refusal}");
    fake.with(|state| state.registration = Registration::Removed(RemovalProgress::CuttingOff));
    assert_eq!(kind(add(&fake, "c1")), RefusalKind::Removed);
    assert!(!has(&fake, "c1") && !fake.is_locked(&attachment("c1")));
}

#[test]
fn an_add_without_free_address_uses_a_new_block_or_the_longest_cooled_address() {
    let (fake, _) = registered();
    let first = added(&fake, "c0");
    del(&fake, "c0").unwrap();
    // A block of 16 addresses: one is the gateway address, and one is in cool-down.
    (1..=free(&fake)).for_each(|number| drop(added(&fake, &format!("c{number}"))));
    fake.with(|state| state.claims.push_back(Err(Unavailable::TooSlow.into())));
    assert_eq!(kind(add(&fake, "late")), RefusalKind::TryAgain);
    fake.with(|state| state.claims.push_back(Ok(())));
    let other = added(&fake, "another-block");
    assert_eq!(fake.blocks_of("n1"), 2);
    assert_ne!(other.addresses, first.addresses);
    (1..=free(&fake)).for_each(|number| drop(added(&fake, &format!("d{number}"))));
    fake.pass(crate::allocator::SHORTEST_COOL_DOWN);
    assert_eq!(added(&fake, "last").addresses, first.addresses, "there is no other block");
    assert_eq!(kind(add(&fake, "none")), RefusalKind::PoolExhausted);
    assert!(
        !fake.with(|state| state.ahead.is_empty()),
        "another block is claimed before the last address is gone"
    );
}

#[test]
fn a_del_deletes_the_interface_first_and_can_be_repeated() {
    let (fake, _) = registered();
    added(&fake, "c1");
    // The fake node checks that the addresses of an existing interface are not freed.
    del(&fake, "c1").unwrap();
    assert!(!has(&fake, "c1") && fake.with(|state| state.interfaces.is_empty()));
    del(&fake, "c1").unwrap();
}

#[test]
fn a_del_succeeds_although_its_add_does_not_end() {
    let (fake, _) = registered();
    let (_held, _lock) = add(&fake, "c1").unwrap();
    del(&fake, "c1").unwrap();
    assert!(!has(&fake, "c1"));
}

#[test]
fn a_del_fails_without_freeing_addresses_while_the_interface_stays() {
    let (fake, _) = registered();
    let held = added(&fake, "c1");
    fake.with(|state| state.fault = Some(NodeFault::InterfacesStay));
    assert!(del(&fake, "c1").unwrap_err().message.contains("the kernel says no"));
    assert!(has(&fake, "c1"));
    assert_eq!(kind(add(&fake, "c1")), RefusalKind::TryAgain, "it is being released");
    fake.with(|state| state.fault = None);
    sweep(&fake, &["c1"], 0);
    assert!(!has(&fake, "c1"), "the next agent completes the release");
    assert_ne!(added(&fake, "c2").addresses, held.addresses, "they are in cool-down");
}

#[test]
fn a_del_succeeds_with_a_full_disk_and_the_addresses_are_freed_later() {
    let (fake, _) = registered();
    added(&fake, "c1");
    fake.with(|state| state.fault = Some(NodeFault::DiskIsFull));
    del(&fake, "c1").unwrap();
    assert!(has(&fake, "c1") && fake.with(|state| state.interfaces.is_empty()));
    fake.with(|state| state.fault = None);
    sweep(&fake, &[], 4);
    assert!(!has(&fake, "c1"));
}

#[test]
fn an_attachment_without_interface_is_released_after_the_grace_period() {
    let (fake, _) = registered();
    for container in ["lives", "gone", "wired"] {
        added(&fake, container);
    }
    let lock = fake.try_lock(&attachment("wired")).unwrap();
    fake.with(|state| {
        state.interfaces.remove(&attachment("gone"));
        state.interfaces.remove(&attachment("wired"));
    });
    sweep(&fake, &[], 3);
    assert!(has(&fake, "gone"), "the grace period is not over");
    sweep(&fake, &[], 4);
    assert!(!has(&fake, "gone") && has(&fake, "lives") && has(&fake, "wired"));
    drop(lock);
    let swept = |container: &str| {
        at_once(orphan_collector::sweep(&fake, &attachment(container), "a test asks for it"))
    };
    assert_eq!(swept("lives"), Ok(orphan_collector::SweepResult::Alive));
    let lock = fake.try_lock(&attachment("wired")).unwrap();
    assert_eq!(swept("wired"), Ok(orphan_collector::SweepResult::Busy));
    drop(lock);
    assert_eq!(swept("wired"), Ok(orphan_collector::SweepResult::Released));
}

#[test]
fn a_tombstone_frees_the_addresses_before_the_next_add_of_its_attachment() {
    let (fake, _) = registered();
    let before = ["c1", "c2", "c3"].map(|container| added(&fake, container).addresses);
    fake.with(|state| {
        state.tombstones.extend(["c1", "c2", "c3"].map(attachment));
        state.interfaces.clear();
    });
    let _lock = fake.try_lock(&attachment("c3")).unwrap();
    assert_ne!(added(&fake, "c1").addresses, before[0]);
    at_once(tombstones::apply_all(&fake));
    assert!(has(&fake, "c1") && !has(&fake, "c2"));
    assert_eq!(fake.tombstones(), [attachment("c3")], "the call that holds the lock applies the tombstone");
}

#[test]
fn a_gc_releases_older_attachments_and_names_the_failed_ones() {
    let (fake, _) = registered();
    for container in ["valid", "old", "stays"] {
        added(&fake, container);
    }
    fake.pass(Duration::from_secs(1));
    let began_ms = fake.with(|state| state.clock);
    added(&fake, "young");
    let collection = |network: &str| Collection {
        network: network.parse().unwrap(),
        valid: vec![attachment("valid")],
        began_ms,
    };
    let collect = |network| at_once(collect::collect(&fake, collection(network)));
    collect("other").unwrap();
    assert!(has(&fake, "old"), "the attachment is of another network");
    fake.with(|state| state.fault = Some(NodeFault::InterfacesStay));
    let problems = collect("polder").unwrap_err().message;
    assert!(problems.contains("/old/") && problems.contains("/stays/"), "{problems}");
    fake.with(|state| state.fault = None);
    let lock = fake.try_lock(&attachment("old")).unwrap();
    collect("polder").unwrap();
    assert!(has(&fake, "old"), "a running ADD or DEL is not disturbed");
    drop(lock);
    collect("polder").unwrap();
    assert_eq!(
        ["valid", "young", "old", "stays"].map(|container| has(&fake, container)),
        [true, true, false, false]
    );
}

#[test]
fn an_abandoned_add_keeps_its_addresses_only_with_an_interface() {
    let (fake, _) = registered();
    for (container, is_made) in [("made", true), ("not-made", false)] {
        let (held, _lock) = add(&fake, container).unwrap();
        if is_made {
            fake.with(|state| state.interfaces.insert(held.attachment.clone()));
        }
        at_once(teardown::abandoned(&fake, &held.attachment));
        assert_eq!(has(&fake, container), is_made);
    }
}

#[test]
fn a_removed_node_keeps_the_addresses_of_a_running_add() {
    let (fake, mut registrar) = registered();
    let (_, lock) = add(&fake, "c1").unwrap();
    added(&fake, "other");
    fake.with(State::remove_node);
    at_once(registrar.run_once());
    assert!(
        !has(&fake, "other") && fake.with(|state| state.interfaces.is_empty()),
        "the other pods are disconnected without waiting for the ADD"
    );
    assert!(matches!(fake.registration(), Registration::Removed(_)), "{:?}", fake.registration());
    assert!(has(&fake, "c1") && !fake.is_confirmed(), "its plugin can still make the interface");
    drop(lock);
    // An ADD that was admitted earlier gets its addresses while the other pods are disconnected.
    fake.with(|state| state.without_gateways = Some(Box::new(|state| state.allocate("c2"))));
    at_once(registrar.run_once());
    let written = fake.with(|state| state.ipam.ledger().attachments().unwrap());
    assert!(has(&fake, "c2") && !fake.is_confirmed());
    assert_eq!(written.len(), 1, "an agent that starts now must find it in the ledger");
    at_once(registrar.run_once());
    assert!(!has(&fake, "c2"));
    at_once(registrar.run_once());
    assert!(fake.is_confirmed());
}

#[test]
fn an_admitted_add_is_refused_if_the_pools_are_lost() {
    let (fake, _) = registered();
    let view = fake.with(|state| {
        let mut view = (*state.view).clone();
        view.pools.clear();
        view
    });
    let (me, caller) = (me(), Plugin { is_gone: false });
    let allocation = allocation::Allocation { host: &fake, me: &me, caller: &caller, view: &view };
    let refused = at_once(allocation.allocate(AttachmentKind::Pod, request("c1"), 1450)).err().unwrap();
    assert_eq!(refused.kind, RefusalKind::TryAgain, "{refused}");
    assert!(refused.message.contains("no pool"), "{refused}");
}

#[test]
fn if_one_reserved_address_is_refused_the_other_is_released() {
    let (fake, mut registrar) = registered();
    for (name, cidr, length, purpose) in [
        ("pods6", "fd00:8::/120", 124, Purpose::Blocks),
        ("four", "10.9.0.0/28", 28, Purpose::Reservations),
        ("six", "fd00:9::/124", 124, Purpose::Reservations),
    ] {
        let mut pool = pool_of(name, cidr, length);
        pool.purpose = purpose;
        fake.with(|state| {
            state.revision = state.revision.next();
            state.put(&Key::Pool(pool.name.clone()).to_string(), encode(&PoolRecord::from(&pool)));
            state.load();
        });
    }
    let (address, unfit) = ("10.9.0.1".parse().unwrap(), "fd00:9::".parse().unwrap());
    let wanted = AddRequest {
        pod: Some(Pod { namespace: "d".to_owned(), name: "web".to_owned(), uid: None }),
        source: AddressSource::Pools { pool: None, addresses: vec![address, unfit] },
        ..request("c1")
    };
    let refused = at_once(super::add(&fake, &me(), wanted, &Plugin { is_gone: false })).unwrap_err();
    assert!(refused.message.contains("fd00:9::"), "{refused}");
    let holders = || {
        fake.records(|key, value| match key {
            Key::Reservation(_) => Some(serde_json::from_slice::<ReservationRecord>(value).unwrap().holder),
            _ => None,
        })
    };
    assert!(holders().iter().any(Option::is_some), "the first one was handed over");
    fake.with(State::load);
    at_once(registrar.run_once());
    assert_eq!(holders(), [None]);
}

#[test]
fn a_requested_address_of_an_unused_family_is_refused() {
    let (fake, _) = registered();
    let mut pool = pool_of("six", "fd00:9::/124", 124);
    pool.purpose = Purpose::Reservations;
    fake.with(|state| {
        state.put(&Key::Pool(pool.name.clone()).to_string(), encode(&PoolRecord::from(&pool)));
        state.load();
    });
    let source = AddressSource::Pools { pool: None, addresses: vec!["fd00:9::5".parse().unwrap()] };
    let wanted = AddRequest { source, ..request("c1") };
    let refused = at_once(super::add(&fake, &me(), wanted, &Plugin { is_gone: false })).unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Invalid, "{refused}");
    assert!(refused.message.contains("no pool gives new pods IPv6 addresses"), "{refused}");
}

#[test]
fn a_host_port_of_another_pod_or_of_the_tunnels_is_refused_and_nothing_is_allocated() {
    let (fake, _) = registered();
    let ask = |container: &str, port: &str, pod: &str| {
        let pod = Some(Pod { namespace: "d".to_owned(), name: pod.to_owned(), uid: None });
        let wanted = AddRequest { ports: vec![port.parse().unwrap()], pod, ..request(container) };
        at_once(super::add(&fake, &me(), wanted, &Plugin { is_gone: false }))
    };
    let lock = ask("c1", "8080:80/tcp", "web").unwrap().lock;
    drop(lock);
    for (port, pod, kind, text) in [
        ("8080:81/tcp", "other", RefusalKind::AddressTaken, "host port 8080:81/tcp is used by"),
        ("8080:80/tcp", "web", RefusalKind::TryAgain, "becomes free soon after its DEL"),
        ("8472:53/udp", "other", RefusalKind::Invalid, "port of the tunnels"),
    ] {
        let refused = ask("c2", port, pod).unwrap_err();
        assert!(refused.kind == kind && refused.message.contains(text), "{port}: {refused:?}");
    }
    assert_eq!(fake.with(|state| state.ipam.attachments().count()), 1);
    assert!(ask("c2", "8472:53/tcp", "other").is_ok(), "tunnels use UDP");
}
