//! Numbers of interfaces.

use std::fmt;

/// The number of an interface (`ifindex`). It counts in one network namespace: in another it is another interface's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfIndex(u32);

impl IfIndex {
    /// The number as the kernel says it.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// As the kernel is told.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for IfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for IfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
