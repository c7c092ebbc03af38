//! Makes the kernel what it should be, whenever one or the other may have changed.
//!
//! A pass reads everything, plans, applies, and looks again until there is nothing left to do. Nothing is patched
//! on the word of an event.

mod draft;
mod moves;
mod rehearsal;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polder_api::message::Refusal;
use polder_ipam::Cidr;
use polder_ipam::peers::{Peer, believe};
use polder_ipam::view::Source;
use polder_netlink::route::Lookup;
use polder_store::NodeIpam;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, sleep_until};
use tracing::{debug, info, warn};

use self::draft::{Draft, Grounds};
use self::moves::Moves;
pub use self::rehearsal::rehearse;
use crate::agent::Agent;
use crate::bell::Wake;
use crate::board::{Made, Pass, set_if_changed};
use crate::config::StoreConfig;
use crate::conflist::Conflist;
use crate::etcd_addresses;
use crate::kernel::desired::Known;
use crate::kernel::plan::{Change, summary};
use crate::kernel::snapshot::HostNetwork;
use crate::repair::Pace;
use crate::requests::PlanRequest;
use crate::underlay::{Facts, Underlay};

/// Events that come together are answered together.
const SETTLE: Duration = Duration::from_millis(10);

/// Passes in a row before a difference that does not go away waits for the next event or the clock.
const PASSES: usize = 3;

/// Peers that are asked for the way to them when the underlay is chosen.
const PEERS_ASKED: usize = 8;

/// Addresses that are nobody's (RFC 5737, RFC 3849): the way to them is the default route.
const WORLD: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// What they are called.
const THE_WORLD: &str = "the world";

/// How long what the store has lost is kept nevertheless: it gets its records back from those who have them.
const LOSS_GRACE: Duration = Duration::from_secs(60);

/// How often it is looked whether the kernel settings are as they should be.
const SETTINGS_EVERY: Duration = Duration::from_millis(400);

/// After a pass that failed: at first soon, then slower.
const RETRY: Duration = Duration::from_millis(200);

/// What woke the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// Records or holdings changed: the ways to known peers did not.
    Records,
    /// The underlay may have changed, or it is time to look.
    Underlay,
    /// Somebody has changed something of ours.
    Disturbance,
}

/// What the next pass would change, in order.
pub async fn ask(agent: &Agent) -> Result<Vec<String>, Refusal> {
    let (reply, answer) = oneshot::channel();
    let sent = agent.plans.send(reply).await;
    let answered = async { sent.ok().and(answer.await.ok()) }.await;
    let planned = answered.unwrap_or_else(|| Err("the engine has stopped".to_owned()));
    planned.map_err(Refusal::try_again)
}

/// Runs for ever.
pub async fn run(agent: Arc<Agent>, mut asked: mpsc::Receiver<PlanRequest>, senders: Wake) {
    let mut view = agent.board.view.subscribe();
    let mut holdings = agent.board.holdings.subscribe();
    let mut registration = agent.board.registration.subscribe();
    let mut probed = agent.board.probed.subscribe();
    let mut engine = Engine::new(agent);
    let agent = Arc::clone(&engine.agent);
    let mut cause = Cause::Underlay;
    loop {
        view.mark_unchanged();
        holdings.mark_unchanged();
        registration.mark_unchanged();
        engine.work(cause).await;
        let wake = Instant::now() + engine.pause();
        cause = loop {
            // Cancel-safe, all of them: what is not taken is seen the next time.
            break tokio::select! {
                _ = view.changed() => Cause::Records,
                _ = holdings.changed() => Cause::Records,
                _ = registration.changed() => Cause::Records,
                () = senders.rung() => Cause::Records,
                () = agent.underlay_changed.notified() => Cause::Underlay,
                () = engine.disturbed() => Cause::Disturbance,
                () = sleep_until(wake.into()) => Cause::Underlay,
                _ = probed.changed() => {
                    engine.announce();
                    continue;
                }
                Some(reply) = asked.recv() => {
                    // Whoever asked may be gone.
                    let _ = reply.send(engine.plan().await);
                    continue;
                }
            };
        };
        sleep(SETTLE).await;
    }
}

struct Engine {
    agent: Arc<Agent>,
    /// How the host reaches the peers' underlay addresses.
    reach: BTreeMap<IpAddr, Option<Lookup>>,
    /// Who has another underlay address than before.
    moves: Moves,
    /// All addresses of this node that are not its pods'.
    own: BTreeSet<IpAddr>,
    /// What is known of the interfaces that are not ours.
    outward: Outward,
    /// Whether some of that could not be asked.
    doubt: bool,
    /// Whether the interfaces could not be read.
    unread: bool,
    /// Losses of the store that are known.
    losses: u64,
    /// When what is in no record is garbage again.
    prune_from: Option<Instant>,
    /// When a pass that failed is tried again.
    retry: Option<Duration>,
    count: u64,
    /// Changes to the kernel so far.
    written: u64,
    /// Whether this agent has put the CNI configuration in place.
    announced: bool,
    /// How soon the next repair may follow.
    pace: Pace,
    /// What was in place when a pass last found nothing to do.
    in_place: Option<Known>,
    /// When somebody has changed something of ours, since the last pass.
    rung: Option<Instant>,
    /// When it is looked next whether the kernel settings are as they should be.
    settings_due: Instant,
}

/// What is known of the interfaces that are not ours.
#[derive(Default)]
struct Outward {
    /// Their names, by index.
    interfaces: BTreeMap<u32, String>,
    /// Those that lead out of the cluster.
    world: BTreeSet<u32>,
}

impl Outward {
    fn of(network: &HostNetwork) -> Self {
        let interfaces = network.interfaces.iter().map(|(index, (name, _))| (*index, name.clone())).collect();
        let world = network.routes.iter().filter(|(what, way)| what == THE_WORLD && !way.local);
        Self { interfaces, world: world.map(|(_, way)| way.index).collect() }
    }
}

impl Engine {
    fn new(agent: Arc<Agent>) -> Self {
        Self {
            agent,
            reach: BTreeMap::new(),
            moves: Moves::default(),
            own: BTreeSet::new(),
            outward: Outward::default(),
            doubt: false,
            unread: false,
            losses: 0,
            prune_from: None,
            retry: None,
            count: 0,
            written: 0,
            announced: false,
            pace: Pace::default(),
            in_place: None,
            rung: None,
            settings_due: Instant::now(),
        }
    }

    /// How long to wait if nothing happens.
    fn pause(&self) -> Duration {
        let resync = self.agent.config.resync;
        let until = |at: Instant| at.saturating_duration_since(Instant::now());
        let (prune, moved) = (self.prune_from.map(until), self.moves.next().map(until));
        let again = (self.unread || self.doubt).then_some(RETRY);
        [self.retry, prune, moved, again].into_iter().flatten().fold(resync, Duration::min)
    }

    /// Waits until somebody has changed something of ours, and it may be repaired.
    async fn disturbed(&mut self) {
        let rung = loop {
            if let Some(rung) = self.rung {
                break rung;
            }
            tokio::select! {
                () = self.agent.alarm.rung() => self.rung = Some(Instant::now()),
                // Nobody tells of those.
                () = sleep_until(self.settings_due.into()) => {
                    self.settings_due = Instant::now() + SETTINGS_EVERY;
                    self.rung = self.settings_differ().then(Instant::now);
                    self.announce();
                }
            }
        };
        sleep_until(self.pace.next(rung).into()).await;
    }

    /// Whether a kernel setting is not what it was when a pass last found nothing to do.
    fn settings_differ(&self) -> bool {
        let Some(in_place) = &self.in_place else { return false };
        let found = self.agent.sysctls.read(in_place.sysctls.iter().map(|(path, _)| path));
        let is_other = |path, value| found.get(path).is_some_and(|found| found != value);
        in_place.sysctls.iter().any(|(path, value)| is_other(path, value))
    }

    /// Remembers what was put right: what should be is what was in place, and is not.
    fn note_repair(&self, changes: &[Change], by: Vec<String>) {
        let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        let who = if by.is_empty() { "somebody".to_owned() } else { by.join(", ") };
        warn!("{who} changed what is ours in the kernel; repaired: {}", changes.join("; "));
        self.agent.board.repairs.send_modify(|repairs| repairs.add(&changes, by));
    }

    async fn work(&mut self, cause: Cause) {
        self.rung = None;
        let view = self.agent.board.view();
        if view.source == Source::Nowhere {
            return self.free_store().await;
        }
        let believed = believe(&view, &self.agent.config.node);
        let anew = cause == Cause::Underlay || self.agent.board.underlay().is_err();
        if anew {
            self.choose_underlay(&believed.peers).await;
        }
        self.look_for(&believed.peers, anew).await;
        self.moves.observe(&believed.peers, Instant::now());
        self.prune_from = self.prune_from.filter(|from| *from > Instant::now());
        let Ok(grounds) = self.grounds(view, believed) else { return self.free_store().await };
        let mut by = self.agent.alarm.take();
        for number in 0..PASSES {
            let started = Instant::now();
            let mut pass = self.pass(&grounds, &mut by).await;
            self.count += 1;
            pass.count = self.count;
            pass.took = started.elapsed();
            pass.problems.clone_from(&grounds.believed.problems);
            if cause == Cause::Disturbance && number == 0 {
                self.pace.note(started, pass.writes > 0);
            }
            self.written += pass.writes as u64;
            pass.written = self.written;
            let failed = pass.made == Made::No || !pass.local_failures.is_empty();
            let settled = pass.writes == 0;
            self.agent.board.pass.send_replace(Some(Arc::new(pass)));
            let resync = self.agent.config.resync;
            self.retry = failed.then(|| self.retry.map_or(RETRY, |before| (before * 2).min(resync)));
            if settled || failed {
                break;
            }
        }
        self.announce();
    }

    async fn pass(&mut self, grounds: &Grounds, by: &mut Vec<String>) -> Pass {
        let Draft { desired, changes, indexes, sysctls, mut pass } = match self.draft(grounds).await {
            Ok(draft) => draft,
            Err(reason) => return self.not_made(reason),
        };
        let neighbours = desired.state.neighbours.keys().map(|(_, address)| *address).collect();
        set_if_changed(&self.agent.board.neighbours, neighbours);
        if changes.is_empty() {
            self.in_place = Some(desired.known());
            return pass;
        }
        info!("changing the kernel: {}", summary(&changes));
        changes.iter().for_each(|change| debug!("{change}"));
        if self.in_place.as_ref() == Some(&desired.known()) {
            // What was read just now may have been heard of just now.
            by.extend(self.agent.alarm.take());
            by.sort();
            by.dedup();
            self.note_repair(&changes, by.clone());
        }
        self.keep_previous(&changes, &sysctls).await;
        let applied = self.agent.kernel.run(move |kernel| kernel.apply(changes, &desired, indexes)).await;
        let failures = match applied {
            Ok(failures) => failures,
            Err(error) => return self.not_made(format!("change the kernel's state: {error}")),
        };
        for failure in failures {
            warn!("{failure}");
            let list =
                if failure.change.is_local() { &mut pass.local_failures } else { &mut pass.other_failures };
            list.push(failure.to_string());
        }
        pass
    }

    /// Writes down what kernel settings were, before they are changed.
    async fn keep_previous(&self, changes: &[Change], found: &BTreeMap<String, String>) {
        let mut previous: Vec<(String, String)> = Vec::new();
        for change in changes {
            let Change::SetSysctl { path, .. } = change else { continue };
            // Put back in the opposite order: what goes along with a setting comes after it.
            previous.extend(self.agent.sysctls.dragged_along(path));
            previous.extend(found.get(path).map(|value| (path.clone(), value.clone())));
        }
        if previous.is_empty() {
            return;
        }
        let keep = move |ipam: &mut NodeIpam| {
            previous.iter().try_for_each(|(path, value)| ipam.keep_sysctl(path, value))
        };
        if let Err(error) = self.agent.ipam.run(keep).await {
            warn!(%error, "previous kernel settings were not written down");
        }
    }

    /// A pass that came to nothing. What the one before found stays true as far as anybody knows: a node that served
    /// goes on serving.
    fn not_made(&self, reason: String) -> Pass {
        warn!("{reason}");
        let before = self.agent.board.pass().map(|before| (*before).clone()).unwrap_or_default();
        let served = !before.gateways.is_empty() && before.local_failures.is_empty();
        let mut pass = Pass { made: Made::No, writes: 0, ..before };
        let list = if served { &mut pass.other_failures } else { &mut pass.local_failures };
        if !list.contains(&reason) {
            list.push(reason);
        }
        pass
    }

    /// Lets the node reach etcd, where a route of ours that is left from before is in the way.
    async fn free_store(&self) {
        let Some(store) = self.agent.board.endpoints.borrow().clone() else { return };
        match self.agent.kernel.run(move |kernel| kernel.free(&store)).await {
            Ok(freed) => {
                freed.iter().for_each(|route| warn!(%route, "deleted: it took etcd away from this node"));
            }
            Err(error) => warn!(%error, "whether a route takes etcd away from this node is not known"),
        }
    }

    /// Chooses the node's addresses on the underlay anew. What cannot be read now stays as it was, and is read soon.
    async fn choose_underlay(&mut self, peers: &[Peer]) {
        // Until it is known where etcd is, nothing can be kept from taking it away: that rings when it is known.
        let Some(store) = self.agent.board.endpoints.borrow().clone() else { return };
        let mut asked: Vec<(String, IpAddr)> = Vec::new();
        for peer in peers.iter().take(PEERS_ASKED) {
            asked
                .extend(peer.record.underlay.iter().map(|address| (format!("node {}", peer.name), *address)));
        }
        if let StoreConfig::Etcd(etcd) = &self.agent.config.store {
            asked.extend(
                etcd.endpoints
                    .iter()
                    .filter_map(|url| Some(("etcd".to_owned(), etcd_addresses::address(url)?))),
            );
        }
        asked.extend(WORLD.iter().filter_map(|world| Some((THE_WORLD.to_owned(), world.parse().ok()?))));
        let known = self.agent.board.underlay();
        let facts = match self.agent.kernel.run(move |kernel| kernel.host_network(&asked)).await {
            Ok(network) => {
                let pods = self.agent.ipam.run(|ipam| own_ranges(ipam)).await;
                Ok(Facts { network, store, pods })
            }
            Err(error) => Err(error),
        };
        self.unread = facts.is_err();
        if let (Err(error), Ok(_)) = (&facts, &known) {
            return warn!(%error, "the interfaces cannot be read: the underlay is taken for what it was");
        }
        if let Ok(facts) = &facts {
            self.own = facts.network.addresses.iter().map(|found| found.address.ip()).collect();
            self.outward = Outward::of(&facts.network);
        }
        let current = known.unwrap_or_default();
        let chosen = facts
            .map_err(|error| format!("read the interfaces: {error}"))
            .and_then(|facts| Underlay::choose(&self.agent.config.underlay, &facts, &current))
            .map(Arc::new);
        let mut changed = false;
        self.agent.board.underlay.send_if_modified(|known| {
            let uplinks =
                |known: &Result<Arc<Underlay>, String>| known.clone().map(|known| known.uplinks.clone());
            changed = uplinks(known) != uplinks(&chosen);
            let is_other = *known != chosen;
            known.clone_from(&chosen);
            is_other
        });
        match chosen {
            Ok(chosen) if changed => {
                for uplink in chosen.uplinks.values() {
                    info!(
                        "underlay address {} on {}: {}",
                        uplink.address, uplink.interface, uplink.chosen_by
                    );
                }
            }
            Err(reason) if changed => warn!("{reason}"),
            _ => {}
        }
    }

    /// Asks for the ways to the peers: to all of them, or to those to which it is not known. A way that cannot be asked
    /// for stays as it was.
    async fn look_for(&mut self, peers: &[Peer], anew: bool) {
        let addresses: BTreeSet<IpAddr> =
            peers.iter().flat_map(|peer| peer.record.underlay.iter().copied()).collect();
        self.reach.retain(|address, _| addresses.contains(address));
        let unknown = |address: &IpAddr| anew || self.doubt || !self.reach.contains_key(address);
        let asked: Vec<IpAddr> = addresses.into_iter().filter(unknown).collect();
        if asked.is_empty() {
            return;
        }
        let found = self.agent.kernel.run(move |kernel| kernel.look_up(&asked)).await;
        self.doubt = found.is_err();
        match found {
            Ok(found) => self.reach.extend(found),
            Err(error) => warn!(%error, "the ways to peers could not be looked up"),
        }
    }

    /// Puts the CNI configuration in place once an ADD would be served, and again whenever it is not there any more.
    fn announce(&mut self) {
        let board = &self.agent.board;
        if !board.unannounced().is_empty() {
            return;
        }
        let config = &self.agent.config;
        let conflist = Conflist::new(&config.cni_file, &config.socket, &config.network);
        let file = config.cni_file.display();
        // An agent that starts brings its own text, which may be newer.
        let written = if self.announced { conflist.keep() } else { conflist.write() };
        let outcome = match written {
            Ok(written) => {
                if written && self.announced {
                    warn!(%file, "the CNI configuration was deleted or damaged: written again");
                } else if !self.announced {
                    info!(%file, "ready: the CNI configuration is in place");
                    for other in conflist.others() {
                        warn!(other = %other.display(), "an earlier CNI configuration of this agent is beside it: delete it, a runtime takes the first by name");
                    }
                }
                self.announced = true;
                Ok(())
            }
            Err(error) => Err(conflist.cannot_write(&error)),
        };
        let failed = outcome.clone().err();
        if set_if_changed(&board.announced, outcome)
            && let Some(reason) = failed
        {
            warn!("{reason}");
        }
    }
}

/// The ranges of this node's own blocks, and the addresses of its attachments.
fn own_ranges(ipam: &NodeIpam) -> Vec<Cidr> {
    let blocks = ipam.blocks().iter().map(|owned| owned.block.cidr());
    let held = ipam.attachments().flat_map(|held| &held.addresses);
    blocks.chain(held.map(|address| Cidr::around(*address, u8::MAX))).collect()
}
