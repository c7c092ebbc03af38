//! The lease record in a datastore that behaves as a test specifies.

use std::cell::RefCell;
use std::future::pending;

use super::fake::{me, until_it_waits};
use super::*;
use crate::Revision;
use crate::change::LeaseWrite;
use crate::publication::lease_write;
use crate::store::Outcome;
use crate::store::refusal::{RefusalCause, StoreRefusal};
use crate::tasks::lease::{LEASE_TTL, LeaseStore, hold};

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
        self.note(format!("{what} as of {}", written_lease(change).by.revision));
        if self.fails(Fails::PutUnanswered) {
            return Err(no_answer());
        }
        if what == "put" && self.fails(Fails::Put) {
            return Ok(Outcome::Refused);
        }
        if what == "restore" && self.fails(Fails::Restore) {
            let refusal = StoreRefusal::new(RefusalCause::Permission, String::new());
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

fn written_lease(change: &Change) -> &LeaseWrite {
    match change {
        Change::WriteLease(written_lease) | Change::RestoreLease(written_lease) => written_lease,
        other => panic!("{other}"),
    }
}

/// The requests to the datastore until `pauses` pauses have ended, if `fails` fails once.
fn asked(fails: Fails, pauses: usize) -> Vec<String> {
    let store = Store { fails: RefCell::new(fails), pauses: RefCell::new(pauses), asked: RefCell::default() };
    let me = me();
    until_it_waits(hold(&store, &lease_write(&me.name, me.boot(), Revision::new(7)), LEASE_TTL));
    store.asked.into_inner()
}

const GRANTED: [&str; 4] = ["grant 10 s", "put as of 7", "renew", "pause 3.3 s"];

#[test]
fn a_lease_is_granted_then_written_then_renewed() {
    assert_eq!(asked(Fails::Nothing, 1), [&GRANTED[..], &["renew", "pause 3.3 s"]].concat());
}

#[test]
fn a_failed_write_revokes_the_lease_and_retries_with_another() {
    for fails in [Fails::Put, Fails::PutUnanswered] {
        let first = ["grant 10 s", "put as of 7", "revoke", "pause 2.0 s"];
        assert_eq!(asked(fails, 1), [first, GRANTED].concat(), "{fails:?}");
    }
}

#[test]
fn a_lost_or_refused_lease_is_replaced_by_another() {
    let lost = ["grant 10 s", "put as of 7", "renew", "pause 2.0 s"];
    assert_eq!(asked(Fails::Renew, 1), [lost, GRANTED].concat());
    assert_eq!(asked(Fails::Grant, 1), [&["grant 10 s", "pause 2.0 s"], &GRANTED[..]].concat());
}

#[test]
fn the_write_permission_is_checked_every_half_minute_without_ending_the_lease() {
    for fails in [Fails::Nothing, Fails::Restore] {
        let asked = asked(fails, 20);
        let at: Vec<usize> = (0..asked.len()).filter(|index| asked[*index] == "restore as of 7").collect();
        let renewals = |end: usize| asked[..end].iter().filter(|what| *what == "renew").count();
        assert_eq!(at.iter().map(|index| renewals(*index)).collect::<Vec<_>>(), [10, 20], "{asked:?}");
        assert_eq!(asked.iter().filter(|what| what.starts_with("grant")).count(), 1);
    }
}
