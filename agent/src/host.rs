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
use crate::board::{Passes, Records};
use crate::kernel::Kernel;
use crate::kernel::desired::{self, PeerPath};
use crate::kernel::surroundings::{Filter, Surroundings};
use crate::kernel::tunnel::Encapsulation;
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
    pub closed_tunnels: BTreeSet<Family>,
    /// Pod families in which at least one peer's pods do not answer.
    pub closed: BTreeSet<Family>,
    /// The UDP port of the tunnels.
    pub tunnel_port: u16,
    /// Interfaces on which tunnel packets arrive.
    pub uplinks: BTreeSet<String>,
    /// Pools, addresses and interfaces that routing must not divert.
    pub pods: Pods,
}

/// The problems found, each with its remedy.
pub fn problems(there: &Surroundings, gaps: &[Gap], needs: &Needs) -> Vec<String> {
    let between = |judged, filter: &Filter| filter.problem_between(judged, needs.attach, &needs.pods);
    let others = there.other_filters.iter().filter_map(|(judged, filter)| between(*judged, filter));
    let back =
        there.other_filters.iter().filter_map(|(_, filter)| filter.reverse_path_problem(&needs.closed));
    let has_firewalld = there.filters.iter().chain(&there.host_filters).any(Filter::is_firewalld);
    let forwarded = |filter: &Filter| {
        filter.problem(needs.attach, has_firewalld).or_else(|| between(BaseHook::Forwarded, filter))
    };
    let filters = there.filters.iter().filter_map(forwarded).chain(others).chain(back);
    let tunnels = there
        .host_filters
        .iter()
        .filter(|filter| needs.closed_tunnels.iter().any(|family| filter.judges(*family)))
        .filter_map(|filter| filter.problem_of_tunnels(needs.tunnel_port, &needs.uplinks));
    // May be harmless: reported only if pods of a peer do not answer.
    let legacy = there.legacy_filters.iter().filter(|family| needs.closed.contains(family));
    let legacy = legacy.map(|family| firewall::unreadable(*family, needs.attach));
    let neighbours = there.neighbours.iter().filter_map(|(family, limits)| {
        let needed = Some(needs.neighbours[family]).filter(|needed| *needed > 0)?;
        limits.problem(family, needed)
    });
    let ports = match needs.attach {
        AttachMode::Bridge => limits::ports(there.bridge_ports),
        AttachMode::Routed => None,
    };
    let gaps = gaps.iter().map(ToString::to_string);
    let sources = there.source_check.as_deref().map(source_check);
    let routing = routing::problems(&there.routing, &needs.pods).into_iter();
    let packets = filters.chain(tunnels).chain(routing);
    packets.chain(legacy).chain(neighbours).chain(ports).chain(gaps).chain(sources).collect()
}

/// The problem with the `rp_filter` of all interfaces, or of this uplink.
fn source_check(name: &str) -> String {
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

    /// Foreign filters, routes, rules and limits on the host ([`Kernel::surroundings`]).
    fn surroundings(
        &self,
        pools: Vec<(Cidr, u8)>,
        uplink: Option<String>,
        closed: bool,
    ) -> impl Future<Output = Result<Surroundings, Error>> + Send;

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

    async fn surroundings(
        &self,
        pools: Vec<(Cidr, u8)>,
        uplink: Option<String>,
        closed: bool,
    ) -> Result<Surroundings, Error> {
        self.kernel.run(move |kernel| kernel.surroundings(&pools, uplink.as_deref(), closed)).await
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
            closed_tunnels: closed_tunnels(&pass.paths, &verdicts),
            closed: closed(&verdicts),
            tunnel_port: Encapsulation::of(cluster).port(cluster),
            uplinks: self.passes.underlay().map(|underlay| underlay.interfaces()).unwrap_or_default(),
            pods,
        };
        let (asked, closed) = (needs.pods.pools.clone(), !needs.closed_tunnels.is_empty());
        // With one kind of path, both directions use the same interface. IPv6 has no such setting.
        let can_differ = cluster.backend == Backend::Auto && view.families().contains(&Family::V4);
        let underlay = self.passes.underlay().ok().filter(|_| can_differ);
        let checked =
            underlay.and_then(|underlay| Some(underlay.uplinks[Family::V4].as_ref()?.interface.clone()));
        let there = match self.survey.surroundings(asked, checked, closed).await {
            Ok(there) => there,
            // Other programs may change their rules during the read: keep the last result.
            Err(error) => {
                return debug!(%error, "cannot read the packet filters of other programs: keeping the last result");
            }
        };
        let gaps = self.survey.gaps().await;
        let problems = [problems(&there, &gaps, &needs), presence::problems(leases.iter()), of_pods].concat();
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
fn closed(verdicts: &BTreeMap<Key, Verdict>) -> BTreeSet<Family> {
    let is_closed = |verdict: &Verdict| {
        matches!(verdict, Verdict::Silent | Verdict::Dropped | Verdict::PathMtuTooSmall(_))
    };
    verdicts.iter().filter(|(_, verdict)| is_closed(verdict)).map(|((_, family), _)| *family).collect()
}

/// Underlay families with tunnels, none of which leads to a peer that answers.
fn closed_tunnels(paths: &BTreeMap<Key, PeerPath>, verdicts: &BTreeMap<Key, Verdict>) -> BTreeSet<Family> {
    let (mut closed, mut open) = (BTreeSet::new(), BTreeSet::new());
    for (key, peer_path) in paths {
        let desired::Path::Tunnel { over, .. } = peer_path.path else { continue };
        match verdicts.get(key) {
            Some(Verdict::Silent) => drop(closed.insert(over)),
            Some(verdict) if verdict.is_open() => drop(open.insert(over)),
            _ => {}
        }
    }
    &closed - &open
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
        let closed_tunnels = BTreeSet::new();
        Needs {
            attach,
            neighbours: PerFamily::default(),
            closed_tunnels,
            closed: BTreeSet::new(),
            tunnel_port: 8472,
            uplinks: BTreeSet::new(),
            pods: Pods::default(),
        }
    }

    #[test]
    fn a_host_without_disturbing_settings_has_no_problems() {
        let needs = Needs { neighbours: PerFamily::new(100, 0), ..needs(AttachMode::Bridge) };
        assert_eq!(problems(&Surroundings::default(), &[], &needs), Vec::<String>::new());
    }

    #[test]
    fn a_nearly_full_bridge_is_a_problem_only_in_attach_mode_bridge() {
        let there = Surroundings { bridge_ports: 1000, ..Surroundings::default() };
        assert_eq!(problems(&there, &[], &needs(AttachMode::Bridge)).len(), 1);
        assert_eq!(problems(&there, &[], &needs(AttachMode::Routed)), Vec::<String>::new());
    }

    /// A host with the state that the test sets.
    #[derive(Debug, Clone, Default)]
    struct Fake(Arc<Mutex<State>>);

    #[derive(Debug, Default)]
    struct State {
        insides: Vec<String>,
        there: Surroundings,
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

        async fn surroundings(
            &self,
            _: Vec<(Cidr, u8)>,
            _: Option<String>,
            _: bool,
        ) -> Result<Surroundings, Error> {
            self.with(|state| {
                state.looks += 1;
                if state.is_unreadable {
                    return Err(Error::Interrupted(1));
                }
                Ok(state.there.clone())
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
        let (host, told) = watch::channel(Vec::new());
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
            async |time: Duration| assert!(timeout(time, &mut running).await.is_err(), "it has ended");
        go_on(EVERY * 2).await;
        assert_eq!(
            survey.with(|state| state.looks),
            0,
            "what is ours is not known without the cluster's settings"
        );
        watcher.send_replace(Arc::new(cluster()));
        survey.with(|state| {
            state.insides.push("a pod has no route".to_owned());
            state.there.source_check = Some("all".to_owned());
        });
        go_on(EVERY / 2).await;
        let said = told.borrow().clone();
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("rp_filter") && said[1] == "a pod has no route", "{said:?}");
        survey.with(|state| (state.is_unreadable, state.insides) = (true, Vec::new()));
        go_on(EVERY).await;
        assert_eq!(*told.borrow(), said);
        survey.with(|state| state.is_unreadable = false);
        go_on(EVERY).await;
        assert_eq!(*told.borrow(), said[..1]);
        survey.with(|state| state.there.source_check = None);
        go_on(EVERY).await;
        assert!(told.borrow().is_empty());
        assert_eq!(survey.with(|state| state.looks), 4);
    }

    #[test]
    fn a_check_and_a_change_of_the_verdicts_do_not_deadlock() {
        let (verdicts, told) = watch::channel(Arc::default());
        let task = Task {
            resync: EVERY,
            survey: Fake::default(),
            records: Records::new(watch::channel(Arc::new(cluster())).1),
            passes: Passes::new(watch::channel(Err(NotChosen::NotYet)).1, watch::channel(None).1),
            verdicts: told,
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
