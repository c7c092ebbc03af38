//! Evaluates the replies to probes, and publishes the results.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Family, NodeName};
use tokio::time::{Instant, timeout};
use tracing::info;

use super::not_ready::{NotProbed, Peers};
use super::pings::Pings;
use super::schedule::{Key, Verdict};
use super::verdict::{ENDPOINT_FAILURES, combine, is_suspect, lease_state};
use super::{Prober, messages};
use crate::endpoint::Endpoint;
use crate::kernel::desired::PeerPath;
use crate::leases;
use crate::node_state::{Pass, set_if_changed};

/// Shortest time between two evaluations of the direct paths.
const JUDGE_EVERY: Duration = Duration::from_millis(500);

/// Replies are published together if they arrive within this time: `SETTLE_PER_PATH` times the number of probed paths,
/// within these limits. A publication evaluates all paths, which takes about 1 us for each.
const SETTLE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
const SETTLE_PER_PATH: Duration = Duration::from_micros(100);

/// Pause between two reads of the leases.
const LEASE_READ_INTERVAL: Duration = Duration::from_secs(2);

/// If the leases cannot be read and no peer answers for this time, the node is ready. Also the longest sleep of the
/// task.
pub(super) const SILENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a lease state that was read stays valid.
const LEASE_STATE_VALIDITY: Duration = Duration::from_secs(30);

/// Timeout of a lease read, so that it does not delay probes.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

impl<P: Pings> Prober<P> {
    /// Replies are published together if they arrive within this time.
    pub(super) fn settle_time(&self) -> Duration {
        let paths = u32::try_from(self.host.schedule.len()).unwrap_or(u32::MAX);
        (SETTLE_PER_PATH * paths).clamp(SETTLE.0, SETTLE.1)
    }

    /// Publishes the results, if they are due.
    pub(super) async fn publish(&mut self, pass: &Pass) {
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

    /// Evaluates the direct paths, not more often than results are published and at most every [`JUDGE_EVERY`], because
    /// it reads the state of every peer.
    fn judge_direct(&mut self, verdicts: &BTreeMap<Key, Verdict>, now: Instant) {
        if now < self.judge_at {
            self.publish_by(self.judge_at);
            return;
        }
        self.judge_at = now + JUDGE_EVERY.max(self.settle_time());
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
