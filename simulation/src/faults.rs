//! What goes wrong, at any step: to agents, machines, disks, and the way to the store.

use polder_ipam::ledger::Ledger;
use polder_ipam::removal::Vouched;

use crate::agent;
use crate::disk::Disk;
use crate::etcd::Space;
use crate::operator;
use crate::runtime;
use crate::schedule::Schedule;
use crate::world::{Ids, Machine, Progress, World, no_answer};

/// Something that can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The agent dies, and what it had in memory.
    Crash,
    /// The machine is booted. All that was in its kernel is gone.
    Reboot,
    /// The power is cut: with the kernel, the last writes to the ledger are gone.
    PowerCut,
    /// The agent ends, and somebody deletes its ledger.
    LedgerDeleted,
    /// The machine is booted with an empty disk.
    DiskWiped,
    /// Nothing more can be written to the disk, or again.
    DiskFull,
    /// A request never arrives.
    RequestLost,
    /// A request arrives after who asked has given it up.
    RequestLate,
    /// A request takes effect, and its reply is lost.
    ReplyLost,
    /// Nothing gets from a node to the store or back, or again.
    Partition,
    /// The store chooses another leader: what is under way is given up.
    LeaderChange,
    /// The store has no space left, or again.
    NoSpace,
    /// A node may only read what is in the store, or may write again.
    ReadsOnly,
    /// A watch ends, and begins again.
    WatchEnds,
    /// What a watch says arrives late, or at last.
    WatchDelayed,
    /// A watch says something again.
    WatchRepeats,
    /// The store forgets its history.
    Compaction,
    /// The store is emptied.
    StoreEmptied,
    /// The store is set back to what it was.
    StoreRestored,
    /// A plugin is killed.
    PluginKilled,
    /// A node is removed that lives.
    NodeRemoved,
    /// A machine is gone for good, its node is removed, and another of its name comes.
    NodeReplaced,
    /// Another machine comes under the name of one that lives.
    Rival,
    /// Another machine comes with a copy of the ledger of one that lives. Both of its ids are its own.
    LedgerCopied,
    /// A machine is booted with the ledger that it had lost, when it has been another incarnation since.
    LedgerBack,
    /// The clock of a machine begins to run at another speed.
    ClockSpeed,
    /// A pool is drained, or used again.
    PoolTurned,
    /// A pool is added.
    PoolAdded,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 28] = [
        Self::Crash,
        Self::Reboot,
        Self::PowerCut,
        Self::LedgerDeleted,
        Self::DiskWiped,
        Self::DiskFull,
        Self::RequestLost,
        Self::RequestLate,
        Self::ReplyLost,
        Self::Partition,
        Self::LeaderChange,
        Self::NoSpace,
        Self::ReadsOnly,
        Self::WatchEnds,
        Self::WatchDelayed,
        Self::WatchRepeats,
        Self::Compaction,
        Self::StoreEmptied,
        Self::StoreRestored,
        Self::PluginKilled,
        Self::NodeRemoved,
        Self::NodeReplaced,
        Self::Rival,
        Self::LedgerCopied,
        Self::LedgerBack,
        Self::ClockSpeed,
        Self::PoolTurned,
        Self::PoolAdded,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crash => "agent crashed",
            Self::Reboot => "machine rebooted",
            Self::PowerCut => "ledger's tail lost",
            Self::LedgerDeleted => "ledger deleted",
            Self::DiskWiped => "disk wiped",
            Self::DiskFull => "disk full",
            Self::RequestLost => "request lost",
            Self::RequestLate => "request late",
            Self::ReplyLost => "reply lost",
            Self::Partition => "partition",
            Self::LeaderChange => "leader change",
            Self::NoSpace => "etcd without space",
            Self::ReadsOnly => "read-only role",
            Self::WatchEnds => "watch ended",
            Self::WatchDelayed => "watch delayed",
            Self::WatchRepeats => "watch repeated",
            Self::Compaction => "compaction",
            Self::StoreEmptied => "store emptied",
            Self::StoreRestored => "store restored",
            Self::PluginKilled => "plugin killed",
            Self::NodeRemoved => "living node removed",
            Self::NodeReplaced => "node replaced",
            Self::Rival => "rival came",
            Self::LedgerCopied => "ledger copied",
            Self::LedgerBack => "lost ledger came back",
            Self::ClockSpeed => "clock speed changed",
            Self::PoolTurned => "pool turned",
            Self::PoolAdded => "pool added",
        }
    }
}

/// How many machines there are at most, with those that are gone.
const MACHINES: usize = 6;

impl Schedule {
    /// Lets that happen, if it can now.
    pub fn inject(&mut self, fault: Fault) {
        let machine = {
            let mut world = self.world.borrow_mut();
            let end = world.machines.len();
            world.random.below(end)
        };
        if self.world.borrow().machines[machine].is_destroyed || self.is_quiet() {
            return;
        }
        if self.happens(fault, machine) {
            let mut world = self.world.borrow_mut();
            world.count(fault.name());
            world.note(|| format!("FAULT {fault:?} on {machine}"));
        }
    }

    fn happens(&mut self, fault: Fault, machine: usize) -> bool {
        match fault {
            Fault::Crash => self.crash(machine),
            Fault::Reboot => self.reboot(machine),
            Fault::PowerCut => {
                // The power of one container cannot be cut.
                if self.world.borrow().ids == Ids::OneKernel {
                    return false;
                }
                let tail = self.world.borrow_mut().random.below(4);
                self.reboot(machine);
                self.world.borrow().machines[machine].disk.lose_tail(tail);
                true
            }
            Fault::LedgerDeleted => {
                // A plugin that has been given addresses and has made no interface is known to nobody then.
                self.end_plugins(machine);
                self.crash(machine);
                self.lose_ledger(machine);
                true
            }
            Fault::DiskWiped => {
                self.reboot(machine);
                self.lose_ledger(machine);
                true
            }
            Fault::NodeRemoved => {
                let mut world = self.world.borrow_mut();
                let name = world.machines[machine].name.clone();
                operator::remove_node(&mut world, &name, Vouched::No)
            }
            Fault::NodeReplaced => self.replace(machine),
            Fault::Rival => self.let_rival_come(machine),
            Fault::LedgerCopied => {
                // Where the boot id of a container or the ledger alone counts, nobody may copy one.
                let is_usual = self.world.borrow().ids == Ids::Usual;
                let came = is_usual && self.let_rival_come(machine);
                if came {
                    let mut world = self.world.borrow_mut();
                    let copy = world.machines[machine].disk.copy();
                    world.machines.last_mut().expect("it has just come").disk = copy;
                }
                came
            }
            Fault::LedgerBack => self.bring_ledger_back(machine),
            Fault::PluginKilled => self.kill_plugin(),
            Fault::StoreEmptied | Fault::StoreRestored => self.set_store_back(fault),
            _ => happens_outside(&mut self.world.borrow_mut(), fault, machine),
        }
    }

    fn crash(&mut self, machine: usize) -> bool {
        let was_there = self.world.borrow().machines[machine].agent.is_some();
        self.world.borrow_mut().kill_agent(machine);
        self.end_tasks();
        was_there
    }

    fn reboot(&mut self, machine: usize) -> bool {
        self.end_plugins(machine);
        self.crash(machine);
        let mut world = self.world.borrow_mut();
        let (boot, number, ids) = (world.new_boot_id(), world.number(), world.ids);
        let is_new = ids == Ids::LedgerAlone || ids == Ids::OneKernel && world.random.once_in(2);
        let Machine { machine_id, boot_id, clock, kernel, promised, notes, .. } =
            &mut world.machines[machine];
        if is_new {
            *machine_id = format!("machine-{number}");
        }
        // The clock is the kernel's.
        if ids != Ids::OneKernel {
            *clock = 0;
        }
        *boot_id = boot;
        *kernel = crate::world::Kernel::default();
        promised.clear();
        notes.clear();
        for index in 0..world.containers.len() {
            if world.containers[index].machine == machine {
                runtime::over(&mut world, index);
            }
        }
        true
    }

    fn lose_ledger(&self, machine: usize) {
        let mut world = self.world.borrow_mut();
        let lost = world.machines[machine].disk.copy();
        if lost.identity().is_ok_and(|identity| identity.is_some()) {
            world.machines[machine].lost_disk = Some(lost);
        }
        world.machines[machine].disk.delete();
        world.machines[machine].ledger_is_whole = false;
        // What only the ledger knew is not known any more: a promise holds as far as there is an interface.
        let Machine { promised, kernel, .. } = &mut world.machines[machine];
        promised.retain(|attachment, _| kernel.interfaces.contains_key(attachment));
    }

    fn replace(&mut self, machine: usize) -> bool {
        // Without space the operator cannot remove the old node.
        let world = self.world.borrow();
        if world.machines.len() >= MACHINES || world.etcd.space() == Space::None {
            return false;
        }
        drop(world);
        self.reboot(machine);
        let mut world = self.world.borrow_mut();
        let name = world.machines[machine].name.clone();
        world.machines[machine].is_destroyed = true;
        world.machines[machine].ledger_is_whole = false;
        operator::remove_node(&mut world, &name, Vouched::Yes);
        crate::schedule::add_machine(&mut world, name);
        true
    }

    /// Another machine begins under a name that is in use. It has never been in the cluster.
    fn let_rival_come(&mut self, machine: usize) -> bool {
        let mut world = self.world.borrow_mut();
        let name = world.machines[machine].name.clone();
        if world.machines.len() >= MACHINES || world.namesakes(&name).len() > 1 {
            return false;
        }
        crate::schedule::add_machine(&mut world, name);
        true
    }

    /// What was lost comes back: with what a node had under an earlier incarnation, if it has another one now.
    fn bring_ledger_back(&mut self, machine: usize) -> bool {
        let is_other = {
            let world = self.world.borrow();
            let machine = &world.machines[machine];
            let incarnation =
                |disk: &Disk| disk.identity().ok().flatten().map(|identity| identity.incarnation);
            let lost = machine.lost_disk.as_ref().and_then(incarnation);
            lost.is_some() && lost != incarnation(&machine.disk) && incarnation(&machine.disk).is_some()
        };
        if !is_other {
            return false;
        }
        self.reboot(machine);
        let mut world = self.world.borrow_mut();
        if let Some(lost) = world.machines[machine].lost_disk.take() {
            world.machines[machine].disk.restore(&lost);
        }
        true
    }

    /// Puts an end to rivalries: of the machines that have a name in common, one stays.
    pub fn retire_rivals(&mut self) {
        let machines = self.world.borrow().machines.len();
        for machine in 0..machines {
            let rivals = {
                let world = self.world.borrow();
                world.namesakes(&world.machines[machine].name)
            };
            if rivals.len() < 2 || rivals[0] != machine {
                continue;
            }
            let stays = {
                let world = self.world.borrow();
                let record = world.truth.nodes.get(&world.machines[machine].name);
                let is_it = |index: &&usize| {
                    record.is_some_and(|node| node.record.machine_id == world.machines[**index].machine_id)
                };
                // Sometimes the one goes that has the record: the other takes its place by an operator's word.
                let keeper = rivals.iter().find(is_it).copied().unwrap_or(machine);
                let other = rivals.iter().copied().find(|rival| *rival != keeper).unwrap_or(keeper);
                drop(world);
                if self.world.borrow_mut().random.once_in(2) { keeper } else { other }
            };
            for rival in rivals.into_iter().filter(|rival| *rival != stays) {
                self.reboot(rival);
                let mut world = self.world.borrow_mut();
                world.machines[rival].is_destroyed = true;
                world.machines[rival].ledger_is_whole = false;
                world.note(|| format!("operator: {rival} is switched off for good"));
            }
            operator::take_place(&mut self.world.borrow_mut(), stays);
        }
    }

    fn kill_plugin(&mut self) -> bool {
        let plugins: Vec<usize> =
            (0..self.tasks.len()).filter(|index| self.tasks[*index].is_plugin()).collect();
        if plugins.is_empty() {
            return false;
        }
        let index = *self.world.borrow_mut().random.one_of(&plugins);
        drop(self.tasks.swap_remove(index));
        true
    }

    /// Only while all agents are there and follow: who is away when it happens learns nothing of what was lost, and can
    /// do nothing about it in the time in which nobody claims.
    fn set_store_back(&mut self, fault: Fault) -> bool {
        self.mend();
        self.start_agents();
        self.settle();
        let mut world = self.world.borrow_mut();
        let revision = world.etcd.revision();
        let follows = |machine: &Machine| {
            let follows = |agent: &crate::world::Agent| {
                agent.view.revision == revision && agent.view.cluster.is_some() && agent.forbids.is_none()
            };
            machine.is_destroyed || machine.ledger_is_whole && machine.agent.as_ref().is_some_and(follows)
        };
        if !world.machines.iter().all(follows) || (fault == Fault::StoreRestored && world.backups.is_empty())
        {
            return false;
        }
        if fault == Fault::StoreEmptied {
            world.etcd.empty();
        } else {
            let backups = std::mem::take(&mut world.backups);
            let backup = world.random.one_of(&backups);
            world.etcd.restore(backup);
            world.backups = backups;
        }
        // What was under way was under way to what is gone.
        world.requests.retain(|request| !matches!(request.state, Progress::Late));
        for request in &mut world.requests {
            request.state = Progress::Answered(Err(no_answer()));
        }
        world.putting_back = true;
        world.history.store_was_set_back();
        world.look();
        true
    }

    /// Puts an end to what goes on going wrong.
    pub fn mend(&mut self) {
        let mut world = self.world.borrow_mut();
        world.etcd.set_space(Space::Enough);
        for machine in &mut world.machines {
            machine.disk.fill(false);
            machine.is_cut = false;
            machine.reads_only = false;
            if let Some(agent) = &mut machine.agent {
                agent.follower.mend();
            }
        }
    }

    /// Starts what is not running and can be.
    pub fn start_agents(&mut self) {
        let down: Vec<usize> = {
            let world = self.world.borrow();
            let down = |index: &usize| {
                let machine = &world.machines[*index];
                machine.agent.is_none() && !machine.is_destroyed
            };
            (0..world.machines.len()).filter(down).collect()
        };
        for machine in down {
            agent::start(&self.world, machine);
        }
    }
}

/// What happens between the nodes and the store.
fn happens_outside(world: &mut World, fault: Fault, machine: usize) -> bool {
    match fault {
        Fault::DiskFull => {
            let disk = &world.machines[machine].disk;
            disk.fill(!disk.is_full());
        }
        Fault::RequestLost | Fault::RequestLate | Fault::ReplyLost => return lose(world, fault),
        Fault::Partition => cut(world, machine),
        Fault::NoSpace => {
            let space = match (world.etcd.space(), world.random.once_in(2)) {
                (Space::Enough, true) => Space::ForOneWrite,
                (Space::Enough, false) => Space::None,
                _ => Space::Enough,
            };
            world.etcd.set_space(space);
        }
        Fault::ReadsOnly => {
            let Machine { reads_only, .. } = &mut world.machines[machine];
            *reads_only = !*reads_only;
        }
        Fault::LeaderChange => {
            for index in 0..world.requests.len() {
                give_up(world, index);
            }
        }
        Fault::Compaction => {
            let revision = world.etcd.revision();
            return world.etcd.compact(revision).is_ok();
        }
        Fault::ClockSpeed => {
            let rate = 500 + world.random.below(501);
            world.machines[machine].rate = u64::try_from(rate).unwrap_or(1_000);
        }
        Fault::PoolTurned => return operator::turn_pool(world),
        Fault::PoolAdded => return operator::add_pool(world),
        _ => return disturb_watch(world, fault, machine),
    }
    true
}

fn disturb_watch(world: &mut World, fault: Fault, machine: usize) -> bool {
    let World { machines, etcd, random, .. } = world;
    let is_cut = machines[machine].is_cut;
    let Some(agent) = machines[machine].agent.as_mut().filter(|_| !is_cut) else { return false };
    match fault {
        Fault::WatchEnds => agent.follower.disconnect(),
        Fault::WatchDelayed if random.once_in(2) => agent.follower.delay(),
        Fault::WatchDelayed => agent.follower.mend(),
        _ => agent.follower.repeat(etcd, 3),
    }
    true
}

fn lose(world: &mut World, fault: Fault) -> bool {
    let is_open =
        |index: &usize| matches!(world.requests[*index].state, Progress::Sent | Progress::Served(_));
    let open: Vec<usize> = (0..world.requests.len()).filter(is_open).collect();
    if open.is_empty() {
        return false;
    }
    let index = *world.random.one_of(&open);
    match fault {
        Fault::RequestLate => give_up(world, index),
        Fault::ReplyLost => {
            if matches!(world.requests[index].state, Progress::Sent) {
                world.serve(index);
            }
            world.requests[index].state = Progress::Answered(Err(no_answer()));
        }
        _ => world.requests[index].state = Progress::Answered(Err(no_answer())),
    }
    true
}

/// Who has asked is told that there is no answer; the request goes on, where it has not arrived.
fn give_up(world: &mut World, index: usize) {
    let (machine, question) = (world.requests[index].machine, world.requests[index].question.clone());
    match world.requests[index].state {
        Progress::Sent => {
            let id = world.number();
            let late = crate::world::Request { id, machine, question, state: Progress::Late };
            world.requests[index].state = Progress::Answered(Err(no_answer()));
            world.requests.push(late);
        }
        Progress::Served(_) => world.requests[index].state = Progress::Answered(Err(no_answer())),
        Progress::Late | Progress::Answered(_) => {}
    }
}

fn cut(world: &mut World, machine: usize) {
    let is_cut = !world.machines[machine].is_cut;
    world.machines[machine].is_cut = is_cut;
    if let Some(agent) = &mut world.machines[machine].agent {
        if is_cut { agent.follower.cut() } else { agent.follower.mend() }
    }
    if is_cut {
        for index in 0..world.requests.len() {
            if world.requests[index].machine == machine {
                give_up(world, index);
            }
        }
    }
}
