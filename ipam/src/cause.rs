//! Errors of components outside this crate, for example the ledger file or the kernel.

use std::cmp::Ordering;
use std::error::Error;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// An error of any type, with its sources. Two errors are equal if their messages are equal.
#[derive(Clone, thiserror::Error)]
#[error(transparent)]
pub struct SharedError(Arc<dyn Error + Send + Sync>);

impl SharedError {
    /// Wraps the error.
    pub fn new(reason: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(reason.into().into())
    }
}

impl fmt::Debug for SharedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl PartialEq for SharedError {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.to_string() == other.to_string()
    }
}

impl Eq for SharedError {}

impl PartialOrd for SharedError {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SharedError {
    fn cmp(&self, other: &Self) -> Ordering {
        self.to_string().cmp(&other.to_string())
    }
}

impl Hash for SharedError {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.to_string().hash(state);
    }
}

/// An operation on the node failed: in its kernel, or in another component that a task uses.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error(transparent)]
pub struct HostError(SharedError);

impl HostError {
    /// Wraps the reason.
    pub fn new(reason: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(SharedError::new(reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("no bridge")]
    struct NoBridge(#[source] fmt::Error);

    #[test]
    fn a_wrapped_error_keeps_its_message_and_causes() {
        let error = HostError::new(NoBridge(fmt::Error));
        assert_eq!((error.to_string(), error.clone()), ("no bridge".to_owned(), HostError::new("no bridge")));
        assert_eq!(error.source().map(ToString::to_string), Some(fmt::Error.to_string()));
        assert_ne!(error, HostError::new("no kernel"));
    }
}
