//! Waiting for conditions, with a deadline.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Timeout of most waits: longer than any operation on a slow and busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between two checks.
const PAUSE: Duration = Duration::from_millis(10);

/// Environment variable with the factor for every timeout, for machines slower than any real one, such as an emulator.
pub const SLOWNESS: &str = "POLDER_SLOWNESS";

/// The timeout on this machine, multiplied by [`SLOWNESS`].
pub fn scaled(deadline: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| {
        let Ok(given) = std::env::var(SLOWNESS) else { return 1 };
        let factor = given.parse().ok().filter(|factor| *factor > 0);
        factor.unwrap_or_else(|| panic!("{SLOWNESS} is a number from 1 on, not {given:?}"))
    });
    deadline.saturating_mul(*FACTOR)
}

/// Waits until `attempt` returns `Ok`, and returns the value. After the timeout it panics with `what` and the last
/// error.
pub fn until<T>(what: &str, attempt: impl FnMut() -> Result<T, String>) -> T {
    within(TIMEOUT, what, attempt)
}

/// Like [`until`], with another timeout.
pub fn within<T>(max_wait: Duration, what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let max_wait = scaled(max_wait);
    let deadline = Instant::now() + max_wait;
    loop {
        // A check that started before the deadline but ended after it is not the last: the condition may hold in the
        // next check.
        let begun = Instant::now();
        match attempt() {
            Ok(found) => return found,
            Err(seen) if begun > deadline => {
                panic!("waited {max_wait:?} for {what}, and the last attempt returned: {seen}")
            }
            Err(_) => pause(),
        }
    }
}

/// Waits until the condition holds.
pub fn until_true(what: &str, mut condition: impl FnMut() -> bool) {
    until(what, || if condition() { Ok(()) } else { Err("not yet".to_owned()) });
}

#[expect(clippy::disallowed_methods, reason = "the one place that looks at a condition again and again")]
fn pause() {
    std::thread::sleep(PAUSE);
}
