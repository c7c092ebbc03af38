//! What the publisher publishes, for which record of the node, and when it restarts.

use std::pin::pin;

use super::fake::*;
use super::*;
use crate::key::Key;
use crate::record::{AddressRecord, LeaseRecord};
use crate::tasks::publisher::run;

/// The containers whose addresses are published for the node.
fn published(fake: &Fake) -> Vec<String> {
    fake.records(|key, value| match key {
        Key::Address(..) => {
            let record: AddressRecord = serde_json::from_slice(value).unwrap();
            Some(record.attachment.container.to_string())
        }
        _ => None,
    })
}

fn is_alive(fake: &Fake) -> bool {
    let boot = |key: &Key, value: &[u8]| match key {
        Key::Lease(_) => Some(serde_json::from_slice::<LeaseRecord>(value).unwrap().boot_id),
        _ => None,
    };
    let boots = fake.records(boot);
    assert!(boots.iter().all(|boot| *boot == me().boot_id), "{boots:?}");
    !boots.is_empty()
}

/// Allocates an address to a pod, and notifies the publisher.
fn attach(fake: &Fake, container: &str) {
    fake.with(|state| {
        state.allocate(container);
        state.has_change_notice = true;
    });
}

/// Lets this number of pauses end.
fn pauses(fake: &Fake, number: usize) {
    fake.with(|state| state.sleeps = number);
}

#[test]
fn a_node_publishes_its_lease_and_addresses_only_after_its_registration() {
    let (fake, mut registrar) = node();
    let me = me();
    let mut running = pin!(run(&fake, &me));
    let mut go_on = || until_it_waits(running.as_mut());
    go_on();
    assert!(!is_alive(&fake));
    at_once(registrar.run_once());
    attach(&fake, "c1");
    go_on();
    assert!(is_alive(&fake));
    assert_eq!(published(&fake), ["c1"]);
    fake.with(|state| state.allocate("c2"));
    go_on();
    assert_eq!(published(&fake), ["c1"], "no change was signalled");
    fake.with(|state| state.has_change_notice = true);
    go_on();
    assert_eq!(published(&fake), ["c1"], "changes within a short time are published together");
    pauses(&fake, 1);
    go_on();
    assert_eq!(published(&fake), ["c1", "c2"]);
}

#[test]
fn a_failed_publication_is_repeated_from_the_current_records() {
    for fate in [Fate::Lost, Fate::Unanswered] {
        let (fake, _registrar) = registered();
        attach(&fake, "c1");
        fake.with(|state| state.fates.push_back(fate));
        let me = me();
        let mut running = pin!(run(&fake, &me));
        until_it_waits(running.as_mut());
        // Meanwhile, a stray record appears under the node's name.
        let stray = Key::Address(me.name.clone(), "10.9.9.9".parse().unwrap()).to_string();
        fake.with(|state| state.put(&stray, b"{}".to_vec()));
        pauses(&fake, 1);
        until_it_waits(running.as_mut());
        assert_eq!(published(&fake), ["c1"]);
    }
}

#[test]
fn a_node_restarts_its_publication_when_its_record_changes() {
    let (fake, _registrar) = registered();
    for container in ["c1", "c2", "c3"] {
        attach(&fake, container);
    }
    // Each change writes at most two records: the second of the two changes hangs.
    fake.with(|state| state.fates.extend([Fate::Carried, Fate::Hangs]));
    let me = me();
    let mut running = pin!(run(&fake, &me));
    until_it_waits(running.as_mut());
    assert_eq!(published(&fake).len(), 2);
    let lease_writes_before = fake.with(|state| state.lease_writes.len());
    fake.with(|state| {
        let node = Key::Node(me.name.clone()).to_string();
        let record = state.entries[&node].value.clone();
        state.revision = state.revision.next();
        state.put(&node, record);
        state.load();
    });
    until_it_waits(running.as_mut());
    assert_eq!(published(&fake), ["c1", "c2", "c3"]);
    let lease_writes = fake.with(|state| state.lease_writes.clone());
    assert!(lease_writes.len() > lease_writes_before && is_alive(&fake));
    assert_eq!(
        lease_writes.last().copied(),
        fake.basis_revision(),
        "the lease write compares the current node record"
    );
}

#[test]
fn after_a_loss_of_records_the_node_publishes_again() {
    let (fake, _registrar) = registered();
    attach(&fake, "c1");
    let me = me();
    let mut running = pin!(run(&fake, &me));
    until_it_waits(running.as_mut());
    fake.with(|state| {
        state.entries.retain(|key, _| !key.contains("/addresses/"));
        Arc::make_mut(&mut state.view).losses += 1;
    });
    until_it_waits(running.as_mut());
    assert_eq!(published(&fake), ["c1"]);
}

#[test]
fn a_removed_node_publishes_nothing() {
    let (fake, _registrar) = registered();
    let me = me();
    let mut running = pin!(run(&fake, &me));
    until_it_waits(running.as_mut());
    fake.with(|state| {
        state.remove_node();
        state.entries.retain(|key, _| !key.contains("/alive/"));
    });
    attach(&fake, "c1");
    pauses(&fake, 9);
    until_it_waits(running.as_mut());
    assert!(published(&fake).is_empty() && !is_alive(&fake));
}
