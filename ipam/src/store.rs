//! The cluster's records: read, followed, and changed in transactions.
//!
//! Transactions are data ([`Txn`]), so that what decides about them needs no store. They are carried out by
//! [`etcd`], or on a node of its own by [`embedded`].

pub mod embedded;
pub mod endpoint;
pub mod etcd;
mod lease;
pub mod login;
pub mod lookup;
mod members;
pub mod position;
pub mod refusal;
mod watch;
pub mod writes;

use polder_api::credentials::EtcdCredentials;
use tokio::sync::mpsc;

use crate::key::{Key, Range};
use refusal::{Effect, Refusal};
use writes::Writes;

/// A key with its value, as of the revision that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// What stands behind it.
    pub value: Vec<u8>,
    /// The revision that put it there.
    pub revision: i64,
}

/// All entries of a range as of one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contents {
    /// The revision of the store.
    pub revision: i64,
    /// The entries, by key.
    pub entries: Vec<Entry>,
}

/// What must hold for a transaction to take effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// There is no key in the range.
    Empty(Range),
    /// The key was last changed at this revision; 0 says that it is not there.
    Unchanged {
        /// The key.
        key: String,
        /// The revision.
        revision: i64,
    },
    /// No key that is in the range was changed after this revision. An empty range holds, and a deletion is not seen:
    /// whoever must notice one keeps a key that every deletion changes, too.
    NothingNewer {
        /// The range.
        range: Range,
        /// The revision, 0 or more.
        revision: i64,
    },
}

impl Compare {
    /// The key is not there.
    pub fn absent(key: &Key) -> Self {
        Self::Unchanged { key: key.to_string(), revision: 0 }
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
        revision: i64,
    },
    /// A compare did not hold.
    Refused,
}

/// The store did not do what it was asked, or it is not known whether it did. Those are two things: see
/// [`StoreError::is_unknown`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
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
    #[error("{store} refuses this: {refusal}")]
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
pub struct Change {
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
        revision: i64,
        /// What changed, in order.
        changes: Vec<Change>,
    },
    /// Nothing is heard from the store. What is known stays known; the next update says that it is back.
    Lost {
        /// Why, and what to look at.
        reason: String,
    },
    /// The store is heard again, and nothing was missed.
    Back {
        /// The revision of the store.
        revision: i64,
    },
}

/// The place where the cluster's records are.
#[derive(Debug, Clone)]
pub enum Store {
    /// An etcd cluster.
    Etcd(etcd::Etcd),
    /// A file of this node alone.
    Embedded(embedded::Embedded),
}

/// Updates that a slow reader leaves waiting before the store is asked to wait, too.
const UPDATES_WAITING: usize = 64;

impl Store {
    /// The store, for people.
    pub fn name(&self) -> String {
        match self {
            Self::Etcd(etcd) => etcd.name(),
            Self::Embedded(embedded) => embedded.name(),
        }
    }

    /// How the writes of this process have ended.
    pub fn writes(&self) -> &Writes {
        match self {
            Self::Etcd(etcd) => etcd.writes(),
            Self::Embedded(embedded) => embedded.writes(),
        }
    }

    /// The store for an operator's request: with these credentials, or else with those that the agent has.
    pub async fn for_operator(&self, own: Option<&EtcdCredentials>) -> Result<Self, StoreError> {
        match (self, own) {
            (Self::Etcd(etcd), own) => Ok(Self::Etcd(etcd.for_operator(own).await?)),
            (Self::Embedded(_), None) => Ok(self.clone()),
            (Self::Embedded(_), Some(_)) => {
                let reason = "this node has no etcd: give no credentials for one".to_owned();
                Err(StoreError::Unusable { store: self.name(), reason })
            }
        }
    }

    /// Whether what is sent to it is encrypted, or does not leave this machine.
    pub fn is_encrypted(&self) -> bool {
        match self {
            Self::Etcd(etcd) => etcd.is_encrypted(),
            Self::Embedded(_) => true,
        }
    }

    /// Reads all entries of the range, as of one revision.
    pub async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.range(range).await,
            Self::Embedded(embedded) => embedded.range(range),
        }
    }

    /// Carries out a transaction. After an error it may have taken effect, unless the error says that it has not.
    pub async fn commit(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.commit(txn).await,
            Self::Embedded(embedded) => embedded.commit(txn),
        }
    }

    /// Follows the range until the receiver is dropped: first all of it, then every change, through every
    /// disconnection.
    pub fn follow(&self, range: Range) -> mpsc::Receiver<Update> {
        let (updates, receiver) = mpsc::channel(UPDATES_WAITING);
        match self.clone() {
            Self::Etcd(etcd) => tokio::spawn(watch::follow(etcd, range, updates)),
            Self::Embedded(embedded) => tokio::spawn(embedded.follow(range, updates)),
        };
        receiver
    }

    /// Keeps the value behind the key as long as this runs, and lets it vanish when it has not run for `ttl_seconds`.
    /// Puts it there only where that holds: somebody else may have come to own the key while this could not run.
    pub async fn hold(&self, key: &Key, value: Vec<u8>, ttl_seconds: i64, only_if: Compare) {
        match self {
            Self::Etcd(etcd) => lease::hold(etcd, key, &value, ttl_seconds, &only_if).await,
            Self::Embedded(embedded) => embedded.hold(key, value, only_if).await,
        }
    }
}
