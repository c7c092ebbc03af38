//! The members of an etcd cluster: one connection to each; one connection is in use.
//!
//! The load balancing of the client would send every other request to a member that is down. The client also stays at
//! the first address of a name as long as it accepts connections, even if that member has lost contact with the others.
//! So each address of a name is a member here, and names are looked up again after a member was left, and every minute.
//! So are files with certificates.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, TlsOptions};
use polder_ipam::store::StoreError;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::answer::explain;
use super::config::{EtcdConfig, Tls};
use super::lookup::{LookupOrigin, MemberLookup, ResolvedMember};
use super::session::Session;
use crate::reason::Unusable;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Interval and timeout of keep-alive requests, also on an idle connection.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// Longest and shortest interval of name lookups.
const LOOKUP: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(1));

/// A member of the etcd cluster.
pub(super) struct EtcdMember {
    /// Its address and the source of the address.
    found: ResolvedMember,
    /// The client, connected to this member only.
    pub(super) client: Client,
    /// The login at this member.
    pub(super) session: Session,
    /// The client certificate and the trusted CA of the connection.
    tls: Tls,
    /// Whether it is known not to be a proxy, since it was last left.
    is_direct: AtomicBool,
}

impl EtcdMember {
    /// Prepares a connection. Succeeds even if the member is unreachable.
    async fn new(tls: Option<&Tls>, found: ResolvedMember) -> Result<Arc<Self>, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            // A member without a leader then ends its streams, instead of sending nothing.
            .with_require_leader(true);
        if let Some(tls) = tls {
            let shown = shown(tls);
            // The certificate contains the host name, not the address.
            options = options.with_tls(match &found.origin {
                Some(origin) => shown.domain_name(&origin.host),
                None => shown,
            });
        }
        // Without a user: the client would log in here, and fail if this member is unreachable.
        let client = Client::connect([&found.url], Some(options)).await;
        let client = client.map_err(|error| StoreError::Unusable {
            store: match &found.origin {
                Some(origin) => format!("etcd at {} ({})", found.url, origin.host),
                None => format!("etcd at {}", found.url),
            },
            reason: explain(&error).0,
        })?;
        Ok(Arc::new(Self {
            found,
            client,
            session: Session::default(),
            tls: tls.cloned().unwrap_or_default(),
            is_direct: AtomicBool::new(false),
        }))
    }

    /// Whether it is known not to be a proxy.
    pub(super) fn is_direct(&self) -> bool {
        self.is_direct.load(Ordering::Relaxed)
    }

    /// Sets whether it is known not to be a proxy. Another server may answer at its address later.
    pub(super) fn set_direct(&self, is_direct: bool) {
        self.is_direct.store(is_direct, Ordering::Relaxed);
    }
}

impl fmt::Display for EtcdMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ResolvedMember { url, origin, .. } = &self.found;
        match origin {
            Some(origin) if origin.is_record() => {
                write!(f, "etcd at {url} ({}, by {})", origin.host, origin.source)
            }
            Some(origin) => write!(f, "etcd at {url} ({})", origin.host),
            None => write!(f, "etcd at {url}"),
        }
    }
}

/// All members. Clones share their state.
#[derive(Clone)]
pub(super) struct Members(Arc<Shared>);

struct Shared {
    config: EtcdConfig,
    known: Mutex<MemberList>,
    /// Notified when a member was left, all connections were replaced, or no member is known.
    left: Arc<Notify>,
    /// Number of times that all connections were replaced at once.
    reconnections: watch::Sender<u64>,
}

/// The known members.
#[derive(Default)]
struct MemberList {
    members: Vec<Arc<EtcdMember>>,
    /// Index of the member in use.
    current: usize,
    /// The last lookup error, for example of a name without an address.
    problem: Option<String>,
}

impl Members {
    /// Prepares connections to all members. Succeeds even if no member is reachable.
    pub(super) async fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let mut lookup = MemberLookup::new(config);
        let shared = Arc::new(Shared::new(config.clone(), MemberList::default()));
        shared.look_up(&mut lookup).await?;
        if lookup.has_names() || config.is_renewable() {
            tokio::spawn(follow_names(lookup, Arc::downgrade(&shared), Arc::clone(&shared.left)));
        }
        Ok(Self(shared))
    }

    /// Prepares separate connections to the known members, with other credentials. The member in use stays the same.
    pub(super) async fn again(&self, config: &EtcdConfig) -> Result<Self, StoreError> {
        let (before, current, problem) = {
            let known = self.0.lock();
            (known.members.clone(), known.current, known.problem.clone())
        };
        let shared = Shared::new(config.clone(), MemberList::default());
        let tls = shared.tls()?;
        let mut members = Vec::new();
        for member in before {
            members.push(EtcdMember::new(tls.as_ref(), member.found.clone()).await?);
        }
        *shared.lock() = MemberList { members, current, problem };
        Ok(Self(Arc::new(shared)))
    }

    /// Replaces all connections, and lets their watches start again: an address of this host that they may use was
    /// removed, and TCP would retry for a long time.
    pub(super) async fn reconnect(&self) -> Result<(), StoreError> {
        let before = self.0.lock().members.clone();
        let mut members = Vec::new();
        for member in before {
            members.push(
                EtcdMember::new(Some(&member.tls).filter(|_| self.is_secure()), member.found.clone()).await?,
            );
        }
        {
            let mut known = self.0.lock();
            known.current = known.current.min(members.len().saturating_sub(1));
            known.members = members;
        }
        self.0.reconnections.send_modify(|count| *count += 1);
        self.0.left.notify_one();
        Ok(())
    }

    /// Changes when all connections are replaced.
    pub(super) fn reconnections(&self) -> watch::Receiver<u64> {
        let mut reconnections = self.0.reconnections.subscribe();
        reconnections.mark_unchanged();
        reconnections
    }

    /// The configuration of the members.
    pub(super) fn config(&self) -> &EtcdConfig {
        &self.0.config
    }

    /// The configured endpoints and SRV domain, for messages.
    pub(super) fn name(&self) -> String {
        let EtcdConfig { endpoints, discovery_srv, .. } = &self.0.config;
        let records = discovery_srv.iter().map(|domain| format!("SRV records of {domain}"));
        format!("etcd at {}", endpoints.iter().cloned().chain(records).collect::<Vec<_>>().join(", "))
    }

    /// Whether TLS is used.
    pub(super) fn is_secure(&self) -> bool {
        self.0.config.is_secure()
    }

    /// Number of members.
    pub(super) fn count(&self) -> usize {
        self.0.lock().members.len()
    }

    /// The member in use.
    pub(super) fn current(&self) -> Result<Arc<EtcdMember>, StoreError> {
        let known = self.0.lock();
        if let Some(member) = known.members.get(known.current) {
            return Ok(Arc::clone(member));
        }
        self.0.left.notify_one();
        Err(match &known.problem {
            Some(problem) => StoreError::Unusable { store: self.name(), reason: problem.clone() },
            None => Unusable::NoEndpoint.at(self.name()),
        })
    }

    /// Switches to the next member, unless another call has already left this one. Names are looked up and certificates
    /// read again in any case: a long stream may still use a connection with earlier certificates, and its end is the
    /// first sign of a member that was restarted.
    pub(super) fn leave(&self, member: &Arc<EtcdMember>) {
        member.set_direct(false);
        let mut known = self.0.lock();
        if known.members.get(known.current).is_some_and(|current| Arc::ptr_eq(current, member)) {
            known.current = (known.current + 1) % known.members.len();
        }
        self.0.left.notify_one();
    }
}

impl Shared {
    fn new(config: EtcdConfig, known: MemberList) -> Self {
        Self {
            config,
            known: Mutex::new(known),
            left: Arc::default(),
            reconnections: watch::Sender::default(),
        }
    }

    /// Reads the certificates and the key of a connection; `None` without TLS.
    fn tls(&self) -> Result<Option<Tls>, StoreError> {
        if !self.config.is_secure() {
            return Ok(None);
        }
        self.config.tls().map(Some).map_err(|why| Unusable::from(why).at("etcd"))
    }

    fn lock(&self) -> MutexGuard<'_, MemberList> {
        // A panic cannot leave the state half changed.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks up the members. Members that remain keep their connections. An unusable name in an SRV record does not
    /// affect the other members; an unusable endpoint is an error of the configuration.
    async fn look_up(&self, lookup: &mut MemberLookup) -> Result<(), StoreError> {
        let (found, problem) = lookup.look_up().await;
        self.take(found, problem, lookup.has_names()).await
    }

    async fn take(
        &self,
        found: Vec<ResolvedMember>,
        mut problem: Option<String>,
        has_names: bool,
    ) -> Result<(), StoreError> {
        let before = self.lock().members.clone();
        let tls = self.tls()?;
        let shown = tls.clone().unwrap_or_default();
        if before.iter().any(|member| member.tls != shown) {
            info!("etcd certificates renewed");
        }
        let (mut members, mut failed) = (Vec::new(), None);
        for found in found {
            let is_same = |member: &&Arc<EtcdMember>| member.found == found && member.tls == shown;
            if let Some(known) = before.iter().find(is_same) {
                members.push(Arc::clone(known));
                continue;
            }
            let is_of_record = found.origin.as_ref().is_some_and(LookupOrigin::is_record);
            match EtcdMember::new(tls.as_ref(), found).await {
                Ok(member) => members.push(member),
                Err(error) if is_of_record => {
                    problem = Some(error.to_string());
                    failed = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        // If no member is usable, the cause is common to all, for example the certificates.
        if let Some(error) = failed.filter(|_| members.is_empty()) {
            return Err(error);
        }
        let mut known = self.lock();
        if let Some(why) = problem.as_ref().filter(|_| problem != known.problem) {
            warn!("{why}");
        }
        let urls = |members: &[Arc<EtcdMember>]| {
            members.iter().map(|member| member.found.url.clone()).collect::<Vec<_>>()
        };
        if has_names && urls(&members) != urls(&known.members) {
            info!("etcd members: {}", urls(&members).join(", "));
        }
        let used = known.members.get(known.current);
        let current = used.and_then(|used| members.iter().position(|member| member.found == used.found));
        *known = MemberList { current: current.unwrap_or_default(), members, problem };
        Ok(())
    }
}

/// Looks up names and reads renewed certificates repeatedly, until the members are dropped.
async fn follow_names(mut lookup: MemberLookup, shared: Weak<Shared>, left: Arc<Notify>) {
    loop {
        let _ = timeout(LOOKUP.0, left.notified()).await;
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = shared.look_up(&mut lookup).await {
            warn!(%error, "cannot update the list of etcd members: keeping the current one");
        }
        drop(shared);
        sleep(LOOKUP.1).await;
    }
}

fn shown(tls: &Tls) -> TlsOptions {
    let mut options = TlsOptions::new();
    if let Some(ca) = &tls.ca {
        options = options.ca_certificate(etcd_client::Certificate::from_pem(ca));
    }
    if let Some((certificate, key)) = &tls.identity {
        options = options.identity(etcd_client::Identity::from_pem(certificate, key));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::config::Pem;

    #[tokio::test]
    async fn operator_credentials_start_at_the_current_member_without_a_lookup() {
        let endpoints = [1, 2, 3].map(|number| format!("http://127.0.0.1:{number}")).to_vec();
        let agents = Members::new(&EtcdConfig { endpoints, ..EtcdConfig::default() }).await.unwrap();
        agents.leave(&agents.current().unwrap());
        // A lookup of this name would fail.
        let config =
            EtcdConfig { endpoints: vec!["http://etcd.invalid:1".to_owned()], ..EtcdConfig::default() };
        let operators = agents.again(&config).await.unwrap();
        assert_eq!(operators.count(), 3);
        let [first, second] = [&agents, &operators].map(|members| members.current().unwrap());
        assert_eq!((first.found.url.as_str(), &second.found), ("http://127.0.0.1:2", &first.found));
        // Each now changes its member independently.
        operators.leave(&second);
        assert_eq!(operators.current().unwrap().found.url, "http://127.0.0.1:3");
        assert!(Arc::ptr_eq(&agents.current().unwrap(), &first));
    }

    #[tokio::test]
    async fn an_unusable_srv_record_is_named_and_the_others_are_used() {
        let config = EtcdConfig {
            discovery_srv: Some("example.org".to_owned()),
            ca: Some(Pem::Inline(Vec::new())),
            ..EtcdConfig::default()
        };
        let found = |host: &str| ResolvedMember {
            url: "https://192.0.2.1:1".to_owned(),
            address: "192.0.2.1".parse().unwrap(),
            port: 1,
            origin: Some(LookupOrigin {
                source: "_etcd-client-ssl._tcp.example.org".to_owned(),
                host: host.to_owned(),
            }),
        };
        let shared = Shared::new(config, MemberList::default());
        shared.take(vec![found("a b.example.org"), found("a.example.org")], None, true).await.unwrap();
        let problem = shared.lock().problem.clone().unwrap();
        assert!(problem.contains("a b.example.org"), "{problem}");
        assert_eq!(
            shared.lock().members.iter().map(|member| &member.found).collect::<Vec<_>>(),
            [&found("a.example.org")]
        );
        // The known members remain if no new member is usable.
        assert!(shared.take(vec![found("a b.example.org")], None, true).await.is_err());
        assert_eq!(shared.lock().members.len(), 1);
    }
}
