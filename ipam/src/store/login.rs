//! Logging in at an etcd that has users with passwords.
//!
//! A login costs a member about 0.1 s of a core (bcrypt). There is no queue, and the member finishes what nobody waits for any
//! more: of 1,000 agents that log in at once, give up after 5 s and try again, none gets in. So an agent logs in at one member
//! at a time, waits for a minute, and pauses longer after each failure. Tokens are kept for each member: one that was restarted
//! knows none.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info};

use super::StoreError;
use super::etcd::{Etcd, PATIENCE, refusal};
use super::members::Member;
use super::refusal::{Cause, Refusal};

/// How long a member has for a login.
const LOGIN_PATIENCE: Duration = Duration::from_secs(60);

/// How long a member has for the login of an operator: polderctl waits for a minute in all.
const OPERATOR_PATIENCE: Duration = Duration::from_secs(30);

/// Before the next login after a refused one: the first pause, and the longest.
const AFTER_REFUSAL: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(120));

/// The same after one that the member had no time for.
const AFTER_TIMEOUT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));

/// A user of etcd.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The password.
    pub password: Password,
}

/// A password, which is not printed.
#[derive(Clone)]
pub enum Password {
    /// It is this.
    Inline(String),
    /// It is in this file, and is read for each login: it may be changed meanwhile.
    File(PathBuf),
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("Inline(_)"),
            Self::File(path) => write!(f, "File({})", path.display()),
        }
    }
}

impl Password {
    /// The password, without the end of its line; or why there is none.
    pub fn read(&self) -> Result<String, String> {
        match self {
            Self::Inline(password) => Ok(password.clone()),
            Self::File(path) => match fs::read_to_string(path) {
                Ok(text) if text.trim_end_matches(['\r', '\n']).is_empty() => {
                    Err(format!("{} is empty", path.display()))
                }
                Ok(text) => Ok(text.trim_end_matches(['\r', '\n']).to_owned()),
                Err(error) => Err(format!("{}: {error}", path.display())),
            },
        }
    }
}

/// How the client is known at a member.
#[derive(Debug, Default)]
pub(super) struct Session(Mutex<Known>);

/// What is known of that.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known {
    /// How many logins have ended well. Whoever was refused with an earlier one need not log in again.
    logins: u64,
    /// Whether the last one has given a token: an etcd without authentication gives none.
    has_token: bool,
}

impl Known {
    /// Whether somebody has logged in there.
    pub(super) fn is_new(self) -> bool {
        self.logins == 0
    }

    /// Whether a request that has ended so is worth a repetition after a login.
    pub(super) fn is_void<T>(self, outcome: &Result<T, StoreError>) -> bool {
        let Err(StoreError::Refused { refusal, .. }) = outcome else { return false };
        match refusal.cause {
            // Tokens that are signed (JWT) are void after every change of users or roles, until the next login.
            Cause::StaleAuth => true,
            Cause::Identity => refusal.wants_login(),
            // Authentication was enabled meanwhile, and etcd uses the name in the client's certificate.
            Cause::Permission => !self.has_token,
            _ => false,
        }
    }
}

impl Session {
    pub(super) fn known(&self) -> Known {
        *self.lock()
    }

    fn logged_in(&self, has_token: bool) {
        let mut known = self.lock();
        *known = Known { logins: known.logins + 1, has_token };
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose turn it is to log in, and since when nobody may.
#[derive(Debug, Default)]
pub(super) struct Turn(Option<Failed>);

/// Why a login has failed, and how long the pauses are to be.
type NoLogin = (StoreError, Option<(Duration, Duration)>);

#[derive(Debug)]
struct Failed {
    error: StoreError,
    pause: Duration,
    until: Instant,
}

impl Turn {
    /// The error of the last login, as long as the next one has to wait.
    fn check(&self, now: Instant) -> Result<(), StoreError> {
        match &self.0 {
            Some(failed) if now < failed.until => Err(failed.error.clone()),
            _ => Ok(()),
        }
    }

    /// Notes how a login has ended.
    fn note(&mut self, outcome: Result<(), NoLogin>) -> Result<(), StoreError> {
        match &outcome {
            Ok(()) => self.0 = None,
            Err((error, Some(pauses))) => self.fail(error, *pauses, Instant::now(), fastrand::f64()),
            Err((_, None)) => {}
        }
        outcome.map_err(|(error, _)| error)
    }

    /// Notes a failure. Its pause is between half and all of what it could be, so that agents do not come back together.
    fn fail(&mut self, error: &StoreError, (first, longest): (Duration, Duration), now: Instant, share: f64) {
        let before = self.0.as_ref().map_or(Duration::ZERO, |failed| failed.pause);
        let pause = (before * 2).clamp(first, longest.max(before));
        let until = now + pause.mul_f64(0.5 + share / 2.0);
        self.0 = Some(Failed { error: error.clone(), pause, until });
    }
}

impl Etcd {
    /// Logs in at that member, unless somebody has since `known`. Waits no longer than for another request; the login itself goes
    /// on, and whoever comes later finds it done. With the credentials of one request nobody comes later: it ends with the request.
    pub(super) async fn log_in(&self, member: &Arc<Member>, known: Known) -> Result<(), StoreError> {
        if self.is_of_one_request() {
            return self.log_in_for_request(member, known).await;
        }
        let deadline = Instant::now() + PATIENCE;
        let slow = |_| StoreError::Unusable {
            store: member.to_string(),
            reason: format!(
                "logging in takes longer than {} s, and goes on: do many clients log in at once? Client certificates \
                 (etcd.cert) need no login",
                PATIENCE.as_secs()
            ),
        };
        let mut turn = timeout_at(deadline, self.turn().lock_owned()).await.map_err(slow)?;
        if member.session.known().logins != known.logins {
            return Ok(());
        }
        turn.check(Instant::now())?;
        let (etcd, at) = (self.clone(), Arc::clone(member));
        let login = tokio::spawn(async move {
            let outcome = etcd.log_in_now(&at, LOGIN_PATIENCE).await;
            turn.note(outcome)
        });
        match timeout_at(deadline, login).await.map_err(slow)? {
            Ok(outcome) => outcome,
            Err(panicked) => {
                Err(StoreError::Unusable { store: member.to_string(), reason: panicked.to_string() })
            }
        }
    }

    /// Logs in at that member, unless that was done since `known`, and is dropped with the request.
    async fn log_in_for_request(&self, member: &Arc<Member>, known: Known) -> Result<(), StoreError> {
        let turn = self.turn();
        let mut turn = turn.lock().await;
        if member.session.known().logins != known.logins {
            return Ok(());
        }
        turn.check(Instant::now())?;
        let outcome = self.log_in_now(member, OPERATOR_PATIENCE).await;
        turn.note(outcome)
    }

    /// Logs in at that member; or why not, and how long the pauses are to be.
    async fn log_in_now(&self, member: &Arc<Member>, patience: Duration) -> Result<(), NoLogin> {
        let Some(credentials) = self.credentials() else { return Ok(()) };
        let store = member.to_string();
        let unusable = |reason| StoreError::Unusable { store: store.clone(), reason };
        let password = credentials.password.read();
        let password =
            password.map_err(|why| (unusable(format!("etcd.password_file: {why}")), Some(AFTER_REFUSAL)))?;
        let mut client = member.client.clone();
        let user = credentials.user.clone();
        let error = match timeout(patience, client.update_user(Some((user, password)))).await {
            Ok(Ok(())) => {
                debug!(store, user = credentials.user, "logged in");
                member.session.logged_in(true);
                return Ok(());
            }
            Ok(Err(error)) => error,
            Err(_) => {
                self.leave(member);
                let remedy = if self.is_of_one_request() {
                    ": do many clients log in at once? A client certificate (--etcd-cert) needs no login"
                } else {
                    ""
                };
                let reason = format!("no answer to the login within {} s{remedy}", patience.as_secs());
                return Err((unusable(reason), Some(AFTER_TIMEOUT)));
            }
        };
        match refusal(&error) {
            Some(refusal) if refusal.is_without_users() => {
                info!(store, "authentication is not enabled: going on without a login");
                // Nothing is asked of etcd: it takes the token away.
                let _ = client.update_user(None).await;
                member.session.logged_in(false);
                Ok(())
            }
            Some(Refusal { cause: Cause::Learner, .. }) => Err((self.failed(member, &error), None)),
            Some(_) => Err((self.failed(member, &error), Some(AFTER_REFUSAL))),
            None => {
                self.leave(member);
                let reason = self.explain(&error);
                // What etcd itself says has cost it something; a connection that is refused has not.
                let pauses = reason.contains("etcdserver").then_some(AFTER_REFUSAL);
                Err((unusable(format!("cannot log in: {reason}")), pauses))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(reason: &str) -> StoreError {
        StoreError::Unusable { store: "etcd".to_owned(), reason: reason.to_owned() }
    }

    #[test]
    fn each_failure_makes_the_pause_longer_up_to_a_limit() {
        let (mut turn, now) = (Turn::default(), Instant::now());
        let after = |turn: &Turn, seconds| turn.check(now + Duration::from_secs(seconds));
        assert_eq!(after(&turn, 0), Ok(()));
        turn.fail(&error("a"), AFTER_REFUSAL, now, 1.0);
        assert_eq!((after(&turn, 1), after(&turn, 2)), (Err(error("a")), Ok(())));
        turn.fail(&error("b"), AFTER_REFUSAL, now, 1.0);
        assert_eq!((after(&turn, 3), after(&turn, 4)), (Err(error("b")), Ok(())));
        (0..20).for_each(|_| turn.fail(&error("c"), AFTER_REFUSAL, now, 1.0));
        assert_eq!((after(&turn, 119), after(&turn, 120)), (Err(error("c")), Ok(())));
        // A refusal after a long pause for a member without time makes it no shorter.
        (0..20).for_each(|_| turn.fail(&error("d"), AFTER_TIMEOUT, now, 1.0));
        turn.fail(&error("e"), AFTER_REFUSAL, now, 1.0);
        assert_eq!((after(&turn, 599), after(&turn, 600)), (Err(error("e")), Ok(())));
    }

    #[test]
    fn agents_that_failed_together_do_not_come_back_together() {
        let now = Instant::now();
        let until = |share| {
            let mut turn = Turn::default();
            turn.fail(&error("a"), AFTER_TIMEOUT, now, share);
            turn.0.unwrap().until - now
        };
        assert_eq!((until(0.0).as_secs(), until(1.0).as_secs()), (15, 30));
    }

    #[test]
    fn a_password_in_a_file_is_its_text_without_the_end_of_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        let password = Password::File(path.clone());
        assert!(password.read().unwrap_err().contains("password: No such file"));
        fs::write(&path, "\n").unwrap();
        assert!(password.read().unwrap_err().contains("is empty"));
        fs::write(&path, " se cret \r\n").unwrap();
        assert_eq!(password.read().unwrap(), " se cret ");
        assert!(!format!("{:?}", Password::Inline("secret".to_owned())).contains("secret"));
    }
}
