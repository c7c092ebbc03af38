//! A machine of the cluster: the state that survives its agent, the agent's state, and the real state of its pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use polder_api::{Attachment, NodeName};
use polder_ipam::Moment;
use polder_ipam::allocator::DEFAULT_COOL_DOWN;
use polder_ipam::ids::{BootId, MachineId};
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{AttachmentEntry, NodeIdentity};
use polder_ipam::node::NodeIpam;
use polder_ipam::record::LeaseRecord;
use polder_ipam::registration::Registration;
use polder_ipam::tasks::RegistrarState;

use super::task::{Answer, Sent, Stopped, Wait};
use super::watcher::Watcher;

/// Index of a machine.
pub type MachineIndex = usize;

/// Number of machines.
pub(super) const MACHINES: usize = 3;

/// Number of a pod on its machine, from 1, in the order of their ADDs.
pub type Container = u8;

/// Length of a tick in milliseconds: longer than any cool-down, also with a node's turn added.
const TICK: u64 = 100_000;

/// Time from boot to the start of the agent, in milliseconds: shorter than any cool-down.
const AFTER_BOOT: u64 = 5_000;

/// Uptime of the machines at the start, in ticks.
pub(super) const EARLIER: u8 = 10;

/// Machine id and node name of each machine. The last machine shares its name with the first.
pub(super) const NAMES: [(&str, &str); MACHINES] = [("m1", "n1"), ("m2", "n2"), ("m3", "n1")];

/// All possible attachments, built once.
static ATTACHMENTS: LazyLock<BTreeMap<(&str, Container), Attachment>> = LazyLock::new(|| {
    let of = |id: &'static str| {
        (1..10).map(move |container| {
            let attachment = format!("net/{id}-{container}/eth0");
            ((id, container), attachment.parse().expect("an attachment"))
        })
    };
    NAMES.into_iter().flat_map(|(id, _)| of(id)).collect()
});

/// Power state of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Power {
    /// Not started yet.
    NotStarted,
    /// Running.
    On,
    /// Failed permanently.
    Failed,
}

/// The kernel that a machine uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Its own kernel: each boot has a new boot id.
    Own,
    /// The kernel of a host: all machines share its boot id, and a restart changes the machine id.
    Shared,
}

/// A machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Prefix of its machine id and of every name that it generates.
    pub id: &'static str,
    /// Own or shared kernel.
    pub kernel: Kernel,
    /// Node name in the cluster.
    pub name: NodeName,
    /// Power state.
    pub power: Power,
    /// Number of boots, from 1.
    pub boots: u8,
    /// Tick of the last boot.
    pub booted: u8,
    /// Number of incarnations that it has generated.
    pub incarnations: u8,
    /// The ledger, and the agent's state over it.
    pub ipam: Arc<NodeIpam<Memory>>,
    /// The real interfaces of the pods in the kernel, with their addresses.
    pub plugged: BTreeMap<Container, Vec<IpAddr>>,
    /// Number of pods ever added.
    pub containers: Container,
    /// The agent, with all state that is lost when it ends.
    pub agent: Agent,
}

/// An agent.
#[derive(Debug, Clone)]
pub struct Agent {
    /// Its view of the store.
    pub watcher: Watcher,
    /// The machine that this one replaces, as declared by an operator.
    pub adopted: Option<LeaseRecord>,
    /// The last registration state that the registrar reported.
    pub registration: Registration,
    /// The registrar's state between steps, after its first step.
    pub state: Option<RegistrarState>,
    /// The locked attachments.
    pub locked: BTreeSet<Attachment>,
    /// The registrar's current task.
    pub registrar: Option<Stopped>,
    /// The ADD that waits for the registrar.
    pub adding: Option<Stopped>,
    /// The DELs in progress.
    pub deleting: BTreeMap<Container, Stopped>,
    /// The task that finishes the DELs of the previous agent.
    pub sweeping: Option<Stopped>,
}

impl Machine {
    /// A machine that is not started yet.
    pub fn new(id: &'static str, name: &str, kernel: Kernel) -> Self {
        Self {
            id,
            kernel,
            name: name.parse().expect("a name"),
            power: Power::NotStarted,
            boots: 1,
            booted: 0,
            incarnations: 0,
            ipam: open(Memory::default(), &boot_id(kernel, id, 1)),
            plugged: BTreeMap::new(),
            containers: 0,
            agent: Agent::new(Watcher::default()),
        }
    }

    /// The machine's clock at that tick.
    pub fn now(&self, tick: u8) -> Moment {
        Moment::from_millis(AFTER_BOOT + u64::from(tick - self.booted) * TICK)
    }

    /// The boot id of the current boot.
    pub fn boot_id(&self) -> BootId {
        boot_id(self.kernel, self.id, self.boots)
    }

    /// The machine id, as in `/etc/machine-id`.
    pub fn machine_id(&self) -> MachineId {
        match self.kernel {
            Kernel::Own => MachineId::new(self.id),
            Kernel::Shared => MachineId::new(format!("{}-{}", self.id, self.boots)),
        }
    }

    /// The identity in its ledger.
    pub fn identity(&self) -> Option<NodeIdentity> {
        self.ipam.identity().expect("a ledger in memory")
    }

    /// The name of its next incarnation.
    pub fn next_incarnation(&self) -> String {
        format!("{}-i{}", self.id, self.incarnations + 1)
    }

    /// Mutable access to the node's addresses.
    pub fn ipam(&mut self) -> &mut NodeIpam<Memory> {
        Arc::make_mut(&mut self.ipam)
    }

    /// The attachment of a pod.
    pub fn attachment(&self, container: Container) -> &'static Attachment {
        &ATTACHMENTS[&(self.id, container)]
    }

    /// The pod with the attachment.
    pub fn container(&self, attachment: &Attachment) -> Option<Container> {
        (1..=self.containers).find(|container| self.attachment(*container) == attachment)
    }

    /// The ledger entries of all other attachments.
    pub fn others(&self, attachment: &Attachment) -> Vec<AttachmentEntry> {
        self.ipam.attachments().filter(|held| held.attachment != *attachment).cloned().collect()
    }

    /// The addresses in use on the machine: those of its pods, and its own.
    pub fn live(&self) -> impl Iterator<Item = IpAddr> {
        let serves = self.power == Power::On && self.agent.may_serve();
        let own = self.ipam.gateways().iter().filter(move |_| serves);
        self.plugged.values().flatten().chain(own).copied()
    }

    /// Starts a new agent after the previous one has crashed.
    pub fn restart(&mut self) {
        self.ipam = open(self.ipam.ledger().clone(), &self.boot_id());
        self.agent = Agent::new(Watcher::from_snapshot(&self.agent.watcher));
    }

    /// Starts with a copy of another machine's ledger.
    pub fn copy(&mut self, other: &NodeIpam<Memory>) {
        self.ipam = open(other.ledger().clone(), &self.boot_id());
    }

    /// Starts again without a ledger.
    pub fn forget(&mut self) {
        self.ipam = open(Memory::default(), &self.boot_id());
        self.agent = Agent::new(Watcher::default());
    }
}

impl Agent {
    fn new(watcher: Watcher) -> Self {
        Self {
            watcher,
            adopted: None,
            registration: Registration::default(),
            state: None,
            locked: BTreeSet::new(),
            registrar: None,
            adding: None,
            deleting: BTreeMap::new(),
            sweeping: None,
        }
    }

    /// Whether the registration permits the node to serve.
    pub fn may_serve(&self) -> bool {
        self.registration.not_serving_reason().is_none()
    }

    /// Whether the registrar has no task.
    pub fn is_idle(&self) -> bool {
        self.registrar.is_none()
    }

    /// Answers the ADD that waits for the registrar. Returns false if none waits for this kind of answer.
    pub fn answer(&mut self, answer: Answer) -> bool {
        let Some(adding) = &mut self.adding else { return false };
        let is_asked = matches!(
            (&adding.wait, &answer),
            (Wait::Block(_), Answer::Block(_)) | (Wait::Address(_), Answer::Address(_))
        );
        if is_asked {
            adding.wait = Wait::Turn(Box::new(answer));
        }
        is_asked
    }

    /// The transactions in flight of its tasks.
    pub fn in_flight(&self) -> impl Iterator<Item = &Sent> {
        self.tasks().filter_map(Stopped::in_flight)
    }

    /// All its tasks that wait.
    pub fn tasks(&self) -> impl Iterator<Item = &Stopped> {
        self.registrar.iter().chain(&self.adding).chain(self.deleting.values()).chain(&self.sweeping)
    }
}

fn boot_id(kernel: Kernel, machine: &str, boots: u8) -> BootId {
    match kernel {
        Kernel::Own => BootId::new(format!("{machine}-boot-{boots}")),
        Kernel::Shared => BootId::new("boot"),
    }
}

fn open(ledger: Memory, boot_id: &BootId) -> Arc<NodeIpam<Memory>> {
    Arc::new(NodeIpam::with(ledger, boot_id, DEFAULT_COOL_DOWN).expect("a ledger in memory").0)
}
