//! Retries of an ADD after a temporary error: the agent is restarting, or another pod is about to release the address.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::parent_id;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::Error;

/// Total time for retries. The kubelet retries a failed ADD after 10 to 16 s, so retries within a shorter time are
/// faster.
const RETRY_TIMEOUT: Duration = Duration::from_secs(8);

/// Pause between two attempts: initial (it doubles each time) and maximum.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Repeats the attempt while `passes` is true for its error, for at most `RETRY_TIMEOUT`. Stops if the calling process
/// has ended: no runtime would undo the ADD.
#[expect(
    clippy::disallowed_methods,
    reason = "nothing tells a plugin that the agent is back, or that an address is free"
)]
pub fn retry<T>(
    passes: impl Fn(&Error) -> bool,
    mut attempt: impl FnMut() -> Result<T, Error>,
) -> Result<T, Error> {
    let (began, caller, mut pause) = (Instant::now(), parent_id(), PAUSE.0);
    loop {
        match attempt() {
            Err(error) if passes(&error) && began.elapsed() + pause < RETRY_TIMEOUT => {
                thread::sleep(pause);
                if parent_id() != caller || result_has_no_reader() {
                    return Err(error);
                }
            }
            outcome => return outcome,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Whether standard output is a pipe that nobody can read any more. This shows the end of a caller in another PID
/// namespace, too: the id of a parent there is always 0.
fn result_has_no_reader() -> bool {
    let output = io::stdout();
    let mut polled = [PollFd::new(output.as_fd(), PollFlags::empty())];
    let is_ready = poll(&mut polled, PollTimeout::ZERO);
    is_ready.is_ok() && polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}

#[cfg(test)]
mod tests {
    use polder_api::message::{Refusal, RefusalKind};

    use super::*;

    #[test]
    fn only_temporary_errors_are_retried() {
        let refused = |kind| Err::<(), _>(Error::Refused(Refusal { kind, message: "no".to_owned() }));
        let mut answers =
            [refused(RefusalKind::TryAgain), refused(RefusalKind::TryAgain), Ok(())].into_iter();
        assert!(retry(Error::passes, || answers.next().unwrap()).is_ok());
        for kind in [
            RefusalKind::Invalid,
            RefusalKind::PoolExhausted,
            RefusalKind::AddressTaken,
            RefusalKind::Removed,
        ] {
            let mut answers = [refused(kind), Ok(())].into_iter();
            assert!(retry(Error::passes, || answers.next().unwrap()).is_err(), "{kind:?}");
        }
    }
}
