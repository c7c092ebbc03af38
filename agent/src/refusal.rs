//! How the agent refuses what it is asked for.

use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::ledger::LedgerError;

/// Refuses, for that reason.
pub(crate) fn refuse<T>(kind: RefusalKind, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(kind, message))
}

/// The refusal where the ledger cannot be written.
pub(crate) fn ledger_failed(error: LedgerError) -> Refusal {
    let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    Refusal::new(RefusalKind::Failed, format!("the ledger cannot be written: {error}{source}"))
}
