//! How the agent refuses what it is asked for.

use polder_api::message::{Refusal, RefusalKind};
use polder_ipam::ledger::LedgerError;

/// Refuses, for that reason.
pub(crate) fn refuse<T>(kind: RefusalKind, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(kind, message))
}

/// The refusal where the ledger cannot be written.
pub(crate) fn ledger_failed(error: &LedgerError) -> Refusal {
    Refusal::new(RefusalKind::Failed, format!("the ledger cannot be written: {error}"))
}
