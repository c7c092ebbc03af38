//! Probes: whether peers answer on the path that pod packets use, and whether that path transports packets of full
//! length.
//!
//! There are two kinds of probes to each peer. The first kind runs between the two probe endpoints; both hosts forward
//! its packets like pod packets. The second kind runs from host to host, and distinguishes a node that is down from one
//! that drops forwarded packets.

pub mod direct;
mod echo;
mod evaluation;
mod messages;
mod not_ready;
mod pings;
pub mod schedule;
mod verdict;

use std::collections::BTreeMap;
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Family, NodeName, PerFamily};
use polder_ipam::cause::SharedError;
use polder_store::Store;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use self::direct::DirectPaths;
use self::evaluation::SILENT_TIMEOUT;
pub use self::messages::{problem, state};
use self::not_ready::NoSocket;
pub use self::not_ready::NotProbed;
use self::pings::{OnNode, Pings, next_reply, send};
use self::schedule::{BATCH, Key, ProbeTarget, Schedule, Sizes, Token, Verdict, probe_other_kind};
use crate::endpoint::{Endpoint, OpenEndpoint};
use crate::kernel::desired::PeerPath;
use crate::node_state::{Pass, Passes};

/// Pause between two batches of probes.
const BATCH_INTERVAL: Duration = Duration::from_millis(10);

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
            // A node without peers waits only for the endpoint, or for the decision that it needs none. The change may
            // have arrived together with another event.
            if endpoints.has_changed().unwrap_or(false) {
                prober.publish_by(Instant::now());
            }
            let endpoint = endpoints.borrow_and_update().clone();
            prober.set_targets(&pass, endpoint);
            prober.send_due_probes().await;
            prober.publish(&pass).await;
            // All branches are cancel-safe: a change that is not received now is received in the next iteration.
            tokio::select! {
                _ = passes.changed() => {}
                _ = endpoints.changed() => prober.publish_by(Instant::now()),
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
                is_changed |= self.replace_host_socket(family, own);
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
        self.publish_by(now);
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

    /// Closes the socket of the family, and opens one with the address `own`. Returns whether a socket was closed or
    /// opened, or the reason why there is none has changed.
    fn replace_host_socket(&mut self, family: Family, own: Option<IpAddr>) -> bool {
        let (closed, before) = (self.host.sockets[family].take(), self.no_socket[family].take());
        match own.map(|source| (source, self.pings.open(source, None))) {
            None => {}
            Some((_, Ok(socket))) => self.host.sockets[family] = Some(socket),
            Some((source_address, Err(error))) => {
                let reason = NoSocket { source_address, error: SharedError::new(error) };
                if before.as_ref() != Some(&reason) {
                    warn!("{reason}");
                }
                self.no_socket[family] = Some(reason);
            }
        }
        closed.is_some() || self.host.sockets[family].is_some() || before != self.no_socket[family]
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

    /// Plans a publication of the results, together with those that follow soon.
    fn publish_soon(&mut self, now: Instant) {
        self.publish_by(now + self.settle_time());
    }

    /// Plans a publication of the results at that time, if none is planned before.
    fn publish_by(&mut self, at: Instant) {
        self.publish_at = Some(self.publish_at.map_or(at, |planned| planned.min(at)));
    }

    fn wake(&self) -> Instant {
        let now = Instant::now();
        let next = [self.host.schedule.next(), self.forwarded.schedule.next(), self.direct.next()];
        let next = next.into_iter().flatten().min();
        let next = next.map(|next| next.max(now + BATCH_INTERVAL));
        let latest = now + SILENT_TIMEOUT;
        [next, self.publish_at, self.read_leases_at].into_iter().flatten().fold(latest, Instant::min)
    }
}

#[cfg(test)]
mod tests;
