//! Random operations: with few keys, so that they often affect the same key, and with recent revisions.

use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::{Compare, Txn, Write};
use polder_simulation::etcd::{Condition, LeaseId, Operation, Operator, Property};
use polder_simulation::{Model, Random};

/// An operation that is applied to both stores.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// A transaction of Polder, sent by Polder's own client.
    Commit(Txn),
    /// A transaction with etcd's own conditions and operations.
    Transact(Vec<Condition>, Vec<Operation>),
    /// A read of a range as of a revision.
    Read(Range, i64),
    Compact(i64),
    Grant(LeaseId),
    Revoke(LeaseId),
    KeepAlive(LeaseId),
    Lease(LeaseId),
    /// Watches, each with its first revision. They are opened together, because etcd reads past events only ten times
    /// a second.
    Watch(Vec<(Range, i64)>),
}

const KEYS: &[&str] = &["a", "b", "b/1", "b/2", "b0", "c", "d", "é"];
const VALUES: &[&str] = &["", "1", "2", "22"];
const LEASES: &[LeaseId] = &[1, 2, 3];

/// Number of watches that are opened together.
const WATCHES: usize = 10;

/// Generates steps from a seed.
pub(crate) struct Chance(Random);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    /// A random step for a store with the contents of `model`.
    pub(crate) fn step(&mut self, model: &Model) -> Step {
        match self.0.below(100) {
            0..35 => Step::Commit(Txn {
                compares: self.some(3, |chance| chance.compare(model)),
                writes: self.some(4, Self::write),
            }),
            35..75 => {
                Step::Transact(self.some(3, |chance| chance.condition(model)), self.some(4, Self::operation))
            }
            75..83 => Step::Read(self.range(), self.revision(model)),
            83..86 => Step::Compact(self.revision(model)),
            86..91 => Step::Grant(self.lease()),
            91..93 => Step::Revoke(self.lease()),
            93..95 => Step::KeepAlive(self.lease()),
            95..99 => Step::Lease(self.lease()),
            _ => Step::Watch((0..WATCHES).map(|_| (self.watchable(), self.revision(model))).collect()),
        }
    }

    /// 0 to `most` elements.
    fn some<T>(&mut self, most: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let number = self.0.below(most + 1);
        (0..number).map(|_| one(self)).collect()
    }

    fn key(&mut self) -> String {
        (*self.0.one_of(KEYS)).to_owned()
    }

    fn value(&mut self) -> Vec<u8> {
        (*self.0.one_of(VALUES)).into()
    }

    /// One of [`LEASES`]; it may not exist in the store.
    fn lease(&mut self) -> LeaseId {
        *self.0.one_of(LEASES)
    }

    fn range(&mut self) -> Range {
        match self.0.below(4) {
            0 => Range::single(self.key()),
            1 => Range::prefix("b/".to_owned()),
            // May end before it starts.
            _ => Range { start: self.key(), end: self.key() },
        }
    }

    /// A range that is not empty: etcd opens no watch of an empty range.
    fn watchable(&mut self) -> Range {
        let range = self.range();
        if range.start < range.end { range } else { Range::single(range.start) }
    }

    /// Mostly one of the last revisions, sometimes one of the next two.
    fn revision(&mut self, model: &Model) -> i64 {
        let back = [0, 1, 2, 3, 5, 8, 20, 100];
        let revision = model.revision().number() + 2 - self.0.one_of(&back);
        revision.max(0)
    }

    fn write(&mut self) -> Write {
        if self.0.once_in(3) {
            return Write::Delete { key: self.key() };
        }
        Write::Put { key: self.key(), value: self.value() }
    }

    fn operation(&mut self) -> Operation {
        if self.0.once_in(4) {
            return Operation::Delete(self.range());
        }
        let lease = self.0.once_in(3).then(|| self.lease());
        Operation::Put { key: self.key(), value: self.value(), lease }
    }

    fn compare(&mut self, model: &Model) -> Compare {
        match self.0.below(5) {
            0 => Compare::Empty(self.range()),
            1 | 2 => {
                Compare::NothingNewer { range: self.range(), revision: Revision::new(self.revision(model)) }
            }
            _ => {
                let key = self.key();
                let there = model.range(&Range::single(key.clone())).entries.pop();
                let right = there.map_or(0, |entry| entry.revision.number());
                let revision = if self.0.once_in(4) { self.revision(model) } else { right };
                Compare::Unchanged { key, revision: Revision::new(revision) }
            }
        }
    }

    fn condition(&mut self, model: &Model) -> Condition {
        let operators = [Operator::Equal, Operator::NotEqual, Operator::Greater, Operator::Less];
        let property = match self.0.below(5) {
            0 => Property::Version(i64::try_from(self.0.below(4)).unwrap()),
            1 => Property::CreateRevision(self.revision(model)),
            2 => Property::ModRevision(self.revision(model)),
            3 => Property::Lease(if self.0.once_in(2) { 0 } else { self.lease() }),
            _ => Property::Value(self.value()),
        };
        Condition { range: self.range(), operator: *self.0.one_of(&operators), property }
    }
}
