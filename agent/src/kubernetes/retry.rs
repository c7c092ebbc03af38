//! Pauses after failures: they grow, and differ between agents, so that thousands of agents do not return at once after
//! a restart of the API server.

use std::time::Duration;

use tokio::time::Instant;

/// First pause, on average.
const FIRST: Duration = Duration::from_secs(1);

/// Longest pause, on average.
const LONGEST: Duration = Duration::from_secs(60);

/// When to try again.
#[derive(Debug, Default)]
pub struct Retry {
    failures: u32,
    due: Option<Instant>,
}

impl Retry {
    /// A failure, or an end that needs a pause. `chance` is a random number from 0 to 1: the pause is between half and
    /// one and a half of its average.
    pub fn failed(&mut self, now: Instant, chance: f64) {
        let average = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.due = Some(now + average.mul_f64(0.5 + chance));
    }

    /// A success: the next pause is short again.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// The end of the pause; now if there is none.
    pub fn due(&self) -> Instant {
        self.due.unwrap_or_else(Instant::now)
    }

    /// Whether the pause is over.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| due <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_limit_and_are_spread() {
        let (mut retry, now) = (Retry::default(), Instant::now());
        assert!(retry.is_due(now));
        retry.failed(now, 0.0);
        assert_eq!((retry.due() - now, retry.is_due(now)), (FIRST / 2, false));
        retry.failed(now, 1.0);
        assert_eq!(retry.due() - now, FIRST * 3);
        (0..100).for_each(|_| retry.failed(now, 0.5));
        assert_eq!((retry.due() - now, retry.is_due(now + LONGEST)), (LONGEST, true));
        retry.succeeded();
        assert!(retry.is_due(now));
    }
}
