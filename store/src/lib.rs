//! Where the cluster's records and the node's ledger are: etcd, or a file of this node.
//!
//! `polder-ipam` says what a store is asked ([`polder_ipam::store`]) and what a ledger keeps ([`polder_ipam::ledger`]), and decides
//! what is to change. This carries it out: records are read, followed and changed in transactions by [`etcd`], or on a node of its
//! own by [`embedded`]; the ledger is in SQLite ([`ledger`]).

pub mod embedded;
pub mod etcd;
pub mod ledger;
pub mod sqlite;
pub mod writes;

use std::time::Duration;

use polder_api::credentials::EtcdCredentials;
use polder_ipam::change::Change;
use polder_ipam::key::Range;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn, Update};
use polder_ipam::tasks::Records;
use polder_ipam::tasks::lease::LeaseStore;
use polder_ipam::transaction::transaction;
use tokio::sync::mpsc;

pub use crate::embedded::Embedded;
pub use crate::etcd::Etcd;
pub use crate::ledger::{NodeIpam, open_node};
use crate::writes::Writes;

/// The place where the cluster's records are.
#[derive(Debug, Clone)]
pub enum Store {
    /// An etcd cluster.
    Etcd(Etcd),
    /// A file of this node alone.
    Embedded(Embedded),
}

impl Records for Store {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        Self::commit(self, change).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        Self::range(self, range).await
    }
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
                let reason = "this node does not use etcd: do not give etcd credentials".to_owned();
                Err(StoreError::Unusable { store: self.name(), reason })
            }
        }
    }

    /// Gives up all connections to it, because an address of this host is gone that they may have been made from.
    pub async fn reconnect(&self) -> Result<(), StoreError> {
        match self {
            Self::Etcd(etcd) => etcd.reconnect().await,
            Self::Embedded(_) => Ok(()),
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

    /// Makes a change, or none of it. After an error it may have taken effect, unless the error says that it has not.
    pub async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        self.transact(&transaction(change)).await
    }

    /// Carries out a transaction, like [`Store::commit`]. For tests, and for what fills a store for them.
    pub async fn transact(&self, txn: &Txn) -> Result<Outcome, StoreError> {
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
            Self::Etcd(etcd) => tokio::spawn(etcd.follow(range, updates)),
            Self::Embedded(embedded) => tokio::spawn(embedded.follow(range, updates)),
        };
        receiver
    }
}

/// A lease that a store has granted.
#[derive(Debug)]
pub enum Lease {
    /// One of etcd.
    Etcd(Box<etcd::lease::Lease>),
    /// None: there is nobody else to see that this node is gone. As long as somebody asks, it is there.
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

    async fn renew(&self, lease: &mut Lease, patience: Duration) -> Result<(), StoreError> {
        match (self, lease) {
            (Self::Etcd(etcd), Lease::Etcd(lease)) => etcd.renew(lease, patience).await,
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
