//! Why an attachment is not released.

use polder_api::Attachment;

use crate::cause::HostError;
use crate::ledger::LedgerError;

/// An attachment or its addresses are not released yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotReleased {
    /// An ADD or DEL of it is running.
    /// Remedy: none, it is temporary.
    #[error("an ADD or DEL of {0} is still running: waiting for it to end")]
    Busy(Attachment),
    /// A plugin creates an interface for an attachment that may no longer be in the ledger.
    /// Remedy: none, it is temporary.
    #[error("a plugin is still running an ADD that the previous agent answered: waiting for it to end")]
    EarlierAdd,
    /// Its interface cannot be looked up or deleted.
    #[error(transparent)]
    Interface(#[from] HostError),
    /// Its interface is deleted, but the ledger cannot be written.
    /// Remedy: check the disk of the agent's state directory; the agent retries.
    #[error("cannot write the ledger: {}", .0.reason())]
    Addresses(#[from] LedgerError),
}
