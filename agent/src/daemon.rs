//! The root of the agent: opens what it works with, makes the channels, and starts the tasks. Nothing imports it but the program.

use std::sync::Arc;

use anyhow::bail;
use polder_api::Attachment;
use polder_ipam::tasks::{sweeper, tombstones};
use polder_netlink::nft::FilterSocket;
use polder_store::{Embedded, Etcd, Store, open_node};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::agent::{Agent, Parts, Queues, assemble};
use crate::config::{Config, StoreConfig};
use crate::kernel::Kernel;
use crate::kernel::features::Features;
use crate::kernel::reaper::Reaper;
use crate::kernel::sysctl::Sysctls;
use crate::lock::NodeLock;
use crate::machine::Machine;
use crate::state_dir::{LEDGER, STORE};
use crate::{
    container, endpoint, engine, etcd_addresses, follower, host, http, inspection, leases, monitor, probe,
    publisher, recovery, registrar, server, state_dir, systemd,
};

/// Runs the agent until it is told to stop. What it has made in the kernel stays when it is gone.
pub async fn run(config: Config) -> anyhow::Result<()> {
    container::refuse_lost_state(&config.state_dir, config.allow_ephemeral_state)?;
    let _state = state_dir::lock(&config.state_dir)?;
    server::refuse_if_answered(&config.socket)?;
    let _node = NodeLock::take()?;
    let machine = Machine::read()?;
    let sysctls = Sysctls::at(config.proc_sys_net.clone())?;
    let features = Features::find_out(&sysctls)?;
    features.missing().iter().for_each(|missing| warn!("{missing}"));

    let (mut ipam, void) = open_node(&config.state_dir.join(LEDGER), &machine.boot_id, config.cooldown)?;
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
    let (agent, Queues { claims, reservations, plans, senders }) = assemble(
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
    tombstones::apply_all(&*agent).await;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(follower::run(Arc::clone(&agent)));
    tasks.spawn(registrar::run(Arc::clone(&agent), claims, reservations));
    tasks.spawn(etcd_addresses::run(Arc::clone(&agent)));
    tasks.spawn(engine::run(Arc::clone(&agent), plans, senders));
    tasks.spawn(endpoint::keeper::run(Arc::clone(&agent)));
    tasks.spawn(probe::run(Arc::clone(&agent)));
    tasks.spawn(publisher::run(Arc::clone(&agent)));
    tasks.spawn(inspection::run(Arc::clone(&agent)));
    tasks.spawn(host::run(Arc::clone(&agent)));
    tasks.spawn(leases::poll::run(Arc::clone(&agent)));
    tasks.spawn(sweep(Arc::clone(&agent), leaving));
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

async fn sweep(agent: Arc<Agent>, leaving: Vec<Attachment>) {
    sweeper::run(&*agent, leaving, agent.config.grace).await;
}
