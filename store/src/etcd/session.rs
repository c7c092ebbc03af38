//! State of the logins at the members of etcd, and pauses after failed logins.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_ipam::store::StoreError;
use polder_ipam::store::refusal::RefusalCause;
use tokio::time::Instant;

use super::answer::wants_login;

/// First and longest pause after a refused login.
pub(super) const AFTER_REFUSAL: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(120));

/// First and longest pause after a login that timed out.
pub(super) const AFTER_TIMEOUT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));

/// State of the login at one member.
#[derive(Debug, Default)]
pub(super) struct Session(Mutex<LoginState>);

/// A copy of the state of the login.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct LoginState {
    /// Number of successful logins. A request that was refused with an earlier login does not need another one.
    logins: u64,
    /// Whether the last login returned a token: etcd without authentication returns none.
    has_token: bool,
}

impl LoginState {
    /// Whether there was no successful login yet.
    pub(super) fn is_new(self) -> bool {
        self.logins == 0
    }

    /// Whether to repeat a request with this outcome after a login.
    pub(super) fn is_void<T>(self, outcome: &Result<T, StoreError>) -> bool {
        let Err(StoreError::Refused { refusal, .. }) = outcome else { return false };
        match refusal.cause {
            // Signed tokens (JWT) are invalid after every change of users or roles, until the next login.
            RefusalCause::StaleAuth => true,
            RefusalCause::Identity => wants_login(refusal),
            // Authentication was enabled since the login, and etcd uses the name in the client certificate.
            RefusalCause::Permission => !self.has_token,
            _ => false,
        }
    }
}

impl Session {
    pub(super) fn known(&self) -> LoginState {
        *self.lock()
    }

    pub(super) fn logged_in(&self, has_token: bool) {
        let mut known = self.lock();
        *known = LoginState { logins: known.logins + 1, has_token };
    }

    fn lock(&self) -> MutexGuard<'_, LoginState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Allows one login at a time, and none during the pause after a failure.
#[derive(Debug, Default)]
pub(super) struct LoginGate(Option<LoginPause>);

/// The error of a login, and the first and longest pause; `None` for no pause.
pub(super) type NoLogin = (StoreError, Option<(Duration, Duration)>);

#[derive(Debug)]
struct LoginPause {
    error: StoreError,
    pause: Duration,
    until: Instant,
}

impl LoginGate {
    /// Returns the error of the last login during the pause after it.
    pub(super) fn check(&self, now: Instant) -> Result<(), StoreError> {
        match &self.0 {
            Some(failed) if now < failed.until => Err(failed.error.clone()),
            _ => Ok(()),
        }
    }

    /// Notes the outcome of a login.
    pub(super) fn note(&mut self, outcome: Result<(), NoLogin>) -> Result<(), StoreError> {
        match &outcome {
            Ok(()) => self.0 = None,
            Err((error, Some(pauses))) => self.fail(error, *pauses, Instant::now(), fastrand::f64()),
            Err((_, None)) => {}
        }
        outcome.map_err(|(error, _)| error)
    }

    /// Notes a failure. A random share of 50 to 100 % of the pause is used, so that agents do not retry at the same
    /// time.
    fn fail(&mut self, error: &StoreError, (first, longest): (Duration, Duration), now: Instant, share: f64) {
        let before = self.0.as_ref().map_or(Duration::ZERO, |failed| failed.pause);
        let pause = (before * 2).clamp(first, longest.max(before));
        let until = now + pause.mul_f64(0.5 + share / 2.0);
        self.0 = Some(LoginPause { error: error.clone(), pause, until });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(reason: &str) -> StoreError {
        StoreError::Unusable { store: "etcd".to_owned(), reason: reason.to_owned() }
    }

    #[test]
    fn each_failure_lengthens_the_pause_up_to_a_limit() {
        let (mut turn, now) = (LoginGate::default(), Instant::now());
        let after = |turn: &LoginGate, seconds| turn.check(now + Duration::from_secs(seconds));
        assert_eq!(after(&turn, 0), Ok(()));
        turn.fail(&error("a"), AFTER_REFUSAL, now, 1.0);
        assert_eq!((after(&turn, 1), after(&turn, 2)), (Err(error("a")), Ok(())));
        turn.fail(&error("b"), AFTER_REFUSAL, now, 1.0);
        assert_eq!((after(&turn, 3), after(&turn, 4)), (Err(error("b")), Ok(())));
        (0..20).for_each(|_| turn.fail(&error("c"), AFTER_REFUSAL, now, 1.0));
        assert_eq!((after(&turn, 119), after(&turn, 120)), (Err(error("c")), Ok(())));
        // A refusal does not shorten a long pause after a timeout.
        (0..20).for_each(|_| turn.fail(&error("d"), AFTER_TIMEOUT, now, 1.0));
        turn.fail(&error("e"), AFTER_REFUSAL, now, 1.0);
        assert_eq!((after(&turn, 599), after(&turn, 600)), (Err(error("e")), Ok(())));
    }

    #[test]
    fn agents_that_failed_together_retry_at_different_times() {
        let now = Instant::now();
        let until = |share| {
            let mut turn = LoginGate::default();
            turn.fail(&error("a"), AFTER_TIMEOUT, now, share);
            turn.0.unwrap().until - now
        };
        assert_eq!((until(0.0).as_secs(), until(1.0).as_secs()), (15, 30));
    }
}
