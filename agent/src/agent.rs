//! What all tasks of the agent share.

use std::sync::Arc;

use polder_ipam::tasks::Me;
use polder_netlink::nft::FilterSocket;
use polder_store::NodeIpam;
use polder_store::Store;
use tokio::sync::{Notify, mpsc};

use crate::bell::{Bell, Wake, bell};
use crate::board::Board;
use crate::config::Config;
use crate::in_flight::InFlight;
use crate::kernel::Kernel;
use crate::kernel::features::Features;
use crate::kernel::reaper::Reaper;
use crate::kernel::sysctl::Sysctls;
use crate::machine::Machine;
use crate::owner::Owner;
use crate::repair::Alarm;
use crate::requests::{ClaimRequest, PlanRequest, ReserveRequest};

/// Claims that wait before whoever wants another has to.
const CLAIMS_WAITING: usize = 256;

/// What all tasks of the agent share.
#[derive(Debug)]
pub struct Agent {
    /// What the operator said.
    pub config: Config,
    /// The machine.
    pub machine: Machine,
    /// Who the node is.
    pub me: Me,
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
    pub plans: mpsc::Sender<PlanRequest>,
    /// Rings when something that is not ours changed in the kernel.
    pub underlay_changed: Notify,
    /// Rings when an attachment came whose addresses the filter does not know yet: for the engine.
    pub senders_changed: Bell,
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
    pub(crate) plans: mpsc::Receiver<PlanRequest>,
    pub(crate) senders: Wake,
}

/// Puts the parts together, each on its own thread if it blocks.
pub(crate) fn assemble(config: Config, parts: Parts) -> std::io::Result<(Arc<Agent>, Queues)> {
    let Parts { machine, features, sysctls, store, ipam, kernel, pods, connections, reaper } = parts;
    let (claims, wanted) = mpsc::channel(CLAIMS_WAITING);
    let (reservations, reserved) = mpsc::channel(CLAIMS_WAITING);
    let (plans, asked) = mpsc::channel(1);
    let me = Me {
        name: config.node.clone(),
        machine_id: machine.machine_id.clone(),
        boot_id: machine.boot_id.clone(),
        proof: config.identity,
        labels: config.labels.clone(),
        bootstrap: config.bootstrap.clone(),
        cooldown: config.cooldown,
    };
    let (senders_changed, senders) = bell();
    let agent = Agent {
        machine,
        me,
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
        senders_changed,
        alarm: Alarm::default(),
        attachments_changed: Notify::new(),
        holdings_changed: Notify::new(),
        config,
    };
    Ok((Arc::new(agent), Queues { claims: wanted, reservations: reserved, plans: asked, senders }))
}
