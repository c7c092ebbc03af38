//! Creates all channels and connects the tasks: the sender of each entry goes to the task that writes it, the receivers
//! to the tasks that read it.

mod entries;
mod kubernetes_tasks;
mod sockets;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use polder_ipam::needed::RequiredRange;
use polder_ipam::record::LeaseRecord;
use polder_ipam::tasks::OwnNode;
use polder_netlink::nft::FilterSocket;
use polder_store::{NodeIpam, Store};
use tokio::sync::{mpsc, watch};

use self::entries::{DatapathEntries, RecordEntries};
pub(crate) use self::sockets::Sockets;
use crate::config::Config;
use crate::connections::{self, StaleConnections};
use crate::endpoint::{self};
use crate::fastpath::{self, NotUsed};
use crate::host::pod_inspection::PodInspector;
use crate::in_flight::InFlight;
use crate::kernel::Kernel;
use crate::kernel::features::Features;
use crate::kernel::reaper::Reaper;
use crate::kernel::sysctl::Sysctls;
use crate::kubernetes::properties::Properties;
use crate::kubernetes::removal;
use crate::leases::{self, Leases};
use crate::liveness::Threads;
use crate::local_pods::LocalPods;
use crate::machine::Machine;
use crate::node::{Channels, Node, Pods};
use crate::owner::Owner;
use crate::readiness::Readiness;
use crate::repair::DriftSignal;
use crate::reporter::{Published, Reporter};
use crate::requests::PlanRequest;
use crate::wake::{WakeSender, wake_channel};
use crate::{
    engine, etcd_addresses, host, http, inspection, kubernetes, monitor, probe, publisher, registrar, server,
    systemd, watcher,
};

/// Capacity of the queue of block requests; further requesters wait.
const CLAIMS_WAITING: usize = 256;

/// The inputs of an agent.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) machine: Machine,
    pub(crate) features: Features,
    pub(crate) sysctls: Sysctls,
    pub(crate) store: Store,
    pub(crate) ipam: NodeIpam,
    /// The released addresses of the ledger.
    pub(crate) cooling_down: Vec<IpAddr>,
    pub(crate) sockets: Sockets,
    pub(crate) reaper: Reaper,
    pub(crate) in_flight: InFlight,
    /// Why the fast path is not used from the beginning.
    pub(crate) no_fast_path: Option<NotUsed>,
}

/// All tasks with their state, not started yet.
#[derive(Debug)]
pub(crate) struct Tasks {
    pub(crate) records: RecordTasks,
    pub(crate) addresses: AddressTasks,
    pub(crate) datapath: DatapathTasks,
    pub(crate) operator: OperatorTasks,
}

/// The tasks that read the datastore's state.
#[derive(Debug)]
pub(crate) struct RecordTasks {
    pub(crate) watcher: watcher::Task,
    pub(crate) etcd_addresses: etcd_addresses::Task,
    pub(crate) leases: leases::poll::Task,
}

/// The tasks that manage the node's addresses.
#[derive(Debug)]
pub(crate) struct AddressTasks {
    /// Shared with the server; the orphan collector uses it, too.
    pub(crate) node: Arc<Node>,
    pub(crate) registrar: registrar::Task,
    pub(crate) publisher: publisher::Task,
    pub(crate) connections: connections::Task,
}

/// The tasks that manage the kernel state.
#[derive(Debug)]
pub(crate) struct DatapathTasks {
    pub(crate) engine: engine::Task,
    pub(crate) monitor: monitor::Task,
    pub(crate) endpoint: endpoint::keeper::Task,
    pub(crate) prober: probe::Task,
    pub(crate) host: host::Task,
    pub(crate) fast_path: fastpath::Task,
}

/// The tasks that serve requests and reports.
#[derive(Debug)]
pub(crate) struct OperatorTasks {
    /// Sources for reports about the node and the cluster.
    pub(crate) reporter: Reporter,
    pub(crate) server: server::Task,
    pub(crate) inspection: inspection::Task,
    pub(crate) http: http::Task,
    pub(crate) systemd: systemd::Task,
    /// If the agent connects to Kubernetes.
    pub(crate) kubernetes: Option<kubernetes::Task>,
    /// If it also shares a datastore with other nodes.
    pub(crate) removal: Option<removal::Task>,
}

/// Connections of engine and monitor other than entries.
struct Lines {
    leases: watch::Receiver<Arc<Leases>>,
    own_ports: BTreeSet<u32>,
    sysctls: Sysctls,
    store_at: watch::Receiver<Option<Vec<RequiredRange>>>,
    wakes: engine::Wakes,
    underlay_changed: WakeSender,
    no_fast_path: Option<NotUsed>,
}

fn connections_task(node: &Node, socket: FilterSocket) -> std::io::Result<connections::Task> {
    Ok(connections::Task {
        stale: Arc::clone(&node.pods.stale),
        pods: Arc::clone(&node.pods.local),
        passes: node.node_state.passes.clone(),
        connections: Owner::spawn("connections", socket)?,
    })
}

/// The node's identity.
fn own_node(config: &Config, machine: Machine) -> OwnNode {
    OwnNode {
        name: config.node.clone(),
        machine_id: machine.machine_id,
        boot_id: machine.boot_id,
        proof: config.identity,
        bootstrap: config.bootstrap.clone(),
        cooldown: config.cooldown,
    }
}

/// Creates the channels, and moves blocking state to threads of its own.
pub(crate) fn assemble(config: Config, parts: Parts) -> std::io::Result<Tasks> {
    let Parts {
        machine,
        features,
        sysctls,
        store,
        ipam,
        cooling_down,
        sockets,
        reaper,
        in_flight,
        no_fast_path,
    } = parts;
    let (records, addresses, datapath) = entries::entries();
    let config = Arc::new(config);
    let kernel = Owner::spawn("kernel", sockets.kernel)?;
    let (claims, claims_asked) = mpsc::channel(CLAIMS_WAITING);
    let (reservations, reservations_asked) = mpsc::channel(CLAIMS_WAITING);
    let (plans, plans_asked) = mpsc::channel(1);
    let (to_registrar, registrar_wake) = wake_channel();
    let (to_publisher, publisher_wake) = wake_channel();
    let (to_engine, engine_wake) = wake_channel();
    let (underlay_changed, underlay_wake) = wake_channel();

    let me = own_node(&config, machine);
    let facts = kubernetes_tasks::kept_facts(&config);
    let properties = Properties::new(config.labels.clone(), facts.subscribe());
    let node_state = entries::node_state(me, properties, &records, &addresses, &datapath);
    let (unreachable, unreachable_read) = watch::channel(None);
    let readiness = Readiness::new(
        node_state.clone(),
        datapath.probe.probed.subscribe(),
        datapath.announced.subscribe(),
        unreachable_read,
    );
    let pods = Pods {
        kernel: Owner::spawn("pods", sockets.pods)?,
        filter: Owner::spawn("filter", sockets.filter)?,
        interfaces: Owner::spawn("fastpath", sockets.interfaces)?,
        forgotten: Arc::default(),
        stale: Arc::new(StaleConnections::of_ledger(&cooling_down)),
        local: Arc::new(LocalPods::of_ledger(ipam.attachments())),
        reaper,
    };
    let node = Arc::new(Node {
        config,
        features,
        store,
        pods,
        ipam: Owner::spawn("ledger", ipam)?,
        node_state,
        in_flight: Arc::new(in_flight),
        channels: Channels {
            claims,
            reservations,
            registrar: to_registrar,
            publisher: to_publisher,
            engine: to_engine,
        },
    });
    let (listen_problem, listen_problem_read) = watch::channel(None);
    let (kubernetes, kubernetes_read) = kubernetes_tasks::entries(facts);
    let reporter =
        reporter(&node, readiness.clone(), &records, &datapath, (listen_problem_read, kubernetes_read));
    let lines = Lines {
        leases: records.leases.subscribe(),
        own_ports: sockets.ports,
        sysctls,
        store_at: records.store_at.subscribe(),
        wakes: engine::Wakes { underlay: underlay_wake, senders: engine_wake, plans: plans_asked },
        underlay_changed: underlay_changed.clone(),
        no_fast_path,
    };
    let registrar = registrar::Task {
        host: registrar::OnNode {
            node: Arc::clone(&node),
            kernel: kernel.clone(),
            registration: addresses.registration,
            allocations: addresses.allocations,
            adopted: addresses.adopted.subscribe(),
        },
        wake: registrar_wake,
        claims: claims_asked,
        reservations: reservations_asked,
    };
    let threads = threads(&node, &kernel);
    let ends = OperatorEnds { plans, adopted: addresses.adopted, unreachable, listen_problem, kubernetes };
    Ok(Tasks {
        records: record_tasks(&node, records, underlay_changed),
        addresses: AddressTasks {
            node: Arc::clone(&node),
            registrar,
            publisher: publisher::Task { node: Arc::clone(&node), wake: publisher_wake },
            connections: connections_task(&node, sockets.connections)?,
        },
        datapath: datapath_tasks(&node, &kernel, &readiness, datapath, lines),
        operator: operator_tasks(&node, reporter, &threads, ends),
    })
}

fn threads(node: &Node, kernel: &Owner<Kernel>) -> Threads {
    Threads {
        ledger: node.ipam.clone(),
        kernel: kernel.clone(),
        pods: node.pods.kernel.clone(),
        filter: node.pods.filter.clone(),
    }
}

/// Senders of the [`OperatorTasks`], and their channels to other tasks.
struct OperatorEnds {
    plans: mpsc::Sender<PlanRequest>,
    adopted: watch::Sender<Option<LeaseRecord>>,
    unreachable: watch::Sender<Option<String>>,
    listen_problem: watch::Sender<Option<String>>,
    kubernetes: kubernetes_tasks::Entries,
}

fn operator_tasks(
    node: &Arc<Node>,
    reporter: Reporter,
    threads: &Threads,
    ends: OperatorEnds,
) -> OperatorTasks {
    let (kubernetes, removal) = kubernetes_tasks::tasks(node, &reporter, ends.kubernetes);
    OperatorTasks {
        server: server::Task {
            node: Arc::clone(node),
            reporter: reporter.clone(),
            plans: ends.plans,
            adopted: ends.adopted,
            threads: threads.clone(),
            unreachable: ends.unreachable,
        },
        inspection: inspection::Task { inspector: pod_inspector(node), node: Arc::clone(node) },
        http: http::Task {
            address: node.config.http,
            listen_problem: ends.listen_problem,
            threads: threads.clone(),
            reporter: reporter.clone(),
        },
        systemd: systemd::Task { threads: threads.clone(), readiness: reporter.readiness.clone() },
        kubernetes,
        removal,
        reporter,
    }
}

fn pod_inspector(node: &Node) -> PodInspector {
    PodInspector {
        pods: node.pods.kernel.clone(),
        ipam: node.ipam.clone(),
        in_flight: Arc::clone(&node.in_flight),
        membership: node.node_state.membership.clone(),
        features: node.features,
    }
}

fn reporter(
    node: &Node,
    readiness: Readiness,
    records: &RecordEntries,
    datapath: &DatapathEntries,
    (listen_problem, kubernetes): (watch::Receiver<Option<String>>, kubernetes_tasks::Reads),
) -> Reporter {
    Reporter {
        config: Arc::clone(&node.config),
        features: node.features,
        store: node.store.clone(),
        ipam: node.ipam.clone(),
        fast_path: node.pods.interfaces.clone(),
        readiness,
        published: Published {
            repairs: datapath.engine.repairs.subscribe(),
            verdicts: datapath.probe.verdicts.subscribe(),
            direct: datapath.probe.direct.subscribe(),
            leases: records.leases.subscribe(),
            endpoint: datapath.probe.endpoint.subscribe(),
            host: datapath.host.subscribe(),
            fast_path: datapath.fast_path.subscribe(),
            listen_problem,
            kubernetes: kubernetes.problems,
            no_leader: kubernetes.no_leader,
        },
    }
}

fn record_tasks(node: &Node, entries: RecordEntries, underlay_changed: WakeSender) -> RecordTasks {
    let Node { config, store, node_state, .. } = node;
    RecordTasks {
        watcher: watcher::Task {
            store: store.clone(),
            state_dir: config.state_dir.clone(),
            underlay: node_state.passes.underlays(),
            view: entries.view,
        },
        etcd_addresses: etcd_addresses::Task {
            store: config.store.clone(),
            addresses: entries.store_at,
            engine_wake: underlay_changed,
        },
        leases: leases::poll::Task {
            node: config.node.clone(),
            resync: config.resync,
            store: store.clone(),
            records: node_state.records.clone(),
            leases: entries.leases,
        },
    }
}

fn datapath_tasks(
    node: &Arc<Node>,
    kernel: &Owner<Kernel>,
    readiness: &Readiness,
    entries: DatapathEntries,
    lines: Lines,
) -> DatapathTasks {
    let Node { config, node_state, .. } = &**node;
    let drift_signal = Arc::new(DriftSignal::default());
    let (programs_changed, programs_changed_wake) = wake_channel();
    let monitor = monitor::Task {
        own: lines.own_ports,
        expected: entries.engine.expected.subscribe(),
        pods: Arc::clone(&node.pods.local),
        in_flight: Arc::clone(&node.in_flight),
        reaper: node.pods.reaper.clone(),
        underlay_changed: lines.underlay_changed,
        drift_signal: Arc::clone(&drift_signal),
        programs_changed,
    };
    let fast_path = fastpath::Task {
        resync: config.resync,
        refused: lines.no_fast_path,
        interfaces: node.pods.interfaces.clone(),
        pods: Arc::clone(&node.pods.local),
        in_flight: Arc::clone(&node.in_flight),
        passes: node_state.passes.clone(),
        sysctls: lines.sysctls.clone(),
        changed: programs_changed_wake,
        not_used: entries.fast_path,
    };
    let prober = probe::Task {
        probe_peers: config.probe_peers,
        resync: config.resync,
        store: node.store.clone(),
        passes: node_state.passes.clone(),
        endpoint: entries.probe.endpoint.subscribe(),
        probed: entries.probe.probed,
        verdicts: entries.probe.verdicts,
        direct: entries.probe.direct,
    };
    let host = host::Task {
        resync: config.resync,
        host: host::LocalHost::new(kernel.clone(), pod_inspector(node)),
        records: node_state.records.clone(),
        passes: node_state.passes.clone(),
        verdicts: prober.verdicts.subscribe(),
        direct: prober.direct.subscribe(),
        problems: entries.host,
    };
    let engine = engine::Task {
        tools: engine::Tools {
            config: Arc::clone(config),
            features: node.features,
            sysctls: lines.sysctls,
            datapath: engine::OnNode {
                kernel: kernel.clone(),
                ipam: node.ipam.clone(),
                filter: node.pods.filter.clone(),
                pods: Arc::clone(&node.pods.local),
            },
            readiness: readiness.clone(),
            store_at: lines.store_at,
            direct: prober.direct.subscribe(),
            leases: lines.leases,
            drift_signal,
            pods: Arc::clone(&node.pods.local),
            in_flight: Arc::clone(&node.in_flight),
            stale: Arc::clone(&node.pods.stale),
        },
        entries: entries.engine,
        announcer: engine::Announcer::new(Arc::clone(config), readiness.clone(), entries.announced),
        wakes: lines.wakes,
    };
    let endpoint = endpoint::keeper::Task {
        node: Arc::clone(node),
        kernel: kernel.clone(),
        endpoint: entries.probe.endpoint,
    };
    DatapathTasks { engine, monitor, endpoint, prober, host, fast_path }
}
