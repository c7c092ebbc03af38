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
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::StoreError;
use super::etcd::{EtcdConfig, explain};
use super::login::Session;
use super::lookup::{By, Found, Lookup};

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
    /// Whether it is known to be a member itself and no proxy, since it was last left.
    is_direct: AtomicBool,
}

impl Member {
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
            Some(By { source, host }) if source.contains("://") => write!(f, "etcd at {url} ({host})"),
            Some(By { source, host }) => write!(f, "etcd at {url} ({host}, by {source})"),
            None => write!(f, "etcd at {url}"),
        }
    }
}

/// All members. Clones are one.
#[derive(Clone)]
pub(super) struct Members(Arc<Shared>);

struct Shared {
    config: EtcdConfig,
    lookup: AsyncMutex<Lookup>,
    has_names: bool,
    known: Mutex<Known>,
    /// Rings when a member was left.
    left: Arc<Notify>,
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
        Self::with(config, Lookup::new(config)).await
    }

    /// Prepares connections of their own to the same members, with other credentials.
    pub(super) async fn again(&self, config: &EtcdConfig) -> Result<Self, StoreError> {
        let lookup = self.0.lookup.lock().await.clone();
        Self::with(config, lookup).await
    }

    async fn with(config: &EtcdConfig, lookup: Lookup) -> Result<Self, StoreError> {
        let left = Arc::new(Notify::new());
        let shared = Arc::new(Shared {
            config: config.clone(),
            has_names: lookup.has_names(),
            lookup: AsyncMutex::new(lookup),
            known: Mutex::default(),
            left: Arc::clone(&left),
        });
        shared.look_up().await?;
        if shared.has_names {
            tokio::spawn(follow_names(Arc::downgrade(&shared), left));
        }
        Ok(Self(shared))
    }

    /// How they are reached.
    pub(super) fn config(&self) -> &EtcdConfig {
        &self.0.config
    }

    /// The endpoints, for people.
    pub(super) fn name(&self) -> String {
        let EtcdConfig { endpoints, discovery_srv, .. } = &self.0.config;
        let records = discovery_srv.iter().map(|domain| format!("the SRV records of {domain}"));
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
        let reason = known.problem.clone().unwrap_or_else(|| "no endpoint is given".to_owned());
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
    fn lock(&self) -> MutexGuard<'_, Known> {
        // Each change of it is whole, whoever panicked.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks up which members there are. Those that stay keep their connections.
    async fn look_up(&self) -> Result<(), StoreError> {
        let (found, problem) = self.lookup.lock().await.look_up().await;
        let before = self.lock().members.clone();
        let mut members = Vec::new();
        for found in found {
            members.push(self.member(&before, found).await?);
        }
        let mut known = self.lock();
        if let Some(why) = problem.as_ref().filter(|_| problem != known.problem) {
            warn!("{why}");
        }
        let words = |members: &[Arc<Member>]| {
            members.iter().map(|member| member.found.url.clone()).collect::<Vec<_>>()
        };
        if self.has_names && words(&members) != words(&known.members) {
            info!("the members of etcd are {}", words(&members).join(", "));
        }
        let used = known.members.get(known.current);
        let place = used.and_then(|used| members.iter().position(|member| Arc::ptr_eq(member, used)));
        *known = Known { current: place.unwrap_or_default(), members, problem };
        Ok(())
    }

    /// The member that was found; the one of before, if it was there.
    async fn member(&self, before: &[Arc<Member>], found: Found) -> Result<Arc<Member>, StoreError> {
        if let Some(known) = before.iter().find(|member| member.found == found) {
            return Ok(Arc::clone(known));
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_PATIENCE)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            // A member that lost touch with the others ends its streams, instead of going quiet.
            .with_require_leader(true);
        if self.config.is_secure() {
            let tls = tls(&self.config);
            // The certificate names the host, not its address.
            options = options.with_tls(match &found.by {
                Some(by) => tls.domain_name(&by.host),
                None => tls,
            });
        }
        // Without the user: with one, it would log in here, and fail where one member of several is away.
        let client = Client::connect([&found.url], Some(options)).await;
        let client = client.map_err(|error| StoreError::Unusable {
            store: format!("etcd at {}", found.url),
            reason: explain(&error).0,
        })?;
        Ok(Arc::new(Member { found, client, session: Session::default(), is_direct: AtomicBool::new(false) }))
    }
}

/// Looks names up again and again, until nobody uses the members any more.
async fn follow_names(shared: Weak<Shared>, left: Arc<Notify>) {
    loop {
        let _ = timeout(LOOKUP.0, left.notified()).await;
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = shared.look_up().await {
            warn!(%error, "a member of etcd is left out");
        }
        drop(shared);
        sleep(LOOKUP.1).await;
    }
}

fn tls(config: &EtcdConfig) -> TlsOptions {
    let mut tls = TlsOptions::new();
    if let Some(ca) = &config.ca {
        tls = tls.ca_certificate(etcd_client::Certificate::from_pem(ca));
    }
    if let Some((certificate, key)) = &config.identity {
        tls = tls.identity(etcd_client::Identity::from_pem(certificate, key));
    }
    tls
}
