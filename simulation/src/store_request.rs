//! Requests to the store and their replies, while in flight.

use polder_ipam::key::Range;
use polder_ipam::store::refusal::StoreRefusal;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn, Write};

use crate::etcd::LeaseId;

/// A request of a node to the store.
pub struct Request {
    /// Request number, unique in the simulation.
    pub id: u64,
    /// Index of the machine that sent the request.
    pub machine: usize,
    /// The operation requested.
    pub operation: StoreOperation,
    /// Progress of the request.
    pub state: Progress,
}

/// The operation that a request asks for.
#[derive(Debug, Clone)]
pub enum StoreOperation {
    /// Read all entries of a range.
    Range(Range),
    /// A transaction.
    Commit(Txn),
    /// Grant a lease, TTL in seconds.
    Grant(u64),
    /// A transaction whose puts are attached to the lease.
    Put(LeaseId, Txn),
    /// Renew the lease to its full TTL.
    Renew(LeaseId),
    /// Revoke the lease.
    Revoke(LeaseId),
}

/// Progress of a request.
#[derive(Debug, Clone)]
pub enum Progress {
    /// In flight to the store.
    Sent,
    /// In flight to the store; the sender does not wait for it any more.
    Late,
    /// Served by the store; the reply is in flight.
    Served(StoreReply),
    /// The reply has arrived, or the request has failed.
    Answered(Result<StoreReply, StoreError>),
}

/// A reply of the store.
#[derive(Debug, Clone)]
pub enum StoreReply {
    /// Reply to a range read.
    Contents(Contents),
    /// Reply to a transaction.
    Outcome(Outcome),
    /// Reply to a lease request: the current lease, if any.
    Lease(Option<LeaseId>),
    /// The store refused the request.
    Refused(StoreRefusal),
}

impl StoreReply {
    /// The error for a caller that expected another kind of reply.
    pub fn error(self) -> StoreError {
        match self {
            Self::Refused(refusal) => StoreError::Refused { store: "etcd".to_owned(), refusal },
            Self::Contents(_) | Self::Outcome(_) | Self::Lease(_) => no_answer(),
        }
    }
}

/// The error for a request without a reply.
pub fn no_answer() -> StoreError {
    StoreError::NoAnswer { store: "etcd".to_owned(), reason: "nothing is heard of it".to_owned() }
}

/// One-line description of a request, for the log.
pub fn brief(operation: &StoreOperation) -> String {
    match operation {
        StoreOperation::Range(range) => format!("for {}", range.start),
        StoreOperation::Commit(txn) => format!("to write {}", writes(txn)),
        StoreOperation::Grant(seconds) => format!("for a lease of {seconds} s"),
        StoreOperation::Put(lease, txn) => format!("to write {} under lease {lease}", writes(txn)),
        StoreOperation::Renew(lease) => format!("to renew lease {lease}"),
        StoreOperation::Revoke(lease) => format!("to revoke lease {lease}"),
    }
}

fn writes(txn: &Txn) -> String {
    let writes = txn.writes.iter().map(|write| match write {
        Write::Put { key, value } => format!("{key}={}", String::from_utf8_lossy(value)),
        Write::Delete { key } => format!("-{key}"),
    });
    writes.collect::<Vec<_>>().join(" ")
}

/// One-line description of a reply, for the log.
pub fn short(reply: &StoreReply) -> String {
    match reply {
        StoreReply::Contents(contents) => format!("{} entries", contents.entries.len()),
        StoreReply::Outcome(outcome) => format!("{outcome:?}"),
        StoreReply::Lease(lease) => lease.map_or("no lease".to_owned(), |lease| format!("lease {lease}")),
        StoreReply::Refused(refusal) => refusal.message.clone(),
    }
}
