//! The members of an etcd cluster: a connection to each, of which one is in use.
//!
//! The client's own balancing over several would send every other request to a member that is known to be down. And it stays at
//! the first address of a name for as long as that takes connections, though the member there may have lost the others: so each
//! address of a name is a member here, and names are looked up again when a member was left, and every minute.

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
use super::lookup::{By, Found, Lookup};
use super::session::Session;

const CONNECT_PATIENCE: Duration = Duration::from_secs(2);

/// A connection that carries nothing is asked for a sign of life this often, and has this long to give it.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// How often names are looked up: in any case, and at most.
const LOOKUP: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(1));

/// A member.
pub(super) struct Member {
    /// Where it is, and how that is known.
    found: Found,
    /// The connection.
    pub(super) client: Client,
    /// How this client is known there.
    pub(super) session: Session,
    /// What is shown there, and what is believed.
    tls: Tls,
    /// Whether it is known to be a member itself and no proxy, since it was last left.
    is_direct: AtomicBool,
}

impl Member {
    /// Prepares a connection. Succeeds whether or not the member is there.
    async fn new(tls: Option<&Tls>, found: Found) -> Result<Arc<Self>, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_PATIENCE)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            // A member that lost touch with the others ends its streams, instead of going quiet.
            .with_require_leader(true);
        if let Some(tls) = tls {
            let shown = shown(tls);
            // The certificate names the host, not its address.
            options = options.with_tls(match &found.by {
                Some(by) => shown.domain_name(&by.host),
                None => shown,
            });
        }
        // Without the user: with one, it would log in here, and fail where one member of several is away.
        let client = Client::connect([&found.url], Some(options)).await;
        let client = client.map_err(|error| StoreError::Unusable {
            store: match &found.by {
                Some(by) => format!("etcd at {} ({})", found.url, by.host),
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

    /// Whether it is known to be a member itself.
    pub(super) fn is_direct(&self) -> bool {
        self.is_direct.load(Ordering::Relaxed)
    }

    /// Notes that it is, or that it has to be asked again: somebody else may answer at its address by now.
    pub(super) fn set_direct(&self, is_direct: bool) {
        self.is_direct.store(is_direct, Ordering::Relaxed);
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { url, by, .. } = &self.found;
        match by {
            Some(by) if by.is_record() => write!(f, "etcd at {url} ({}, by {})", by.host, by.source),
            Some(by) => write!(f, "etcd at {url} ({})", by.host),
            None => write!(f, "etcd at {url}"),
        }
    }
}

/// All members. Clones are one.
#[derive(Clone)]
pub(super) struct Members(Arc<Shared>);

struct Shared {
    config: EtcdConfig,
    known: Mutex<Known>,
    /// Rings when a member was left.
    left: Arc<Notify>,
    /// How often all connections were given up at once.
    reconnections: watch::Sender<u64>,
}

/// What is known of the members.
#[derive(Default)]
struct Known {
    members: Vec<Arc<Member>>,
    /// The place of the one in use.
    current: usize,
    /// Why there is none for a name.
    problem: Option<String>,
}

impl Members {
    /// Prepares connections to all members. Succeeds whether or not one of them is there.
    pub(super) async fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let mut lookup = Lookup::new(config);
        let shared = Arc::new(Shared::new(config.clone(), Known::default()));
        shared.look_up(&mut lookup).await?;
        if lookup.has_names() || config.is_renewable() {
            tokio::spawn(follow_names(lookup, Arc::downgrade(&shared), Arc::clone(&shared.left)));
        }
        Ok(Self(shared))
    }

    /// Prepares connections of their own to the members that are known now, with other credentials. The one in use stays so.
    pub(super) async fn again(&self, config: &EtcdConfig) -> Result<Self, StoreError> {
        let (before, current, problem) = {
            let known = self.0.lock();
            (known.members.clone(), known.current, known.problem.clone())
        };
        let shared = Shared::new(config.clone(), Known::default());
        let tls = shared.tls()?;
        let mut members = Vec::new();
        for member in before {
            members.push(Member::new(tls.as_ref(), member.found.clone()).await?);
        }
        *shared.lock() = Known { members, current, problem };
        Ok(Self(Arc::new(shared)))
    }

    /// Gives up all connections, and those who read from them are to begin anew: an address of this host is gone that they may have
    /// been made from, and TCP would try for long.
    pub(super) async fn reconnect(&self) -> Result<(), StoreError> {
        let before = self.0.lock().members.clone();
        let mut members = Vec::new();
        for member in before {
            members.push(
                Member::new(Some(&member.tls).filter(|_| self.is_secure()), member.found.clone()).await?,
            );
        }
        {
            let mut known = self.0.lock();
            known.current = known.current.min(members.len().saturating_sub(1));
            known.members = members;
        }
        self.0.reconnections.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Changes when all connections were given up.
    pub(super) fn reconnections(&self) -> watch::Receiver<u64> {
        let mut reconnections = self.0.reconnections.subscribe();
        reconnections.mark_unchanged();
        reconnections
    }

    /// How they are reached.
    pub(super) fn config(&self) -> &EtcdConfig {
        &self.0.config
    }

    /// The endpoints, for people.
    pub(super) fn name(&self) -> String {
        let EtcdConfig { endpoints, discovery_srv, .. } = &self.0.config;
        let records = discovery_srv.iter().map(|domain| format!("SRV records of {domain}"));
        format!("etcd at {}", endpoints.iter().cloned().chain(records).collect::<Vec<_>>().join(", "))
    }

    /// Whether TLS is used.
    pub(super) fn is_secure(&self) -> bool {
        self.0.config.is_secure()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.0.lock().members.len()
    }

    /// The one in use.
    pub(super) fn current(&self) -> Result<Arc<Member>, StoreError> {
        let known = self.0.lock();
        if let Some(member) = known.members.get(known.current) {
            return Ok(Arc::clone(member));
        }
        self.0.left.notify_one();
        let reason = known.problem.clone().unwrap_or_else(|| "no endpoint is configured".to_owned());
        Err(StoreError::Unusable { store: self.name(), reason })
    }

    /// Goes on to the next, unless somebody else has left that one already.
    pub(super) fn leave(&self, member: &Arc<Member>) {
        member.set_direct(false);
        let mut known = self.0.lock();
        if known.members.get(known.current).is_some_and(|current| Arc::ptr_eq(current, member)) {
            known.current = (known.current + 1) % known.members.len();
            self.0.left.notify_one();
        }
    }
}

impl Shared {
    fn new(config: EtcdConfig, known: Known) -> Self {
        Self {
            config,
            known: Mutex::new(known),
            left: Arc::default(),
            reconnections: watch::Sender::default(),
        }
    }

    /// What a connection shows, where TLS is used.
    fn tls(&self) -> Result<Option<Tls>, StoreError> {
        if !self.config.is_secure() {
            return Ok(None);
        }
        let unusable = |reason| StoreError::Unusable { store: "etcd".to_owned(), reason };
        self.config.tls().map(Some).map_err(unusable)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Each change of it is whole, whoever panicked.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks up which members there are. Those that stay keep their connections. A record that leads to no usable name leaves
    /// the others alone; an endpoint that cannot be used is a fault of the configuration.
    async fn look_up(&self, lookup: &mut Lookup) -> Result<(), StoreError> {
        let (found, problem) = lookup.look_up().await;
        self.take(found, problem, lookup.has_names()).await
    }

    async fn take(
        &self,
        found: Vec<Found>,
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
            let is_same = |member: &&Arc<Member>| member.found == found && member.tls == shown;
            if let Some(known) = before.iter().find(is_same) {
                members.push(Arc::clone(known));
                continue;
            }
            let is_of_record = found.by.as_ref().is_some_and(By::is_record);
            match Member::new(tls.as_ref(), found).await {
                Ok(member) => members.push(member),
                Err(error) if is_of_record => {
                    problem = Some(error.to_string());
                    failed = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        // With no member at all the fault is what all have in common, such as the certificates.
        if let Some(error) = failed.filter(|_| members.is_empty()) {
            return Err(error);
        }
        let mut known = self.lock();
        if let Some(why) = problem.as_ref().filter(|_| problem != known.problem) {
            warn!("{why}");
        }
        let words = |members: &[Arc<Member>]| {
            members.iter().map(|member| member.found.url.clone()).collect::<Vec<_>>()
        };
        if has_names && words(&members) != words(&known.members) {
            info!("etcd members: {}", words(&members).join(", "));
        }
        let used = known.members.get(known.current);
        let place = used.and_then(|used| members.iter().position(|member| member.found == used.found));
        *known = Known { current: place.unwrap_or_default(), members, problem };
        Ok(())
    }
}

/// Looks names up again and again, and whether certificates were renewed, until nobody uses the members any more.
async fn follow_names(mut lookup: Lookup, shared: Weak<Shared>, left: Arc<Notify>) {
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
    async fn other_credentials_start_at_the_member_in_use_and_look_nothing_up() {
        let endpoints = [1, 2, 3].map(|number| format!("http://127.0.0.1:{number}")).to_vec();
        let agents = Members::new(&EtcdConfig { endpoints, ..EtcdConfig::default() }).await.unwrap();
        agents.leave(&agents.current().unwrap());
        // Were it asked, this name would be looked up, and nothing found.
        let config =
            EtcdConfig { endpoints: vec!["http://etcd.invalid:1".to_owned()], ..EtcdConfig::default() };
        let operators = agents.again(&config).await.unwrap();
        assert_eq!(operators.count(), 3);
        let [first, second] = [&agents, &operators].map(|members| members.current().unwrap());
        assert_eq!((first.found.url.as_str(), &second.found), ("http://127.0.0.1:2", &first.found));
        // Each goes its own way from there.
        operators.leave(&second);
        assert_eq!(operators.current().unwrap().found.url, "http://127.0.0.1:3");
        assert!(Arc::ptr_eq(&agents.current().unwrap(), &first));
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_used_is_named_and_leaves_the_others_alone() {
        let config = EtcdConfig {
            discovery_srv: Some("example.org".to_owned()),
            ca: Some(Pem::Inline(Vec::new())),
            ..EtcdConfig::default()
        };
        let found = |host: &str| Found {
            url: "https://192.0.2.1:1".to_owned(),
            address: "192.0.2.1".parse().unwrap(),
            port: 1,
            by: Some(By { source: "_etcd-client-ssl._tcp.example.org".to_owned(), host: host.to_owned() }),
        };
        let shared = Shared::new(config, Known::default());
        shared.take(vec![found("a b.example.org"), found("a.example.org")], None, true).await.unwrap();
        let problem = shared.lock().problem.clone().unwrap();
        assert!(problem.contains("a b.example.org"), "{problem}");
        assert_eq!(
            shared.lock().members.iter().map(|member| &member.found).collect::<Vec<_>>(),
            [&found("a.example.org")]
        );
        // What is known stays where nothing can be used.
        assert!(shared.take(vec![found("a b.example.org")], None, true).await.is_err());
        assert_eq!(shared.lock().members.len(), 1);
    }
}
