//! Pools and settings that operators change.

use polder_api::Backend;
use polder_api::message::{Refusal, RefusalKind};
use polder_api::pool::{NewPool, PoolChange, PoolPurpose};

use super::super::fake::*;
use super::super::*;
use crate::ids::{Incarnation, Nonce};
use crate::key::Key;
use crate::pool::PoolState;
use crate::record::{BlockRecord, ClusterRecord, PoolRecord, encode};
use crate::store::refusal::RefusalCause;
use crate::tasks::ATTEMPTS;
use crate::tasks::operator::{change_pools, change_settings};

fn change(fake: &Fake, change: PoolChange) -> Result<String, Refusal> {
    at_once(change_pools(fake, &fake.view(), change))
}

fn more() -> PoolChange {
    PoolChange::Add(NewPool {
        name: "more".parse().unwrap(),
        cidr: "10.1.0.0/26".parse().unwrap(),
        block_length: Some(28),
        purpose: PoolPurpose::Blocks,
        nodes: Labels::new(),
    })
}

fn remove(name: &str) -> PoolChange {
    PoolChange::Remove(name.parse().unwrap())
}

/// The pools in the datastore, each with its state.
fn pools(fake: &Fake) -> Vec<(String, PoolState)> {
    fake.records(|key, value| match key {
        Key::Pool(name) => {
            let record: PoolRecord = serde_json::from_slice(value).unwrap();
            Some((name.to_string(), record.state))
        }
        _ => None,
    })
}

fn names(fake: &Fake) -> Vec<String> {
    pools(fake).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn adding_draining_and_removing_a_pool_can_be_repeated() {
    let (fake, _) = registered();
    let drain = || PoolChange::Drain("more".parse().unwrap());
    let steps =
        [(more(), "is added"), (drain(), "is drained: new pods get no address"), (more(), "is active again")];
    for (wanted, expected) in steps {
        let answer = change(&fake, wanted).unwrap();
        assert!(answer.contains(expected), "{answer}");
    }
    assert_eq!(pools(&fake)[1], ("more".to_owned(), PoolState::Active));
    assert!(change(&fake, more()).unwrap().contains("already exists"));
    change(&fake, drain()).unwrap();
    assert!(change(&fake, drain()).unwrap().contains("is already drained"));
    assert_eq!(
        change(&fake, remove("more")).unwrap(),
        "pool more is removed: 10.1.0.0/26 is free for other uses"
    );
    assert_eq!(names(&fake), ["main"]);
    let again = change(&fake, remove("more")).unwrap_err();
    assert!(again.kind == RefusalKind::Invalid && again.message.contains("there is no pool more"), "{again}");
}

#[test]
fn an_unanswered_change_is_found_in_the_records() {
    let (fake, _) = registered();
    for (wanted, expected, left) in [(more(), "is added", 2), (remove("more"), "is removed", 1)] {
        fake.with(|state| state.fates.push_back(Fate::Unanswered));
        let answer = change(&fake, wanted).unwrap();
        assert!(answer.contains(expected), "{answer}");
        assert_eq!(names(&fake).len(), left);
    }
}

#[test]
fn a_refused_change_is_reported_as_made_only_if_the_records_contain_it() {
    let (fake, _) = registered();
    fake.with(|state| state.fates.push_back(Fate::MadeAndRefused(RefusalCause::NoSpace)));
    assert!(change(&fake, more()).unwrap().contains("is added"));
    // With both causes, the change may have been made.
    for cause in [RefusalCause::NoSpace, RefusalCause::Permission] {
        fake.with(|state| state.fates.push_back(Fate::Refused(cause)));
        let refused = change(&fake, remove("more")).unwrap_err();
        assert!(refused.message.contains("refused the request"), "{refused}");
        assert!(!refused.message.contains("is unknown"), "{refused}");
    }
    assert_eq!(names(&fake), ["main", "more"]);
}

#[test]
fn a_change_without_any_answer_is_reported_as_unknown() {
    let (fake, _) = registered();
    fake.with(|state| state.fates.extend((0..ATTEMPTS).map(|_| Fate::Lost)));
    let unknown = change(&fake, more()).unwrap_err();
    assert!(unknown.kind == RefusalKind::TryAgain && unknown.message.contains("is unknown"), "{unknown}");
    assert_eq!(names(&fake), ["main"]);
    fake.with(|state| state.fates.extend((1..ATTEMPTS).map(|_| Fate::Lost)));
    assert!(change(&fake, more()).unwrap().contains("is added"));
}

#[test]
fn a_pool_is_not_removed_if_a_node_claims_a_block_meanwhile() {
    let (fake, _) = registered();
    change(&fake, more()).unwrap();
    let block = pool_of("more", "10.1.0.0/26", 28).block(1);
    let claim = encode(&BlockRecord {
        node: "n2".parse().unwrap(),
        incarnation: Incarnation::new("other"),
        pool: "more".parse().unwrap(),
        nonce: Nonce::new("x"),
    });
    fake.with(|state| state.fates.push_back(Fate::Late(Key::Block(block), claim)));
    let used = change(&fake, remove("more")).unwrap_err();
    assert!(used.kind == RefusalKind::Invalid && used.message.contains("1 blocks are claimed (n2"), "{used}");
    assert_eq!(names(&fake), ["main", "more"]);
}

#[test]
fn changing_the_backend_changes_no_other_setting() {
    let (fake, _) = registered();
    let settings = || {
        let record = |key: &Key, value: &[u8]| {
            (*key == Key::Cluster).then(|| serde_json::from_slice::<ClusterRecord>(value).unwrap())
        };
        fake.records(record).remove(0)
    };
    let before = settings();
    fake.with(|state| state.fates.push_back(Fate::Unanswered));
    let change = |backend| at_once(change_settings(&fake, &Backend::into(backend))).unwrap();
    assert_eq!(change(Backend::Vxlan), "the backend is now vxlan (was auto)");
    assert_eq!(settings(), ClusterRecord { backend: Backend::Vxlan, ..before });
    assert_eq!(change(Backend::Vxlan), "the backend is already vxlan");
}
