//! The simulated world: machines, the store, requests in flight, and time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, NodeName, PoolName};
use polder_ipam::Revision;
use polder_ipam::allocator::SHORTEST_COOL_DOWN;
use polder_ipam::ids::{BootId, MachineId};
use polder_ipam::invariants::Deviation;
use polder_ipam::invariants::history::History;
use polder_ipam::key::Key;
use polder_ipam::ledger::Ledger as _;
use polder_ipam::membership::Proof;
use polder_ipam::node::NodeIpam;
use polder_ipam::publication::Basis;
use polder_ipam::record::{Boot, LeaseRecord};
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::tasks::OwnNode;
use polder_ipam::view::View;
use polder_ipam::{Cidr, Moment, Pool};

use crate::container::Container;
use crate::disk::Disk;
use crate::in_flight::InFlight;
use crate::requests::{ClaimRequest, ReserveRequest};
use crate::settings;
use crate::store_request::Request;
use crate::task::Task;
use crate::{Model, Random, Watcher};

/// Cool-down of a released address, if others are available.
pub const COOL_DOWN: Duration = Duration::from_secs(20);

/// Time for which an interface must be missing before its address is released, in milliseconds.
pub const GRACE_MS: u64 = 9_000;

/// Number of log lines kept to diagnose a failure.
const LOG: usize = 60;

/// Number of earlier states kept of an embedded store. A power failure loses fewer writes than that.
pub const TAIL: usize = 4;

/// A machine and its node.
#[expect(clippy::struct_excessive_bools, reason = "what can befall a machine, each by itself")]
pub struct Machine {
    /// The node's name. Another machine can have the same name.
    pub name: NodeName,
    /// The machine id, as in `/etc/machine-id`.
    pub machine_id: MachineId,
    /// The boot id of the current boot.
    pub boot_id: BootId,
    /// The machine's clock: milliseconds since its kernel booted, at the clock's speed.
    pub clock: u64,
    /// Clock speed: milliseconds that the clock gains per second of [`World::now`].
    pub rate: u64,
    /// Whether the machine is destroyed permanently.
    pub is_destroyed: bool,
    /// The kernel state.
    pub kernel: Kernel,
    /// The disk with the ledger.
    pub disk: Disk,
    /// A copy of the disk before the ledger was lost.
    pub lost_disk: Option<Disk>,
    /// Whether the ledger was restored from the kernel since it was last lost.
    pub ledger_is_whole: bool,
    /// Number of the last agent started; unique in the simulation.
    pub epoch: u64,
    /// The running agent.
    pub agent: Option<Agent>,
    /// Whether the agent must not be restarted.
    pub is_stopped: bool,
    /// Whether the machine is partitioned from the store.
    pub is_partitioned: bool,
    /// Whether the machine's store role is read-only.
    pub reads_only: bool,
    /// The attachments that plugins removed while no agent ran.
    pub tombstones: BTreeSet<Attachment>,
    /// The addresses that the runtime received for its containers.
    pub promised: BTreeMap<Attachment, Vec<IpAddr>>,
}

/// Kernel state, lost at a reboot.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// The pods' interfaces, with their addresses.
    pub interfaces: BTreeMap<Attachment, Vec<IpAddr>>,
    /// The interface aliases, which describe the attachments.
    pub aliases: BTreeMap<Attachment, String>,
    /// The network namespaces, by container.
    pub namespaces: BTreeSet<String>,
    /// The node's own addresses.
    pub gateways: Vec<IpAddr>,
    /// The attachments whose DEL did not wait for the end of the ADD. The next pass deletes an interface that is
    /// created afterwards.
    pub deleted_meanwhile: BTreeSet<Attachment>,
    /// The attachments whose interfaces plugins are creating.
    pub in_creation: InFlight,
}

impl Machine {
    /// Whether a plugin is creating the interface of the attachment after a reply of an earlier agent.
    pub fn is_wired_by_earlier_process(&self, attachment: &Attachment) -> bool {
        !self.is_locked_by_agent(attachment) && self.kernel.in_creation.borrow().contains(attachment)
    }

    /// Whether a task works on the attachment.
    pub fn is_locked(&self, attachment: &Attachment) -> bool {
        self.is_locked_by_agent(attachment) || self.is_wired_by_earlier_process(attachment)
    }

    fn is_locked_by_agent(&self, attachment: &Attachment) -> bool {
        self.agent.as_ref().is_some_and(|agent| agent.in_flight.borrow().contains(attachment))
    }

    /// Whether the kernel has an interface that is not in the ledger any more, because the DEL overtook the ADD.
    pub fn has_overtaken(&self) -> bool {
        let is_there = |attachment: &&Attachment| self.kernel.interfaces.contains_key(attachment);
        self.kernel.deleted_meanwhile.iter().filter(is_there).any(|attachment| !self.disk.names(attachment))
    }
}

/// The state of an agent, lost when it ends.
#[expect(clippy::struct_excessive_bools, reason = "what its tasks tell each other, each by itself")]
pub struct Agent {
    /// The agent's number.
    pub epoch: u64,
    /// The identity of the node.
    pub me: Rc<OwnNode>,
    /// The node's addresses.
    pub ipam: NodeIpam<Disk>,
    /// The agent's view of the cluster.
    pub view: Arc<View>,
    /// The watcher that updates the view.
    pub watcher: Watcher,
    /// The attachments on which tasks work.
    pub in_flight: InFlight,
    /// Whether the node is registered, and whether it may serve.
    pub registration: Registration,
    /// The node's allocations, as announced by the registrar.
    pub allocations: Allocations,
    /// Whether the agent accepts requests.
    pub is_open: bool,
    /// Requests for blocks, for the registrar.
    pub claims: VecDeque<ClaimRequest>,
    /// Requests for reserved addresses, for the registrar.
    pub reservations: VecDeque<ReserveRequest>,
    /// Whether the registrar must check the records.
    pub must_check_records: bool,
    /// Whether an attachment was added or removed since the publisher last checked.
    pub is_unpublished: bool,
    /// The machine that this one replaces, as declared by an operator.
    pub adopted: Option<LeaseRecord>,
    /// Number of store losses that the registrar has handled.
    pub losses: u64,
    /// Whether the registrar makes no claims because of a loss.
    pub hold_off: bool,
    /// The last step of the registrar, for the log.
    pub last_step: String,
    /// The pools from which it allocates nothing new: its registrar has seen that they are closed, and has settled.
    pub closed: Vec<ClosedPool>,
}

/// A pool that gives no address to new pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClosedPool {
    /// Name of the pool.
    pub name: PoolName,
    /// The revision of its record.
    pub revision: Revision,
    /// The CIDR of the pool.
    pub cidr: Cidr,
}

impl Machine {
    /// The machine id and the boot id.
    pub fn boot(&self) -> Boot<'_> {
        Boot { machine_id: &self.machine_id, boot_id: &self.boot_id }
    }

    /// Deletes the ledger. A copy with an identity is kept, so that it can return later.
    pub fn lose_disk(&mut self) {
        let lost = self.disk.copy();
        if lost.identity().is_ok_and(|identity| identity.is_some()) {
            self.lost_disk = Some(lost);
        }
        self.disk.delete();
        self.ledger_is_whole = false;
    }

    /// The current basis of the node's records in the store, if an agent runs.
    pub fn basis(&self) -> Option<Basis> {
        let agent = self.agent.as_ref()?;
        Some(Basis::of(&agent.view, &self.name, agent.allocations.identity.as_ref(), self.boot()))
    }

    /// The time on the machine's clock.
    pub fn now(&self) -> Moment {
        Moment::from_millis(self.clock)
    }

    /// The number of the running agent.
    pub fn epoch_running(&self) -> Option<u64> {
        self.agent.as_ref().map(|agent| agent.epoch)
    }
}

impl Agent {
    /// Whether claims are suspended because the store has lost records.
    pub fn holds_off(&self) -> bool {
        self.view.losses != self.losses || self.hold_off
    }

    /// Whether the node must not serve.
    pub fn is_forbidden(&self) -> bool {
        self.registration.not_serving_reason().is_some()
    }
}

/// How steps are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Not at all: a seed that fails runs again.
    Nothing,
    /// The last steps are kept.
    Last,
    /// All steps are printed.
    Printed,
}

/// The ids that distinguish machines and boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// The boot id changes at each boot; the machine id is constant.
    Usual,
    /// Containers on one host: one boot id for all. The machine id can change at a restart.
    OneKernel,
    /// Both ids change at each boot, and the configuration accepts the ledger alone as proof.
    LedgerAlone,
}

/// Location of the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    /// An etcd that all machines share.
    Etcd,
    /// A local file of the only machine.
    Embedded,
}

/// The simulated world.
pub struct World {
    /// The random number generator.
    pub random: Random,
    /// The ids that distinguish machines and boots.
    pub ids: Ids,
    /// Milliseconds since the start, independent of the machines' clocks.
    pub now: u64,
    /// Location of the records.
    pub store_kind: StoreKind,
    /// The store.
    pub etcd: Model,
    /// The states of an embedded store before its last writes, the latest at the end.
    pub earlier: Vec<Model>,
    /// Number of times that the store has lost records.
    pub store_losses: u64,
    /// Backups of the store, at most 2.
    pub backups: Vec<Model>,
    /// The machines, by index.
    pub machines: Vec<Machine>,
    /// The requests in flight to the store and back.
    pub requests: Vec<Request>,
    /// All containers ever created, by index.
    pub containers: Vec<Container>,
    /// A view of the current records.
    pub truth: View,
    /// The watcher that updates `truth`.
    pub truth_watcher: Watcher,
    /// Earlier observations, for invariants over time.
    pub history: History,
    /// The initial pools in every node's configuration.
    pub first_pools: Vec<Pool>,
    /// Whether the owners of lost records are restoring them.
    pub is_restoring: bool,
    /// The last log lines.
    pub log: VecDeque<String>,
    /// Number of occurrences of each event.
    pub counts: BTreeMap<&'static str, u64>,
    /// Violations found within a step.
    pub found: Vec<Deviation>,
    /// Tasks that have not started yet.
    pub spawned: Vec<Task>,
    /// How steps are recorded.
    pub record: Record,
    numbers: u64,
}

impl World {
    /// A world without machines, with an empty store.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            first_pools: settings::first_pools(&mut random),
            ids: *random.one_of(&[Ids::Usual, Ids::Usual, Ids::OneKernel, Ids::LedgerAlone]),
            random,
            now: 0,
            store_kind: StoreKind::Etcd,
            etcd: Model::new(),
            earlier: Vec::new(),
            store_losses: 0,
            backups: Vec::new(),
            machines: Vec::new(),
            requests: Vec::new(),
            containers: Vec::new(),
            truth: View::default(),
            truth_watcher: Watcher::new(Key::followed()),
            history: History::new(SHORTEST_COOL_DOWN),
            is_restoring: false,
            log: VecDeque::new(),
            counts: BTreeMap::new(),
            found: Vec::new(),
            spawned: Vec::new(),
            record: Record::Nothing,
            numbers: 0,
        }
    }

    /// A number that was not used before.
    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Adds a line to the log.
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

    /// Counts an event.
    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// The proof that a machine is the node of its ledger.
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

    /// Indices of the machines with that name that are not destroyed.
    pub fn machines_named(&self, name: &NodeName) -> Vec<usize> {
        let is_one = |index: &usize| {
            let machine = &self.machines[*index];
            machine.name == *name && !machine.is_destroyed
        };
        (0..self.machines.len()).filter(is_one).collect()
    }

    /// Records that the store has lost records: its current state does not follow from the previous one.
    pub fn note_store_loss(&mut self) {
        self.store_losses += 1;
        self.is_restoring = true;
        self.history.store_was_set_back();
        self.observe();
    }

    /// Updates `truth` from the store.
    pub fn observe(&mut self) {
        if self.truth.revision == self.etcd.revision() && self.truth.cluster.is_some() {
            return;
        }
        for _ in 0..3 {
            for update in self.truth_watcher.poll(&self.etcd) {
                self.truth.apply(update);
            }
        }
        self.history.forget_given_up(&self.truth);
    }

    /// Ends an agent. The scheduler ends its tasks.
    pub fn kill_agent(&mut self, machine: usize) {
        self.machines[machine].agent = None;
        self.abandon_all(|request| request.machine == machine);
    }
}

/// The world, shared by all tasks.
pub type Shared = Rc<std::cell::RefCell<World>>;
