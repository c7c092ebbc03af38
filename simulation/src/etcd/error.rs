//! What etcd refuses to do.

use super::LeaseId;

/// A refusal, in the words of etcd. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The revision is before the one that history begins with.
    #[error("etcdserver: mvcc: required revision has been compacted")]
    Compacted,
    /// The revision has not come yet.
    #[error("etcdserver: mvcc: required revision is a future revision")]
    FutureRevision,
    /// A transaction puts one key twice, or puts a key that it deletes.
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    /// A transaction has more compares, or more operations, than [`polder_ipam::store::LARGEST_TXN`].
    #[error("etcdserver: too many operations in txn request")]
    TooManyOperations,
    /// A key has no characters.
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// The quota is used up: nothing is put, and no lease granted.
    #[error("etcdserver: mvcc: database space exceeded")]
    NoSpace,
    /// The lease was never granted, or has ended.
    #[error("etcdserver: requested lease not found")]
    LeaseNotFound(LeaseId),
    /// There is a lease of that number already.
    #[error("etcdserver: lease already exists")]
    LeaseExists(LeaseId),
}
