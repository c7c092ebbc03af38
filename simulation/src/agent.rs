//! The agent of a node: the production tasks of [`polder_ipam::tasks`], with data in place of a kernel and a store.

pub mod engine;
pub mod host;
pub mod publisher;
pub mod registrar;
pub mod registrar_requests;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, Mac};
use polder_ipam::Revision;
use polder_ipam::bootstrap::Bootstrap;
use polder_ipam::change::Change;
use polder_ipam::key::{Key, Range};
use polder_ipam::membership::Proof;
use polder_ipam::node::NodeIpam;
use polder_ipam::record::ClusterRecord;
use polder_ipam::recovery::{self, LivingPod, NotRestored};
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::store::{Contents, Outcome, StoreError, position};
use polder_ipam::tasks::publisher::run as run_publisher;
use polder_ipam::tasks::{CATCH_UP, OwnNode, orphan_collector, tombstones};
use polder_ipam::transaction::transaction;
use polder_ipam::view::View;
use polder_ipam::{Moment, Pool};

use crate::Watcher;
use crate::disk::Disk;
use crate::etcd::Operation;
use crate::in_flight::InFlight;
use crate::settings;
use crate::store_request::{StoreOperation, StoreReply, no_answer};
use crate::task::{Owner, Pause, Task, Wait, Waiting};
use crate::world::{Agent, COOL_DOWN, Kernel, Machine, Shared, StoreKind, World};

/// Handle of a task to the simulated world.
#[derive(Clone)]
pub struct SimHost {
    /// The simulated world.
    pub world: Shared,
    /// Index of the machine on which the task runs.
    pub machine: usize,
    /// Epoch of the agent that owns the task; 0 for a plugin.
    pub epoch: u64,
    /// Whether the task, like a DEL, marks an attachment as deleted meanwhile if the wait for its lock times out.
    marks_deleted: bool,
    waiting: Waiting,
}

impl SimHost {
    /// A handle for a new task of the agent.
    pub fn new(world: &Shared, machine: usize, epoch: u64) -> Self {
        Self { world: Rc::clone(world), machine, epoch, marks_deleted: true, waiting: Rc::default() }
    }

    /// Runs an action on the world.
    pub fn with<T>(&self, action: impl FnOnce(&mut World) -> T) -> T {
        action(&mut self.world.borrow_mut())
    }

    /// Runs an action on the agent, which exists as long as its tasks.
    pub fn agent<T>(&self, action: impl FnOnce(&mut Agent) -> T) -> T {
        self.with(|world| {
            let agent = world.machines[self.machine].agent.as_mut();
            action(agent.expect("a task of an agent ends with it"))
        })
    }

    /// Runs an action on the node's addresses. Changes are on disk when this returns.
    pub fn ipam<T>(&self, action: impl FnOnce(&mut NodeIpam<Disk>, Moment) -> T) -> T {
        self.with(|world| {
            let machine = &mut world.machines[self.machine];
            let now = machine.now();
            action(&mut machine.agent.as_mut().expect("a task of an agent ends with it").ipam, now)
        })
    }

    /// The machine's clock, in milliseconds.
    pub fn clock(&self) -> u64 {
        self.with(|world| world.machines[self.machine].clock)
    }

    /// The agent's view of the cluster.
    pub fn view(&self) -> Arc<View> {
        self.agent(|agent| Arc::clone(&agent.view))
    }

    /// The attachments whose interfaces plugins are creating.
    pub fn in_creation(&self) -> InFlight {
        self.with(|world| Rc::clone(&world.machines[self.machine].kernel.in_creation))
    }

    /// Waits for the condition.
    pub async fn wait(&self, wait: Wait) {
        Pause::new(&self.world, self.machine, &self.waiting, wait).await;
    }

    /// Ends a step: the task continues at its next turn.
    pub async fn turn(&self) {
        self.wait(Wait::Turn).await;
    }

    /// Waits for this time on the machine's clock, in milliseconds.
    pub async fn sleep(&self, millis: u64) {
        self.wait(Wait::Until(self.clock() + millis)).await;
    }

    /// Commits a change to the store.
    pub async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        match self.call_store(StoreOperation::Commit(transaction(change))).await? {
            StoreReply::Outcome(outcome) => Ok(outcome),
            other => Err(other.error()),
        }
    }

    /// Reads a range of the store.
    pub async fn range(&self, range: Range) -> Result<Contents, StoreError> {
        match self.call_store(StoreOperation::Range(range)).await? {
            StoreReply::Contents(contents) => Ok(contents),
            other => Err(other.error()),
        }
    }

    /// Sends a request to the store and waits for the reply.
    async fn call_store(&self, operation: StoreOperation) -> Result<StoreReply, StoreError> {
        let is_commit = matches!(operation, StoreOperation::Commit(_));
        let id = self.with(|world| world.send_request(self.machine, operation));
        let mut pending = PendingRequest { host: self, id, is_commit, is_answered: false };
        self.wait(Wait::Reply(id)).await;
        pending.is_answered = true;
        self.with(|world| world.take_answer(id))
    }

    /// Waits, at most [`CATCH_UP`], until the agent's view shows that revision.
    pub async fn wait_for_revision(&self, revision: Revision) -> Result<(), StoreError> {
        self.wait(Wait::Revision(revision, self.clock() + host::millis(CATCH_UP))).await;
        if self.view().revision >= revision { Ok(()) } else { Err(no_answer()) }
    }

    /// The identity of the node.
    pub fn own_node(&self) -> Rc<OwnNode> {
        self.agent(|agent| Rc::clone(&agent.me))
    }

    /// A name that is unique in the simulation.
    pub fn unique_name(&self) -> String {
        self.with(|world| format!("x{}", world.number()))
    }

    /// Writes a line to the log, with the machine and its name.
    pub fn note(&self, what: impl FnOnce() -> String) {
        self.with(|world| {
            let name = format!("{}/{}", self.machine, world.machines[self.machine].name);
            world.note(|| format!("{name}: {}", what()));
        });
    }
}

/// A request whose reply a task waits for. If the wait is dropped, the request can still arrive.
struct PendingRequest<'a> {
    host: &'a SimHost,
    id: u64,
    is_commit: bool,
    is_answered: bool,
}

impl Drop for PendingRequest<'_> {
    fn drop(&mut self) {
        if self.is_answered {
            return;
        }
        let SimHost { machine, epoch, .. } = *self.host;
        self.host.with(|world| {
            world.abandon(self.id);
            // While the agent runs, only the publisher abandons a change.
            if self.is_commit && world.machines[machine].epoch_running() == Some(epoch) {
                world.count(publisher::CANCELLED);
            }
        });
    }
}

/// Time after the start of a plugin, in milliseconds, from which it continues at once whenever it is ready.
pub const PLUGIN_TIMEOUT_MS: u64 = 4_000;

/// Starts a task of the agent.
pub fn spawn<F: Future<Output = ()> + 'static>(
    world: &Shared,
    machine: usize,
    epoch: u64,
    name: &str,
    task: impl FnOnce(SimHost) -> F,
) {
    let host = SimHost::new(world, machine, epoch);
    let waiting = Rc::clone(&host.waiting);
    let task = Task::new(machine, Owner::Agent(epoch), name.to_owned(), u64::MAX, waiting, task(host));
    world.borrow_mut().spawned.push(task);
}

/// Starts a plugin task. It outlives the agent. Returns its number.
pub fn spawn_plugin<F: Future<Output = ()> + 'static>(
    world: &Shared,
    machine: usize,
    name: &str,
    task: impl FnOnce(SimHost, u64) -> F,
) -> u64 {
    let (number, deadline) = {
        let mut world = world.borrow_mut();
        (world.number(), world.now + PLUGIN_TIMEOUT_MS)
    };
    let host = SimHost::new(world, machine, 0);
    let waiting = Rc::clone(&host.waiting);
    let owner = Owner::Plugin(number);
    let task = Task::new(machine, owner, name.to_owned(), deadline, waiting, task(host, number));
    world.borrow_mut().spawned.push(task);
    number
}

/// Starts the agent of a machine that has none. First it restores lost ledger entries from the kernel. Returns false
/// if the disk is full.
pub fn start(world: &Shared, index: usize) -> bool {
    let number = world.borrow_mut().number();
    let mut guard = world.borrow_mut();
    let proof = guard.proof();
    let World { machines, first_pools, store_kind, etcd, .. } = &mut *guard;
    let machine = &mut machines[index];
    let Ok((ipam, void_attachments)) = NodeIpam::with(machine.disk.clone(), &machine.boot_id, COOL_DOWN)
    else {
        return false;
    };
    let mut ipam = ipam.with_low_water(2);
    if recover(&mut ipam, &machine.kernel, machine.now()).is_err() {
        return false;
    }
    machine.ledger_is_whole = true;
    machine.epoch = number;
    if *store_kind == StoreKind::Embedded {
        // The leases of an embedded store end with the agent: the records of the previous agent are stale.
        let _ = etcd.transact(&[], &[Operation::Delete(Key::all_leases())]);
    }
    let me = own_node(machine, proof, first_pools.clone());
    let leaving: Vec<Attachment> =
        ipam.attachments().filter(|held| held.leaving).map(|held| held.attachment.clone()).collect();
    machine.agent = Some(Agent {
        epoch: number,
        me: Rc::new(me),
        ipam,
        view: Arc::default(),
        watcher: Watcher::new(Key::followed()),
        in_flight: InFlight::default(),
        registration: Registration::default(),
        allocations: Allocations::default(),
        is_open: false,
        claims: VecDeque::new(),
        reservations: VecDeque::new(),
        must_check_records: true,
        is_unpublished: false,
        adopted: None,
        losses: 0,
        hold_off: false,
        last_step: String::new(),
        closed: Vec::new(),
    });
    if machine.is_partitioned {
        machine.agent.as_mut().expect("just made").watcher.cut();
    }
    guard.note(|| format!("{index}: agent {number} starts, {} attachments are void", void_attachments.len()));
    drop(guard);
    spawn(world, index, number, "main", |host| async move {
        tombstones::apply_all(&host).await;
        host.agent(|agent| agent.is_open = true);
        let SimHost { world, machine, epoch, .. } = &host;
        spawn(world, *machine, *epoch, "verifier", verify);
        spawn(world, *machine, *epoch, "registrar", registrar::run);
        spawn(world, *machine, *epoch, "engine", engine::run);
        spawn(world, *machine, *epoch, "publisher", async move |host| {
            run_publisher(&host, &host.own_node()).await;
        });
        spawn(world, *machine, *epoch, "orphan collector", async move |host| {
            orphan_collector::run(&host, leaving, GRACE).await;
        });
    });
    true
}

/// The identity of the node on that machine, in the current boot.
fn own_node(machine: &Machine, proof: Proof, pools: Vec<Pool>) -> OwnNode {
    let ClusterRecord { backend, attach, vxlan, masquerade, .. } = settings::first_settings();
    OwnNode {
        name: machine.name.clone(),
        machine_id: machine.machine_id.clone(),
        boot_id: machine.boot_id.clone(),
        proof,
        bootstrap: Some(Bootstrap { pools, backend, attach, vxlan, masquerade }),
        cooldown: COOL_DOWN,
    }
}

/// Verifies periodically that the watch has missed nothing.
async fn verify(host: SimHost) {
    loop {
        host.sleep(host::millis(VERIFY_EVERY)).await;
        host.with(|world| {
            let World { machines, etcd, .. } = world;
            let agent = machines[host.machine].agent.as_mut().expect("a task of an agent ends with it");
            if let Some(update) = agent.watcher.verify(etcd) {
                Arc::make_mut(&mut agent.view).apply(update);
                agent.must_check_records = true;
            }
        });
    }
}

/// If the ledger has no identity, restores its entries from the kernel.
fn recover(ipam: &mut NodeIpam<Disk>, kernel: &Kernel, now: Moment) -> Result<(), NotRestored> {
    // Reading a simulated ledger cannot fail.
    if ipam.identity().is_ok_and(|identity| identity.is_some()) {
        return Ok(());
    }
    let pods = kernel.interfaces.iter().map(|(attachment, addresses)| LivingPod {
        name: attachment.host_interface(),
        alias: kernel.aliases.get(attachment).cloned().unwrap_or_default(),
        mac: Mac::of_pod(addresses[0]),
        mtu: host::MTU,
        addresses: addresses.clone(),
        ports: Vec::new(),
    });
    recovery::recover(ipam, &kernel.gateways, pods.collect(), now)
}

/// Interval of the verifier: a third of the real interval, so that a cluster recovers within the test time.
const VERIFY_EVERY: Duration = position::VERIFY_EVERY.checked_div(3).expect("the divisor is not 0");

/// How long an interface may be missing before its address is released.
pub const GRACE: Duration = Duration::from_millis(crate::world::GRACE_MS);
