//! Probes: whether peers answer on the path that pod packets use, and whether that path transports packets of full
//! length.
//!
//! Each peer is probed twice: from this node's probe endpoint to the peer's, which both hosts forward like pods'
//! packets; and from host to host, which distinguishes a node that is down from one that drops forwarded packets.

mod closed;
pub mod direct;
mod echo;
mod pings;
pub mod schedule;
mod verdict;
mod words;

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

pub use self::closed::NotProbed;
use self::closed::{NoSocket, Peers};
use self::direct::DirectPaths;
use self::pings::{OnNode, Pings, answer, send};
use self::schedule::{BATCH, DueProbe, Key, ProbeTarget, Schedule, Sizes, Token, Verdict};
use self::verdict::{ENDPOINT_FAILURES, Living, combine, is_suspect};
pub use self::words::{problem, state};
use crate::board::{Pass, Passes, set_if_changed};
use crate::endpoint::{Endpoint, Open};
use crate::kernel::desired::PeerPath;
use crate::leases;

/// Pause between two volleys.
const BATCH_INTERVAL: Duration = Duration::from_millis(10);

/// Shortest time between two evaluations of the direct paths.
const JUDGE_EVERY: Duration = Duration::from_millis(500);

/// Replies within this time are published together.
const SETTLE: Duration = Duration::from_millis(20);

/// Pause between two reads of the leases.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Timeout for a reply while the datastore is unreachable and it is unknown whether any peer is alive.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long a lease state that was read stays valid.
const BELIEF: Duration = Duration::from_secs(30);

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
    /// `Ok` once the paths to the peers were open, or if the node has no peers; until then the reason. Then it stays
    /// `Ok`: a later fault is no reason to refuse pods.
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
            host: Side::new(self.resync),
            forwarded: Side::new(self.resync),
            direct: direct::Tests::new(self.resync),
            task: self,
            no_socket: PerFamily::NONE,
            endpoint: None,
            aimed_by: None,
            alive: BTreeMap::new(),
            // Published at once, because the node may have no peers.
            tell_at: Some(Instant::now()),
            silent_since: None,
            ask_at: None,
            ask_not_before: Instant::now(),
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
            prober.due_probes().await;
            prober.publish(&pass).await;
            // All branches are cancel-safe: a change that is not received now is received in the next iteration.
            tokio::select! {
                _ = passes.changed() => {}
                _ = endpoints.changed() => {}
                (family, answer) = answer(&prober.pings, &prober.host.echoes) => {
                    prober.take(Route::Host, family, answer);
                }
                (family, answer) = answer(&prober.pings, &prober.forwarded.echoes) => {
                    prober.take(Route::Forwarded, family, answer);
                }
                (family, answer) = answer(&prober.pings, prober.direct.echoes()) => {
                    prober.take(Route::Underlay, family, answer);
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
    host: Side<P::Echo>,
    /// From endpoint to endpoint.
    forwarded: Side<P::Echo>,
    /// To the peers' underlay addresses.
    direct: direct::Tests<P::Echo>,
    /// Why the host sockets could not be opened, by family.
    no_socket: PerFamily<Option<NoSocket>>,
    /// The endpoint in whose namespace the sockets of `forwarded` are open.
    endpoint: Option<Arc<Open>>,
    /// The pass that defined the current targets.
    aimed_by: Option<Arc<Pass>>,
    /// For peers whose endpoint does not answer: whether their agent is alive, and when that was read.
    alive: BTreeMap<NodeName, (bool, Instant)>,
    /// Time of the next publication of results.
    tell_at: Option<Instant>,
    /// Time since when no peer has answered, before the node is ready.
    silent_since: Option<Instant>,
    /// Time of the next read of the leases.
    ask_at: Option<Instant>,
    /// Earliest time of the next lease read for suspects, after a failed read.
    ask_not_before: Instant,
    /// Earliest time of the next evaluation of the direct paths.
    judge_at: Instant,
}

/// The probes of one kind: schedule and sockets.
struct Side<E> {
    schedule: Schedule,
    echoes: PerFamily<Option<E>>,
}

impl<E> Side<E> {
    fn new(steady: Duration) -> Self {
        Self { schedule: Schedule::new(steady), echoes: PerFamily::NONE }
    }
}

/// The kind of a probe, by source and target address.
#[derive(Debug, Clone, Copy)]
enum Route {
    Host,
    Forwarded,
    Underlay,
}

impl<P: Pings> Prober<P> {
    /// Sets the targets from the last pass and the current endpoint.
    fn set_targets(&mut self, pass: &Arc<Pass>, endpoint: Endpoint) {
        let endpoint = match endpoint {
            Endpoint::Open(open) => Some(open),
            Endpoint::Awaited | Endpoint::Without(_) | Endpoint::Unneeded => None,
        };
        let is_same = match (&self.endpoint, &endpoint) {
            (Some(known), Some(now)) => Arc::ptr_eq(known, now),
            (known, now) => known.is_none() && now.is_none(),
        };
        if !is_same {
            self.enter(endpoint);
        } else if self.aimed_by.as_ref().is_some_and(|by| Arc::ptr_eq(by, pass)) {
            return;
        }
        self.aimed_by = Some(Arc::clone(pass));
        for family in Family::BOTH {
            let own = pass.gateways.iter().copied().find(|own| Family::of(*own) == family);
            let opened = self.host.echoes[family].as_ref().map(|echo| self.pings.source(echo));
            if own.is_none() || opened != own {
                self.host.echoes[family] = None;
                self.open(family, own);
            }
        }
        let endpoint = |family: &Family, peer_path: &PeerPath| {
            let can_forward = self.forwarded.echoes[*family].is_some();
            can_forward.then(|| ProbeTarget::endpoint(peer_path)).flatten()
        };
        let hosts = pass.paths.iter().filter_map(|(key, peer_path)| {
            // Full-length probes use the forwarded path, if it exists.
            let sizes = if endpoint(&key.1, peer_path).is_some() { Sizes::Small } else { Sizes::Both };
            let target = self.host.echoes[key.1].is_some().then(|| ProbeTarget::host(peer_path, sizes));
            Some((key.clone(), target.flatten()?))
        });
        let endpoints = pass
            .paths
            .iter()
            .filter_map(|(key, peer_path)| Some((key.clone(), endpoint(&key.1, peer_path)?)));
        let now = Instant::now();
        self.host.schedule.set_targets(hosts, now);
        self.forwarded.schedule.set_targets(endpoints, now);
        let underlay = self.task.passes.underlay().map(|underlay| underlay.addresses()).unwrap_or_default();
        self.direct.set_targets(&self.pings, &pass.paths, &self.host.echoes, &underlay, now);
        self.tell_at.get_or_insert(now);
    }

    /// Opens the sockets in the endpoint's namespace.
    fn enter(&mut self, endpoint: Option<Arc<Open>>) {
        self.forwarded.echoes = PerFamily::NONE;
        let sources =
            endpoint.iter().flat_map(|open| open.addresses.iter().map(|source| (source, &open.namespace)));
        for (source, namespace) in sources {
            match self.pings.open(*source, Some(namespace)) {
                Ok(echo) => self.forwarded.echoes[Family::of(*source)] = Some(echo),
                Err(error) => {
                    warn!(%source, %error, "cannot open a socket in the probe endpoint to probe peers");
                }
            }
        }
        self.endpoint = endpoint;
    }

    fn open(&mut self, family: Family, own: Option<IpAddr>) {
        let before = self.no_socket[family].take();
        let Some(source) = own else { return };
        match self.pings.open(source, None) {
            Ok(echo) => self.host.echoes[family] = Some(echo),
            Err(error) => {
                let reason = NoSocket { source_address: source, error: SharedError::new(error) };
                if before.as_ref() != Some(&reason) {
                    warn!("{reason}");
                }
                self.no_socket[family] = Some(reason);
            }
        }
    }

    async fn due_probes(&mut self) {
        let now = Instant::now();
        let shots = self.host.schedule.due_probes(now, BATCH);
        let forwarded = self.forwarded.schedule.due_probes(now, BATCH);
        // If one kind gets no reply, the other is probed at once.
        hurry(&shots, &self.host.schedule, &mut self.forwarded.schedule, now);
        hurry(&forwarded, &self.forwarded.schedule, &mut self.host.schedule, now);
        let tests = self.direct.due_probes(&self.pings, &self.host.echoes, now).await;
        if shots.is_empty() && forwarded.is_empty() && !tests {
            return;
        }
        send(&self.pings, &self.host.echoes, shots).await;
        send(&self.pings, &self.forwarded.echoes, forwarded).await;
        // An earlier round may have ended without a reply.
        self.tell_at.get_or_insert(Instant::now() + SETTLE);
    }

    fn take(&mut self, route: Route, family: Family, answer: io::Result<(IpAddr, Token)>) {
        match answer {
            Ok((from, token)) => {
                let now = Instant::now();
                match route {
                    Route::Host => {
                        self.host.schedule.take(from, token, now);
                        // Direct tests use the same source address.
                        self.direct.take_pods(from, token, now);
                    }
                    Route::Forwarded => self.forwarded.schedule.take(from, token, now),
                    Route::Underlay => self.direct.take_nodes(from, token, now),
                }
                self.tell_at.get_or_insert(now + SETTLE);
            }
            Err(error) => {
                warn!(%family, %error, "cannot read replies to probes");
                match route {
                    Route::Host => self.host.echoes[family] = None,
                    Route::Forwarded => self.forwarded.echoes[family] = None,
                    Route::Underlay => self.direct.close(family),
                }
                self.aimed_by = None;
            }
        }
    }

    fn wake(&self) -> Instant {
        let now = Instant::now();
        let next = [self.host.schedule.next(), self.forwarded.schedule.next(), self.direct.next()];
        let next = next.into_iter().flatten().min();
        let next = next.map(|next| next.max(now + BATCH_INTERVAL));
        let far = now + TIMEOUT;
        [next, self.tell_at, self.ask_at].into_iter().flatten().fold(far, Instant::min)
    }

    /// Publishes the results, if they are due.
    async fn publish(&mut self, pass: &Pass) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if !is_due(self.tell_at) && !is_due(self.ask_at) {
            return;
        }
        self.tell_at = None;
        self.ask_at = None;
        self.ask_for_suspects().await;
        let verdicts = self.verdicts();
        self.judge_direct(&verdicts, now);
        if self.task.probed.borrow().is_err() {
            let probed = self.judge(pass, &verdicts).await;
            let is_open = probed.is_ok();
            if set_if_changed(&self.task.probed, probed) && is_open {
                info!("peer check passed: a peer answers on the pod path, or no peer is known to be alive");
            }
        }
        self.task.verdicts.send_if_modified(|known| {
            let changed = **known != verdicts;
            if changed {
                words::log(known, &verdicts);
                *known = Arc::new(verdicts);
            }
            changed
        });
    }

    /// Evaluates the direct paths, at most every [`JUDGE_EVERY`], because it reads the state of every peer.
    fn judge_direct(&mut self, verdicts: &BTreeMap<Key, Verdict>, now: Instant) {
        if now < self.judge_at {
            self.tell_at.get_or_insert(self.judge_at);
            return;
        }
        self.judge_at = now + JUDGE_EVERY;
        let alive = &self.alive;
        let (direct, doubted) = self.direct.judge(verdicts, |name| living(alive, name), now);
        for key in doubted {
            self.host.schedule.press(&key, now);
            self.forwarded.schedule.press(&key, now);
        }
        set_if_changed(&self.task.direct, Arc::new(direct));
    }

    /// The verdicts on the paths to all peers.
    fn verdicts(&self) -> BTreeMap<Key, Verdict> {
        let keys: BTreeSet<&Key> = self.host.schedule.keys().chain(self.forwarded.schedule.keys()).collect();
        let verdict = |key: &Key| {
            let host = self.host.schedule.seen(key).map(|seen| seen.verdict);
            combine(host, self.forwarded.schedule.seen(key), living(&self.alive, &key.0))
        };
        keys.into_iter().map(|key| (key.clone(), verdict(key))).collect()
    }

    /// Reads the leases of peers with one address that answers and another that does not.
    async fn ask_for_suspects(&mut self) {
        let mut suspects: BTreeMap<NodeName, u8> = BTreeMap::new();
        for key in self.forwarded.schedule.keys() {
            let host = self.host.schedule.seen(key).map(|seen| seen.verdict);
            if let Some(seen) = self.forwarded.schedule.seen(key).filter(|seen| is_suspect(host, *seen)) {
                let lost = suspects.entry(key.0.clone()).or_default();
                *lost = seen.lost.max(*lost);
            }
        }
        let known = Arc::clone(&self.task.verdicts.borrow());
        for name in self.direct.suspects(&known) {
            suspects.entry(name.clone()).or_default();
        }
        self.alive.retain(|name, _| suspects.contains_key(name));
        let now = Instant::now();
        let is_said = |name: &NodeName| {
            Family::BOTH.iter().any(|family| known.get(&(name.clone(), *family)) == Some(&Verdict::Dropped))
        };
        // Read again before a fault is reported: the lease of a killed agent lasts for a while.
        let is_due = |(name, lost): (&NodeName, &u8)| match self.alive.get(name) {
            None => true,
            Some((true, at)) if *lost >= ENDPOINT_FAILURES && !is_said(name) => now - *at >= ASK_AGAIN,
            Some((_, at)) => now - *at >= BELIEF,
        };
        if now < self.ask_not_before || !suspects.iter().any(is_due) {
            return;
        }
        let names: Vec<NodeName> = suspects.into_keys().collect();
        let living = timeout(STORE_TIMEOUT, leases::with_lease_among(&self.task.store, &names))
            .await
            .ok()
            .and_then(Result::ok);
        if living.is_none() {
            self.ask_not_before = now + ASK_AGAIN;
        }
        for name in names {
            match &living {
                Some(living) => drop(self.alive.insert(name.clone(), (living.contains(&name), now))),
                // The state is unknown again.
                None => drop(self.alive.remove(&name)),
            }
        }
    }

    /// Whether the node is ready as far as peers matter: in each family one peer answers, or no peer that could answer
    /// is alive. A peer without a path counts as not answering.
    async fn judge(&mut self, pass: &Pass, verdicts: &BTreeMap<Key, Verdict>) -> Result<(), NotProbed> {
        if let Some(reason) = self.no_socket.values().next() {
            return Err(reason.clone().into());
        }
        if matches!(*self.task.endpoint.borrow(), Endpoint::Awaited) {
            return Err(NotProbed::NoEndpoint);
        }
        let (mut silent, mut dropped) = (Vec::new(), BTreeSet::new());
        for family in self.host.echoes.families() {
            let has_pods =
                |((_, of), peer_path): &(&Key, &PeerPath)| *of == family && peer_path.gateway.is_some();
            let peers: Vec<&Key> = pass.paths.iter().filter(has_pods).map(|(key, _)| key).collect();
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
        self.ask_at = Some(now + ASK_AGAIN);
        let living = match leases::with_lease(&self.task.store).await {
            Ok(living) => living,
            Err(_) if now - since < TIMEOUT => return Err(NotProbed::Unasked),
            Err(_) => return Ok(()),
        };
        silent.retain(|name| living.contains(name));
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

/// The last known lease state of a peer's agent.
fn living(alive: &BTreeMap<NodeName, (bool, Instant)>, name: &NodeName) -> Living {
    match alive.get(name) {
        Some((true, _)) => Living::Yes,
        Some((false, _)) => Living::No,
        None => Living::Unknown,
    }
}

/// Schedules an immediate probe of the other kind for peers that did not answer this kind.
fn hurry(shots: &[DueProbe], schedule: &Schedule, other: &mut Schedule, now: Instant) {
    for shot in shots.iter().filter(|shot| shot.lost) {
        if let Some(key) = schedule.key_of(shot.number) {
            other.hurry(key, now);
        }
    }
}

#[cfg(test)]
mod tests;
