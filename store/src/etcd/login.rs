//! Login at an etcd that has users with passwords.
//!
//! A login costs a member about 0.1 s of a core (bcrypt). etcd has no queue for logins, and finishes those that the
//! client has given up: if 1,000 agents log in at the same time, give up after 5 s and retry, no login succeeds. So an
//! agent logs in at one member at a time, waits for up to a minute, and increases the pause after each failure. Tokens
//! are kept for each member: a restarted member knows none.

use std::sync::Arc;
use std::time::Duration;

use polder_ipam::store::StoreError;
use polder_ipam::store::refusal::{RefusalCause, StoreRefusal};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info};

use super::answer::{is_without_users, refusal};
use super::members::EtcdMember;
use super::session::{AFTER_REFUSAL, AFTER_TIMEOUT, LoginState, NoLogin};
use super::{Etcd, REQUEST_TIMEOUT};
use crate::reason::Unusable;

/// Timeout for a login of the agent.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Timeout for the login of an operator. It is shorter because polderctl waits for a minute in total.
const OPERATOR_LOGIN_TIMEOUT: Duration = Duration::from_secs(30);

impl Etcd {
    /// Logs in at that member, unless another call did since `known`. Returns an error after `REQUEST_TIMEOUT`; the
    /// login itself continues in the background, for later calls. A login with the credentials of one request ends with
    /// the request.
    pub(super) async fn log_in(&self, member: &Arc<EtcdMember>, known: LoginState) -> Result<(), StoreError> {
        if self.is_of_one_request() {
            return self.log_in_for_request(member, known).await;
        }
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        let slow = |_| Unusable::SlowLogin { seconds: REQUEST_TIMEOUT.as_secs() }.at(member.to_string());
        let mut turn = timeout_at(deadline, self.turn().lock_owned()).await.map_err(slow)?;
        if member.session.known() != known {
            return Ok(());
        }
        turn.check(Instant::now())?;
        let (etcd, at) = (self.clone(), Arc::clone(member));
        let login = tokio::spawn(async move {
            let outcome = etcd.log_in_now(&at, LOGIN_TIMEOUT).await;
            turn.note(outcome)
        });
        match timeout_at(deadline, login).await.map_err(slow)? {
            Ok(outcome) => outcome,
            Err(panicked) => Err(Unusable::LoginPanicked(panicked).at(member.to_string())),
        }
    }

    /// Logs in at that member, unless another call did since `known`. The login is dropped with the request.
    async fn log_in_for_request(
        &self,
        member: &Arc<EtcdMember>,
        known: LoginState,
    ) -> Result<(), StoreError> {
        let turn = self.turn();
        let mut turn = turn.lock().await;
        if member.session.known() != known {
            return Ok(());
        }
        turn.check(Instant::now())?;
        let outcome = self.log_in_now(member, OPERATOR_LOGIN_TIMEOUT).await;
        turn.note(outcome)
    }

    /// Logs in at that member. The error includes the pauses before the next login.
    async fn log_in_now(&self, member: &Arc<EtcdMember>, max_wait: Duration) -> Result<(), NoLogin> {
        let Some(credentials) = self.credentials() else { return Ok(()) };
        let store = member.to_string();
        let unusable = |reason: Unusable| reason.at(store.as_str());
        let password = credentials.password.read();
        let password = password.map_err(|why| (unusable(Unusable::Password(why)), Some(AFTER_REFUSAL)))?;
        let mut client = member.client.clone();
        let user = credentials.user.clone();
        let error = match timeout(max_wait, client.update_user(Some((user, password)))).await {
            Ok(Ok(())) => {
                debug!(store, user = credentials.user, "logged in");
                member.session.logged_in(true);
                return Ok(());
            }
            Ok(Err(error)) => error,
            Err(_) => {
                self.leave(member);
                let seconds = max_wait.as_secs();
                let reason = if self.is_of_one_request() {
                    Unusable::NoLoginOfOperator { seconds }
                } else {
                    Unusable::NoLogin { seconds }
                };
                return Err((unusable(reason), Some(AFTER_TIMEOUT)));
            }
        };
        match refusal(&error) {
            Some(refusal) if is_without_users(&refusal) => {
                info!(store, "etcd authentication is not enabled: continuing without a login");
                // This sends no request: it only deletes the client's token.
                let _ = client.update_user(None).await;
                member.session.logged_in(false);
                Ok(())
            }
            Some(StoreRefusal { cause: RefusalCause::Learner, .. }) => {
                Err((self.failed(member, &error), None))
            }
            Some(_) => Err((self.failed(member, &error), Some(AFTER_REFUSAL))),
            None => {
                self.leave(member);
                let cause = self.explain(&error);
                // An error from etcd has cost it CPU time, so pause; a refused connection has not.
                let pauses = cause.contains("etcdserver").then_some(AFTER_REFUSAL);
                Err((unusable(Unusable::LoginFailed { cause }), pauses))
            }
        }
    }
}
