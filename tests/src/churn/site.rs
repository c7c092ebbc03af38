//! A node as its runtimes see it: running or powered off.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::caller::Caller;
use crate::wait::{self, TIMEOUT};

/// A node that may be rebooted while runtimes use it.
#[derive(Debug)]
pub struct Site {
    /// The node's name.
    pub node: String,
    boot: Mutex<Option<Boot>>,
    changed: Condvar,
}

/// A boot of a node.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Number of the boot, from 0.
    pub number: u64,
    /// Access to the node.
    pub caller: Caller,
}

impl Site {
    /// The node in its first boot.
    pub fn new(node: &str, caller: Caller) -> Self {
        let boot = Mutex::new(Some(Boot { number: 0, caller }));
        Self { node: node.to_owned(), boot, changed: Condvar::new() }
    }

    fn boot(&self) -> MutexGuard<'_, Option<Boot>> {
        self.boot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Access to the node, as soon as it runs.
    pub fn enter(&self) -> Boot {
        let mut boot = self.boot();
        loop {
            if let Some(boot) = &*boot {
                return boot.clone();
            }
            let max_wait = wait::scaled(TIMEOUT);
            let waited = self.changed.wait_timeout(boot, max_wait).unwrap_or_else(PoisonError::into_inner);
            assert!(!waited.1.timed_out(), "{} does not come back", self.node);
            boot = waited.0;
        }
    }

    /// Denies access from now on.
    pub fn close(&self) {
        *self.boot() = None;
    }

    /// Allows access: the node runs again.
    pub fn open(&self, boot: Boot) {
        *self.boot() = Some(boot);
        self.changed.notify_all();
    }
}
