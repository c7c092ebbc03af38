//! Settings of other software on this host that disturb pods: checked periodically (at least every 30 s) and reported
//! in `status` with a remedy. Nothing is changed, because these settings do not belong to Polder.

pub mod bridges;
pub mod firewall;
pub mod host_ports;
pub mod limits;
pub mod managers;
pub mod pod_inspection;
pub mod queues;
pub mod routing;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
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

use self::host_ports::Listener;
use self::managers::MissingSetting;
use self::pod_inspection::{PodInspections, PodInspector};
use self::routing::PodTraffic;
use crate::kernel::Kernel;
use crate::kernel::desired::{self, PeerPath};
use crate::kernel::foreign_state::{Filter, ForeignState};
use crate::kernel::tunnel::Encapsulation;
use crate::node_state::{Passes, Records};
use crate::owner::Owner;
use crate::presence;
use crate::probe::direct::{Direct, DirectPaths};
use crate::probe::schedule::{Key, Verdict};

/// Longest time between two checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// The state of this node that the host's settings are checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckContext {
    /// How pods are attached.
    pub attach: AttachMode,
    /// Number of underlay neighbours through which peers are reached, by family.
    pub neighbours: PerFamily<usize>,
    /// Underlay families with tunnels to peers, none of which answers.
    pub silent_tunnels: BTreeSet<Family>,
    /// Pod families in which at least one peer's pods do not answer.
    pub failing_families: BTreeSet<Family>,
    /// Pod families in which the direct path to at least one peer seems to drop pod packets.
    pub dropping_families: BTreeSet<Family>,
    /// Underlay addresses of the peers behind `silent_tunnels`.
    pub silent_peers: BTreeSet<IpAddr>,
    /// The UDP port of the tunnels.
    pub tunnel_port: u16,
    /// Interfaces on which tunnel packets arrive.
    pub uplinks: BTreeSet<String>,
    /// Pools, addresses and interfaces that routing must not divert.
    pub pod_traffic: PodTraffic,
    /// Families in which Polder switched iptables rules off for the frames of all bridges.
    pub without_bridge_calls: BTreeSet<Family>,
}

/// The problems found, each with its remedy.
pub fn problems(
    foreign: &ForeignState,
    missing_settings: &[MissingSetting],
    context: &CheckContext,
) -> Vec<String> {
    let pod_rule =
        |base_hook, filter: &Filter| filter.pod_rule_problem(base_hook, context.attach, &context.pod_traffic);
    let routing_filters =
        foreign.routing_filters.iter().filter_map(|(base_hook, filter)| pod_rule(*base_hook, filter));
    let suspected_families = &context.failing_families | &context.dropping_families;
    let reverse_path_filters = foreign
        .routing_filters
        .iter()
        .filter_map(|(_, filter)| filter.reverse_path_problem(&suspected_families));
    let has_firewalld = foreign.filters.iter().chain(&foreign.host_filters).any(Filter::is_firewalld);
    let forwarded = |filter: &Filter| {
        filter
            .problem(context.attach, has_firewalld)
            .or_else(|| filter.source_zone_problem(&context.pod_traffic.pools))
            .or_else(|| pod_rule(BaseHook::Forwarded, filter))
    };
    let forward_filters = foreign.filters.iter().filter_map(forwarded);
    let all_filters = foreign.filters.iter().chain(foreign.routing_filters.iter().map(|(_, filter)| filter));
    let queues = foreign.read_queues.iter().flat_map(|read| queues::problems(all_filters.clone(), read));
    let filters = forward_filters.chain(routing_filters).chain(reverse_path_filters).chain(queues);
    let tunnels = foreign
        .host_filters
        .iter()
        .filter(|filter| context.silent_tunnels.iter().any(|family| filter.applies_to(*family)))
        .filter_map(|filter| {
            filter.tunnel_problem(context.tunnel_port, &context.uplinks, &context.silent_peers)
        });
    // Rules of legacy iptables may be harmless: they are reported only if pods of a peer do not answer.
    let legacy = foreign.legacy_filters.iter().filter(|family| context.failing_families.contains(family));
    let legacy = legacy.map(|family| firewall::legacy_iptables_problem(*family, context.attach));
    let neighbours = foreign.neighbours.iter().filter_map(|(family, limits)| {
        let needed = Some(context.neighbours[family]).filter(|needed| *needed > 0)?;
        limits.problem(family, needed)
    });
    let ports = match context.attach {
        AttachMode::Bridge => limits::ports(foreign.bridge_ports),
        AttachMode::Routed => None,
    };
    let missing_settings = missing_settings.iter().map(ToString::to_string);
    let rp_filter = foreign.rp_filter_interface.as_deref().map(rp_filter_problem);
    let routing = routing::problems(&foreign.routing, &context.pod_traffic).into_iter();
    let packets = filters.chain(tunnels).chain(routing);
    let limits = neighbours.chain(ports);
    let bridges = bridges::problems(&foreign.bridges_without_rules, &context.without_bridge_calls);
    packets.chain(legacy).chain(limits).chain(missing_settings).chain(rp_filter).chain(bridges).collect()
}

/// The problem with `rp_filter`; `name` is `all` or the name of an uplink.
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
pub struct Task<H = LocalHost> {
    /// Configured time between two periodic passes (`resync_seconds`).
    pub resync: Duration,
    /// The host.
    pub host: H,
    /// The cluster's records.
    pub records: Records,
    /// The last pass over the kernel.
    pub passes: Passes,
    /// Probe results of the path to each peer.
    pub verdicts: watch::Receiver<Arc<BTreeMap<Key, Verdict>>>,
    /// Test results of the direct paths.
    pub direct: watch::Receiver<Arc<DirectPaths>>,
    /// The problems found, each with its remedy.
    pub problems: watch::Sender<Vec<String>>,
}

/// Access to the host that is checked.
pub trait HostAccess {
    /// Problems inside pods' network namespaces.
    fn pod_problems(&mut self, cluster: &ClusterRecord) -> impl Future<Output = Vec<String>> + Send;

    /// The attachments whose interfaces belong to other plugins, and those with host ports.
    fn attachments(&self) -> impl Future<Output = Vec<AttachmentEntry>> + Send;

    /// Families in which Polder has switched iptables rules off for the frames of all bridges.
    fn without_bridge_calls(&self) -> impl Future<Output = BTreeSet<Family>> + Send;

    /// The sockets of the host that receive packets from any client.
    fn listeners(&self) -> impl Future<Output = Vec<Listener>> + Send;

    /// Foreign filters, routes, rules and limits on the host ([`Kernel::foreign_state`]).
    fn foreign_state(
        &self,
        pools: Vec<(Cidr, u8)>,
        uplink: Option<String>,
        no_tunnel_answers: bool,
    ) -> impl Future<Output = Result<ForeignState, Error>> + Send;

    /// The settings that network managers lack to ignore Polder's interfaces and routes.
    fn missing_settings(&self) -> impl Future<Output = Vec<MissingSetting>> + Send;
}

/// The host that the agent runs on.
#[derive(Debug)]
pub struct LocalHost {
    kernel: Owner<Kernel>,
    inspector: PodInspector,
    inspections: PodInspections,
}

impl LocalHost {
    /// Reads the host through the kernel connection of the passes, and pods through `inspector`.
    pub fn new(kernel: Owner<Kernel>, inspector: PodInspector) -> Self {
        Self { kernel, inspector, inspections: PodInspections::default() }
    }
}

impl HostAccess for LocalHost {
    async fn pod_problems(&mut self, cluster: &ClusterRecord) -> Vec<String> {
        self.inspections.check_all(&self.inspector, cluster).await
    }

    async fn attachments(&self) -> Vec<AttachmentEntry> {
        let is_checked =
            |held: &&AttachmentEntry| held.kind == AttachmentKind::Lease || !held.ports.is_empty();
        self.inspector.ipam.run(move |ipam| ipam.attachments().filter(is_checked).cloned().collect()).await
    }

    async fn without_bridge_calls(&self) -> BTreeSet<Family> {
        // An unreadable ledger is reported elsewhere.
        let previous = self.inspector.ipam.run(|ipam| ipam.kept_sysctls()).await.unwrap_or_default();
        bridges::switched_off(&previous)
    }

    async fn listeners(&self) -> Vec<Listener> {
        spawn_blocking(|| host_ports::listeners(Path::new("/proc/net"))).await.unwrap_or_default()
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

    async fn missing_settings(&self) -> Vec<MissingSetting> {
        spawn_blocking(|| managers::missing_settings(Path::new("/"))).await.unwrap_or_default()
    }
}

impl<H: HostAccess> Task<H> {
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
            let pod_problems = self.host.pod_problems(&cluster).await;
            self.check(&cluster, pod_problems).await;
            sleep(self.resync.min(CHECK_INTERVAL)).await;
        }
    }

    /// Checks once.
    pub(crate) async fn check(&self, cluster: &ClusterRecord, pod_problems: Vec<String>) {
        let pass = self.passes.last().unwrap_or_default();
        let view = self.records.view();
        let pools = view.every_pool().map(|pool| (pool.record.cidr(), pool.record.block_length()));
        let attachments = self.host.attachments().await;
        let (leased, with_ports): (Vec<_>, Vec<_>) =
            attachments.into_iter().partition(|held| held.kind == AttachmentKind::Lease);
        let listeners = if with_ports.is_empty() { Vec::new() } else { self.host.listeners().await };
        let leased_addresses = leased.iter().flat_map(|held| held.addresses.iter().copied()).collect();
        let pod_traffic = PodTraffic {
            pools: pools.collect(),
            leased: leased_addresses,
            ingress_interfaces: pass.ingress_interfaces.clone(),
        };
        // Borrow the channel once per statement: a second borrow would wait for a writer, and the writer for the first
        // borrow.
        let verdicts = Arc::clone(&self.verdicts.borrow());
        let direct = Arc::clone(&self.direct.borrow());
        let silent_tunnels = silent_tunnels(&pass.paths, &verdicts);
        let context = CheckContext {
            attach: cluster.attach,
            neighbours: pass.next_hops,
            silent_peers: peers_behind(&pass.paths, &silent_tunnels),
            silent_tunnels,
            failing_families: failing_families(&verdicts),
            dropping_families: dropping_families(&direct),
            tunnel_port: Encapsulation::of(cluster).port(cluster),
            uplinks: self.passes.underlay().map(|underlay| underlay.interfaces()).unwrap_or_default(),
            pod_traffic,
            without_bridge_calls: match cluster.attach {
                AttachMode::Bridge => self.host.without_bridge_calls().await,
                AttachMode::Routed => BTreeSet::new(),
            },
        };
        let pools = context.pod_traffic.pools.clone();
        let no_tunnel_answers = !context.silent_tunnels.is_empty();
        // rp_filter exists only for IPv4. It drops packets only if the two directions use different kinds of path.
        let may_be_asymmetric = cluster.backend == Backend::Auto && view.families().contains(&Family::V4);
        let underlay = self.passes.underlay().ok().filter(|_| may_be_asymmetric);
        let uplink =
            underlay.and_then(|underlay| Some(underlay.uplinks[Family::V4].as_ref()?.interface.clone()));
        let foreign = match self.host.foreign_state(pools, uplink, no_tunnel_answers).await {
            Ok(foreign) => foreign,
            // Other programs may change their rules during the read: keep the last result.
            Err(error) => {
                return debug!(%error, "cannot read the packet filters of other programs: keeping the last result");
            }
        };
        let missing_settings = self.host.missing_settings().await;
        let host_problems = problems(&foreign, &missing_settings, &context);
        let port_problems = host_ports::problems(&with_ports, &listeners, &pass);
        let problems =
            [host_problems, presence::problems(leased.iter()), port_problems, pod_problems].concat();
        self.problems.send_if_modified(|known| {
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
fn failing_families(verdicts: &BTreeMap<Key, Verdict>) -> BTreeSet<Family> {
    let has_failed = |verdict: &Verdict| {
        matches!(verdict, Verdict::Silent | Verdict::Dropped | Verdict::PathMtuTooSmall(_))
    };
    verdicts.iter().filter(|(_, verdict)| has_failed(verdict)).map(|((_, family), _)| *family).collect()
}

/// Pod families in which the direct path to at least one peer seems to drop pod packets.
fn dropping_families(direct: &DirectPaths) -> BTreeSet<Family> {
    let dropping = direct.iter().filter(|(_, result)| **result == Direct::Drops);
    dropping.map(|((_, family), _)| *family).collect()
}

/// The underlay addresses of peers that are reached through tunnels of these underlay families.
fn peers_behind(paths: &BTreeMap<Key, PeerPath>, tunnels: &BTreeSet<Family>) -> BTreeSet<IpAddr> {
    let remotes = paths.values().filter_map(|peer_path| match peer_path.path {
        desired::Path::Tunnel { over, remote, .. } if tunnels.contains(&over) => Some(remote),
        _ => None,
    });
    remotes.collect()
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
mod tests;
