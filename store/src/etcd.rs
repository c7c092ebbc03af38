//! The etcd datastore. Adds to the client: timeouts, failover to another member, pages, and error messages with a
//! remedy.

mod answer;
pub mod config;
pub mod endpoint;
pub mod lease;
mod login;
pub mod lookup;
mod members;
mod session;
mod watch;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, CompareOp, GetOptions, TxnOp};
use polder_api::credentials::EtcdCredentials;
use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::refusal::{Asker, RefusalCause, StoreRefusal};
use polder_ipam::store::{Compare, Contents, Entry, Outcome, StoreError, Txn, Update, Write};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tracing::warn;

use self::answer::{Hint, explain, refusal};
use self::config::{Credentials, EtcdConfig, Password, Pem};
use self::members::{EtcdMember, Members};
use self::session::LoginGate;
use crate::reason::{NoReply, Unusable};
use crate::writes::{Writes, Written};

/// gRPC code for a revision that was compacted or does not exist yet.
const OUT_OF_RANGE: i32 = 11;

/// Timeout for one answer of a member. etcd replaces a lost leader within about a second.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Entries in one page: far below the 4 MiB that the client decodes at once.
const PAGE: i64 = 2000;

/// An etcd cluster. Clones share their state.
#[derive(Clone)]
pub struct Etcd {
    members: Members,
    writes: Writes,
    credentials: Option<Arc<Credentials>>,
    turn: Arc<Mutex<LoginGate>>,
    asker: Asker,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl Etcd {
    /// Prepares connections to all members. Succeeds even if no member is reachable.
    pub async fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() && config.discovery_srv.is_none() {
            return Err(Unusable::NoEndpoint.at("etcd"));
        }
        Ok(Self {
            members: Members::new(config).await?,
            writes: Writes::default(),
            credentials: config.credentials.clone().map(Arc::new),
            turn: Arc::default(),
            asker: Asker::Agent,
        })
    }

    /// The same etcd for an operator: with these credentials, or without them with the agent's. Its writes are counted
    /// separately, because a refusal of an operator's request is not a problem of the node.
    pub(crate) async fn for_operator(&self, own: Option<&EtcdCredentials>) -> Result<Self, StoreError> {
        let Some(own) = own else {
            return Ok(Self { writes: Writes::default(), asker: Asker::Operator, ..self.clone() });
        };
        let mut config = self.members.config().clone();
        if let Some(shown) = &own.certificate {
            if !self.members.is_secure() {
                return Err(Unusable::CertificateWithoutTls.at(self.name()));
            }
            config.identity = Some((inline(&shown.certificate), inline(&shown.key.0)));
        }
        // A client certificate names its own user, so the agent's user is not used.
        config.credentials = own.user.as_ref().map(|user| Credentials {
            user: user.name.clone(),
            password: Password::Inline(user.password.0.clone()),
        });
        if let Some(user) = own.user.as_ref().filter(|_| !self.is_encrypted()) {
            warn!("the password of etcd user {} is sent unencrypted: enable TLS in etcd", user.name);
        }
        Ok(Self {
            members: self.members.again(&config).await?,
            writes: Writes::default(),
            credentials: config.credentials.map(Arc::new),
            turn: Arc::default(),
            asker: Asker::OperatorWithCredentials,
        })
    }

    /// The same etcd for the agent as the leader of all agents. Its writes are counted separately: with a user for each
    /// node, etcd refuses them to most nodes, and that is not a problem of the node.
    pub(crate) fn for_leader(&self) -> Self {
        Self { writes: Writes::default(), asker: Asker::Leader, ..self.clone() }
    }

    /// Whether TLS is used.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.members.is_secure()
    }

    /// Whether the credentials are those of one request, and are dropped with it.
    fn is_of_one_request(&self) -> bool {
        self.asker == Asker::OperatorWithCredentials
    }

    pub(crate) fn name(&self) -> String {
        self.members.name()
    }

    pub(crate) fn writes(&self) -> &Writes {
        &self.writes
    }

    /// The member in use. If it is a proxy, tries the next members, each once.
    async fn member(&self) -> Result<Arc<EtcdMember>, StoreError> {
        let mut outcome = self.direct_member().await;
        for _ in 1..self.members.count() {
            if !matches!(outcome, Err(StoreError::Unusable { .. })) {
                break;
            }
            outcome = self.direct_member().await;
        }
        outcome
    }

    /// The member in use. If it is a proxy, leaves it and returns an error.
    ///
    /// `etcd grpc-proxy` removes the codes of errors, so that a refusal looks like an unknown outcome, and watches
    /// through it can stall forever. It answers a request for the member list itself, without the header of etcd's
    /// answers (`server/proxy/grpcproxy/cluster.go`; 3.4.23).
    async fn direct_member(&self) -> Result<Arc<EtcdMember>, StoreError> {
        let member = self.members.current()?;
        if member.is_direct() {
            return Ok(member);
        }
        let asked = self.attempt(&member, &|mut client: Client| async move { client.member_list().await });
        match asked.await {
            Ok(answer) if answer.header().is_none() => {
                self.leave(&member);
                Err(Unusable::Proxy.at(member.to_string()))
            }
            // A proxy does not refuse this request, so this is a member.
            Ok(_) | Err(StoreError::Refused { .. }) => {
                member.set_direct(true);
                Ok(member)
            }
            Err(error) => Err(error),
        }
    }

    fn credentials(&self) -> Option<&Credentials> {
        self.credentials.as_deref()
    }

    fn turn(&self) -> Arc<Mutex<LoginGate>> {
        Arc::clone(&self.turn)
    }

    /// Replaces all connections, after an address of this host was removed.
    pub(crate) async fn reconnect(&self) -> Result<(), StoreError> {
        self.members.reconnect().await
    }

    fn reconnections(&self) -> tokio::sync::watch::Receiver<u64> {
        self.members.reconnections()
    }

    /// Switches to the next member, unless another call has already left this one.
    fn leave(&self, member: &Arc<EtcdMember>) {
        self.members.leave(member);
    }

    /// The last cause of the error, with a hint if one is known.
    fn explain(&self, error: &etcd_client::Error) -> String {
        let (text, is_known) = explain(error);
        // With TLS 1.3 the client may send data before it learns that the member refuses its certificate.
        let closed = ["broken pipe", "connection reset", "connection closed"];
        let is_tls = self.members.is_secure();
        if is_known || !is_tls || !closed.iter().any(|pattern| text.contains(pattern)) {
            return text;
        }
        format!("{text} ({})", Hint::ClientCertificate)
    }

    fn no_answer(&self, reason: NoReply) -> StoreError {
        reason.at(self.name())
    }

    /// Converts an error of that member. Leaves the member if it sent no refusal: a member that refuses works. Also
    /// leaves a learner, because the other members serve the request.
    fn failed(&self, member: &Arc<EtcdMember>, error: &etcd_client::Error) -> StoreError {
        let store = member.to_string();
        match refusal(error) {
            Some(refusal) => {
                let refusal = StoreRefusal { asker: self.asker, ..refusal };
                if refusal.cause == RefusalCause::Learner {
                    self.leave(member);
                }
                StoreError::Refused { store, refusal }
            }
            None => {
                self.leave(member);
                StoreError::NoAnswer { store, reason: self.explain(error) }
            }
        }
    }

    /// Calls the member in use; if the call fails, leaves the member. With a user, logs in first, and again if the
    /// member no longer accepts the login.
    async fn call<T, F>(&self, call: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let member = self.member().await?;
        if self.credentials.is_none() {
            return self.attempt(&member, &call).await;
        }
        let known = member.session.known();
        if known.is_new() {
            self.log_in(&member, known).await?;
        }
        let known = member.session.known();
        let outcome = self.attempt(&member, &call).await;
        if !known.is_void(&outcome) {
            return outcome;
        }
        self.log_in(&member, known).await?;
        self.attempt(&member, &call).await
    }

    async fn attempt<T, F>(
        &self,
        member: &Arc<EtcdMember>,
        call: &impl Fn(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        match again_if_stale(|| timeout(REQUEST_TIMEOUT, call(member.client.clone())), is_stale).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.failed(member, &error)),
            Err(_) => {
                self.leave(member);
                Err(NoReply::Timeout { seconds: REQUEST_TIMEOUT.as_secs() }.at(member.to_string()))
            }
        }
    }

    /// Sends a write to the member in use, and counts the outcome. A learner does not carry out the write, so the next
    /// members are tried.
    async fn write<T, F>(&self, written: Written, call: impl Fn(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut outcome = self.call(&call).await;
        for _ in 1..self.members.count() {
            if !outcome.as_ref().is_err_and(is_from_learner) {
                break;
            }
            outcome = self.call(&call).await;
        }
        match &outcome {
            Ok(_) => self.writes.taken(&written),
            Err(error) => self.writes.failed(&written, error),
        }
        outcome
    }

    /// Reads can be repeated: tries each member once, until one answers or refuses.
    pub(crate) async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        let mut outcome = self.range_once(range).await;
        for _ in 1..self.members.count() {
            if !outcome.as_ref().is_err_and(|error| error.is_unknown() || is_from_learner(error)) {
                break;
            }
            outcome = self.range_once(range).await;
        }
        outcome
    }

    async fn range_once(&self, range: &Range) -> Result<Contents, StoreError> {
        let mut contents = Contents::default();
        let mut start = range.start.clone();
        loop {
            let mut options = GetOptions::new().with_range(range.end.as_str()).with_limit(PAGE);
            if contents.revision > Revision::ABSENT {
                options = options.with_revision(contents.revision.number());
            }
            let mut answer = self
                .call(|mut client| {
                    let (page, options) = (start.clone(), options.clone());
                    async move { client.get(page, Some(options)).await }
                })
                .await?;
            if contents.revision == Revision::ABSENT {
                contents.revision = revision(answer.header());
            }
            let more = answer.more();
            contents.entries.extend(answer.take_kvs().into_iter().filter_map(entry));
            match contents.entries.last() {
                // The smallest key after the last one of this page.
                Some(last) if more => start = format!("{}\0", last.key),
                _ => return Ok(contents),
            }
        }
    }

    /// The number of keys in the range: at that revision, or now if that revision is not available.
    async fn count(&self, range: &Range, revision: Revision) -> Result<usize, StoreError> {
        let count = async |revision: i64| {
            let options = GetOptions::new().with_range(range.end.as_str()).with_count_only();
            let options = options.with_revision(revision);
            self.call(|mut client| {
                let (start, options) = (range.start.clone(), options.clone());
                async move {
                    match client.get(start, Some(options)).await {
                        Ok(answer) => Ok(usize::try_from(answer.count()).ok()),
                        Err(etcd_client::Error::GRpcStatus(status))
                            if i32::from(status.code()) == OUT_OF_RANGE =>
                        {
                            Ok(None)
                        }
                        Err(error) => Err(error),
                    }
                }
            })
            .await
        };
        let known = match count(revision.number()).await? {
            Some(number) => Some(number),
            None => count(0).await?,
        };
        known.ok_or_else(|| self.no_answer(NoReply::NoCount))
    }

    /// Follows the range until the receiver is dropped.
    pub(crate) async fn follow(self, range: Range, updates: mpsc::Sender<Update>) {
        watch::follow(self, range, updates).await;
    }

    /// Sends a transaction to one member, once: after an error the caller must find out its outcome. Sends it again
    /// only if it is known to have had no effect.
    pub(crate) async fn commit(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        let request = etcd_client::Txn::new()
            .when(txn.compares.iter().map(compare).collect::<Vec<_>>())
            .and_then(txn.writes.iter().map(write).collect::<Vec<_>>());
        self.transact(Written::from(txn), request).await
    }

    async fn transact(&self, written: Written, request: etcd_client::Txn) -> Result<Outcome, StoreError> {
        let answer = self
            .write(written, |mut client| {
                let request = request.clone();
                async move { client.txn(request).await }
            })
            .await?;
        let revision = revision(answer.header());
        Ok(if answer.succeeded() { Outcome::Applied { revision } } else { Outcome::Refused })
    }
}

fn is_stale(error: &etcd_client::Error) -> bool {
    refusal(error).is_some_and(|refusal| refusal.cause == RefusalCause::StaleAuth)
}

fn is_from_learner(error: &StoreError) -> bool {
    matches!(error, StoreError::Refused { refusal, .. } if refusal.cause == RefusalCause::Learner)
}

/// Retries once, immediately, if etcd refused a request because users or roles were just changed: it then refuses
/// requests of all clients for a moment. The request had no effect, and the next attempt usually succeeds.
async fn again_if_stale<T, E, L, F>(
    attempt: impl Fn() -> F,
    is_stale: impl Fn(&E) -> bool,
) -> Result<Result<T, E>, L>
where
    F: Future<Output = Result<Result<T, E>, L>>,
{
    let outcome = attempt().await?;
    if outcome.as_ref().is_err_and(&is_stale) { attempt().await } else { Ok(outcome) }
}

fn inline(pem: &str) -> Pem {
    Pem::Inline(pem.to_owned().into_bytes())
}

/// The revision of the datastore in the header of an answer; `ABSENT` without a header.
fn revision(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    header.map_or(Revision::ABSENT, |header| Revision::new(header.revision()))
}

/// Converts an entry; `None` if its key is not UTF-8, which Polder's keys always are.
fn entry(pair: etcd_client::KeyValue) -> Option<Entry> {
    let revision = Revision::new(pair.mod_revision());
    let (key, value) = pair.into_key_value();
    Some(Entry { key: String::from_utf8(key).ok()?, value, revision })
}

fn compare(compare: &Compare) -> etcd_client::Compare {
    match compare {
        // The compare must hold for every key of the range. An existing key never has version 0.
        Compare::Empty(range) => {
            let none = etcd_client::Compare::version(range.start.as_str(), CompareOp::Equal, 0);
            none.with_range(range.end.as_str())
        }
        Compare::Unchanged { key, revision } => {
            etcd_client::Compare::mod_revision(key.as_str(), CompareOp::Equal, revision.number())
        }
        // etcd has no "less or equal". A missing key has modification revision 0.
        Compare::NothingNewer { range, revision } => {
            let limit = revision.next().number();
            let older = etcd_client::Compare::mod_revision(range.start.as_str(), CompareOp::Less, limit);
            older.with_range(range.end.as_str())
        }
    }
}

fn write(write: &Write) -> TxnOp {
    match write {
        Write::Put { key, value } => TxnOp::put(key.as_str(), value.as_slice(), None),
        Write::Delete { key } => TxnOp::delete(key.as_str(), None),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Runs attempts with these outcomes. Returns the number of attempts and the final outcome.
    async fn play(ends: &[Result<u8, &'static str>]) -> (usize, Result<Result<u8, &'static str>, ()>) {
        let attempts = Cell::new(0);
        let attempt = || {
            let number = attempts.replace(attempts.get() + 1);
            async move { Ok(ends[number]) }
        };
        let outcome = again_if_stale(attempt, |error| *error == "stale").await;
        (attempts.get(), outcome)
    }

    #[tokio::test]
    async fn a_request_with_stale_authentication_is_repeated_once() {
        assert_eq!(play(&[Ok(1)]).await, (1, Ok(Ok(1))));
        assert_eq!(play(&[Err("stale"), Ok(2)]).await, (2, Ok(Ok(2))));
        assert_eq!(play(&[Err("stale"), Err("stale"), Ok(3)]).await, (2, Ok(Err("stale"))));
        assert_eq!(play(&[Err("no space"), Ok(2)]).await, (1, Ok(Err("no space"))));
    }
}
