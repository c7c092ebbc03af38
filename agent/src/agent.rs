//! The agent's parts, put together.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use polder_api::Attachment;
use polder_ipam::node::NodeIpam;
use polder_ipam::store::Store;
use polder_ipam::store::embedded::Embedded;
use polder_ipam::store::etcd::Etcd;
use polder_netlink::nft::FilterSocket;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tracing::{info, warn};

use crate::board::Board;
use crate::config::{Config, StoreConfig};
use crate::in_flight::InFlight;
use crate::kernel::Kernel;
use crate::kernel::features::Features;
use crate::kernel::reaper::Reaper;
use crate::kernel::sysctl::Sysctls;
use crate::lock::NodeLock;
use crate::machine::Machine;
use crate::owner::Owner;
use crate::registrar::{ClaimRequest, ReserveRequest};
use crate::repair::Alarm;

use crate::{
    container, endpoint, engine, etcd_addresses, follower, host, http, inspection, leases, monitor, probe,
    publisher, recovery, registrar, server, sweeper, systemd,
};

/// The ledger's file, in the state folder.
pub(crate) const LEDGER: &str = "ledger.db";

/// The file of a store of this node's own.
pub(crate) const STORE: &str = "store.db";

/// Claims that wait before whoever wants another has to.
const CLAIMS_WAITING: usize = 256;

/// What all tasks of the agent share.
#[derive(Debug)]
pub struct Agent {
    /// What the operator said.
    pub config: Config,
    /// The machine.
    pub machine: Machine,
    /// What its kernel can do.
    pub features: Features,
    /// The kernel's settings.
    pub sysctls: Sysctls,
    /// Where the cluster's records are.
    pub store: Store,
    /// The node's addresses.
    pub ipam: Owner<NodeIpam>,
    /// The kernel, for passes over all of it.
    pub kernel: Owner<Kernel>,
    /// The kernel, for what a single pod needs at once.
    pub pods: Owner<Kernel>,
    /// The kernel, for the connections of addresses that are freed.
    pub connections: Owner<FilterSocket>,
    /// Deletes pods' interfaces.
    pub reaper: Reaper,
    /// What the tasks tell each other.
    pub board: Board,
    /// Attachments that a plugin is wiring.
    pub in_flight: Arc<InFlight>,
    /// Where blocks are asked for.
    pub claims: mpsc::Sender<ClaimRequest>,
    /// Where reserved addresses are asked for.
    pub reservations: mpsc::Sender<ReserveRequest>,
    /// Where it is asked what the next pass would change.
    pub plans: mpsc::Sender<engine::Asked>,
    /// Rings when something that is not ours changed in the kernel.
    pub underlay_changed: Notify,
    /// Rings when somebody else has changed something of ours in the kernel.
    pub alarm: Alarm,
    /// Rings when an attachment came or went: for the publisher.
    pub attachments_changed: Notify,
    /// Rings when one went: for the registrar, who may have something to give back.
    pub holdings_changed: Notify,
}

/// What an agent is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) machine: Machine,
    pub(crate) features: Features,
    pub(crate) sysctls: Sysctls,
    pub(crate) store: Store,
    pub(crate) ipam: NodeIpam,
    pub(crate) kernel: Kernel,
    pub(crate) pods: Kernel,
    pub(crate) connections: FilterSocket,
    pub(crate) reaper: Reaper,
}

/// What tasks are asked through.
#[derive(Debug)]
pub(crate) struct Queues {
    pub(crate) claims: mpsc::Receiver<ClaimRequest>,
    pub(crate) reservations: mpsc::Receiver<ReserveRequest>,
    pub(crate) plans: mpsc::Receiver<engine::Asked>,
}

/// Puts the parts together, each on its own thread if it blocks.
pub(crate) fn assemble(config: Config, parts: Parts) -> std::io::Result<(Arc<Agent>, Queues)> {
    let Parts { machine, features, sysctls, store, ipam, kernel, pods, connections, reaper } = parts;
    let (claims, wanted) = mpsc::channel(CLAIMS_WAITING);
    let (reservations, reserved) = mpsc::channel(CLAIMS_WAITING);
    let (plans, asked) = mpsc::channel(1);
    let agent = Agent {
        machine,
        features,
        sysctls,
        store,
        ipam: Owner::spawn("ledger", ipam)?,
        kernel: Owner::spawn("kernel", kernel)?,
        pods: Owner::spawn("pods", pods)?,
        connections: Owner::spawn("connections", connections)?,
        reaper,
        board: Board::default(),
        in_flight: Arc::default(),
        claims,
        reservations,
        plans,
        underlay_changed: Notify::new(),
        alarm: Alarm::default(),
        attachments_changed: Notify::new(),
        holdings_changed: Notify::new(),
        config,
    };
    Ok((Arc::new(agent), Queues { claims: wanted, reservations: reserved, plans: asked }))
}

/// Runs the agent until it is told to stop. What it has made in the kernel stays when it is gone.
pub async fn run(config: Config) -> anyhow::Result<()> {
    container::refuse_lost_state(&config.state_dir, config.allow_ephemeral_state)?;
    let _state = lock_state(&config.state_dir)?;
    server::refuse_if_answered(&config.socket)?;
    let _node = NodeLock::take()?;
    let machine = Machine::read()?;
    let sysctls = Sysctls::at(config.proc_sys_net.clone())?;
    let features = Features::find_out(&sysctls)?;
    features.missing().iter().for_each(|missing| warn!("{missing}"));

    let (mut ipam, void) = NodeIpam::open(&config.state_dir.join(LEDGER), &machine.boot_id, config.cooldown)?;
    if !void.is_empty() {
        info!(attachments = void.len(), "the machine was booted: earlier attachments are void");
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
    let pods = Kernel::open(&sysctls)?;
    let own_ports = [kernel.ports()?, pods.ports()?].into_iter().flatten().collect();
    let (agent, Queues { claims, reservations, plans }) = assemble(
        config,
        Parts {
            machine,
            features,
            sysctls,
            store,
            ipam,
            kernel,
            pods,
            connections: FilterSocket::open()?,
            reaper: Reaper::start()?,
        },
    )?;
    let api = server::bind(&agent.config.socket)?;
    let web = http::bind(agent.config.http).await?;
    info!(node = %agent.config.node, store = agent.store.name(), "polder-agent {}", env!("CARGO_PKG_VERSION"));

    monitor::start(&agent, own_ports)?;
    sweeper::take_notes(&agent).await;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(follower::run(Arc::clone(&agent)));
    tasks.spawn(registrar::run(Arc::clone(&agent), claims, reservations));
    tasks.spawn(etcd_addresses::run(Arc::clone(&agent)));
    tasks.spawn(engine::run(Arc::clone(&agent), plans));
    tasks.spawn(endpoint::run(Arc::clone(&agent)));
    tasks.spawn(probe::run(Arc::clone(&agent)));
    tasks.spawn(publisher::run(Arc::clone(&agent)));
    tasks.spawn(inspection::run(Arc::clone(&agent)));
    tasks.spawn(host::run(Arc::clone(&agent)));
    tasks.spawn(leases::run(Arc::clone(&agent)));
    tasks.spawn(sweeper::run(Arc::clone(&agent), leaving));
    tasks.spawn(server::run(Arc::clone(&agent), api));
    tasks.spawn(http::run(Arc::clone(&agent), web));
    tasks.spawn(systemd::run(Arc::clone(&agent)));

    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => info!("told to stop: what is in the kernel stays"),
        _ = tokio::signal::ctrl_c() => info!("interrupted: what is in the kernel stays"),
        // None of the tasks ends by itself.
        ended = tasks.join_next() => bail!("a task of the agent has ended: {ended:?}"),
    }
    systemd::stopping().await;
    Ok(())
}

/// Makes the state folder, and makes sure that no other agent uses it.
pub(crate) fn lock_state(folder: &Path) -> anyhow::Result<Flock<fs::File>> {
    let writable = || format!("state_dir {}: can the agent write there?", folder.display());
    fs::create_dir_all(folder).with_context(writable)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).with_context(writable)?;
    let file = fs::File::create(folder.join("lock")).with_context(writable)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!("state_dir {}: another polder-agent uses it", folder.display())
        }
        Err((_, errno)) => Err(errno).with_context(writable),
    }
}
