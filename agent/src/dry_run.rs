//! `polder-agent --plan`: runs the agent's tasks on copies of the records and of the ledger, with read-only access to
//! the kernel.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use polder_ipam::key::{Key, Range};
use polder_ipam::registration::Registration;
use polder_ipam::store::{Contents, StoreError};
use polder_store::{Embedded, Etcd, Store, open_node};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::assembly::{Parts, Sockets, assemble};
use crate::config::{Config, StoreConfig};
use crate::engine::Engine;
use crate::in_flight::InFlight;
use crate::kernel::Kernel;
use crate::kernel::desired::{Path as NetworkPath, PeerPath};
use crate::kernel::features::Features;
use crate::kernel::reaper::Reaper;
use crate::kernel::sysctl::Sysctls;
use crate::lock::NodeLock;
use crate::machine::Machine;
use crate::node_state::NodeState;
use crate::state_dir::{LEDGER, NODE_OBJECT, STORE};
use crate::underlay::Uplink;
use crate::{container, engine, fastpath, recovery, server, watcher};

/// Timeout for reading the records from etcd. A login takes seconds, or longer when many nodes log in.
const STORE_TIMEOUT: Duration = Duration::from_secs(60);

/// Timeout of the tasks, once the records are read.
const TIMEOUT: Duration = Duration::from_secs(15);

/// The plan cannot be computed.
#[derive(Debug, thiserror::Error)]
enum PlanNotMade {
    /// An agent of this node answers on the socket or holds the lock of the node, or that lock cannot be taken.
    #[error("an agent is already running on this node: use polderctl plan")]
    Runs(#[source] anyhow::Error),
    /// The cluster's records, which the plan depends on, cannot be read from etcd.
    /// Remedy: check that this node reaches etcd, and the endpoints and credentials in section `etcd` of the
    /// configuration.
    #[error("{store}: cannot read the records; without them an agent waits and does not change the kernel")]
    Records {
        /// Name of the datastore.
        store: String,
        /// The error.
        #[source]
        source: RecordsNotRead,
    },
    /// No directory for temporary files is writable.
    #[error(
        "cannot create a directory for a copy of the ledger: none of {folders:?} is writable: set TMPDIR"
    )]
    Scratch {
        /// The directories that were tried.
        folders: Vec<PathBuf>,
    },
    /// A file of the state directory cannot be copied to the directory for temporary files.
    /// Remedy: run the command as root, and check the free space of the directory for temporary files.
    #[error("cannot read {}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// Why the records were not read.
#[derive(Debug, thiserror::Error)]
enum RecordsNotRead {
    /// etcd did not send all records within the timeout.
    /// Remedy: check the network and the load of etcd, and try again.
    #[error("no answer within {seconds} s")]
    NoAnswer {
        /// The timeout.
        seconds: u64,
    },
    /// The datastore refused the request, or is unreachable.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The changes that an agent would make on this node.
#[derive(Debug, Default)]
pub struct DryRun {
    /// The node, and the content of its state directory.
    node: Vec<String>,
    /// The node's addresses on the underlay.
    underlay: Vec<String>,
    /// The nodes by the path on which they would be reached.
    peers: BTreeMap<String, Vec<String>>,
    /// Name of the datastore, and the keys that would be written or deleted.
    records: (String, Vec<String>),
    /// Changes that would be made to the kernel.
    kernel: Vec<String>,
    /// Files that would be written.
    files: Vec<String>,
    /// Problems on this host, each with its remedy.
    problems: Vec<String>,
    /// Why the node would not become ready. Empty if it would.
    obstacles: Vec<String>,
}

impl DryRun {
    /// Whether the node would serve pods.
    pub fn would_serve(&self) -> bool {
        self.obstacles.is_empty()
    }
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (store, records) = &self.records;
        let peers = self.peers.iter().map(|(path, nodes)| {
            let more = nodes.len().saturating_sub(NODES_NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!(
                "{path}: {}{more}",
                nodes.iter().take(NODES_NAMED).cloned().collect::<Vec<_>>().join(", ")
            )
        });
        let peers: Vec<_> = peers.collect();
        // An empty list of changes is printed, an empty list of problems is not.
        let parts = [
            ("Node", &self.node, true),
            ("Underlay", &self.underlay, true),
            ("Peers", &peers, true),
            (&*format!("Records in {store}"), records, true),
            ("Kernel", &self.kernel, true),
            ("Files", &self.files, true),
            ("Problems on this host", &self.problems, false),
            ("The node would not become ready", &self.obstacles, false),
        ];
        for (title, lines, even_empty) in parts {
            if lines.is_empty() && !even_empty {
                continue;
            }
            writeln!(f, "{title}:")?;
            if lines.is_empty() {
                writeln!(f, "  none")?;
            }
            lines.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        }
        f.write_str("Nothing was changed.")
    }
}

/// Maximum number of nodes listed per path.
const NODES_NAMED: usize = 10;

/// Computes the plan. Fails where an agent could not start.
pub async fn run(mut config: Config) -> anyhow::Result<DryRun> {
    container::refuse_lost_state(&config.state_dir, config.allow_ephemeral_state)?;
    server::refuse_if_answered(&config.socket).map_err(|error| PlanNotMade::Runs(error.into()))?;
    drop(NodeLock::take().map_err(|error| PlanNotMade::Runs(error.into()))?);
    let machine = Machine::read()?;
    let sysctls = Sysctls::at(config.proc_sys_net.clone())?;
    let mut features = Features::find_out(&sysctls)?;
    let no_fast_path = fastpath::Loaded::load(config.fastpath).refused;
    features.fast_path = no_fast_path.is_none();
    config.prefix.set()?;

    let scratch = scratch()?;
    let (state, copy) = (config.state_dir.clone(), scratch.path());
    let has_ledger = copy_database(&state, copy, LEDGER)?;
    if matches!(config.store, StoreConfig::Embedded) {
        copy_database(&state, copy, STORE)?;
    }
    // The last records from the datastore: the comparison restores records that it has lost since.
    copy_file(&state, copy, watcher::SNAPSHOT)?;
    copy_file(&state, copy, NODE_OBJECT)?;
    let mut dry = DryRun::default();
    dry.node.push(format!("{}, machine {}", config.node, machine.machine_id));
    dry.node.push(format!(
        "state directory {}: {}",
        state.display(),
        if has_ledger { "has a ledger" } else { "has no ledger, a new one would be created" }
    ));
    dry.problems = features.missing(config.keep_nat);

    let store = Embedded::open(&copy.join(STORE))?;
    let mut before = Contents::default();
    dry.records.0 = match &config.store {
        StoreConfig::Etcd(etcd) => {
            let etcd = Store::Etcd(Etcd::new(etcd).await?);
            let name = etcd.name();
            before = match timeout(STORE_TIMEOUT, read(&etcd, &config)).await {
                Ok(read) => read.map_err(RecordsNotRead::Store),
                Err(_) => Err(RecordsNotRead::NoAnswer { seconds: STORE_TIMEOUT.as_secs() }),
            }
            .map_err(|source| PlanNotMade::Records { store: name.clone(), source })?;
            store.fill(&before)?;
            name
        }
        StoreConfig::Embedded => format!("embedded store {}", state.join(STORE).display()),
    };
    let store = Store::Embedded(store);
    if matches!(config.store, StoreConfig::Embedded) {
        before = read(&store, &config).await?;
    }

    let (mut ipam, _) = open_node(&copy.join(LEDGER), &machine.boot_id, config.cooldown)?;
    let mut kernel = Kernel::open_to_read(&sysctls)?;
    recovery::recover(&mut ipam, &mut kernel)?;
    copy.clone_into(&mut config.state_dir);
    let pods = ipam.attachments().count();
    let parts = Parts {
        machine,
        features,
        ipam,
        cooling_down: Vec::new(),
        store,
        sockets: Sockets::read_only(kernel, &sysctls)?,
        reaper: Reaper::idle(),
        in_flight: InFlight::default(),
        sysctls: sysctls.read_only(),
        no_fast_path,
    };
    // The tasks that are not run are kept until the end, because their entries are read.
    let tasks = assemble(config, parts)?;
    let (records, reporter) = (tasks.records, tasks.operator.reporter);
    let mut running = tokio::task::JoinSet::new();
    running.spawn(records.watcher.run());
    running.spawn(tasks.addresses.registrar.run());
    running.spawn(records.etcd_addresses.run());
    let node_state = reporter.node_state();
    let engine::Task { tools, entries, announcer, .. } = tasks.datapath.engine;
    let mut engine = Engine::new(tools, entries, announcer);
    match engine::rehearse(&mut engine, TIMEOUT).await {
        Ok(changes) => dry.kernel = changes,
        Err(_) if matches!(node_state.registration(), Registration::Removed(_)) => {
            dry.obstacles.push(format!(
                "this node was removed from the cluster: an agent that starts here disconnects its pods ({pods}), \
                 deletes the node's own addresses from the bridge, and serves no pods. To let this machine join again, \
                 delete {}",
                state.display()
            ));
        }
        Err(obstacles) => dry.obstacles = obstacles,
    }
    if let Some(cluster) = node_state.view().cluster.as_ref().map(|cluster| Arc::clone(&cluster.record)) {
        tasks.datapath.host.check(&cluster, Vec::new()).await;
        dry.problems.extend(reporter.published.host.borrow().iter().cloned());
    }
    running.shutdown().await;

    let pass = node_state.pass().unwrap_or_default();
    dry.underlay = underlay(node_state, pass.mtu);
    for ((node, family), peer_path) in &*pass.paths {
        dry.peers.entry(describe(peer_path)).or_default().push(format!("{node} ({family})"));
    }
    dry.problems.extend(pass.problems.iter().map(ToString::to_string));
    dry.records.1 = differences(&before, &read(&reporter.store, &reporter.config).await?);
    dry.files = files(&reporter.config, &state, has_ledger);
    Ok(dry)
}

/// The node's underlay addresses, and the MTU of pods.
fn underlay(node_state: &NodeState, mtu: u32) -> Vec<String> {
    let uplinks = node_state.underlay().map(|underlay| underlay.uplinks.clone()).unwrap_or_default();
    let uplink = |uplink: &Uplink| {
        format!("{} on {}, MTU {}: {}", uplink.address, uplink.interface, uplink.mtu, uplink.chosen_by)
    };
    let mtu = (mtu > 0).then(|| format!("pod MTU {mtu}"));
    uplinks.values().map(uplink).chain(mtu).collect()
}

/// Text for the path to a peer.
fn describe(peer_path: &PeerPath) -> String {
    match &peer_path.path {
        NetworkPath::Direct { .. } => "direct route".to_owned(),
        NetworkPath::Tunnel { encapsulation, over, .. } => format!("{encapsulation} tunnel over {over}"),
        NetworkPath::Unreachable(reason) => format!("unreachable ({reason})"),
    }
}

/// A folder for copies, deleted when the handle is dropped. A container may have no `/tmp`, or no write access to it.
fn scratch() -> Result<TempDir, PlanNotMade> {
    let folders = [std::env::temp_dir(), "/dev/shm".into(), "/run".into()];
    let made = folders
        .iter()
        .find_map(|folder| tempfile::Builder::new().prefix("polder-plan-").tempdir_in(folder).ok());
    made.ok_or_else(|| PlanNotMade::Scratch { folders: folders.into() })
}

/// Copies a SQLite file, if it exists, and its write-ahead log. No agent runs that could write to it.
fn copy_database(from: &Path, to: &Path, name: &str) -> Result<bool, PlanNotMade> {
    let is_there = copy_file(from, to, name)?;
    copy_file(from, to, &format!("{name}-wal"))?;
    Ok(is_there)
}

fn copy_file(from: &Path, to: &Path, name: &str) -> Result<bool, PlanNotMade> {
    match fs::copy(from.join(name), to.join(name)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(PlanNotMade::Copy { path: from.join(name), source }),
    }
}

/// Reads all records that the tasks use.
async fn read(store: &Store, config: &Config) -> Result<Contents, StoreError> {
    let mut all = store.range(&Key::followed()).await?;
    let of_node =
        [Range::single(Key::Lease(config.node.clone()).to_string()), Key::addresses_of(&config.node)];
    for range in of_node {
        all.entries.extend(store.range(&range).await?.entries);
    }
    Ok(all)
}

/// The keys written or deleted between two reads.
fn differences(before: &Contents, after: &Contents) -> Vec<String> {
    let by_key = |contents: &Contents| -> BTreeMap<String, Vec<u8>> {
        contents.entries.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect()
    };
    let (before, after) = (by_key(before), by_key(after));
    let mut changes = Vec::new();
    for (key, value) in &after {
        let mut line = match before.get(key) {
            Some(found) if found == value => continue,
            Some(_) => format!("change {key}"),
            None => format!("write {key}"),
        };
        let _ = write!(line, " {}", String::from_utf8_lossy(value));
        changes.push(line);
    }
    changes.extend(before.keys().filter(|key| !after.contains_key(*key)).map(|key| format!("delete {key}")));
    changes
}

/// The files that would be written.
fn files(config: &Config, state: &Path, has_ledger: bool) -> Vec<String> {
    let mut files = Vec::new();
    if !has_ledger {
        files.push(format!("write {}", state.join(LEDGER).display()));
    }
    files.push(format!("write {} repeatedly", state.join(watcher::SNAPSHOT).display()));
    let conflist = config.conflist();
    if !conflist.is_written() {
        files.push(format!("write {} once the node is ready", config.cni_file.display()));
    }
    files.extend(conflist.others().iter().map(|other| {
        format!(
            "{} is an older CNI configuration of Polder: delete it, a runtime uses the first file by name",
            other.display()
        )
    }));
    files
}
