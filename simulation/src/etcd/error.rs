//! The errors of etcd.

use super::LeaseId;

/// An error with etcd's message. The transaction was not executed, except for [`Error::NoSpace`] after
/// [`super::Space::ForOneWrite`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The revision is before the compacted one.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// The revision is in the future.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    /// A transaction puts one key twice, or puts a key that it deletes.
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    /// A transaction has more compares, or more operations, than [`polder_ipam::store::LARGEST_TXN`].
    #[error("etcdserver: too many operations in txn request")]
    TooManyOperations,
    /// A key is empty.
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// The quota is used up: puts and new leases are refused.
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    /// The lease was never granted, or has expired.
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound(LeaseId),
    /// A lease with this number already exists.
    #[error("etcdserver: lease already exists")]
    LeaseExists(LeaseId),
}
