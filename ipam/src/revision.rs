//! Revisions of the store.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A revision of the store, which every change makes greater by one (etcd: `revision` of a response header, `mod_revision` of a key).
/// The number itself means nothing: revisions are compared, to see whether something changed, or was read later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(i64);

impl Revision {
    /// The revision of a key that does not exist. A comparison with it holds where the key is absent, in etcd as in the embedded store.
    pub const ABSENT: Self = Self(0);

    /// The revision with this number.
    pub const fn new(number: i64) -> Self {
        Self(number)
    }

    /// The number, for etcd, SQL and JSON.
    pub const fn number(self) -> i64 {
        self.0
    }

    /// The revision that the next change makes.
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
