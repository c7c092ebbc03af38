//! The compares of an etcd transaction, all kinds.

use polder_ipam::key::Range;
use polder_ipam::store::Compare;

use super::LeaseId;
use super::history::{History, KeyValue};

/// A compare: every key in the range must have the property. An empty range is compared like a key that never
/// existed: all its numbers are 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// The range of keys.
    pub range: Range,
    /// Compares the key's property ...
    pub operator: Operator,
    /// ... with this value.
    pub property: Property,
}

/// Comparison operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// The key's property is equal.
    Equal,
    /// The key's property is not equal.
    NotEqual,
    /// The key's property is greater.
    Greater,
    /// The key's property is less.
    Less,
}

/// The compared property of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Property {
    /// Number of puts since the key was created.
    Version(i64),
    /// The revision that created the key.
    CreateRevision(i64),
    /// The revision of the last change.
    ModRevision(i64),
    /// The key's lease; 0 is none.
    Lease(LeaseId),
    /// The value, compared by bytes. A missing key has no value: the compare fails.
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
