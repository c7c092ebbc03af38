//! The answer to `polderctl status` and `node list`, from the values that the agent's tasks publish.

use std::time::SystemTime;

use polder_api::message::Refusal;
use polder_api::status::{
    BlockStatus, ClusterStatus, NodeStanding, NodeStatus, NotUnderlayStatus, PassStatus, PathKind,
    PathStatus, ProbeState, RemovedStatus, RepairStatus, Status, StoreStatus, UnderlayStatus,
};
use polder_api::{Family, NodeName, PerFamily};
use tokio::time::Instant;

use crate::fastpath;
use crate::health;
use crate::host::{managers, pod_inspection};
use crate::kernel::desired::Path;
use crate::kubernetes::removal;
use crate::leases;
use crate::machine::now;
use crate::node_state::Pass;
use crate::presence;
use crate::probe::{self, direct};
use crate::refused;
use crate::repair::Repair;
use crate::reporter::Reporter;
use crate::underlay::{Other, Underlay};
use polder_ipam::membership::WaitReason;
use polder_ipam::peers::{RecordFault, RecordProblem};
use polder_ipam::tasks::operator;
use polder_ipam::view::{View, ViewSource};
use polder_ipam::{capacity, record};

/// The status of this node.
pub async fn status(reporter: &Reporter) -> Status {
    let view = reporter.node_state().view();
    let pass = reporter.node_state().pass();
    let reasons = reporter.readiness.reasons();
    let (counts, pods) = reporter.ipam.run(|ipam| (ipam.counts(now()), ipam.attachments().count())).await;
    let mut problems = problems(reporter).await;
    problems.extend(reporter.published.kubernetes.borrow().iter().cloned());
    // Not among those of Events: all agents report the same.
    problems.extend(removal::problems(&view, reporter.published.no_leader.borrow().as_ref()));
    let Underlay { uplinks, others, .. } =
        reporter.node_state().underlay().map(|underlay| (*underlay).clone()).unwrap_or_default();
    let fast_path_counts = reporter.fast_path.run(|interfaces| interfaces.counts()).await;
    // One borrow: with two in the statement, a writer that waits between them blocks the second one, and both hang.
    let repairs = reporter.published.repairs.borrow().clone();
    Status {
        node: reporter.config.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ready: reasons.is_empty(),
        reasons,
        problems,
        cluster: view.cluster.as_ref().map(|cluster| ClusterStatus {
            id: cluster.record.id.to_string(),
            backend: cluster.record.backend,
            attach: cluster.record.attach,
            vxlan_port: cluster.record.vxlan.port,
            vxlan_vni: cluster.record.vxlan.vni,
            masquerade: cluster.record.masquerade.enabled,
            masquerade_except: cluster.record.masquerade.except.iter().map(|cidr| (*cidr).into()).collect(),
        }),
        store: store(reporter, &view),
        underlay: uplinks
            .into_values()
            .map(|uplink| UnderlayStatus {
                address: uplink.address,
                interface: uplink.interface,
                mtu: uplink.mtu,
                chosen_by: uplink.chosen_by,
            })
            .collect(),
        not_underlay: others
            .into_iter()
            .map(|Other { address, interface, reason }| NotUnderlayStatus { address, interface, reason })
            .collect(),
        mtu: pass.as_ref().map(|pass| pass.mtu),
        blocks: counts
            .into_iter()
            .map(|(owned, counts)| BlockStatus {
                block: owned.block.cidr().into(),
                pool: owned.pool,
                used: counts.used,
                resting: counts.resting,
                free: counts.free,
                excluded: counts.excluded,
            })
            .collect(),
        pods,
        missing_features: missing(reporter, &view),
        fast_path: fastpath::status(reporter.published.fast_path.borrow().as_ref(), fast_path_counts),
        last_pass: pass.map(|pass| PassStatus {
            count: pass.count,
            writes: pass.writes,
            written: pass.written,
            took_us: u64::try_from(pass.took.as_micros()).unwrap_or(u64::MAX),
            failures: pass
                .local_failures
                .iter()
                .chain(&pass.other_failures)
                .map(ToString::to_string)
                .collect(),
        }),
        repair_count: repairs.count,
        repairs: repairs.last.iter().map(repair).collect(),
        refused_writes: refused::status(&reporter.store),
        removed: operator::standings(&view)
            .into_iter()
            .map(|(node, standing)| RemovedStatus { node, standing })
            .collect(),
    }
}

/// The problems of this node, each with its remedy, except those of the connection to Kubernetes.
pub async fn problems(reporter: &Reporter) -> Vec<String> {
    let (view, pass) = (reporter.node_state().view(), reporter.node_state().pass());
    let totals = reporter.ipam.run(|ipam| PerFamily::each(|family| ipam.total(family, None, now()))).await;
    let mut problems = of_records(reporter, &view, pass.as_deref());
    problems.extend(refused::problems(&reporter.store));
    problems.extend(reporter.published.host.borrow().iter().cloned());
    problems.extend(reporter.published.listen_problem.borrow().clone());
    problems.extend(preceding(reporter));
    let leases = reporter.published.leases.borrow().among(|name| view.nodes.contains_key(name));
    problems.extend(leases.problems(Instant::now()));
    let shortages = capacity::warnings(&view, &reporter.node_state().properties.labels(), &totals);
    problems.extend(shortages.iter().map(ToString::to_string));
    if reporter.node_state().obstacles().is_empty() {
        let shortfalls = health::shortfalls(reporter, None).await;
        problems.extend(shortfalls.iter().map(|shortfall| format!("new pods get no address: {shortfall}")));
    }
    problems
}

/// The problem, if another CNI configuration file precedes Polder's.
fn preceding(reporter: &Reporter) -> Option<String> {
    let config = &reporter.config;
    let conflist = config.conflist();
    let other = conflist.preceding()?;
    Some(format!(
        "the container runtime may use {other} instead of {own}, because {other} is the first file by name: delete \
         {other} if its network is no longer used, or set cni.file to a name that sorts before it",
        other = other.display(),
        own = config.cni_file.display()
    ))
}

/// The missing features and checks.
fn missing(reporter: &Reporter, view: &View) -> Vec<String> {
    let mut missing = reporter.features.missing(reporter.config.keep_nat);
    if reporter.config.probe_peers {
        missing.extend(reporter.published.endpoint.borrow().missing(&view.families()));
    }
    missing.extend(pod_inspection::not_looked_at());
    missing.extend(managers::not_looked_at());
    missing.extend(presence::not_seen());
    missing
}

fn repair(repair: &Repair) -> RepairStatus {
    let since_1970 = repair.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    RepairStatus {
        at: since_1970.as_secs(),
        changes: repair.changes.clone(),
        more: repair.more,
        by: repair.by.clone(),
    }
}

fn store(reporter: &Reporter, view: &View) -> StoreStatus {
    let store = reporter.store.name();
    let waiting = || match view.source {
        ViewSource::Nowhere => Some(WaitReason::Records.to_string()),
        ViewSource::Snapshot => Some(WaitReason::NotReached.to_string()),
        ViewSource::Store => None,
    };
    match view.lost.as_ref().map(ToString::to_string).or_else(waiting) {
        Some(reason) => StoreStatus::Disconnected { store, reason },
        None => StoreStatus::Connected { store, revision: view.revision.number() },
    }
}

/// The problems with records, peers and the last pass.
fn of_records(reporter: &Reporter, view: &View, pass: Option<&Pass>) -> Vec<String> {
    let Some(pass) = pass else {
        return view.refused_records().map(|record| record.to_string()).collect();
    };
    let unreachable = pass.paths.iter().filter_map(|((node, family), peer_path)| match &peer_path.path {
        Path::Unreachable(reason) => Some(format!("{family} pods of node {node} are unreachable: {reason}")),
        _ => None,
    });
    // Blocks in cool-down of a removed node are reported elsewhere.
    let rests = |problem: &&RecordProblem| matches!(problem.fault, RecordFault::Rests(_));
    let refused = pass.problems.iter().filter(|problem| !rests(problem)).map(ToString::to_string);
    let mtu = reporter.config.mtu.filter(|mtu| *mtu > pass.mtu).map(|mtu| {
        format!(
            "mtu = {mtu} in agent.toml exceeds the MTU of {} bytes that the underlay permits, which pods use instead: \
             lower mtu, or raise the MTU of the underlay interfaces",
            pass.mtu
        )
    });
    let verdicts = reporter.published.verdicts.borrow().clone();
    let closed = verdicts.iter().filter_map(|(key, verdict)| {
        probe::problem(
            key,
            *verdict,
            pass.paths.get(key)?,
            view.cluster.as_ref().map(|cluster| &*cluster.record),
        )
    });
    let has_tunnels = view.cluster.as_ref().is_some_and(|cluster| cluster.record.backend.uses_tunnels());
    let direct = direct::problem(&reporter.published.direct.borrow(), has_tunnels);
    refused
        .chain(unreachable)
        .chain(closed)
        .chain(direct)
        .chain(mtu)
        .chain(pass.other_failures.iter().map(ToString::to_string))
        .collect()
}

/// The nodes of the cluster, removed ones included.
pub async fn nodes(reporter: &Reporter) -> Result<Vec<NodeStatus>, Refusal> {
    let view = reporter.node_state().records.read()?;
    let pass = reporter.node_state().pass();
    // Leases are not watched, because they change all the time: they are read now.
    let alive = leases::with_lease(&reporter.store).await.ok();
    let node = |(name, known): (&NodeName, &polder_ipam::view::Versioned<_>)| {
        let record: &record::NodeRecord = &known.record;
        NodeStatus {
            name: name.clone(),
            standing: NodeStanding::Member,
            underlay: record.underlay.clone(),
            gateways: record.gateways.clone(),
            blocks: view
                .blocks
                .iter()
                .filter(|(_, claim)| claim.record.node == *name)
                .map(|(block, _)| block.cidr().into())
                .collect(),
            paths: paths(reporter, pass.as_deref(), name),
            alive: alive.as_ref().map(|alive| alive.contains(name)),
            version: record.version.clone(),
        }
    };
    let removed = operator::standings(&view).into_iter().map(|(name, standing)| NodeStatus {
        name,
        standing: NodeStanding::Removed(standing),
        underlay: Vec::new(),
        gateways: Vec::new(),
        blocks: Vec::new(),
        paths: Vec::new(),
        alive: None,
        version: String::new(),
    });
    Ok(view.nodes.iter().map(node).chain(removed).collect())
}

fn paths(reporter: &Reporter, pass: Option<&Pass>, name: &NodeName) -> Vec<PathStatus> {
    if *name == reporter.config.node {
        let families = reporter.node_state().view().families().into_iter();
        return families
            .map(|family| PathStatus {
                family,
                path: PathKind::Local,
                via: String::new(),
                probe: ProbeState::Unknown,
            })
            .collect();
    }
    let path = |family: Family| {
        let (path, via) = match &pass?.paths.get(&(name.clone(), family))?.path {
            Path::Direct { via, .. } => (PathKind::Direct, via.to_string()),
            Path::Tunnel { encapsulation, remote, .. } => (encapsulation.path_kind(), remote.to_string()),
            Path::Unreachable(reason) => (PathKind::Unreachable, reason.to_string()),
        };
        let probe = probe::state(reporter.published.verdicts.borrow().get(&(name.clone(), family)));
        Some(PathStatus { family, path, via, probe })
    };
    Family::BOTH.into_iter().filter_map(path).collect()
}
