//! A model of etcd: one value that behaves like a member of etcd 3.4.
//!
//! It models the semantics of etcd: one revision for all writes of a transaction, history that can be compacted,
//! leases, watches. It does not model the network. The caller simulates lost requests and replies: for a lost request
//! it does not call the model, for a lost reply it drops the answer.

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
pub use watch::{Watch, WatchMessage};

use history::History;
use lease::Leases;

/// A complete etcd. A clone is a backup of it.
#[derive(Debug, Clone)]
pub struct Model {
    history: History,
    leases: Leases,
    /// Number of restarts. Each restart ends all watches.
    starts: u64,
    space: Space,
}

/// Remaining storage quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Enough quota for all writes.
    Enough,
    /// Enough for one more write. It takes effect, but the reply is an error (`quotaApplierV3`).
    ForOneWrite,
    /// No quota: puts are refused. A transaction that only deletes is executed.
    None,
}

/// An operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Puts a value under a key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// The lease to which the key is attached. `None` detaches the key from an earlier lease.
        lease: Option<LeaseId>,
    },
    /// Deletes all keys in the range.
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
    /// An empty etcd at revision 1, with [`Deletions::Forgotten`].
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty etcd at revision 1, with either behaviour for compacted deletions.
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

    /// Reads all entries of the range with all etcd fields, at an earlier revision; 0 is now.
    pub fn range_at(&self, range: &Range, revision: Revision) -> Result<Vec<KeyValue>, Error> {
        self.history.at(range, revision.number())
    }

    /// Executes a transaction, as `polder_store::Store::commit` does. An error means that etcd rejects the request
    /// without executing it.
    pub fn commit(&mut self, txn: &Txn) -> Result<Outcome, Error> {
        let conditions: Vec<_> = txn.compares.iter().map(Condition::from).collect();
        let operations: Vec<_> = txn.writes.iter().map(Operation::from).collect();
        self.transact(&conditions, &operations)
    }

    /// Executes a transaction in etcd's own terms. The returned revision is the store's revision afterwards: if
    /// nothing was written, the previous one.
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

    /// Sets the remaining quota.
    pub fn set_space(&mut self, space: Space) {
        self.space = space;
    }

    /// Remaining quota.
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

    /// Compacts the history before that revision. Keys that still exist are kept.
    pub fn compact(&mut self, revision: Revision) -> Result<(), Error> {
        self.history.compact(revision.number())
    }

    /// Grants a lease, TTL in seconds. etcd itself grants at least one and a half times its election timeout (2 s);
    /// the model has no minimum.
    pub fn grant(&mut self, id: LeaseId, seconds: u64) -> Result<(), Error> {
        if self.space == Space::None {
            return Err(Error::NoSpace);
        }
        self.leases.grant(id, seconds)
    }

    /// The lease, if it has not expired.
    pub fn lease(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(id)
    }

    /// Renews the lease to its full TTL. Returns the TTL in seconds; `None` if the lease has expired.
    pub fn keep_alive(&mut self, id: LeaseId) -> Option<u64> {
        self.leases.keep_alive(id)
    }

    /// Revokes a lease, and deletes its keys at one revision.
    pub fn revoke(&mut self, id: LeaseId) -> Result<(), Error> {
        let keys = self.leases.remove(id).ok_or(Error::LeaseNotFound(id))?;
        self.carry_out(
            &keys.into_iter().map(|key| Operation::Delete(Range::single(key))).collect::<Vec<_>>(),
        );
        Ok(())
    }

    /// Advances time. Expired leases are revoked one by one, in the order of expiry.
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

    /// Restarts etcd with its data. All watches end. All leases get their full TTL again, as under every new leader.
    pub fn restart(&mut self) {
        self.starts += 1;
        self.leases.renew();
    }

    /// Replaces the store with an empty one.
    pub fn empty(&mut self) {
        *self = Self { starts: self.starts + 1, ..Self::with(self.history.deletions()) };
    }

    /// Restores a backup. The quota does not change.
    pub fn restore(&mut self, backup: &Self) {
        let (starts, space) = (self.starts, self.space);
        self.clone_from(backup);
        (self.starts, self.space) = (starts, space);
        self.restart();
    }
}

/// The checks that etcd makes first (`checkTxnRequest` and `checkIntervals` of its `api/v3rpc/key.go`).
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
