//! Reconciles kernel state with the cluster's records whenever one of them may have changed.
//!
//! A pass reads everything, plans and applies; passes repeat until no change is left. Events only trigger a pass; their
//! content is not applied.

mod announcer;
mod datapath;
mod memory;
mod parts;
mod pass_plan;
mod rehearsal;
mod transitions;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{IfName, NodeName, PerFamily};
use polder_ipam::cause::{HostError, SharedError};
use polder_ipam::peers::{Peer, validate};
use polder_ipam::registration::Registration;
use polder_ipam::view::ViewSource;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

pub use self::announcer::Announcer;
use self::datapath::ApplyFailed;
pub use self::datapath::{Datapath, OnNode};
use self::memory::{Losses, Network, Outward, Passes, Repairing};
pub use self::parts::{Entries, Expected, Tools, Wakes, ask};
use self::pass_plan::{PassInputs, PassPlan};
pub use self::rehearsal::rehearse;
use self::transitions::Transitions;
use crate::config::StoreConfig;
use crate::etcd_addresses;
use crate::kernel::plan::{KernelChange, summary};
use crate::kernel::snapshot::RouteTo;
use crate::node_state::{Chosen, Made, NodeState, Pass};
use crate::repair;
use crate::underlay::{NotChosen, Underlay, UnderlayInputs};
use crate::wake::next_tick;

/// Events within this time are handled by one pass.
const SETTLE: Duration = Duration::from_millis(10);

/// Most passes in a row. A remaining difference waits for the next event or the periodic pass.
const PASSES: usize = 3;

/// Most peers whose routes are looked up when the underlay is chosen.
const PEERS_ASKED: usize = 8;

/// Documentation addresses (RFC 5737, RFC 3849): the route to them is the default route.
const OUTSIDE: PerFamily<&str> = PerFamily::new("192.0.2.1", "2001:db8::1");

/// How long state of lost records is kept: the nodes that own those records write them again.
const LOSS_GRACE: Duration = Duration::from_secs(60);

/// First pause after a failed pass; it doubles up to `resync`.
const RETRY: Duration = Duration::from_millis(200);

/// What woke the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    /// Records or allocations changed, but not the routes to known peers.
    Records,
    /// The underlay may have changed, or the periodic pass is due.
    Underlay,
    /// Another program changed Polder's kernel state.
    Drift,
}

/// The engine, before it runs.
#[derive(Debug)]
pub struct Task<D = OnNode> {
    /// Its inputs and its access to the kernel.
    pub tools: Tools<D>,
    /// The values that it publishes.
    pub entries: Entries,
    /// Lets runtimes find the CNI configuration.
    pub announcer: Announcer,
    /// Its wake-up sources.
    pub wakes: Wakes,
}

impl<D: Datapath> Task<D> {
    /// Runs without end.
    pub async fn run(self) {
        let Self { tools, entries, announcer, wakes: Wakes { underlay, senders, mut plans } } = self;
        let node_state = &tools.readiness.node_state;
        let mut view = node_state.records.changes();
        let mut membership_changes = node_state.membership.changes();
        let mut registration = node_state.membership.registrations();
        let mut probed = tools.readiness.probes();
        let mut leases = tools.leases.clone();
        let mut direct = tools.direct.clone();
        let mut properties = node_state.properties.changes();
        let mut engine = Engine::new(tools, entries, announcer);
        let mut cause = Trigger::Underlay;
        loop {
            view.mark_unchanged();
            membership_changes.mark_unchanged();
            registration.mark_unchanged();
            direct.mark_unchanged();
            properties.mark_unchanged();
            engine.work(cause).await;
            let (wake, dead) = (Instant::now() + engine.pause(), engine.dead.clone());
            cause = loop {
                // All branches are cancel-safe: a change that is missed here is detected in the next iteration.
                break tokio::select! {
                    _ = view.changed() => Trigger::Records,
                    _ = membership_changes.changed() => Trigger::Records,
                    _ = registration.changed() => Trigger::Records,
                    () = async { drop(leases.wait_for(|leases| *leases.dead() != dead).await) } => Trigger::Records,
                    _ = direct.changed() => Trigger::Records,
                    () = senders.woken() => Trigger::Records,
                    () = underlay.woken() => Trigger::Underlay,
                    () = properties.changed() => Trigger::Underlay,
                    () = engine.drifted() => Trigger::Drift,
                    () = sleep_until(wake) => Trigger::Underlay,
                    _ = probed.changed() => {
                        engine.announcer.announce();
                        continue;
                    }
                    Some(reply) = plans.recv() => {
                        // The requester may have given up.
                        let _ = reply.send(engine.plan().await);
                        continue;
                    }
                };
            };
            sleep(SETTLE).await;
        }
    }
}

/// The engine, with its state between passes.
#[derive(Debug)]
pub struct Engine<D = OnNode> {
    tools: Tools<D>,
    entries: Entries,
    announcer: Announcer,
    /// The host's interfaces and routes.
    network: Network,
    /// Nodes whose underlay address changed.
    transitions: Transitions,
    /// Records that the datastore lost.
    losses: Losses,
    /// The passes so far.
    passes: Passes,
    /// Changes by other programs, and their repair.
    repairing: Repairing,
    /// The nodes whose agents the last pass treated as dead.
    dead: BTreeSet<NodeName>,
}

impl<D: Datapath> Engine<D> {
    /// An engine that has made no pass yet.
    pub fn new(tools: Tools<D>, entries: Entries, announcer: Announcer) -> Self {
        Self {
            tools,
            entries,
            announcer,
            network: Network::default(),
            transitions: Transitions::default(),
            losses: Losses::default(),
            passes: Passes::default(),
            repairing: Repairing::default(),
            dead: BTreeSet::new(),
        }
    }

    fn node_state(&self) -> &NodeState {
        &self.tools.readiness.node_state
    }

    /// Whether the node can have no peers.
    fn is_alone(&self) -> bool {
        matches!(self.tools.config.store, StoreConfig::Embedded)
    }

    /// How long to wait for an event before the next pass.
    fn pause(&self) -> Duration {
        let resync = self.tools.config.resync;
        let until = |at: Instant| at.saturating_duration_since(Instant::now());
        let (prune, moved) = (self.losses.prune_from.map(until), self.transitions.next().map(until));
        let again = (self.network.unread || self.network.doubt || self.network.has_new_path).then_some(RETRY);
        [self.passes.retry, prune, moved, again].into_iter().flatten().fold(resync, Duration::min)
    }

    /// Waits until another program has changed Polder's kernel state and a repair is allowed.
    async fn drifted(&mut self) {
        let drift_at = loop {
            if let Some(drift_at) = self.repairing.drift_at {
                break drift_at;
            }
            tokio::select! {
                () = self.tools.drift_signal.woken() => self.repairing.drift_at = Some(Instant::now()),
                // Changes of kernel settings cause no notification.
                () = sleep_until(self.repairing.settings_due) => {
                    self.repairing.settings_due = next_tick();
                    self.repairing.drift_at = self.repairing.settings.differ().then(Instant::now);
                    self.announcer.announce();
                }
            }
        };
        sleep_until(self.repairing.pace.next(drift_at)).await;
    }

    /// Records a repair: the desired state is unchanged, but the kernel differed from it.
    fn note_repair(&self, changes: &[&KernelChange], by: Vec<String>) {
        let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        let who = if by.is_empty() { "another program".to_owned() } else { by.join(", ") };
        warn!("{who} changed Polder's kernel state; repaired: {}", changes.join("; "));
        self.entries.repairs.send_modify(|repairs| repairs.add(&changes, by));
    }

    async fn work(&mut self, cause: Trigger) {
        self.repairing.drift_at = None;
        let view = self.node_state().view();
        if view.source == ViewSource::Nowhere {
            return self.delete_routes_that_capture_etcd().await;
        }
        self.dead.clone_from(self.tools.leases.borrow().dead());
        let validated = validate(&view, &self.tools.config.node, &self.dead);
        let anew = cause == Trigger::Underlay || self.node_state().underlay().is_err();
        if anew {
            self.choose_underlay(&validated.peers).await;
        }
        self.look_for(&validated.peers, anew).await;
        self.publish_path_interfaces();
        self.transitions.observe(&validated.peers, Instant::now());
        self.losses.prune_from = self.losses.prune_from.filter(|from| *from > Instant::now());
        let Ok(grounds) = self.grounds(view, validated) else {
            if matches!(self.node_state().registration(), Registration::Removed(_)) {
                // A removed node has no peers.
                self.entries.pass.send_replace(None);
                self.announcer.withdraw();
            }
            return self.delete_routes_that_capture_etcd().await;
        };
        let mut by = self.tools.drift_signal.take();
        for number in 0..PASSES {
            let started = Instant::now();
            let mut pass = self.pass(&grounds, &mut by).await;
            self.passes.count += 1;
            pass.count = self.passes.count;
            pass.took = started.elapsed();
            pass.problems.clone_from(&grounds.validated.problems);
            if cause == Trigger::Drift && number == 0 {
                self.repairing.pace.note(started, pass.writes > 0);
            }
            self.passes.written += pass.writes as u64;
            pass.written = self.passes.written;
            let failed = pass.made == Made::No || !pass.local_failures.is_empty();
            let settled = pass.writes == 0;
            self.entries.pass.send_replace(Some(Arc::new(pass)));
            if std::mem::take(&mut self.passes.has_added_ports) {
                // Flows that began without them lead elsewhere. The addresses of the host are in the published pass.
                self.tools.stale.add_ports(self.tools.pods.all().iter().flat_map(|pod| &pod.ports));
            }
            let resync = self.tools.config.resync;
            self.passes.retry =
                failed.then(|| self.passes.retry.map_or(RETRY, |before| (before * 2).min(resync)));
            // With newer records the next pass starts from the beginning. It also verifies this one.
            if settled || failed || !Arc::ptr_eq(&grounds.view, &self.node_state().view()) {
                break;
            }
        }
        self.announcer.announce();
    }

    async fn pass(&mut self, grounds: &PassInputs, by: &mut Vec<String>) -> Pass {
        let PassPlan { desired, prune, changes, indexes, sysctls, mut pass } =
            match self.pass_plan(grounds).await {
                Ok(pass_plan) => pass_plan,
                Err(reason) => return self.not_made(SharedError::new(reason)),
            };
        self.entries.expected.send_if_modified(|expected| {
            let before = expected.pod_link.replace(desired.pod_link);
            before != expected.pod_link
        });
        let digest = desired.digest(prune);
        if changes.is_empty() {
            if self.repairing.in_place.as_ref().is_none_or(|before| before.sysctls != digest.sysctls) {
                self.repairing.settings = self.tools.sysctls.watch(&digest.sysctls);
            }
            self.repairing.in_place = Some(digest);
            return pass;
        }
        info!("changing kernel state: {}", summary(&changes));
        changes.iter().for_each(|change| debug!("{change}"));
        let is_repair = self.repairing.in_place.as_ref() == Some(&digest);
        if is_repair {
            // The notification of a change may arrive after the change was read.
            by.extend(self.tools.drift_signal.take());
            by.sort();
            by.dedup();
        }
        if !is_repair {
            // Another state is put in place now. If no pass verifies it, a return to the state before is no repair.
            self.repairing.in_place = None;
        }
        self.keep_previous(&changes, &sysctls).await;
        let wanted = if is_repair {
            let is_in_flight = |name: &IfName| self.tools.in_flight.has_interface(name);
            repair::foreign_repairs(&changes, &self.tools.pods.changing(is_in_flight))
        } else {
            Vec::new()
        };
        let adds_ports = changes.iter().any(KernelChange::adds_host_ports);
        let applied = self.tools.datapath.apply(changes, desired, indexes).await;
        self.passes.has_added_ports |= adds_ports;
        let failures = match applied {
            Ok(failures) => failures,
            Err(error) => return self.not_made(SharedError::new(ApplyFailed(error))),
        };
        let has_failed =
            |change: &KernelChange| failures.iter().any(|failure| failure.change.is_same_object(change));
        let repaired: Vec<&KernelChange> = wanted.iter().filter(|change| !has_failed(change)).collect();
        if !repaired.is_empty() {
            self.note_repair(&repaired, by.clone());
        }
        for failure in failures.into_iter().filter(|failure| !failure.follows) {
            warn!("{failure}");
            let list =
                if failure.change.is_local() { &mut pass.local_failures } else { &mut pass.other_failures };
            list.push(SharedError::new(failure));
        }
        pass
    }

    /// Saves the previous values of kernel settings before they are changed.
    async fn keep_previous(&self, changes: &[KernelChange], found: &BTreeMap<String, String>) {
        let mut previous: Vec<(String, String)> = Vec::new();
        for change in changes {
            let KernelChange::SetSysctl { path, .. } = change else { continue };
            // Restored in reverse order: dependent settings follow the setting that changes them.
            previous.extend(self.tools.sysctls.changed_with(path));
            previous.extend(found.get(path).map(|value| (path.clone(), value.clone())));
        }
        if previous.is_empty() {
            return;
        }
        if let Err(error) = self.tools.datapath.keep_sysctls(previous).await {
            warn!(%error, "cannot save the previous kernel settings in the ledger");
        }
    }

    /// The result of a failed pass. The results of the previous pass stay valid, so a node that served pods continues
    /// to serve them.
    fn not_made(&self, reason: SharedError) -> Pass {
        warn!("{reason}");
        let before = self.node_state().pass().map(|before| (*before).clone()).unwrap_or_default();
        let served = !before.gateways.is_empty() && before.local_failures.is_empty();
        let mut pass = Pass { made: Made::No, writes: 0, ..before };
        let list = if served { &mut pass.other_failures } else { &mut pass.local_failures };
        if !list.contains(&reason) {
            list.push(reason);
        }
        pass
    }

    /// Deletes Polder's leftover routes that make etcd unreachable.
    async fn delete_routes_that_capture_etcd(&self) {
        let Some(store) = self.tools.store_at.borrow().clone() else { return };
        match self.tools.datapath.delete_routes_that_capture(store).await {
            Ok(deleted) => {
                for route in &deleted {
                    warn!(%route, "deleted a route of Polder that made etcd unreachable from this node");
                }
            }
            Err(error) => {
                warn!(%error, "cannot check whether a route of Polder makes etcd unreachable from this node");
            }
        }
    }

    /// Chooses the node's underlay addresses again. If the kernel cannot be read, they stay as they are, and the read
    /// is retried soon.
    async fn choose_underlay(&mut self, peers: &[Peer]) {
        // While etcd's addresses are unknown, routes to them cannot be protected. A wake-up follows once they are
        // known.
        let Some(store) = self.tools.store_at.borrow().clone() else { return };
        let mut asked: Vec<(RouteTo, IpAddr)> = Vec::new();
        for peer in peers.iter().take(PEERS_ASKED) {
            let node = |address: &IpAddr| (RouteTo::Node(peer.name.clone()), *address);
            asked.extend(peer.record.underlay.iter().map(node));
        }
        if let StoreConfig::Etcd(etcd) = &self.tools.config.store {
            asked.extend(
                etcd.endpoints.iter().filter_map(|url| Some((RouteTo::Etcd, etcd_addresses::address(url)?))),
            );
        }
        asked.extend(
            OUTSIDE.both().into_iter().filter_map(|(_, world)| Some((RouteTo::World, world.parse().ok()?))),
        );
        let known = self.node_state().underlay();
        let facts = match self.tools.datapath.host_network(asked).await {
            Ok(network) => {
                let view = self.node_state().view();
                let own = view.nodes.get(&self.tools.config.node);
                Ok(UnderlayInputs {
                    network,
                    store,
                    pods: self.tools.datapath.own_ranges().await,
                    pools: view.pools.values().map(|pool| pool.record.cidr()).collect(),
                    registered: own.map(|own| own.record.underlay.clone()).unwrap_or_default(),
                    node_object: self.node_state().properties.addresses(),
                })
            }
            Err(error) => Err(error),
        };
        self.network.unread = facts.is_err();
        if let (Err(error), Ok(_)) = (&facts, &known) {
            return warn!(%error, "cannot list interfaces: keeping the current underlay addresses");
        }
        if let Ok(facts) = &facts {
            self.network.own = facts.network.addresses.iter().map(|found| found.address.ip()).collect();
            self.network.host_addresses = facts.network.host_addresses();
            self.network.outward = Outward::of(&facts.network);
        }
        let current = known.unwrap_or_default();
        let chosen = facts
            .map_err(|error| NotChosen::Unreadable(HostError::new(error)))
            .and_then(|facts| match Underlay::choose(&self.tools.config.underlay, &facts, &current) {
                Err(NotChosen::Undecided { .. }) if self.is_alone() => Ok(Underlay::of_lone_node(&facts)),
                chosen => chosen,
            })
            .map(Arc::new);
        let mut changed = false;
        self.entries.underlay.send_if_modified(|known| {
            let uplinks = |known: &Chosen| known.clone().map(|known| known.uplinks.clone());
            changed = uplinks(known) != uplinks(&chosen);
            let changed = *known != chosen;
            known.clone_from(&chosen);
            changed
        });
        if let Ok(chosen) = &chosen {
            self.network.underlay = Some(Arc::clone(chosen));
        }
        match chosen {
            Ok(chosen) if changed => {
                for uplink in chosen.uplinks.values() {
                    info!(
                        "underlay address {} on {}, chosen by {}",
                        uplink.address, uplink.interface, uplink.chosen_by
                    );
                }
            }
            Err(reason) if changed => warn!("{reason}"),
            _ => {}
        }
    }

    /// Publishes the interfaces whose changes may change the paths out of this node. The monitor has ignored changes of
    /// new ones: they are read again soon.
    fn publish_path_interfaces(&mut self) {
        let now = self.node_state().underlay().ok().map(|underlay| self.network.path_interfaces(&underlay));
        let before = self.entries.expected.borrow().path_interfaces.clone();
        self.network.has_new_path =
            before.zip(now.as_ref()).is_some_and(|(before, now)| !now.is_subset(&before));
        self.entries.expected.send_if_modified(|expected| {
            let is_new = expected.path_interfaces != now;
            expected.path_interfaces = now;
            is_new
        });
    }

    /// Looks up the routes to all peers, or only to those not known yet. If a lookup fails, the known route stays.
    async fn look_for(&mut self, peers: &[Peer], anew: bool) {
        let addresses: BTreeSet<IpAddr> =
            peers.iter().flat_map(|peer| peer.record.underlay.iter().copied()).collect();
        self.network.underlay_routes.retain(|address, _| addresses.contains(address));
        let unknown = |address: &IpAddr| {
            anew || self.network.doubt || !self.network.underlay_routes.contains_key(address)
        };
        let asked: Vec<IpAddr> = addresses.into_iter().filter(unknown).collect();
        if asked.is_empty() {
            return;
        }
        let found = self.tools.datapath.look_up(asked).await;
        self.network.doubt = found.is_err();
        match found {
            Ok(found) => self.network.underlay_routes.extend(found),
            Err(error) => warn!(%error, "cannot look up the routes to peers"),
        }
    }
}

#[cfg(test)]
mod tests;
