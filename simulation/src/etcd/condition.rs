//! The compares of etcd, all of them.

use polder_ipam::key::Range;
use polder_ipam::store::Compare;

use super::LeaseId;
use super::history::{History, KeyValue};

/// A compare: every key that is in the range has the property. Of a range without keys, it is asked as of a key that
/// was never there, whose numbers are all 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// The range.
    pub range: Range,
    /// The key's is compared ...
    pub operator: Operator,
    /// ... with this.
    pub property: Property,
}

/// How two things are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// The key's is the same.
    Equal,
    /// The key's is another one.
    NotEqual,
    /// The key's is more.
    Greater,
    /// The key's is less.
    Less,
}

/// What is compared of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Property {
    /// How often it was put since it was not there.
    Version(i64),
    /// The revision that created it.
    CreateRevision(i64),
    /// The revision that changed it last.
    ModRevision(i64),
    /// Its lease; 0 is none.
    Lease(LeaseId),
    /// Its value, by its bytes. A key that is not there has none, and no compare with one holds.
    Value(Vec<u8>),
}

impl From<&Compare> for Condition {
    fn from(compare: &Compare) -> Self {
        let (range, operator, property) = match compare {
            Compare::Empty(range) => (range.clone(), Operator::Equal, Property::Version(0)),
            Compare::Unchanged { key, revision } => {
                (Range::single(key.clone()), Operator::Equal, Property::ModRevision(revision.number()))
            }
            Compare::NothingNewer { range, revision } => {
                (range.clone(), Operator::Less, Property::ModRevision(revision.next().number()))
            }
        };
        Self { range, operator, property }
    }
}

impl Condition {
    pub(super) fn holds(&self, history: &History) -> bool {
        let mut keys = history.now(&self.range).peekable();
        if keys.peek().is_none() {
            return !matches!(self.property, Property::Value(_)) && self.holds_of(&KeyValue::default());
        }
        keys.all(|key| self.holds_of(key))
    }

    fn holds_of(&self, key: &KeyValue) -> bool {
        let order = match &self.property {
            Property::Version(version) => key.version.cmp(version),
            Property::CreateRevision(revision) => key.create_revision.cmp(revision),
            Property::ModRevision(revision) => key.mod_revision.cmp(revision),
            Property::Lease(lease) => key.lease.cmp(lease),
            Property::Value(value) => key.value.cmp(value),
        };
        match self.operator {
            Operator::Equal => order.is_eq(),
            Operator::NotEqual => order.is_ne(),
            Operator::Greater => order.is_gt(),
            Operator::Less => order.is_lt(),
        }
    }
}
