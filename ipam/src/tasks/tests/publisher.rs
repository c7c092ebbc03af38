//! What the publisher publishes, for which record of the node, and when it restarts.

use std::pin::pin;

use super::fake::*;
use super::*;
use crate::key::Key;
use crate::record::{AddressRecord, Alive};
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
        Key::Alive(_) => Some(serde_json::from_slice::<Alive>(value).unwrap().boot_id),
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
        state.has_rung = true;
    });
}

/// Lets this number of pauses end.
fn pauses(fake: &Fake, number: usize) {
    fake.with(|state| state.sleeps = number);
}

#[test]
fn a_node_says_nothing_before_its_record_is_there_and_then_that_it_lives_and_who_has_its_addresses() {
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
    assert_eq!(published(&fake), ["c1"], "nobody has rung");
    fake.with(|state| state.has_rung = true);
    go_on();
    assert_eq!(published(&fake), ["c1"], "what happens within a moment goes together");
    pauses(&fake, 1);
    go_on();
    assert_eq!(published(&fake), ["c1", "c2"]);
}

#[test]
fn what_the_store_did_not_take_is_tried_again_from_what_is_there_then() {
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
fn a_node_whose_record_was_written_again_begins_anew_also_between_two_changes() {
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
    let signed = fake.with(|state| state.signs.len());
    fake.with(|state| {
        let node = Key::Node(me.name.clone()).to_string();
        let record = state.entries[&node].value.clone();
        state.revision = state.revision.next();
        state.put(&node, record);
        state.load();
    });
    until_it_waits(running.as_mut());
    assert_eq!(published(&fake), ["c1", "c2", "c3"]);
    let signs = fake.with(|state| state.signs.clone());
    assert!(signs.len() > signed && is_alive(&fake));
    assert_eq!(signs.last().copied(), fake.basis_revision(), "the sign rests on the record as it is now");
}

#[test]
fn after_the_store_has_lost_records_it_is_read_again() {
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
fn a_node_that_is_removed_says_nothing_any_more() {
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
