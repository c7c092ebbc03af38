//! Storage of the cluster's records and of the node's ledger: etcd, or a file of this node.
//!
//! `polder-ipam` defines the requests to a datastore ([`polder_ipam::store`]) and the contents of a ledger
//! ([`polder_ipam::ledger`]), and decides on changes. This crate carries them out: [`etcd`] reads, watches and changes
//! records in transactions; on a node without etcd, [`embedded`] does the same in a file. The ledger is in SQLite
//! ([`ledger`]).

pub mod embedded;
pub mod etcd;
pub mod ledger;
mod reason;
pub mod sqlite;
pub mod writes;

use std::time::Duration;

use polder_api::credentials::EtcdCredentials;
use polder_ipam::change::Change;
use polder_ipam::key::Range;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn, Update};
use polder_ipam::tasks::RecordStore;
use polder_ipam::tasks::lease::LeaseStore;
use polder_ipam::transaction::transaction;
use tokio::sync::mpsc;

pub use crate::embedded::Embedded;
pub use crate::etcd::Etcd;
pub use crate::ledger::{NodeIpam, open_node};
use crate::reason::Unusable;
use crate::writes::Writes;

/// The datastore of the cluster's records.
#[derive(Debug, Clone)]
pub enum Store {
    /// An etcd cluster.
    Etcd(Etcd),
    /// A file of this node; not shared with other nodes.
    Embedded(Embedded),
}

impl RecordStore for Store {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        Self::commit(self, change).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        Self::range(self, range).await
    }
}

/// Maximum number of updates in the queue of a receiver. When it is full, the sending task waits for the receiver.
const UPDATES_WAITING: usize = 64;

impl Store {
    /// Name and location of the datastore, for messages.
    pub fn name(&self) -> String {
        match self {
            Self::Etcd(etcd) => etcd.name(),
            Self::Embedded(embedded) => embedded.name(),
        }
    }

    /// The outcomes of this process's writes.
    pub fn writes(&self) -> &Writes {
        match self {
            Self::Etcd(etcd) => etcd.writes(),
            Self::Embedded(embedded) => embedded.writes(),
        }
    }

    /// The datastore for an operator's request: it uses these credentials, or the agent's if there are none.
    pub async fn for_operator(&self, credentials: Option<&EtcdCredentials>) -> Result<Self, StoreError> {
        match (self, credentials) {
            (Self::Etcd(etcd), credentials) => Ok(Self::Etcd(etcd.for_operator(credentials).await?)),
            (Self::Embedded(_), None) => Ok(self.clone()),
            (Self::Embedded(_), Some(_)) => Err(Unusable::NotEtcd.at(self.name())),
        }
    }

    /// The datastore for the comparison with Kubernetes, which one agent does for all. `None` for a file of this node:
    /// no other node uses it.
    pub fn for_leader(&self) -> Option<Self> {
        match self {
            Self::Etcd(etcd) => Some(Self::Etcd(etcd.for_leader())),
            Self::Embedded(_) => None,
        }
    }

    /// Replaces all connections, because an address of this host that they may use was removed.
    pub async fn reconnect(&self) -> Result<(), StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.reconnect().await,
            Self::Embedded(_) => Ok(()),
        }
    }

    /// Whether the traffic to the datastore is encrypted or does not leave this machine.
    pub fn is_encrypted(&self) -> bool {
        match self {
            Self::Etcd(etcd) => etcd.is_encrypted(),
            Self::Embedded(_) => true,
        }
    }

    /// Reads all entries of the range, at one revision.
    pub async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.range(range).await,
            Self::Embedded(embedded) => embedded.range(range),
        }
    }

    /// Commits the change, completely or not at all. After an error with [`StoreError::is_unknown`] it may have taken
    /// effect.
    pub async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        self.transact(&transaction(change)).await
    }

    /// Carries out a transaction, like [`Store::commit`]. For tests, and for programs that fill a datastore for tests.
    pub async fn transact(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.commit(txn).await,
            Self::Embedded(embedded) => embedded.commit(txn),
        }
    }

    /// Follows the range until the receiver is dropped: first all entries, then every change, also after
    /// disconnections.
    pub fn follow(&self, range: Range) -> mpsc::Receiver<Update> {
        let (updates, receiver) = mpsc::channel(UPDATES_WAITING);
        match self.clone() {
            Self::Etcd(etcd) => tokio::spawn(etcd.follow(range, updates)),
            Self::Embedded(embedded) => tokio::spawn(embedded.follow(range, updates)),
        };
        receiver
    }
}

/// A lease granted by a datastore.
#[derive(Debug)]
pub enum Lease {
    /// A lease of etcd.
    Etcd(Box<etcd::lease::Lease>),
    /// No lease: no other node uses this datastore, so the node counts as alive while the process runs.
    Embedded,
}

impl LeaseStore for Store {
    type Lease = Lease;

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        match self {
            Self::Etcd(etcd) => Ok(Lease::Etcd(Box::new(etcd.grant(ttl).await?))),
            Self::Embedded(_) => Ok(Lease::Embedded),
        }
    }

    async fn put(&self, lease: &Lease, change: &Change) -> Result<Outcome, StoreError> {
        match (self, lease) {
            (Self::Etcd(etcd), Lease::Etcd(lease)) => etcd.commit_under(lease, &transaction(change)).await,
            _ => self.commit(change).await,
        }
    }

    async fn renew(&self, lease: &mut Lease, max_wait: Duration) -> Result<(), StoreError> {
        match (self, lease) {
            (Self::Etcd(etcd), Lease::Etcd(lease)) => etcd.renew(lease, max_wait).await,
            _ => Ok(()),
        }
    }

    async fn revoke(&self, lease: Lease) {
        if let (Self::Etcd(etcd), Lease::Etcd(lease)) = (self, lease) {
            etcd.revoke(*lease).await;
        }
    }

    async fn pause(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}
