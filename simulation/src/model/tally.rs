//! Counts the events of an exploration: a model in which nothing happens proves nothing.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! occurrences {
    ($($name:ident $words:literal,)*) => {
        /// An event that a complete exploration should contain.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Occurrence {
            $(#[doc = $words] $name,)*
        }

        /// All events, with their descriptions.
        pub const OCCURRENCES: &[(Occurrence, &str)] = &[$((Occurrence::$name, $words),)*];
    };
}

occurrences! {
    Claimed "a claim was made",
    ClaimRefused "a claim was refused",
    FoundApplied "an unknown outcome was read: applied",
    FoundNotApplied "an unknown outcome was read: not applied",
    BlockTakenOver "a block was adopted that is claimed by the node in the store",
    LateApplied "a late transaction took effect",
    LateRefused "a late transaction was refused",
    BlockReleased "a block was released",
    RemovedBlockReleased "a removed node's block was released",
    Confirmed "a removed node confirmed that its pods are gone",
    FencedRefused "a removed node's transaction was refused",
    Conflict "a node refused to serve because another has its name",
    Registered "a machine registered under the name of another",
    Adopted "a machine replaced another, as declared by an operator",
    HandedOver "a reserved address was handed over",
    HandedOverRemoved "a reserved address was handed over from a removed node",
    HandedOverRebooted "a reserved address was handed over from an earlier boot",
    Denied "a hand-over was denied",
    HolderCleared "the holder of a reservation was cleared",
}

/// Number of occurrences of each event.
#[derive(Debug, Default)]
pub struct Tally([AtomicU64; OCCURRENCES.len()]);

impl Tally {
    /// Counts one occurrence.
    pub fn count(&self, occurrence: Occurrence) {
        self.0[occurrence as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Number of occurrences of the event.
    pub fn of(&self, occurrence: Occurrence) -> u64 {
        self.0[occurrence as usize].load(Ordering::Relaxed)
    }
}
