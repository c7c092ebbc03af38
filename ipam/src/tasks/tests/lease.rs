//! The sign of life in a datastore that behaves as a test specifies.

use std::cell::RefCell;
use std::future::pending;

use super::fake::{me, until_it_waits};
use super::*;
use crate::Revision;
use crate::change::LeaseWrite;
use crate::publication::sign_of_life;
use crate::store::Outcome;
use crate::store::refusal::{Refusal, RefusalCause};
use crate::tasks::lease::{ALIVE, LeaseStore, hold};

/// The operation that fails, the first time only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fails {
    Nothing,
    Grant,
    Put,
    PutUnanswered,
    Renew,
    Restore,
}

/// A datastore that records its requests.
struct Store {
    fails: RefCell<Fails>,
    pauses: RefCell<usize>,
    asked: RefCell<Vec<String>>,
}

impl Store {
    fn note(&self, what: String) {
        self.asked.borrow_mut().push(what);
    }

    fn fails(&self, at: Fails) -> bool {
        let fails = *self.fails.borrow() == at;
        if fails {
            *self.fails.borrow_mut() = Fails::Nothing;
        }
        fails
    }
}

fn no_answer() -> StoreError {
    StoreError::NoAnswer { store: "a fake".to_owned(), reason: "a test says so".to_owned() }
}

impl LeaseStore for Store {
    type Lease = ();

    async fn grant(&self, ttl: Duration) -> Result<(), StoreError> {
        self.note(format!("grant {} s", ttl.as_secs()));
        if self.fails(Fails::Grant) { Err(no_answer()) } else { Ok(()) }
    }

    async fn put(&self, (): &(), change: &Change) -> Result<Outcome, StoreError> {
        let (what, outcome) = match change {
            Change::WriteLease(_) => ("put", Outcome::Applied { revision: Revision::new(9) }),
            Change::RestoreLease(_) => ("restore", Outcome::Refused),
            other => panic!("{other}"),
        };
        self.note(format!("{what} as of {}", sign(change).by.revision));
        if self.fails(Fails::PutUnanswered) {
            return Err(no_answer());
        }
        if what == "put" && self.fails(Fails::Put) {
            return Ok(Outcome::Refused);
        }
        if what == "restore" && self.fails(Fails::Restore) {
            let refusal = Refusal::new(RefusalCause::Permission, String::new());
            return Err(StoreError::Refused { store: "a fake".to_owned(), refusal });
        }
        Ok(outcome)
    }

    async fn renew(&self, (): &mut (), _: Duration) -> Result<(), StoreError> {
        self.note("renew".to_owned());
        if self.fails(Fails::Renew) { Err(no_answer()) } else { Ok(()) }
    }

    async fn revoke(&self, (): ()) {
        self.note("revoke".to_owned());
    }

    async fn pause(&self, time: Duration) {
        self.note(format!("pause {:.1} s", time.as_secs_f64()));
        let Some(left) = self.pauses.borrow().checked_sub(1) else { return pending().await };
        *self.pauses.borrow_mut() = left;
    }
}

fn sign(change: &Change) -> &LeaseWrite {
    match change {
        Change::WriteLease(sign) | Change::RestoreLease(sign) => sign,
        other => panic!("{other}"),
    }
}

/// The requests to the datastore until `pauses` pauses have ended, if `fails` fails once.
fn asked(fails: Fails, pauses: usize) -> Vec<String> {
    let store = Store { fails: RefCell::new(fails), pauses: RefCell::new(pauses), asked: RefCell::default() };
    let me = me();
    until_it_waits(hold(&store, &sign_of_life(&me.name, me.boot(), Revision::new(7)), ALIVE));
    store.asked.into_inner()
}

const GRANTED: [&str; 4] = ["grant 10 s", "put as of 7", "renew", "pause 3.3 s"];

#[test]
fn a_lease_is_granted_then_the_sign_is_put_as_of_the_nodes_record_and_then_it_is_renewed() {
    assert_eq!(asked(Fails::Nothing, 1), [&GRANTED[..], &["renew", "pause 3.3 s"]].concat());
}

#[test]
fn a_sign_that_is_not_put_is_kept_by_no_lease_and_is_tried_again_with_another() {
    for fails in [Fails::Put, Fails::PutUnanswered] {
        let first = ["grant 10 s", "put as of 7", "revoke", "pause 2.0 s"];
        assert_eq!(asked(fails, 1), [first, GRANTED].concat(), "{fails:?}");
    }
}

#[test]
fn after_a_lease_was_lost_or_not_granted_there_is_another_and_the_sign_is_put_as_of_the_same_record() {
    let lost = ["grant 10 s", "put as of 7", "renew", "pause 2.0 s"];
    assert_eq!(asked(Fails::Renew, 1), [lost, GRANTED].concat());
    assert_eq!(asked(Fails::Grant, 1), [&["grant 10 s", "pause 2.0 s"], &GRANTED[..]].concat());
}

#[test]
fn every_half_minute_it_is_asked_whether_the_sign_could_be_put_and_a_no_ends_nothing() {
    for fails in [Fails::Nothing, Fails::Restore] {
        let asked = asked(fails, 20);
        let at: Vec<usize> = (0..asked.len()).filter(|index| asked[*index] == "restore as of 7").collect();
        let renewals = |end: usize| asked[..end].iter().filter(|what| *what == "renew").count();
        assert_eq!(at.iter().map(|index| renewals(*index)).collect::<Vec<_>>(), [10, 20], "{asked:?}");
        assert_eq!(asked.iter().filter(|what| what.starts_with("grant")).count(), 1);
    }
}
