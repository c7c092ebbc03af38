//! A machine of the cluster: what survives its agent, what its agent has in mind, and the truth about its pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use polder_api::{Attachment, NodeName};
use polder_ipam::Moment;
use polder_ipam::allocator::USUAL_REST;
use polder_ipam::ids::{BootId, MachineId};
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{Held, Identity};
use polder_ipam::node::NodeIpam;
use polder_ipam::record::Alive;
use polder_ipam::registration::Registration;
use polder_ipam::tasks::RegistrarState;

use super::task::{Answer, Sent, Stopped, Wait};
use super::watcher::Watcher;

/// Which machine.
pub type Who = usize;

/// How many machines there are.
pub(super) const MACHINES: usize = 3;

/// Which of the pods that were ever begun on a machine.
pub type Container = u8;

/// How much time passes at once, in milliseconds: more than any rest, and any rest and a node's turn together.
const TICK: u64 = 100_000;

/// How long after its boot a machine's agent runs, in milliseconds: less than any rest.
const AFTER_BOOT: u64 = 5_000;

/// The ticks for which the machines have been up when it begins.
pub(super) const EARLIER: u8 = 10;

/// The machines: their ids, and the names that they have in the cluster. The last one has that of the first.
pub(super) const NAMES: [(&str, &str); MACHINES] = [("m1", "n1"), ("m2", "n2"), ("m3", "n1")];

/// The attachments that there can be, made once.
static ATTACHMENTS: LazyLock<BTreeMap<(&str, Container), Attachment>> = LazyLock::new(|| {
    let of = |id: &'static str| {
        (1..10).map(move |container| {
            let attachment = format!("net/{id}-{container}/eth0");
            ((id, container), attachment.parse().expect("an attachment"))
        })
    };
    NAMES.into_iter().flat_map(|(id, _)| of(id)).collect()
});

/// Whether there is a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Power {
    /// Not yet.
    Blank,
    /// It runs.
    On,
    /// Not any more, and never again.
    Gone,
}

/// Whose kernel a machine runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Its own: each boot has another boot id.
    Own,
    /// That of a host: all machines have its boot id, and each has another machine id after a restart.
    Shared,
}

/// A machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The first part of its machine id and of every name that it makes up.
    pub id: &'static str,
    /// Whether it has a kernel of its own.
    pub kernel: Kernel,
    /// The name that it has in the cluster.
    pub name: NodeName,
    /// Whether it runs.
    pub power: Power,
    /// How often it was booted.
    pub boots: u8,
    /// The tick of the last boot.
    pub booted: u8,
    /// How many incarnations it has made up.
    pub lives: u8,
    /// Its ledger, and what its agent makes of it.
    pub ipam: Arc<NodeIpam<Memory>>,
    /// The interfaces that pods have, with their addresses: the kernel's truth.
    pub plugged: BTreeMap<Container, Vec<IpAddr>>,
    /// How many pods were ever begun.
    pub containers: Container,
    /// What goes with the agent.
    pub agent: Agent,
}

/// An agent.
#[derive(Debug, Clone)]
pub struct Agent {
    /// What it knows of the store.
    pub watcher: Watcher,
    /// The machine that an operator says this one is in place of.
    pub adopted: Option<Alive>,
    /// What its registrar has said last.
    pub registration: Registration,
    /// What its registrar remembers from step to step, once it has made one.
    pub state: Option<RegistrarState>,
    /// The attachments that somebody works on.
    pub locked: BTreeSet<Attachment>,
    /// What its registrar does.
    pub registrar: Option<Stopped>,
    /// The ADD that waits for the registrar.
    pub adding: Option<Stopped>,
    /// The DELs.
    pub deleting: BTreeMap<Container, Stopped>,
    /// What finishes the DELs of the agent before.
    pub sweeping: Option<Stopped>,
}

impl Machine {
    /// A machine that is not there yet.
    pub fn new(id: &'static str, name: &str, kernel: Kernel) -> Self {
        Self {
            id,
            kernel,
            name: name.parse().expect("a name"),
            power: Power::Blank,
            boots: 1,
            booted: 0,
            lives: 0,
            ipam: open(Memory::default(), &boot_id(kernel, id, 1)),
            plugged: BTreeMap::new(),
            containers: 0,
            agent: Agent::new(Watcher::default()),
        }
    }

    /// Its clock, at that tick.
    pub fn now(&self, tick: u8) -> Moment {
        Moment::from_millis(AFTER_BOOT + u64::from(tick - self.booted) * TICK)
    }

    /// Which boot it is.
    pub fn boot_id(&self) -> BootId {
        boot_id(self.kernel, self.id, self.boots)
    }

    /// `/etc/machine-id`.
    pub fn machine_id(&self) -> MachineId {
        match self.kernel {
            Kernel::Own => MachineId::new(self.id),
            Kernel::Shared => MachineId::new(format!("{}-{}", self.id, self.boots)),
        }
    }

    /// Who its ledger says it is.
    pub fn identity(&self) -> Option<Identity> {
        self.ipam.identity().expect("a ledger in memory")
    }

    /// The name of its next incarnation.
    pub fn next_incarnation(&self) -> String {
        format!("{}-i{}", self.id, self.lives + 1)
    }

    /// The node's addresses, to be changed.
    pub fn ipam(&mut self) -> &mut NodeIpam<Memory> {
        Arc::make_mut(&mut self.ipam)
    }

    /// The attachment of a pod.
    pub fn attachment(&self, container: Container) -> &'static Attachment {
        &ATTACHMENTS[&(self.id, container)]
    }

    /// The pod that has the attachment.
    pub fn container(&self, attachment: &Attachment) -> Option<Container> {
        (1..=self.containers).find(|container| self.attachment(*container) == attachment)
    }

    /// What is written down of all attachments but that one.
    pub fn others(&self, attachment: &Attachment) -> Vec<Held> {
        self.ipam.attachments().filter(|held| held.attachment != *attachment).cloned().collect()
    }

    /// The addresses that are in use on it: those of its pods, and its own.
    pub fn live(&self) -> impl Iterator<Item = IpAddr> {
        let serves = self.power == Power::On && self.agent.may_serve();
        let own = self.ipam.gateways().iter().filter(move |_| serves);
        self.plugged.values().flatten().chain(own).copied()
    }

    /// Starts its agent, in place of one that died.
    pub fn restart(&mut self) {
        self.ipam = open(self.ipam.ledger().clone(), &self.boot_id());
        self.agent = Agent::new(Watcher::from_snapshot(&self.agent.watcher));
    }

    /// Begins with a copy of another's ledger.
    pub fn copy(&mut self, other: &NodeIpam<Memory>) {
        self.ipam = open(other.ledger().clone(), &self.boot_id());
    }

    /// Begins anew without a ledger.
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

    /// Whether it takes pods, as far as it is for its registrar to say.
    pub fn may_serve(&self) -> bool {
        self.registration.forbids().is_none()
    }

    /// Whether its registrar has nothing else to do.
    pub fn is_idle(&self) -> bool {
        self.registrar.is_none()
    }

    /// Answers the ADD that waits for the registrar. False if none waits for that.
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

    /// The transactions that are under way for it.
    pub fn under_way(&self) -> impl Iterator<Item = &Sent> {
        self.tasks().filter_map(Stopped::under_way)
    }

    /// Its tasks.
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
    Arc::new(NodeIpam::with(ledger, boot_id, USUAL_REST).expect("a ledger in memory").0)
}
