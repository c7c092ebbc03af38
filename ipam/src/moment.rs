//! Time for the allocator.

use std::time::Duration;

/// A moment, as the time since the machine was booted (`CLOCK_BOOTTIME`).
///
/// The clock includes the time in suspend, and does not jump when the system time is set. Moments can be compared
/// only within one boot, so every record with a moment belongs to a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment {
    millis: u64,
}

impl Moment {
    /// The moment when the machine was booted.
    pub const BOOT: Self = Self { millis: 0 };

    /// The moment `millis` milliseconds after boot.
    pub const fn from_millis(millis: u64) -> Self {
        Self { millis }
    }

    /// Milliseconds since boot.
    pub const fn millis(self) -> u64 {
        self.millis
    }

    /// The time from `earlier` to this moment; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.millis.saturating_sub(earlier.millis))
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self { millis: self.millis.saturating_add(millis) }
    }
}
