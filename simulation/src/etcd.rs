//! A model of etcd: one value that answers as a member of etcd 3.4 would.
//!
//! What it knows is etcd's own semantics: one revision for everything that a transaction writes, history that can be
//! compacted, leases, watches. What it does not know is the way to it. Lost requests and lost replies are the
//! caller's to simulate: a request is lost when the model is not asked, its reply when the answer is dropped.

mod condition;
mod error;
mod history;
mod lease;
mod watch;

use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::{Contents, LARGEST_TXN, Outcome, Txn, Write};

pub use condition::{Condition, Operator, Property};
pub use error::Error;
pub use history::{Deletions, Event, KeyValue};
pub use lease::{Lease, LeaseId};
pub use watch::{Said, Watch};

use history::History;
use lease::Leases;

/// The whole of an etcd. A clone is a backup of it.
#[derive(Debug, Clone)]
pub struct Model {
    history: History,
    leases: Leases,
    /// How often it was started. Watches end when it ends.
    starts: u64,
    space: Space,
}

/// How much of its quota is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Enough.
    Enough,
    /// Enough for one write, which is carried out and answered as if it were not (`quotaApplierV3`).
    ForOneWrite,
    /// None: nothing is put. What only deletes is carried out.
    None,
}

/// One of the things that a transaction does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Puts the value behind the key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// With whose end the key goes away. None takes it off an earlier lease.
        lease: Option<LeaseId>,
    },
    /// Deletes all keys that are in the range.
    Delete(Range),
}

impl From<&Write> for Operation {
    fn from(write: &Write) -> Self {
        match write {
            Write::Put { key, value } => Self::Put { key: key.clone(), value: value.clone(), lease: None },
            Write::Delete { key } => Self::Delete(Range::single(key.clone())),
        }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::with(Deletions::Forgotten)
    }
}

impl Model {
    /// An etcd that was never written to. Its revision is 1. It is one of those that forget the most.
    pub fn new() -> Self {
        Self::default()
    }

    /// An etcd that was never written to, of one sort or the other.
    pub fn with(deletions: Deletions) -> Self {
        let space = Space::Enough;
        Self { history: History::new(deletions), leases: Leases::default(), starts: 0, space }
    }

    /// The revision of the last change.
    pub fn revision(&self) -> Revision {
        Revision::new(self.history.revision())
    }

    /// Reads all entries of the range, as `polder_store::Store::range` does.
    pub fn range(&self, range: &Range) -> Contents {
        let entries = self.history.now(range).map(KeyValue::entry).collect();
        Contents { revision: self.revision(), entries }
    }

    /// Reads all entries of the range with all that etcd knows of them, as of an earlier revision; 0 is now.
    pub fn range_at(&self, range: &Range, revision: Revision) -> Result<Vec<KeyValue>, Error> {
        self.history.at(range, revision.number())
    }

    /// Carries out a transaction, as `polder_store::Store::commit` does. An error is etcd's refusal to look
    /// at it at all.
    pub fn commit(&mut self, txn: &Txn) -> Result<Outcome, Error> {
        let conditions: Vec<_> = txn.compares.iter().map(Condition::from).collect();
        let operations: Vec<_> = txn.writes.iter().map(Operation::from).collect();
        self.transact(&conditions, &operations)
    }

    /// Carries out a transaction in etcd's own terms. The revision that it tells is that of the store afterwards: where
    /// nothing was written, it is that of before.
    pub fn transact(&mut self, when: &[Condition], then: &[Operation]) -> Result<Outcome, Error> {
        check(when, then)?;
        let puts = then.iter().any(|operation| matches!(operation, Operation::Put { .. }));
        if puts && self.space == Space::None {
            return Err(Error::NoSpace);
        }
        if !when.iter().all(|condition| condition.holds(&self.history)) {
            return Ok(Outcome::Refused);
        }
        if let Some(id) = then.iter().find_map(|operation| self.missing_lease(operation)) {
            return Err(Error::LeaseNotFound(id));
        }
        self.carry_out(then);
        if puts && self.space == Space::ForOneWrite {
            self.space = Space::None;
            return Err(Error::NoSpace);
        }
        Ok(Outcome::Applied { revision: self.revision() })
    }

    /// Has that much of its quota left from now on.
    pub fn set_space(&mut self, space: Space) {
        self.space = space;
    }

    /// How much of its quota is left.
    pub fn space(&self) -> Space {
        self.space
    }

    fn missing_lease(&self, operation: &Operation) -> Option<LeaseId> {
        let Operation::Put { lease, .. } = operation else { return None };
        lease.filter(|id| self.leases.get(*id).is_none())
    }

    fn carry_out(&mut self, operations: &[Operation]) {
        let mut step = self.history.step();
        for operation in operations {
            match operation {
                Operation::Put { key, value, lease } => {
                    step.put(key, value, *lease);
                    self.leases.attach(key, *lease);
                }
                Operation::Delete(range) => {
                    step.delete(range).iter().for_each(|key| self.leases.attach(key, None));
                }
            }
        }
    }

    /// Forgets what was changed before that revision, and how. A key that is still there is not forgotten.
    pub fn compact(&mut self, revision: Revision) -> Result<(), Error> {
        self.history.compact(revision.number())
    }

    /// Grants a lease for that many seconds. etcd itself grants none for less than one and a half times its election
    /// timeout, which is 2 s; here nothing is added.
    pub fn grant(&mut self, id: LeaseId, seconds: u64) -> Result<(), Error> {
        if self.space == Space::None {
            return Err(Error::NoSpace);
        }
        self.leases.grant(id, seconds)
    }

    /// The lease, if it has not ended.
    pub fn lease(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(id)
    }

    /// Lets the lease last its whole time from now on. Returns that time in seconds; `None` says that it has ended.
    pub fn keep_alive(&mut self, id: LeaseId) -> Option<u64> {
        self.leases.keep_alive(id)
    }

    /// Ends a lease, and deletes its keys at one revision.
    pub fn revoke(&mut self, id: LeaseId) -> Result<(), Error> {
        let keys = self.leases.remove(id).ok_or(Error::LeaseNotFound(id))?;
        self.carry_out(
            &keys.into_iter().map(|key| Operation::Delete(Range::single(key))).collect::<Vec<_>>(),
        );
        Ok(())
    }

    /// Lets time pass. Leases that have run out are revoked, each by itself, the one that ended first before the
    /// others.
    pub fn advance(&mut self, seconds: u64) -> Vec<LeaseId> {
        let ended = self.leases.advance(seconds);
        for id in &ended {
            self.revoke(*id).expect("it was there a moment ago");
        }
        ended
    }

    /// Watches the range from that revision on; 0 is from now on.
    pub fn watch(&self, range: Range, from: Revision) -> Watch {
        Watch::new(self, range, from.number())
    }

    /// Ends and starts again with what it has. Watches end. Leases last their whole time from now on, as they do under
    /// every new leader.
    pub fn restart(&mut self) {
        self.starts += 1;
        self.leases.renew();
    }

    /// Is replaced by one that was never written to.
    pub fn empty(&mut self) {
        *self = Self { starts: self.starts + 1, ..Self::with(self.history.deletions()) };
    }

    /// Is set back to what it was when that backup was made. Its quota is what it is.
    pub fn restore(&mut self, backup: &Self) {
        let (starts, space) = (self.starts, self.space);
        self.clone_from(backup);
        (self.starts, self.space) = (starts, space);
        self.restart();
    }
}

/// What etcd looks at before anything else (`checkTxnRequest` and `checkIntervals` of its `api/v3rpc/key.go`).
fn check(when: &[Condition], then: &[Operation]) -> Result<(), Error> {
    if when.len().max(then.len()) > LARGEST_TXN {
        return Err(Error::TooManyOperations);
    }
    let key_of = |operation: &Operation| match operation {
        Operation::Put { key, .. } => key.is_empty(),
        Operation::Delete(range) => range.start.is_empty(),
    };
    if when.iter().any(|condition| condition.range.start.is_empty()) || then.iter().any(key_of) {
        return Err(Error::EmptyKey);
    }
    for (number, operation) in then.iter().enumerate() {
        let Operation::Put { key, .. } = operation else { continue };
        let again = |other: &Operation| matches!(other, Operation::Put { key: other, .. } if other == key);
        let deleted = |other: &Operation| matches!(other, Operation::Delete(range) if range.has(key));
        if then.iter().any(deleted) || then[..number].iter().any(again) {
            return Err(Error::DuplicateKey);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
