//! Revisions of the datastore.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A revision of the datastore; every change increases it by one (etcd: `revision` of a response header,
/// `mod_revision` of a key). The number itself has no meaning: revisions are compared, to
/// detect a change or a later read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(i64);

impl Revision {
    /// The revision of a key that does not exist. A comparison with it is true if the key is absent, in etcd and in
    /// the embedded store.
    pub const ABSENT: Self = Self(0);

    /// The revision with this number.
    pub const fn new(number: i64) -> Self {
        Self(number)
    }

    /// The number, for etcd, SQL and JSON.
    pub const fn number(self) -> i64 {
        self.0
    }

    /// The revision of the next change.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
