//! All that there is: machines, the store, what is under way between them, and time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, NodeName, PoolName};
use polder_ipam::Revision;
use polder_ipam::allocator::SHORTEST_REST;
use polder_ipam::ids::{BootId, MachineId};
use polder_ipam::invariants::Deviation;
use polder_ipam::invariants::history::History;
use polder_ipam::key::Key;
use polder_ipam::ledger::Ledger as _;
use polder_ipam::node::NodeIpam;
use polder_ipam::publication::Basis;
use polder_ipam::record::{Alive, Life};
use polder_ipam::registration::{Holdings, Registration};
use polder_ipam::steward::Proof;
use polder_ipam::tasks::Me;
use polder_ipam::view::View;
use polder_ipam::{Cidr, Moment, Pool};

use crate::container::Container;
use crate::disk::Disk;
use crate::in_flight::InFlight;
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::settings;
use crate::store_request::Request;
use crate::task::Task;
use crate::{Follower, Model, Random};

/// How long a freed address rests where there are others.
pub const COOL_DOWN: Duration = Duration::from_secs(20);

/// How long an interface is missed before its address is free.
pub const GRACE_MS: u64 = 9_000;

/// How many of the last steps are kept for whoever looks at a failure.
const LOG: usize = 60;

/// How many of its last writes a store in a file can lose when the power is cut.
pub const TAIL: usize = 4;

/// A machine, and the node that it is.
#[expect(clippy::struct_excessive_bools, reason = "what can befall a machine, each by itself")]
pub struct Machine {
    /// The node's name. Another machine can have it, too.
    pub name: NodeName,
    /// `/etc/machine-id`.
    pub machine_id: MachineId,
    /// Which boot it is.
    pub boot_id: BootId,
    /// Milliseconds since boot, as its clock says.
    pub clock: u64,
    /// How many thousandths of a second its clock gains in a second.
    pub rate: u64,
    /// Whether it was switched off for good.
    pub is_destroyed: bool,
    /// Its kernel.
    pub kernel: Kernel,
    /// What its disk holds.
    pub disk: Disk,
    /// What its disk held before it was lost.
    pub lost_disk: Option<Disk>,
    /// Whether what the ledger says was compared with the kernel since it was lost.
    pub ledger_is_whole: bool,
    /// How many agents were started.
    pub epoch: u64,
    /// The agent that runs.
    pub agent: Option<Agent>,
    /// Whether its agent is not started again.
    pub is_stopped: bool,
    /// Whether nothing gets from it to the store or back.
    pub is_cut: bool,
    /// Whether the role of its user at the store lets it read only.
    pub reads_only: bool,
    /// What plugins took down while no agent ran.
    pub tombstones: BTreeSet<Attachment>,
    /// What the runtime was told that its containers have.
    pub promised: BTreeMap<Attachment, Vec<IpAddr>>,
}

/// What is in a kernel until the next boot.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// The pods' interfaces, with their addresses.
    pub interfaces: BTreeMap<Attachment, Vec<IpAddr>>,
    /// What the interfaces say of their attachments.
    pub aliases: BTreeMap<Attachment, String>,
    /// The network namespaces, by container.
    pub namespaces: BTreeSet<String>,
    /// The node's own addresses.
    pub gateways: Vec<IpAddr>,
    /// The attachments whose DEL did not wait for the end of their ADD. An interface that is made afterwards is deleted by the
    /// next pass.
    pub overtaken: BTreeSet<Attachment>,
    /// The attachments whose interfaces plugins are making.
    pub marked: InFlight,
}

impl Machine {
    /// Whether a plugin makes the interface of the attachment that an earlier agent has answered.
    pub fn is_wired_from_before(&self, attachment: &Attachment) -> bool {
        !self.is_locked_by_agent(attachment) && self.kernel.marked.borrow().contains(attachment)
    }

    /// Whether somebody works on the attachment.
    pub fn is_locked(&self, attachment: &Attachment) -> bool {
        self.is_locked_by_agent(attachment) || self.is_wired_from_before(attachment)
    }

    fn is_locked_by_agent(&self, attachment: &Attachment) -> bool {
        self.agent.as_ref().is_some_and(|agent| agent.in_flight.borrow().contains(attachment))
    }

    /// Whether the kernel has an interface that the ledger does not name any more, because its DEL was faster than its ADD.
    pub fn has_overtaken(&self) -> bool {
        let is_there = |attachment: &&Attachment| self.kernel.interfaces.contains_key(attachment);
        self.kernel.overtaken.iter().filter(is_there).any(|attachment| !self.disk.names(attachment))
    }
}

/// What an agent knows, and forgets when it ends.
#[expect(clippy::struct_excessive_bools, reason = "what its tasks tell each other, each by itself")]
pub struct Agent {
    /// Which one it is.
    pub epoch: u64,
    /// Who the node is.
    pub me: Rc<Me>,
    /// The node's addresses.
    pub ipam: NodeIpam<Disk>,
    /// The cluster.
    pub view: Arc<View>,
    /// How it learns of it.
    pub follower: Follower,
    /// Who works on which attachment.
    pub in_flight: InFlight,
    /// Whether the store knows the node, and whether it may serve.
    pub registration: Registration,
    /// What its registrar says that the node owns.
    pub holdings: Holdings,
    /// Whether it serves at all yet.
    pub is_open: bool,
    /// Wishes for blocks.
    pub claims: VecDeque<ClaimRequest>,
    /// Wishes for reserved addresses.
    pub reservations: VecDeque<ReserveRequest>,
    /// Whether the registrar has reason to look.
    pub news: bool,
    /// Whether an attachment came or went since the publisher has looked.
    pub is_unpublished: bool,
    /// The machine that an operator says this one is in place of.
    pub adopted: Option<Alive>,
    /// Losses of the store that its registrar knows of.
    pub losses: u64,
    /// Whether its registrar claims nothing because of them.
    pub caution: bool,
    /// What the last step of its registrar was, for people.
    pub last_step: String,
    /// The pools that it gives nothing new of: its registrar has seen that they are closed, and has nothing else to do.
    pub closed: Vec<ClosedPool>,
}

/// A pool of which no address goes to a new pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClosedPool {
    /// Its name.
    pub name: PoolName,
    /// The revision of its record.
    pub revision: Revision,
    /// Its range.
    pub cidr: Cidr,
}

impl Machine {
    /// Which machine it is, and which boot of it.
    pub fn life(&self) -> Life<'_> {
        Life { machine_id: &self.machine_id, boot_id: &self.boot_id }
    }

    /// Deletes what its disk holds. A ledger that says who the node is can come back later.
    pub fn lose_disk(&mut self) {
        let lost = self.disk.copy();
        if lost.identity().is_ok_and(|identity| identity.is_some()) {
            self.lost_disk = Some(lost);
        }
        self.disk.delete();
        self.ledger_is_whole = false;
    }

    /// What the node may say of itself in the store rests on this now, if an agent runs.
    pub fn basis(&self) -> Option<Basis> {
        let agent = self.agent.as_ref()?;
        Some(Basis::of(&agent.view, &self.name, agent.holdings.identity.as_ref(), self.life()))
    }

    /// The time on its clock.
    pub fn now(&self) -> Moment {
        Moment::from_millis(self.clock)
    }

    /// The agent that runs, as a number.
    pub fn epoch_running(&self) -> Option<u64> {
        self.agent.as_ref().map(|agent| agent.epoch)
    }
}

impl Agent {
    /// Whether nothing is claimed now, because the store has lost records.
    pub fn is_cautious(&self) -> bool {
        self.view.losses != self.losses || self.caution
    }

    /// Whether it must not serve.
    pub fn is_forbidden(&self) -> bool {
        self.registration.forbids().is_some()
    }
}

/// What is kept of the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Nothing: a seed that fails is played again.
    Nothing,
    /// The last ones.
    Last,
    /// All of them are printed.
    Printed,
}

/// What tells machines and their boots apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// A boot id for each boot, and a machine id that stays.
    Usual,
    /// Containers of one host: one boot id for all of them. A machine id can be another one after a restart.
    OneKernel,
    /// Both change at each boot, and the configuration says that the ledger alone counts.
    LedgerAlone,
}

/// Where the records are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// In an etcd that all machines share.
    Etcd,
    /// In a file of the one machine that there is.
    Embedded,
}

/// All that there is.
pub struct World {
    /// Chance.
    pub random: Random,
    /// What tells machines and their boots apart.
    pub ids: Ids,
    /// Milliseconds since the beginning, by no machine's clock.
    pub now: u64,
    /// Where the store is.
    pub keeping: Keeping,
    /// The store.
    pub etcd: Model,
    /// What a store in a file was before its last writes, the last one at the end.
    pub earlier: Vec<Model>,
    /// How often the store has lost records.
    pub set_backs: u64,
    /// What it was before.
    pub backups: Vec<Model>,
    /// The machines.
    pub machines: Vec<Machine>,
    /// What is on its way to the store and back.
    pub requests: Vec<Request>,
    /// The containers that the runtimes know of, and those that they have forgotten.
    pub containers: Vec<Container>,
    /// The records as they are.
    pub truth: View,
    /// How they are read.
    pub truth_follower: Follower,
    /// What was seen before.
    pub history: History,
    /// The pools that every node's configuration has for a new cluster.
    pub first_pools: Vec<Pool>,
    /// Whether the owners of lost records are putting them back.
    pub putting_back: bool,
    /// The last steps.
    pub log: VecDeque<String>,
    /// How often each thing happened.
    pub counts: BTreeMap<&'static str, u64>,
    /// What was found to be wrong in the middle of a step.
    pub found: Vec<Deviation>,
    /// Tasks that have not begun.
    pub spawned: Vec<Task>,
    /// What is kept of the steps.
    pub record: Record,
    numbers: u64,
}

impl World {
    /// An empty one.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            first_pools: settings::first_pools(&mut random),
            ids: *random.one_of(&[Ids::Usual, Ids::Usual, Ids::OneKernel, Ids::LedgerAlone]),
            random,
            now: 0,
            keeping: Keeping::Etcd,
            etcd: Model::new(),
            earlier: Vec::new(),
            set_backs: 0,
            backups: Vec::new(),
            machines: Vec::new(),
            requests: Vec::new(),
            containers: Vec::new(),
            truth: View::default(),
            truth_follower: Follower::new(Key::followed()),
            history: History::new(SHORTEST_REST),
            putting_back: false,
            log: VecDeque::new(),
            counts: BTreeMap::new(),
            found: Vec::new(),
            spawned: Vec::new(),
            record: Record::Nothing,
            numbers: 0,
        }
    }

    /// A number that was not given before.
    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Keeps what happens for whoever looks at a failure.
    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if self.record == Record::Nothing {
            return;
        }
        let line = format!("{:>9.3} s  {}", Duration::from_millis(self.now).as_secs_f64(), what());
        if self.record == Record::Printed {
            println!("{line}");
        }
        self.log.push_back(line);
        if self.log.len() > LOG {
            self.log.pop_front();
        }
    }

    /// Counts something that happened.
    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// What proves that a machine is the node of its ledger.
    pub fn proof(&self) -> Proof {
        if self.ids == Ids::LedgerAlone { Proof::Ledger } else { Proof::Machine }
    }

    /// The id of a new boot.
    pub fn new_boot_id(&mut self) -> BootId {
        BootId::new(match self.ids {
            Ids::OneKernel => "boot-of-all".to_owned(),
            _ => format!("boot-{}", self.number()),
        })
    }

    /// The machines of that name that are not gone.
    pub fn namesakes(&self, name: &NodeName) -> Vec<usize> {
        let is_one = |index: &usize| {
            let machine = &self.machines[*index];
            machine.name == *name && !machine.is_destroyed
        };
        (0..self.machines.len()).filter(is_one).collect()
    }

    /// Takes in that the store has lost records: what it says now was not said after what it said before.
    pub fn store_was_set_back(&mut self) {
        self.set_backs += 1;
        self.putting_back = true;
        self.history.store_was_set_back();
        self.look();
    }

    /// Keeps the truth true.
    pub fn look(&mut self) {
        if self.truth.revision == self.etcd.revision() && self.truth.cluster.is_some() {
            return;
        }
        for _ in 0..3 {
            for update in self.truth_follower.poll(&self.etcd) {
                self.truth.apply(update);
            }
        }
        self.history.forget_given_up(&self.truth);
    }

    /// Ends an agent. Its tasks are the scheduler's to end.
    pub fn kill_agent(&mut self, machine: usize) {
        self.machines[machine].agent = None;
        self.leave_all(|request| request.machine == machine);
    }
}

/// All that there is, shared by the tasks.
pub type Shared = Rc<std::cell::RefCell<World>>;
