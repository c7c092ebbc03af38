//! Why an attachment is not taken away.

use polder_api::Attachment;

use crate::cause::HostError;
use crate::ledger::LedgerError;

/// An attachment, or its addresses, stay for now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotReleased {
    /// Somebody wires it, or takes it away.
    #[error("{0} is being worked on: waiting for the end of its ADD or DEL")]
    Busy(Attachment),
    /// An interface is made for an attachment that the ledger may not name any more.
    #[error(
        "a plugin still works on an ADD that the agent before this one has answered: waiting for its end"
    )]
    EarlierAdd,
    /// Its interface cannot be found, or not deleted.
    #[error(transparent)]
    Interface(#[from] HostError),
    /// Its interface is gone, and that cannot be written down.
    #[error("the ledger cannot be written: {0}")]
    Addresses(#[from] LedgerError),
}
