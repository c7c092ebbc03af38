//! Requests to the datastore of the cluster's records, and its responses.
//!
//! These are plain data, so that decisions and the simulation of many nodes need no datastore. Crate `polder-store`
//! carries them out.

pub mod position;
pub mod refusal;

use position::Interruption;
use refusal::{Effect, StoreRefusal};

use crate::Revision;
use crate::key::{Key, Range};

/// A key with its value, as of the revision that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Value of the key.
    pub value: Vec<u8>,
    /// Revision of the last change of the key.
    pub revision: Revision,
}

/// All entries of a range as of one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// Revision of the datastore.
    pub revision: Revision,
    /// The entries, in key order.
    pub entries: Vec<Entry>,
}

/// Condition for a transaction to take effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// No key exists in the range.
    Empty(Range),
    /// The key was last changed at this revision, or does not exist ([`Revision::ABSENT`]).
    Unchanged {
        /// The key.
        key: String,
        /// The revision.
        revision: Revision,
    },
    /// No existing key in the range was changed after this revision. True for an empty range. Does not detect
    /// deletions: to detect them, also compare a key that every deletion changes.
    NothingNewer {
        /// The range.
        range: Range,
        /// The revision, 0 or more.
        revision: Revision,
    },
}

impl Compare {
    /// The key does not exist.
    pub fn absent(key: &Key) -> Self {
        Self::Unchanged { key: key.to_string(), revision: Revision::ABSENT }
    }
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets the value of the key.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
    },
    /// Deletes the key, if it exists.
    Delete {
        /// The key.
        key: String,
    },
}

/// If all compares hold, all writes happen at one revision; otherwise none does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// The conditions, all of which must hold.
    pub compares: Vec<Compare>,
    /// The writes.
    pub writes: Vec<Write>,
}

/// Maximum number of compares, and of writes, in one etcd transaction: the default of `--max-txn-ops`.
pub const LARGEST_TXN: usize = 128;

/// Result of a transaction.
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

/// A request failed, or its outcome is unknown: see [`StoreError::is_unknown`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum StoreError {
    /// No response. The outcome of a transaction is unknown: it may have taken effect, or may still do so.
    /// Remedy: check that etcd runs and is reachable from this node; the cause is in the text.
    #[error("{store} does not answer: {reason}")]
    NoAnswer {
        /// Name of the datastore.
        store: String,
        /// Cause and remedy.
        reason: String,
    },
    /// The datastore refused the request. Nothing was changed, but see [`StoreRefusal::effect`].
    /// Remedy: follow the remedy in parentheses.
    #[error("{store} refused the request: {refusal}")]
    Refused {
        /// Name of the datastore.
        store: String,
        /// Cause and remedy.
        refusal: StoreRefusal,
    },
    /// The request was not sent: the configuration is not usable, or the client could not log in.
    /// Remedy: correct the etcd settings of the agent; the cause is in the text.
    #[error("{store} cannot be used: {reason}")]
    Unusable {
        /// Name of the datastore.
        store: String,
        /// Cause and remedy.
        reason: String,
    },
}

impl StoreError {
    /// Whether a transaction with this error may have taken effect, or may still do so.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::NoAnswer { .. })
    }

    /// Whether a retry fails in the same way until an operator corrects the cause.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Refused { refusal, .. } if refusal.cause.is_lasting())
    }

    /// Whether the result of a transaction with this error must be read. After a refusal one read is enough.
    pub fn needs_reread(&self) -> bool {
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
    /// New entry of the key; `None` if it was deleted.
    pub entry: Option<Entry>,
}

/// An update of a watched range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// All entries. This is the first update; a later one replaces all that is known.
    Loaded(Contents),
    /// These keys changed.
    Changed {
        /// Revision of the datastore.
        revision: Revision,
        /// The changes, in order.
        changes: Vec<KeyChange>,
    },
    /// The watch is interrupted. Known records stay valid; the next update ends the interruption.
    Lost {
        /// The reason.
        reason: Interruption,
    },
    /// The watch has resumed, and no change was missed.
    Back {
        /// Revision of the datastore.
        revision: Revision,
    },
}
