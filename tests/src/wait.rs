//! Waiting for conditions, with a deadline.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Longer than anything takes on a slow and busy machine, shorter than a person's patience.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// The variable with the number by which every deadline is multiplied, where the machine is slower than any real one: an
/// emulator.
pub const SLOWNESS: &str = "POLDER_SLOWNESS";

/// That deadline on this machine, which is as slow as [`SLOWNESS`] says.
pub fn here(deadline: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| {
        let Ok(given) = std::env::var(SLOWNESS) else { return 1 };
        let factor = given.parse().ok().filter(|factor| *factor > 0);
        factor.unwrap_or_else(|| panic!("{SLOWNESS} is a number from 1 on, not {given:?}"))
    });
    deadline.saturating_mul(*FACTOR)
}

/// Waits until `look` finds something, and returns it. At the deadline it panics with what was waited for and what
/// the last look said.
pub fn until<T>(what: &str, look: impl FnMut() -> Result<T, String>) -> T {
    within(PATIENCE, what, look)
}

/// Like [`until`], with another deadline.
pub fn within<T>(patience: Duration, what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let patience = here(patience);
    let deadline = Instant::now() + patience;
    loop {
        // One that the machine held up until after the deadline is not the last: what it waited for may just be happening.
        let begun = Instant::now();
        match look() {
            Ok(found) => return found,
            Err(seen) if begun > deadline => {
                panic!("waited {patience:?} for {what}, and the last look said: {seen}")
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
