//! What the store of the cluster's records is asked, and what it answers.
//!
//! All of it is data, so that what decides needs no store, and what plays many nodes through needs none, either. What carries it
//! out is the crate `polder-store`.

pub mod position;
pub mod refusal;

use refusal::{Effect, Refusal};

use crate::Revision;
use crate::key::{Key, Range};

/// A key with its value, as of the revision that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// What stands behind it.
    pub value: Vec<u8>,
    /// The revision that put it there.
    pub revision: Revision,
}

/// All entries of a range as of one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// The revision of the store.
    pub revision: Revision,
    /// The entries, by key.
    pub entries: Vec<Entry>,
}

/// What must hold for a transaction to take effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// There is no key in the range.
    Empty(Range),
    /// The key was last changed at this revision, or does not exist ([`Revision::ABSENT`]).
    Unchanged {
        /// The key.
        key: String,
        /// The revision.
        revision: Revision,
    },
    /// No key that is in the range was changed after this revision. An empty range holds, and a deletion is not seen:
    /// whoever must notice one keeps a key that every deletion changes, too.
    NothingNewer {
        /// The range.
        range: Range,
        /// The revision, 0 or more.
        revision: Revision,
    },
}

impl Compare {
    /// The key is not there.
    pub fn absent(key: &Key) -> Self {
        Self::Unchanged { key: key.to_string(), revision: Revision::ABSENT }
    }
}

/// What a transaction does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Puts the value behind the key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
    },
    /// Deletes the key, if it is there.
    Delete {
        /// The key.
        key: String,
    },
}

/// If all compares hold, all writes happen at one revision; else nothing does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// What must hold.
    pub compares: Vec<Compare>,
    /// What then happens.
    pub writes: Vec<Write>,
}

/// How many compares, and how many writes, etcd takes in one transaction (`--max-txn-ops`).
pub const LARGEST_TXN: usize = 128;

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It took effect, at this revision.
    Applied {
        /// The revision.
        revision: Revision,
    },
    /// A compare did not hold.
    Refused,
}

/// The store did not do what it was asked, or it is not known whether it did. Those are two things: see
/// [`StoreError::is_unknown`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum StoreError {
    /// Nothing was read. Of a transaction, the outcome is not known: it may have taken effect, or may still.
    #[error("{store} does not answer: {reason}")]
    NoAnswer {
        /// Which store.
        store: String,
        /// Why, and what to look at.
        reason: String,
    },
    /// The store has answered that it does not do it. Nothing was changed, but see [`Refusal::effect`].
    #[error("{store} refused the request: {refusal}")]
    Refused {
        /// Which store.
        store: String,
        /// Why, and what helps.
        refusal: Refusal,
    },
    /// The store was not asked: it cannot be used as it is configured, or the client could not log in.
    #[error("{store} cannot be used: {reason}")]
    Unusable {
        /// Which store.
        store: String,
        /// Why, and what to look at.
        reason: String,
    },
}

impl StoreError {
    /// Whether a transaction that failed so may have taken effect, or may still.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::NoAnswer { .. })
    }

    /// Whether the next attempt would end so, too, until somebody does something in the store.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Refused { refusal, .. } if refusal.cause.is_lasting())
    }

    /// Whether it is worth a look what a transaction that failed so has done. Of a refusal, only once.
    pub fn needs_look(&self) -> bool {
        match self {
            Self::NoAnswer { .. } => true,
            Self::Refused { refusal, .. } => refusal.effect() == Effect::Perhaps,
            Self::Unusable { .. } => false,
        }
    }
}

/// A key that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyChange {
    /// The key.
    pub key: String,
    /// What stands behind it now; `None` if it was deleted.
    pub entry: Option<Entry>,
}

/// What happens in a followed range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// These are all entries. It is the first update; a later one replaces everything that was known.
    Loaded(Contents),
    /// These keys changed.
    Changed {
        /// The revision of the store.
        revision: Revision,
        /// What changed, in order.
        changes: Vec<KeyChange>,
    },
    /// Nothing is heard from the store. What is known stays known; the next update says that it is back.
    Lost {
        /// Why, and what to look at.
        reason: String,
    },
    /// The store is heard again, and nothing was missed.
    Back {
        /// The revision of the store.
        revision: Revision,
    },
}
