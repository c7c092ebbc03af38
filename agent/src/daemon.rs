//! Entry point of the agent: opens ledger, datastore and kernel sockets, and starts the tasks.

use std::io;
use std::time::Duration;

use polder_api::Attachment;
use polder_ipam::ledger::Ledger;
use polder_ipam::tasks::{orphan_collector, tombstones};
use polder_netlink::nft::NatAnchor;
use polder_store::{Embedded, Etcd, Store, open_node};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinError;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::assembly::{AddressTasks, Parts, Sockets, Tasks, assemble};
use crate::config::{Config, StoreConfig};
use crate::in_flight::InFlight;
use crate::kernel::Kernel;
use crate::kernel::features::Features;
use crate::kernel::reaper::Reaper;
use crate::kernel::ruleset;
use crate::kernel::sysctl::Sysctls;
use crate::lock::NodeLock;
use crate::machine::Machine;
use crate::state_dir::{LEDGER, STORE};
use crate::{container, fastpath, monitor, recovery, server, state_dir, systemd};

/// Timeout for the shutdown of the tasks.
const LAST: Duration = Duration::from_secs(1);

/// The agent did not start, or ended unexpectedly.
#[derive(Debug, thiserror::Error)]
enum NotRunning {
    /// The directory in which plugins mark the ADDs that they wire cannot be read.
    /// Remedy: check that the directory of the socket is readable for root.
    #[error("read the marks of ADDs in progress")]
    Marks(#[source] io::Error),
    /// A task of the agent ended or panicked, although no task ends by itself. This is a defect of Polder.
    /// Remedy: restart the agent, and report the defect with the agent's log.
    #[error("a task of the agent ended unexpectedly: {outcome:?}")]
    TaskEnded {
        /// Result of the task.
        outcome: Option<Result<(), JoinError>>,
    },
}

/// Runs the agent until SIGTERM or SIGINT. The kernel state is kept.
pub async fn run(config: Config) -> anyhow::Result<()> {
    container::refuse_lost_state(&config.state_dir, config.allow_ephemeral_state)?;
    let _state = state_dir::lock(&config.state_dir)?;
    server::refuse_if_answered(&config.socket)?;
    let _node = NodeLock::take()?;
    let machine = Machine::read()?;
    let sysctls = Sysctls::at(config.proc_sys_net.clone())?;
    let mut features = Features::find_out(&sysctls)?;
    features.missing(config.keep_nat).iter().for_each(|missing| warn!("{missing}"));

    let wants_anchor = config.keep_nat && features.owned_tables;
    // Held as long as the agent runs.
    let _nat = match wants_anchor.then(|| NatAnchor::hold(ruleset::ANCHOR)).transpose() {
        Ok(anchor) => anchor,
        Err(error) => {
            let table = ruleset::ANCHOR;
            warn!(%error, "nftables.keep_nat has no effect, because table inet {table} cannot be created: delete a \
                           table of that name");
            features.owned_tables = false;
            None
        }
    };

    let mut fast_path = fastpath::Loaded::load(config.fastpath);
    features.fast_path = fast_path.refused.is_none();

    let (mut ipam, void) = open_node(&config.state_dir.join(LEDGER), &machine.boot_id, config.cooldown)?;
    if !void.is_empty() {
        info!(attachments = void.len(), "the machine has rebooted: dropping earlier attachments");
    }
    let mut kernel = Kernel::open(&sysctls)?;
    recovery::recover(&mut ipam, &mut kernel)?;
    let leaving: Vec<Attachment> =
        ipam.attachments().filter(|held| held.leaving).map(|held| held.attachment.clone()).collect();

    config.prefix.set()?;
    let store = match &config.store {
        StoreConfig::Etcd(etcd) => Store::Etcd(Etcd::new(etcd).await?),
        StoreConfig::Embedded => Store::Embedded(Embedded::open(&config.state_dir.join(STORE))?),
    };
    let reaper = Reaper::start()?;
    kernel.forget_on_changes(fast_path.take_records());
    let (interfaces, no_fast_path) = fast_path.interfaces()?;
    let sockets = Sockets::open(kernel, interfaces, &sysctls, reaper.ports())?;
    let in_flight = InFlight::found(&config.socket).map_err(NotRunning::Marks)?;
    let cooling_down = ipam.ledger().resting()?.into_iter().map(|(address, _)| address).collect();
    let parts = Parts {
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
    };
    let Tasks { records, addresses, datapath, operator } = assemble(config, parts)?;
    let AddressTasks { node, registrar, publisher, connections } = addresses;
    let api = server::Socket::bind(&node.config.socket)?;
    info!(node = %node.config.node, store = node.store.name(), "polder-agent {}", env!("CARGO_PKG_VERSION"));

    monitor::start(datapath.monitor)?;
    tombstones::apply_all(&*node).await;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(records.watcher.run());
    tasks.spawn(registrar.run());
    tasks.spawn(records.etcd_addresses.run());
    tasks.spawn(datapath.engine.run());
    tasks.spawn(datapath.endpoint.run());
    tasks.spawn(datapath.prober.run());
    tasks.spawn(publisher.run());
    tasks.spawn(connections.run());
    tasks.spawn(operator.inspection.run());
    tasks.spawn(datapath.host.run());
    tasks.spawn(datapath.fast_path.run());
    tasks.spawn(records.leases.run());
    tasks.spawn(async move { orphan_collector::run(&*node, leaving, node.config.grace).await });
    tasks.spawn(operator.server.run(api));
    tasks.spawn(operator.http.run());
    tasks.spawn(operator.systemd.run());
    if let Some(kubernetes) = operator.kubernetes {
        tasks.spawn(kubernetes.run());
    }
    if let Some(removal) = operator.removal {
        tasks.spawn(removal.run());
    }

    let mut terminate = signal(SignalKind::terminate())?;
    let outcome = tokio::select! {
        _ = terminate.recv() => {
            info!("stopping on SIGTERM: the kernel state is kept");
            Ok(())
        }
        _ = tokio::signal::ctrl_c() => {
            info!("stopping on SIGINT: the kernel state is kept");
            Ok(())
        }
        // No task ends by itself.
        outcome = tasks.join_next() => Err(NotRunning::TaskEnded { outcome }.into()),
    };
    systemd::stopping().await;
    // Stops the tasks, which deletes the socket, before another agent may start.
    let _ = timeout(LAST, tasks.shutdown()).await;
    outcome
}
