//! A machine of the cluster: what survives its agent, what its agent has in mind, and the truth about its pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use polder_api::{Attachment, NodeName};
use polder_ipam::allocator::USUAL_REST;
use polder_ipam::attempt::{Attempt, Doubt};
use polder_ipam::change::Change;
use polder_ipam::ids::Incarnation;
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{Identity, OwnedBlock};
use polder_ipam::node::NodeIpam;
use polder_ipam::record::Alive;
use polder_ipam::removal::Quarantine;
use polder_ipam::steward::Double;
use polder_ipam::store::Txn;
use polder_ipam::{Block, Moment};

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

/// What an agent has in mind.
#[derive(Debug, Clone)]
pub struct Agent {
    /// What it knows of the store.
    pub watcher: Watcher,
    /// Whether it has taken in which pools there are: they stay what they are.
    pub learned: bool,
    /// Whether somebody else lives under its name, as far as this round knows.
    pub double: Double,
    /// The machine that an operator says this one is in place of.
    pub adopted: Option<Alive>,
    /// Whether it takes pods.
    pub service: Service,
    /// Whether no block was to be had in this round.
    pub unclaimable: bool,
    /// The removed nodes whose blocks rest.
    pub quarantine: Quarantine,
    /// Whether the store has lost records just now.
    pub cautious: bool,
    /// Losses of the store that are known.
    pub losses: u64,
    /// What its registrar waits for.
    pub registrar: Option<Errand>,
    /// What an ADD of a pod with a reserved address waits for.
    pub adding: Option<Errand>,
}

/// Whether an agent takes pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    /// It does, as far as it is for the registrar to say.
    Open,
    /// It must not.
    Forbidden,
}

/// Something that takes more than one step.
#[derive(Debug, Clone)]
pub struct Errand {
    /// What it is for.
    pub goal: Goal,
    /// How far it has come.
    pub stage: Stage,
}

/// What an errand is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Goal {
    /// A change that the steward wants made.
    Write(Arc<Change>),
    /// A block.
    Claim {
        /// Those that were tried.
        lost: BTreeSet<Block>,
        /// The one that is being tried.
        attempt: Option<OwnedBlock>,
    },
    /// A reserved address.
    HandOver {
        /// For which pod.
        container: Container,
        /// The address.
        address: IpAddr,
    },
}

/// How far an errand has come.
#[derive(Debug, Clone)]
pub enum Stage {
    /// What is to be tried is to be chosen.
    Ready,
    /// A transaction is under way.
    UnderWay(Sent),
    /// It is not known what became of it.
    Unknown(Doubt),
    /// It took effect, at this revision; 0 if that was seen by looking.
    Won(i64),
}

/// A transaction, and who sent it.
#[derive(Debug, Clone)]
pub struct Sent {
    /// What its sender makes of the answer.
    pub attempt: Attempt,
    /// Who.
    pub by: Option<Incarnation>,
    /// Whether it is the one that a removed node may still write.
    pub confirms: bool,
    /// What.
    pub txn: Arc<Txn>,
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
    pub fn boot_id(&self) -> String {
        boot_id(self.kernel, self.id, self.boots)
    }

    /// `/etc/machine-id`.
    pub fn machine_id(&self) -> String {
        match self.kernel {
            Kernel::Own => self.id.to_owned(),
            Kernel::Shared => format!("{}-{}", self.id, self.boots),
        }
    }

    /// Who its ledger says it is.
    pub fn identity(&self) -> Option<Identity> {
        self.ipam.identity().expect("a ledger in memory")
    }

    /// The node's addresses, to be changed.
    pub fn ipam(&mut self) -> &mut NodeIpam<Memory> {
        Arc::make_mut(&mut self.ipam)
    }

    /// The attachment of a pod.
    pub fn attachment(&self, container: Container) -> &'static Attachment {
        &ATTACHMENTS[&(self.id, container)]
    }

    /// The pods whose attachments are being taken away.
    pub fn leaving(&self) -> Vec<Container> {
        let is_leaving = |container: &Container| {
            self.ipam.get(self.attachment(*container)).is_some_and(|held| held.leaving)
        };
        (1..=self.containers).filter(is_leaving).collect()
    }

    /// The addresses that are in use on it: those of its pods, and its own.
    pub fn live(&self) -> impl Iterator<Item = IpAddr> {
        let serves = self.power == Power::On && self.agent.service == Service::Open;
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

impl Errand {
    /// Whether what is under way for it has something in it.
    pub fn mentions(&self, is_in: &impl Fn(&Sent) -> bool) -> bool {
        // What has won or is unknown has left the network, and its block is compared by all of its entry.
        matches!(&self.stage, Stage::UnderWay(sent) if is_in(sent))
    }
}

impl Agent {
    fn new(watcher: Watcher) -> Self {
        Self {
            watcher,
            learned: false,
            double: Double::Unasked,
            adopted: None,
            // Who it is, is not known before its registrar has looked.
            service: Service::Forbidden,
            unclaimable: false,
            quarantine: Quarantine::new(USUAL_REST),
            cautious: false,
            losses: 0,
            registrar: None,
            adding: None,
        }
    }

    /// What it waits for.
    pub fn errands(&self) -> impl Iterator<Item = &Errand> {
        self.registrar.iter().chain(&self.adding)
    }

    /// Whether its registrar has nothing else to do. It is the registrar, too, who gets reserved addresses.
    pub fn is_idle(&self) -> bool {
        self.registrar.is_none() && !self.is_handing_over()
    }

    /// Whether its registrar gets a reserved address.
    pub fn is_handing_over(&self) -> bool {
        self.adding.as_ref().is_some_and(|adding| !matches!(adding.stage, Stage::Won(_)))
    }

    /// Ends a round of the registrar.
    pub fn end_round(&mut self) {
        self.double = Double::Unasked;
        self.unclaimable = false;
        self.registrar = None;
    }
}

fn boot_id(kernel: Kernel, machine: &str, boots: u8) -> String {
    match kernel {
        Kernel::Own => format!("{machine}-boot-{boots}"),
        Kernel::Shared => "boot".to_owned(),
    }
}

fn open(ledger: Memory, boot_id: &str) -> Arc<NodeIpam<Memory>> {
    Arc::new(NodeIpam::with(ledger, boot_id, USUAL_REST).expect("a ledger in memory").0)
}
