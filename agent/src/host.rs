//! Effects of other software on the host on pods: checked periodically (at least every 30 s) and reported in `status`
//! with a remedy. Nothing is changed, because these settings do not belong to Polder.

pub mod firewall;
pub mod insides;
pub mod limits;
pub mod managers;
pub mod routing;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Backend, Family, PerFamily};
use polder_ipam::Cidr;
use polder_ipam::ledger::{AttachmentEntry, AttachmentKind};
use polder_ipam::record::{AttachMode, ClusterRecord};
use polder_netlink::Error;
use polder_netlink::nft::foreign::BaseHook;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use self::insides::{Insides, Looker};
use self::managers::Gap;
use self::routing::Pods;
use crate::kernel::Kernel;
use crate::kernel::desired::{self, PeerPath};
use crate::kernel::foreign_state::{Filter, ForeignState};
use crate::kernel::tunnel::Encapsulation;
use crate::node_state::{Passes, Records};
use crate::owner::Owner;
use crate::presence;
use crate::probe::schedule::{Key, Verdict};

/// Longest time between two checks.
const EVERY: Duration = Duration::from_secs(30);

/// The state of this node that the host's settings are checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// How pods are attached.
    pub attach: AttachMode,
    /// Number of underlay neighbours through which peers are reached, by family.
    pub neighbours: PerFamily<usize>,
    /// Underlay families with tunnels to peers, none of which answers.
    pub silent_tunnels: BTreeSet<Family>,
    /// Pod families in which at least one peer's pods do not answer.
    pub failing: BTreeSet<Family>,
    /// The UDP port of the tunnels.
    pub tunnel_port: u16,
    /// Interfaces on which tunnel packets arrive.
    pub uplinks: BTreeSet<String>,
    /// Pools, addresses and interfaces that routing must not divert.
    pub pods: Pods,
}

/// The problems found, each with its remedy.
pub fn problems(foreign: &ForeignState, gaps: &[Gap], needs: &Needs) -> Vec<String> {
    let between = |judged, filter: &Filter| filter.problem_between(judged, needs.attach, &needs.pods);
    let others = foreign.routing_filters.iter().filter_map(|(judged, filter)| between(*judged, filter));
    let back =
        foreign.routing_filters.iter().filter_map(|(_, filter)| filter.reverse_path_problem(&needs.failing));
    let has_firewalld = foreign.filters.iter().chain(&foreign.host_filters).any(Filter::is_firewalld);
    let forwarded = |filter: &Filter| {
        filter.problem(needs.attach, has_firewalld).or_else(|| between(BaseHook::Forwarded, filter))
    };
    let filters = foreign.filters.iter().filter_map(forwarded).chain(others).chain(back);
    let tunnels = foreign
        .host_filters
        .iter()
        .filter(|filter| needs.silent_tunnels.iter().any(|family| filter.judges(*family)))
        .filter_map(|filter| filter.problem_of_tunnels(needs.tunnel_port, &needs.uplinks));
    // May be harmless: reported only if pods of a peer do not answer.
    let legacy = foreign.legacy_filters.iter().filter(|family| needs.failing.contains(family));
    let legacy = legacy.map(|family| firewall::unreadable(*family, needs.attach));
    let neighbours = foreign.neighbours.iter().filter_map(|(family, limits)| {
        let needed = Some(needs.neighbours[family]).filter(|needed| *needed > 0)?;
        limits.problem(family, needed)
    });
    let ports = match needs.attach {
        AttachMode::Bridge => limits::ports(foreign.bridge_ports),
        AttachMode::Routed => None,
    };
    let gaps = gaps.iter().map(ToString::to_string);
    let sources = foreign.rp_filter_interface.as_deref().map(rp_filter_problem);
    let routing = routing::problems(&foreign.routing, &needs.pods).into_iter();
    let packets = filters.chain(tunnels).chain(routing);
    packets.chain(legacy).chain(neighbours).chain(ports).chain(gaps).chain(sources).collect()
}

/// The problem with the `rp_filter` of all interfaces, or of this uplink.
fn rp_filter_problem(name: &str) -> String {
    match name {
        "all" => "net.ipv4.conf.all.rp_filter is not 0: the kernel can drop packets between two nodes that use \
                  different interfaces in each direction. Set it to 2 on each interface on which it is 1, then run \
                  `sysctl -w net.ipv4.conf.all.rp_filter=0`, and make both persistent"
            .to_owned(),
        // With dots in the name, `sysctl` needs the path with slashes.
        _ => format!(
            "rp_filter of {name} is 1 (strict): while a peer uses the direct path and this node still uses the tunnel \
             to it, the kernel drops the peer's packets. Run `sysctl -w net/ipv4/conf/{name}/rp_filter=2` and make it \
             persistent"
        ),
    }
}

/// The inputs of the host check, and the value that it publishes.
#[derive(Debug)]
pub struct Task<S = OnHost> {
    /// Configured time between two periodic passes (`resync_seconds`).
    pub resync: Duration,
    /// The host.
    pub survey: S,
    /// The cluster's records.
    pub records: Records,
    /// The last pass over the kernel.
    pub passes: Passes,
    /// Probe results of the path to each peer.
    pub verdicts: watch::Receiver<Arc<BTreeMap<Key, Verdict>>>,
    /// The problems found, each with its remedy.
    pub host: watch::Sender<Vec<String>>,
}

/// Access to the host that is checked.
pub trait HostChecks {
    /// Problems inside pods' network namespaces.
    fn insides(&mut self, cluster: &ClusterRecord) -> impl Future<Output = Vec<String>> + Send;

    /// The attachments whose interfaces belong to other plugins.
    fn leases(&self) -> impl Future<Output = Vec<AttachmentEntry>> + Send;

    /// Foreign filters, routes, rules and limits on the host ([`Kernel::foreign_state`]).
    fn foreign_state(
        &self,
        pools: Vec<(Cidr, u8)>,
        uplink: Option<String>,
        no_tunnel_answers: bool,
    ) -> impl Future<Output = Result<ForeignState, Error>> + Send;

    /// Network managers that are not configured to ignore Polder's interfaces or routes.
    fn gaps(&self) -> impl Future<Output = Vec<Gap>> + Send;
}

/// The host that the agent runs on.
#[derive(Debug)]
pub struct OnHost {
    kernel: Owner<Kernel>,
    looker: Looker,
    insides: Insides,
}

impl OnHost {
    /// Reads the host through the kernel connection of the passes, and pods through `looker`.
    pub fn new(kernel: Owner<Kernel>, looker: Looker) -> Self {
        Self { kernel, looker, insides: Insides::default() }
    }
}

impl HostChecks for OnHost {
    async fn insides(&mut self, cluster: &ClusterRecord) -> Vec<String> {
        self.insides.check_all(&self.looker, cluster).await
    }

    async fn leases(&self) -> Vec<AttachmentEntry> {
        let is_lease = |held: &&AttachmentEntry| held.kind == AttachmentKind::Lease;
        self.looker.ipam.run(move |ipam| ipam.attachments().filter(is_lease).cloned().collect()).await
    }

    async fn foreign_state(
        &self,
        pools: Vec<(Cidr, u8)>,
        uplink: Option<String>,
        no_tunnel_answers: bool,
    ) -> Result<ForeignState, Error> {
        self.kernel
            .run(move |kernel| kernel.foreign_state(&pools, uplink.as_deref(), no_tunnel_answers))
            .await
    }

    async fn gaps(&self) -> Vec<Gap> {
        spawn_blocking(|| managers::gaps(Path::new("/"))).await.unwrap_or_default()
    }
}

impl<S: HostChecks> Task<S> {
    /// Runs for ever.
    pub async fn run(mut self) {
        let mut view = self.records.changes();
        loop {
            let cluster =
                view.borrow_and_update().cluster.as_ref().map(|cluster| Arc::clone(&cluster.record));
            let Some(cluster) = cluster else {
                // The sender is dropped only when the agent ends.
                let _ = view.changed().await;
                continue;
            };
            let of_pods = self.survey.insides(&cluster).await;
            self.check(&cluster, of_pods).await;
            sleep(self.resync.min(EVERY)).await;
        }
    }

    /// Checks once.
    pub(crate) async fn check(&self, cluster: &ClusterRecord, of_pods: Vec<String>) {
        let pass = self.passes.last().unwrap_or_default();
        let view = self.records.view();
        let pools = view.every_pool().map(|pool| (pool.record.cidr(), pool.record.block_length()));
        let leases = self.survey.leases().await;
        let addresses = leases.iter().flat_map(|held| held.addresses.iter().copied()).collect();
        let pods = Pods {
            pools: pools.collect(),
            leased: addresses,
            ingress_interfaces: pass.ingress_interfaces.clone(),
        };
        // One borrow in the statement: with two, a writer that waits between them blocks the second one, and both hang.
        let verdicts = Arc::clone(&self.verdicts.borrow());
        let needs = Needs {
            attach: cluster.attach,
            neighbours: pass.next_hops,
            silent_tunnels: silent_tunnels(&pass.paths, &verdicts),
            failing: failing(&verdicts),
            tunnel_port: Encapsulation::of(cluster).port(cluster),
            uplinks: self.passes.underlay().map(|underlay| underlay.interfaces()).unwrap_or_default(),
            pods,
        };
        let (pools, no_tunnel_answers) = (needs.pods.pools.clone(), !needs.silent_tunnels.is_empty());
        // With one kind of path, both directions use the same interface. IPv6 has no such setting.
        let can_differ = cluster.backend == Backend::Auto && view.families().contains(&Family::V4);
        let underlay = self.passes.underlay().ok().filter(|_| can_differ);
        let uplink =
            underlay.and_then(|underlay| Some(underlay.uplinks[Family::V4].as_ref()?.interface.clone()));
        let foreign = match self.survey.foreign_state(pools, uplink, no_tunnel_answers).await {
            Ok(foreign) => foreign,
            // Other programs may change their rules during the read: keep the last result.
            Err(error) => {
                return debug!(%error, "cannot read the packet filters of other programs: keeping the last result");
            }
        };
        let gaps = self.survey.gaps().await;
        let problems =
            [problems(&foreign, &gaps, &needs), presence::problems(leases.iter()), of_pods].concat();
        self.host.send_if_modified(|known| {
            problems.iter().filter(|problem| !known.contains(problem)).for_each(|problem| warn!("{problem}"));
            known
                .iter()
                .filter(|problem| !problems.contains(problem))
                .for_each(|problem| info!("resolved: {problem}"));
            let changed = *known != problems;
            *known = problems;
            changed
        });
    }
}

/// Pod families in which at least one peer's pods do not answer.
fn failing(verdicts: &BTreeMap<Key, Verdict>) -> BTreeSet<Family> {
    let has_failed = |verdict: &Verdict| {
        matches!(verdict, Verdict::Silent | Verdict::Dropped | Verdict::PathMtuTooSmall(_))
    };
    verdicts.iter().filter(|(_, verdict)| has_failed(verdict)).map(|((_, family), _)| *family).collect()
}

/// Underlay families with tunnels, none of which leads to a peer that answers.
fn silent_tunnels(paths: &BTreeMap<Key, PeerPath>, verdicts: &BTreeMap<Key, Verdict>) -> BTreeSet<Family> {
    let (mut silent, mut answering) = (BTreeSet::new(), BTreeSet::new());
    for (key, peer_path) in paths {
        let desired::Path::Tunnel { over, .. } = peer_path.path else { continue };
        match verdicts.get(key) {
            Some(Verdict::Silent) => drop(silent.insert(over)),
            Some(verdict) if verdict.is_open() => drop(answering.insert(over)),
            _ => {}
        }
    }
    &silent - &answering
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use polder_ipam::ids::ClusterId;

    use polder_ipam::view::{Versioned, View};
    use tokio::time::timeout;

    use super::*;
    use crate::underlay::NotChosen;
    use polder_ipam::Revision;

    fn needs(attach: AttachMode) -> Needs {
        let silent_tunnels = BTreeSet::new();
        Needs {
            attach,
            neighbours: PerFamily::default(),
            silent_tunnels,
            failing: BTreeSet::new(),
            tunnel_port: 8472,
            uplinks: BTreeSet::new(),
            pods: Pods::default(),
        }
    }

    #[test]
    fn a_host_without_disturbing_settings_has_no_problems() {
        let needs = Needs { neighbours: PerFamily::new(100, 0), ..needs(AttachMode::Bridge) };
        assert_eq!(problems(&ForeignState::default(), &[], &needs), Vec::<String>::new());
    }

    #[test]
    fn a_nearly_full_bridge_is_a_problem_only_in_attach_mode_bridge() {
        let foreign = ForeignState { bridge_ports: 1000, ..ForeignState::default() };
        assert_eq!(problems(&foreign, &[], &needs(AttachMode::Bridge)).len(), 1);
        assert_eq!(problems(&foreign, &[], &needs(AttachMode::Routed)), Vec::<String>::new());
    }

    /// A host with the state that the test sets.
    #[derive(Debug, Clone, Default)]
    struct Fake(Arc<Mutex<State>>);

    #[derive(Debug, Default)]
    struct State {
        insides: Vec<String>,
        foreign: ForeignState,
        is_unreadable: bool,
        looks: usize,
    }

    impl Fake {
        fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
            action(&mut self.0.lock().unwrap())
        }
    }

    impl HostChecks for Fake {
        async fn insides(&mut self, _: &ClusterRecord) -> Vec<String> {
            self.with(|state| state.insides.clone())
        }

        async fn leases(&self) -> Vec<AttachmentEntry> {
            Vec::new()
        }

        async fn foreign_state(
            &self,
            _: Vec<(Cidr, u8)>,
            _: Option<String>,
            _: bool,
        ) -> Result<ForeignState, Error> {
            self.with(|state| {
                state.looks += 1;
                if state.is_unreadable {
                    return Err(Error::Interrupted(1));
                }
                Ok(state.foreign.clone())
            })
        }

        async fn gaps(&self) -> Vec<Gap> {
            Vec::new()
        }
    }

    fn cluster() -> View {
        let mut view = View::default();
        let record = ClusterRecord::new(ClusterId::new("c"));
        view.cluster = Some(Versioned { record: Arc::new(record), revision: Revision::new(1) });
        view
    }

    #[tokio::test(start_paused = true)]
    async fn problems_are_published_until_resolved_and_kept_while_the_host_cannot_be_read() {
        let survey = Fake::default();
        let (watcher, view) = watch::channel(Arc::<View>::default());
        let (host, problems) = watch::channel(Vec::new());
        let task = Task {
            resync: EVERY,
            survey: survey.clone(),
            records: Records::new(view),
            passes: Passes::new(watch::channel(Err(NotChosen::NotYet)).1, watch::channel(None).1),
            verdicts: watch::channel(Arc::default()).1,
            host,
        };
        let mut running = Box::pin(task.run());
        let mut go_on =
            async |time: Duration| assert!(timeout(time, &mut running).await.is_err(), "the task ended");
        go_on(EVERY * 2).await;
        assert_eq!(
            survey.with(|state| state.looks),
            0,
            "without the cluster's settings, the own state is unknown"
        );
        watcher.send_replace(Arc::new(cluster()));
        survey.with(|state| {
            state.insides.push("a pod has no route".to_owned());
            state.foreign.rp_filter_interface = Some("all".to_owned());
        });
        go_on(EVERY / 2).await;
        let found = problems.borrow().clone();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("rp_filter") && found[1] == "a pod has no route", "{found:?}");
        survey.with(|state| (state.is_unreadable, state.insides) = (true, Vec::new()));
        go_on(EVERY).await;
        assert_eq!(*problems.borrow(), found);
        survey.with(|state| state.is_unreadable = false);
        go_on(EVERY).await;
        assert_eq!(*problems.borrow(), found[..1]);
        survey.with(|state| state.foreign.rp_filter_interface = None);
        go_on(EVERY).await;
        assert!(problems.borrow().is_empty());
        assert_eq!(survey.with(|state| state.looks), 4);
    }

    #[test]
    fn a_check_and_a_change_of_the_verdicts_do_not_deadlock() {
        let (verdicts, receiver) = watch::channel(Arc::default());
        let task = Task {
            resync: EVERY,
            survey: Fake::default(),
            records: Records::new(watch::channel(Arc::new(cluster())).1),
            passes: Passes::new(watch::channel(Err(NotChosen::NotYet)).1, watch::channel(None).1),
            verdicts: receiver,
            host: watch::channel(Vec::new()).0,
        };
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let record = ClusterRecord::new(ClusterId::new("c"));
            (0..20_000).for_each(|_| runtime.block_on(task.check(&record, Vec::new())));
            done.send(()).unwrap();
        });
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        // The prober publishes from another thread.
        let changes = std::thread::spawn(move || {
            while ended.try_recv().is_err() && std::time::Instant::now() < deadline {
                verdicts.send_modify(|_| ());
            }
            std::time::Instant::now() < deadline
        });
        while !changes.is_finished() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(changes.is_finished() && changes.join().unwrap(), "both wait for each other");
    }
}
