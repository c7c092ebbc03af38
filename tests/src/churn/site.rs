//! A node as its runtimes see it: there, or switched off for a moment.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::caller::Caller;
use crate::wait::{self, PATIENCE};

/// A node that may be rebooted while runtimes work there.
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
    /// Its number, from 0 on.
    pub number: u64,
    /// The way in.
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

    /// The way into the node, as soon as it runs.
    pub fn enter(&self) -> Boot {
        let mut boot = self.boot();
        loop {
            if let Some(boot) = &*boot {
                return boot.clone();
            }
            let patience = wait::here(PATIENCE);
            let waited = self.changed.wait_timeout(boot, patience).unwrap_or_else(PoisonError::into_inner);
            assert!(!waited.1.timed_out(), "{} does not come back", self.node);
            boot = waited.0;
        }
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        *self.boot() = None;
    }

    /// The node runs again.
    pub fn open(&self, boot: Boot) {
        *self.boot() = Some(boot);
        self.changed.notify_all();
    }
}
