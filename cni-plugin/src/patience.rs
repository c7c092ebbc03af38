//! How long an ADD waits for what passes by itself: an agent that is being replaced, a pod that is about to give up its address.

use std::os::unix::process::parent_id;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Error;

/// A kubelet whose ADD has failed makes another attempt 10 to 16 s later, so to wait for less than that is the shorter way.
const PATIENCE: Duration = Duration::from_secs(8);

/// Between two attempts: at first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Repeats the attempt as long as it fails for such a reason, and whoever has called the plugin is there: nobody would undo what is
/// added after its end.
#[expect(
    clippy::disallowed_methods,
    reason = "nothing tells a plugin that the agent is back, or that an address is free"
)]
pub fn until_it_passes<T>(
    passes: impl Fn(&Error) -> bool,
    mut attempt: impl FnMut() -> Result<T, Error>,
) -> Result<T, Error> {
    let (began, caller, mut pause) = (Instant::now(), parent_id(), PAUSE.0);
    loop {
        match attempt() {
            Err(error) if passes(&error) && began.elapsed() + pause < PATIENCE => {
                thread::sleep(pause);
                if parent_id() != caller {
                    return Err(error);
                }
            }
            outcome => return outcome,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

#[cfg(test)]
mod tests {
    use polder_api::message::{Refusal, RefusalKind};

    use super::*;

    #[test]
    fn what_passes_is_waited_for_and_what_does_not_is_told_at_once() {
        let refused = |kind| Err::<(), _>(Error::Refused(Refusal::new(kind, "no")));
        let mut answers =
            [refused(RefusalKind::TryAgain), refused(RefusalKind::TryAgain), Ok(())].into_iter();
        assert!(until_it_passes(Error::passes, || answers.next().unwrap()).is_ok());
        for kind in [
            RefusalKind::Invalid,
            RefusalKind::PoolExhausted,
            RefusalKind::AddressTaken,
            RefusalKind::Removed,
        ] {
            let mut answers = [refused(kind), Ok(())].into_iter();
            assert!(until_it_passes(Error::passes, || answers.next().unwrap()).is_err(), "{kind:?}");
        }
    }
}
