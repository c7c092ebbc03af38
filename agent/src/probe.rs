//! Probes: whether peers answer on the path that pod packets use, and whether that path transports packets of full
//! length.
//!
//! There are two kinds of probes to each peer. The first kind runs between the two probe endpoints; both hosts forward
//! its packets like pod packets. The second kind runs from host to host, and distinguishes a node that is down from one
//! that drops forwarded packets.

pub mod direct;
mod echo;
mod messages;
mod not_ready;
mod pings;
pub mod schedule;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Family, NodeName, PerFamily};
use polder_ipam::cause::SharedError;
use polder_store::Store;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use self::direct::DirectPaths;
pub use self::messages::{problem, state};
pub use self::not_ready::NotProbed;
use self::not_ready::{NoSocket, Peers};
use self::pings::{OnNode, Pings, next_reply, send};
use self::schedule::{BATCH, Key, ProbeTarget, Schedule, Sizes, Token, Verdict, probe_other_kind};
use self::verdict::{ENDPOINT_FAILURES, combine, is_suspect, lease_state};
use crate::endpoint::{Endpoint, OpenEndpoint};
use crate::kernel::desired::PeerPath;
use crate::leases;
use crate::node_state::{Pass, Passes, set_if_changed};

/// Pause between two batches of probes.
const BATCH_INTERVAL: Duration = Duration::from_millis(10);

/// Shortest time between two evaluations of the direct paths.
const JUDGE_EVERY: Duration = Duration::from_millis(500);

/// Replies within this time are published together: at least, and for each probed path. A publication evaluates all
/// paths, which takes about 1 us for each.
const SETTLE: Duration = Duration::from_millis(20);
const SETTLE_PER_PATH: Duration = Duration::from_micros(100);

/// Pause between two reads of the leases.
const LEASE_READ_INTERVAL: Duration = Duration::from_secs(2);

/// If the leases cannot be read and no peer answers for this time, the node is ready. Also the longest sleep of the
/// task.
const SILENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a lease state that was read stays valid.
const LEASE_STATE_VALIDITY: Duration = Duration::from_secs(30);

/// Timeout of a lease read, so that it does not delay probes.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

/// The inputs of the prober, and the values that it publishes.
#[derive(Debug)]
pub struct Task {
    /// Whether peers are probed at all.
    pub probe_peers: bool,
    /// Interval between two probes of a path without a fault.
    pub resync: Duration,
    /// The datastore, for the leases of agents.
    pub store: Store,
    /// The last pass over the kernel, with the paths to the peers.
    pub passes: Passes,
    /// The node's own probe endpoint.
    pub endpoint: watch::Receiver<Endpoint>,
    /// `Err` with the reason until one peer in each family answers, or no peer is alive. Afterwards always `Ok`: a
    /// later fault is no reason to refuse pods.
    pub probed: watch::Sender<Result<(), NotProbed>>,
    /// Probe results of the path to each peer.
    pub verdicts: watch::Sender<Arc<BTreeMap<Key, Verdict>>>,
    /// Test results of the direct path to each peer on the same link, whether or not pod packets use it.
    pub direct: watch::Sender<Arc<DirectPaths>>,
}

impl Task {
    /// Runs for ever.
    pub async fn run(self) {
        if !self.probe_peers {
            drop(self.probed.send_replace(Ok(())));
            return pending().await;
        }
        // The low 16 bits of the process id.
        let identifier = u16::try_from(std::process::id() & 0xffff).expect("16 bits");
        self.probe(OnNode { identifier }).await;
    }

    /// Probes for ever.
    async fn probe(self, pings: impl Pings) {
        let mut passes = self.passes.changes();
        let mut endpoints = self.endpoint.clone();
        let mut prober = Prober {
            pings,
            host: ProbeSet::new(self.resync),
            forwarded: ProbeSet::new(self.resync),
            direct: direct::Tests::new(self.resync),
            task: self,
            no_socket: PerFamily::NONE,
            endpoint: None,
            targets_from: None,
            alive: BTreeMap::new(),
            // Published at once, because the node may have no peers.
            publish_at: Some(Instant::now()),
            silent_since: None,
            read_leases_at: None,
            no_lease_read_before: Instant::now(),
            judge_at: Instant::now(),
        };
        loop {
            // Without an own address in the pod network, no peer can be probed.
            let pass = passes.borrow_and_update().clone().filter(|pass| !pass.gateways.is_empty());
            let Some(pass) = pass else {
                if passes.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let endpoint = endpoints.borrow_and_update().clone();
            prober.set_targets(&pass, endpoint);
            prober.send_due_probes().await;
            prober.publish(&pass).await;
            // All branches are cancel-safe: a change that is not received now is received in the next iteration.
            tokio::select! {
                _ = passes.changed() => {}
                // Readiness depends on it, even if it does not change the targets.
                _ = endpoints.changed() => prober.publish_soon(Instant::now()),
                (family, reply) = next_reply(&prober.pings, &prober.host.sockets) => {
                    prober.record_reply(ProbeKind::Host, family, reply);
                }
                (family, reply) = next_reply(&prober.pings, &prober.forwarded.sockets) => {
                    prober.record_reply(ProbeKind::Forwarded, family, reply);
                }
                (family, reply) = next_reply(&prober.pings, prober.direct.sockets()) => {
                    prober.record_reply(ProbeKind::Underlay, family, reply);
                }
                () = sleep_until(prober.wake()) => {}
            }
        }
    }
}

struct Prober<P: Pings> {
    task: Task,
    pings: P,
    /// From this host's address in the pod network to the peer host's: not forwarded.
    host: ProbeSet<P::Socket>,
    /// From endpoint to endpoint.
    forwarded: ProbeSet<P::Socket>,
    /// To the peers' underlay addresses.
    direct: direct::Tests<P::Socket>,
    /// Why the host sockets could not be opened, by family.
    no_socket: PerFamily<Option<NoSocket>>,
    /// The endpoint in whose namespace the sockets of `forwarded` are open.
    endpoint: Option<Arc<OpenEndpoint>>,
    /// The pass that defined the current targets.
    targets_from: Option<Arc<Pass>>,
    /// For peers whose endpoint does not answer: whether their agent is alive, and when that was read.
    alive: BTreeMap<NodeName, (bool, Instant)>,
    /// Time of the next publication of results.
    publish_at: Option<Instant>,
    /// Time of the first check in which no peer answered. Used only until the node is ready.
    silent_since: Option<Instant>,
    /// Time of the next read of the leases.
    read_leases_at: Option<Instant>,
    /// Earliest time of the next lease read for suspects, after a failed read.
    no_lease_read_before: Instant,
    /// Earliest time of the next evaluation of the direct paths.
    judge_at: Instant,
}

/// The probes of one kind: schedule and sockets.
struct ProbeSet<S> {
    schedule: Schedule,
    sockets: PerFamily<Option<S>>,
}

impl<S> ProbeSet<S> {
    fn new(steady: Duration) -> Self {
        Self { schedule: Schedule::new(steady), sockets: PerFamily::NONE }
    }
}

/// The kind of a probe, by source and target address.
#[derive(Debug, Clone, Copy)]
enum ProbeKind {
    Host,
    Forwarded,
    Underlay,
}

impl<P: Pings> Prober<P> {
    /// Sets the targets from the last pass and the current endpoint.
    fn set_targets(&mut self, pass: &Arc<Pass>, endpoint: Endpoint) {
        let endpoint = match endpoint {
            Endpoint::Open(open) => Some(open),
            Endpoint::Awaited | Endpoint::Unavailable(_) | Endpoint::Unneeded => None,
        };
        let is_same = match (&self.endpoint, &endpoint) {
            (Some(known), Some(now)) => Arc::ptr_eq(known, now),
            (known, now) => known.is_none() && now.is_none(),
        };
        if !is_same {
            self.set_endpoint(endpoint);
            self.targets_from = None;
        } else if self.targets_from.as_ref().is_some_and(|known| Arc::ptr_eq(known, pass)) {
            return;
        }
        let before = self.targets_from.replace(Arc::clone(pass));
        let mut is_changed = before.is_none_or(|before| !Arc::ptr_eq(&before.paths, &pass.paths));
        for family in Family::BOTH {
            let own = pass.gateways.iter().copied().find(|gateway| Family::of(*gateway) == family);
            let opened = self.host.sockets[family].as_ref().map(|socket| self.pings.source(socket));
            if own.is_none() || opened != own {
                self.host.sockets[family] = None;
                self.open_host_socket(family, own);
                is_changed |= opened.is_some() || self.host.sockets[family].is_some();
            }
        }
        let underlay = self.task.passes.underlay().map(|underlay| underlay.addresses()).unwrap_or_default();
        is_changed |= self.direct.open_sockets(&self.pings, &underlay);
        if !is_changed {
            return;
        }
        let endpoint = |family: &Family, peer_path: &PeerPath| {
            let can_forward = self.forwarded.sockets[*family].is_some();
            can_forward.then(|| ProbeTarget::endpoint(peer_path)).flatten()
        };
        let hosts = pass.paths.iter().filter_map(|(key, peer_path)| {
            // Full-length probes use the forwarded path, if it exists.
            let sizes = if endpoint(&key.1, peer_path).is_some() { Sizes::Small } else { Sizes::Both };
            let target = self.host.sockets[key.1].is_some().then(|| ProbeTarget::host(peer_path, sizes));
            Some((key.clone(), target.flatten()?))
        });
        let endpoints = pass
            .paths
            .iter()
            .filter_map(|(key, peer_path)| Some((key.clone(), endpoint(&key.1, peer_path)?)));
        let now = Instant::now();
        self.host.schedule.set_targets(hosts, now);
        self.forwarded.schedule.set_targets(endpoints, now);
        self.direct.set_targets(&pass.paths, &self.host.sockets, now);
        self.publish_at.get_or_insert(now);
    }

    /// Closes the sockets in the previous endpoint, and opens those in the new one, if there is one.
    fn set_endpoint(&mut self, endpoint: Option<Arc<OpenEndpoint>>) {
        self.forwarded.sockets = PerFamily::NONE;
        let sources =
            endpoint.iter().flat_map(|open| open.addresses.iter().map(|source| (source, &open.namespace)));
        for (source, namespace) in sources {
            match self.pings.open(*source, Some(namespace)) {
                Ok(socket) => self.forwarded.sockets[Family::of(*source)] = Some(socket),
                Err(error) => {
                    warn!(%source, %error, "cannot open a socket in the probe endpoint to probe peers");
                }
            }
        }
        self.endpoint = endpoint;
    }

    fn open_host_socket(&mut self, family: Family, own: Option<IpAddr>) {
        let before = self.no_socket[family].take();
        let Some(source) = own else { return };
        match self.pings.open(source, None) {
            Ok(socket) => self.host.sockets[family] = Some(socket),
            Err(error) => {
                let reason = NoSocket { source_address: source, error: SharedError::new(error) };
                if before.as_ref() != Some(&reason) {
                    warn!("{reason}");
                }
                self.no_socket[family] = Some(reason);
            }
        }
    }

    async fn send_due_probes(&mut self) {
        let now = Instant::now();
        let host = self.host.schedule.due_probes(now, BATCH);
        let forwarded = self.forwarded.schedule.due_probes(now, BATCH);
        // If a peer's host address does not answer, its endpoint is probed at once, and vice versa.
        probe_other_kind(&host, &self.host.schedule, &mut self.forwarded.schedule, now);
        probe_other_kind(&forwarded, &self.forwarded.schedule, &mut self.host.schedule, now);
        let tests = self.direct.send_due_probes(&self.pings, &self.host.sockets, now).await;
        if host.is_empty() && forwarded.is_empty() && !tests {
            return;
        }
        send(&self.pings, &self.host.sockets, host).await;
        send(&self.pings, &self.forwarded.sockets, forwarded).await;
        // An earlier round may have ended without a reply.
        self.publish_soon(Instant::now());
    }

    fn record_reply(&mut self, kind: ProbeKind, family: Family, reply: io::Result<(IpAddr, Token)>) {
        match reply {
            Ok((from, token)) => {
                let now = Instant::now();
                match kind {
                    ProbeKind::Host => {
                        self.host.schedule.record_reply(from, token, now);
                        // Direct tests use the same source address.
                        self.direct.record_pod_address_reply(from, token, now);
                    }
                    ProbeKind::Forwarded => self.forwarded.schedule.record_reply(from, token, now),
                    ProbeKind::Underlay => self.direct.record_underlay_reply(from, token, now),
                }
                self.publish_soon(now);
            }
            Err(error) => {
                warn!(%family, %error, "cannot read replies to probes");
                match kind {
                    ProbeKind::Host => self.host.sockets[family] = None,
                    ProbeKind::Forwarded => self.forwarded.sockets[family] = None,
                    ProbeKind::Underlay => self.direct.close(family),
                }
                self.targets_from = None;
            }
        }
    }

    /// Plans a publication of the results.
    fn publish_soon(&mut self, now: Instant) {
        let paths = u32::try_from(self.host.schedule.len()).unwrap_or(u32::MAX);
        self.publish_at.get_or_insert(now + SETTLE.max(SETTLE_PER_PATH * paths));
    }

    fn wake(&self) -> Instant {
        let now = Instant::now();
        let next = [self.host.schedule.next(), self.forwarded.schedule.next(), self.direct.next()];
        let next = next.into_iter().flatten().min();
        let next = next.map(|next| next.max(now + BATCH_INTERVAL));
        let latest = now + SILENT_TIMEOUT;
        [next, self.publish_at, self.read_leases_at].into_iter().flatten().fold(latest, Instant::min)
    }

    /// Publishes the results, if they are due.
    async fn publish(&mut self, pass: &Pass) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if !is_due(self.publish_at) && !is_due(self.read_leases_at) {
            return;
        }
        self.publish_at = None;
        self.read_leases_at = None;
        self.read_leases_of_suspects().await;
        let verdicts = self.verdicts();
        self.judge_direct(&verdicts, now);
        if self.task.probed.borrow().is_err() {
            let probed = self.judge(pass, &verdicts).await;
            let is_ready = probed.is_ok();
            if set_if_changed(&self.task.probed, probed) && is_ready {
                info!("peer check passed: a peer answers on the pod path, or no peer is known to be alive");
            }
        }
        self.task.verdicts.send_if_modified(|known| {
            let changed = **known != verdicts;
            if changed {
                messages::log(known, &verdicts);
                *known = Arc::new(verdicts);
            }
            changed
        });
    }

    /// Evaluates the direct paths, at most every [`JUDGE_EVERY`], because it reads the state of every peer.
    fn judge_direct(&mut self, verdicts: &BTreeMap<Key, Verdict>, now: Instant) {
        if now < self.judge_at {
            self.publish_at.get_or_insert(self.judge_at);
            return;
        }
        self.judge_at = now + JUDGE_EVERY;
        let alive = &self.alive;
        let (direct, doubted) = self.direct.judge(verdicts, |name| lease_state(alive, name), now);
        for key in doubted {
            self.host.schedule.probe_now_and_reset_pause(&key, now);
            self.forwarded.schedule.probe_now_and_reset_pause(&key, now);
        }
        set_if_changed(&self.task.direct, Arc::new(direct));
    }

    /// The verdicts on the paths to all peers.
    fn verdicts(&self) -> BTreeMap<Key, Verdict> {
        let keys: BTreeSet<&Key> = self.host.schedule.keys().chain(self.forwarded.schedule.keys()).collect();
        let verdict = |key: &Key| {
            let host = self.host.schedule.result(key).map(|result| result.verdict);
            combine(host, self.forwarded.schedule.result(key), lease_state(&self.alive, &key.0))
        };
        keys.into_iter().map(|key| (key.clone(), verdict(key))).collect()
    }

    /// Reads the leases of peers with one address that answers and another that does not.
    async fn read_leases_of_suspects(&mut self) {
        let mut suspects: BTreeMap<NodeName, u8> = BTreeMap::new();
        for key in self.forwarded.schedule.keys() {
            let host = self.host.schedule.result(key).map(|result| result.verdict);
            let forwarded = self.forwarded.schedule.result(key);
            if let Some(result) = forwarded.filter(|result| is_suspect(host, *result)) {
                let lost = suspects.entry(key.0.clone()).or_default();
                *lost = result.lost.max(*lost);
            }
        }
        let known = Arc::clone(&self.task.verdicts.borrow());
        for name in self.direct.suspects(&known) {
            suspects.entry(name.clone()).or_default();
        }
        self.alive.retain(|name, _| suspects.contains_key(name));
        let now = Instant::now();
        let is_reported = |name: &NodeName| {
            Family::BOTH.iter().any(|family| known.get(&(name.clone(), *family)) == Some(&Verdict::Dropped))
        };
        // Read again before a fault is reported: the lease of a killed agent lasts for a while.
        let is_due = |(name, lost): (&NodeName, &u8)| match self.alive.get(name) {
            None => true,
            Some((true, at)) if *lost >= ENDPOINT_FAILURES && !is_reported(name) => {
                now - *at >= LEASE_READ_INTERVAL
            }
            Some((_, at)) => now - *at >= LEASE_STATE_VALIDITY,
        };
        if now < self.no_lease_read_before || !suspects.iter().any(is_due) {
            return;
        }
        let names: Vec<NodeName> = suspects.into_keys().collect();
        let with_lease = timeout(STORE_TIMEOUT, leases::with_lease_among(&self.task.store, &names))
            .await
            .ok()
            .and_then(Result::ok);
        if with_lease.is_none() {
            self.no_lease_read_before = now + LEASE_READ_INTERVAL;
        }
        for name in names {
            match &with_lease {
                Some(with_lease) => drop(self.alive.insert(name.clone(), (with_lease.contains(&name), now))),
                // The state is unknown again.
                None => drop(self.alive.remove(&name)),
            }
        }
    }

    /// `Ok` if, in each family, at least one peer answers or no peer with an address in it has a lease. A peer without
    /// a path counts as not answering.
    async fn judge(&mut self, pass: &Pass, verdicts: &BTreeMap<Key, Verdict>) -> Result<(), NotProbed> {
        if let Some(reason) = self.no_socket.values().next() {
            return Err(reason.clone().into());
        }
        if matches!(*self.task.endpoint.borrow(), Endpoint::Awaited) {
            return Err(NotProbed::NoEndpoint);
        }
        let (mut silent, mut dropped) = (Vec::new(), BTreeSet::new());
        for family in self.host.sockets.families() {
            let is_in_family = |peer: &(&Key, &PeerPath)| peer.0.1 == family && peer.1.gateway.is_some();
            let peers: Vec<&Key> = pass.paths.iter().filter(is_in_family).map(|(key, _)| key).collect();
            let known = || peers.iter().filter_map(|key| verdicts.get(*key));
            if known().any(|verdict| verdict.is_open()) {
                continue;
            }
            if known().any(|verdict| *verdict == Verdict::Unknown) {
                return Err(NotProbed::Probing);
            }
            let drops = |key: &&&Key| verdicts.get(**key) == Some(&Verdict::Dropped);
            dropped.extend(peers.iter().filter(drops).map(|(name, _)| name.clone()));
            silent.extend(peers.into_iter().map(|(name, _)| name.clone()));
        }
        if silent.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let since = *self.silent_since.get_or_insert(now);
        self.read_leases_at = Some(now + LEASE_READ_INTERVAL);
        let with_lease = match leases::with_lease(&self.task.store).await {
            Ok(with_lease) => with_lease,
            Err(_) if now - since < SILENT_TIMEOUT => return Err(NotProbed::LeasesUnreadable),
            Err(_) => return Ok(()),
        };
        silent.retain(|name| with_lease.contains(name));
        silent.sort();
        silent.dedup();
        if silent.is_empty() {
            return Ok(());
        }
        if !dropped.is_empty() {
            return Err(NotProbed::Dropped(Peers::of(dropped.iter())));
        }
        Err(NotProbed::Silent(Peers::of(silent.iter())))
    }
}

#[cfg(test)]
mod tests;
