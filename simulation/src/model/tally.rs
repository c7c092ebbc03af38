//! Counts the events of an exploration: a model in which nothing happens proves nothing.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! happenings {
    ($($name:ident $words:literal,)*) => {
        /// An event that a complete exploration should contain.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Happening {
            $(#[doc = $words] $name,)*
        }

        /// All events, with their descriptions.
        pub const HAPPENINGS: &[(Happening, &str)] = &[$((Happening::$name, $words),)*];
    };
}

happenings! {
    Claimed "a claim was made",
    Beaten "a claim was refused",
    FoundMade "an unknown outcome was looked up: it had taken effect",
    FoundUnmade "an unknown outcome was looked up: it had not taken effect",
    TakenOver "a block was taken over that the store says is the node's",
    LateApplied "a late transaction took effect",
    LateRefused "a late transaction was refused",
    GivenBack "a block was given back",
    Inherited "a removed node's block was given back",
    Confirmed "a removed node said that its pods are gone",
    FencedRefused "a removed node's transaction was refused",
    Conflict "a node refused to serve, for another has its name",
    Registered "a machine registered under the name of another",
    Adopted "a machine came in place of another by an operator's word",
    HandedOver "a reserved address was handed over",
    HandedOverRemoved "a reserved address was handed over from a removed node",
    HandedOverRebooted "a reserved address was handed over from an earlier boot",
    Denied "a hand-over was denied",
    LetGo "a reserved address was let go",
}

/// Number of occurrences of each event.
#[derive(Debug, Default)]
pub struct Tally([AtomicU64; HAPPENINGS.len()]);

impl Tally {
    /// Counts one occurrence.
    pub fn count(&self, happening: Happening) {
        self.0[happening as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Number of occurrences of the event.
    pub fn of(&self, happening: Happening) -> u64 {
        self.0[happening as usize].load(Ordering::Relaxed)
    }
}
