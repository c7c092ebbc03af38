//! Chooses the next event, step by step.

use std::sync::Arc;
use std::time::Duration;

use polder_api::NodeName;
use polder_ipam::ids::MachineId;
use polder_ipam::tasks::teardown::WIRING_TIMEOUT;

use crate::agent::PLUGIN_TIMEOUT_MS;
use crate::agent::host::millis;
use crate::container::Container;
use crate::disk::Disk;
use crate::fault::Fault;
use crate::runtime;
use crate::settings::NETWORK;
use crate::store_request::Progress;
use crate::task::{Owner, Task};
use crate::world::{COOL_DOWN, Kernel, Machine, Shared, World};

/// Maximum number of recent containers of a machine on which the runtime still acts.
const REMEMBERED: usize = 10;

/// Maximum number of containers that should run on a machine.
const CONTAINERS: usize = 3;

/// Counted event: an ADD hangs.
pub const HUNG: &str = "ADD hangs";

/// Time for which an ADD hangs: longer than its DEL waits, on most clocks, and shorter than the cool-down, on the
/// fastest clock.
const HANGS: Duration = Duration::from_secs(17);

const _: () = assert!(
    HANGS.as_secs() > WIRING_TIMEOUT.as_secs() * 3 / 2 && HANGS.as_secs() < COOL_DOWN.as_secs(),
    "no DEL would time out, or the address would be allocated again while the ADD hangs"
);

/// The running tasks and the possible faults.
pub struct Schedule {
    /// The simulated world.
    pub world: Shared,
    /// The running tasks.
    pub tasks: Vec<Task>,
    /// The faults that can occur.
    pub faults: Vec<Fault>,
    /// On average, one step in `rarity` injects a fault.
    pub rarity: usize,
}

/// Adds a machine that was never in the cluster.
pub fn add_machine(world: &mut World, name: NodeName) {
    let number = world.number();
    let rate = 700 + world.random.below(301);
    let boot_id = world.new_boot_id();
    world.machines.push(Machine {
        name,
        machine_id: MachineId::new(format!("machine-{number}")),
        boot_id,
        clock: 0,
        rate: u64::try_from(rate).unwrap_or(1_000),
        is_destroyed: false,
        kernel: Kernel::default(),
        disk: Disk::default(),
        lost_disk: None,
        ledger_is_whole: false,
        epoch: 0,
        agent: None,
        is_stopped: false,
        is_partitioned: false,
        reads_only: false,
        tombstones: std::collections::BTreeSet::new(),
        promised: std::collections::BTreeMap::new(),
    });
}

impl Schedule {
    /// Whether faults are suspended, because lost records are being restored.
    pub fn is_quiet(&self) -> bool {
        self.world.borrow().is_restoring
    }

    fn chance(&self, end: usize) -> usize {
        self.world.borrow_mut().random.below(end)
    }

    /// Index of a random machine.
    pub fn any_machine(&self) -> usize {
        let machines = self.world.borrow().machines.len();
        self.chance(machines)
    }

    /// Ends the tasks of agents that do not run any more.
    pub fn end_tasks(&mut self) {
        let ended: Vec<Task> = {
            let world = self.world.borrow();
            let lives = |task: &Task| match task.owner {
                Owner::Agent(epoch) => world.machines[task.machine].epoch_running() == Some(epoch),
                Owner::Plugin(_) => true,
            };
            let (living, ended) = std::mem::take(&mut self.tasks).into_iter().partition(lives);
            self.tasks = living;
            ended
        };
        drop(ended);
    }

    /// Ends the plugins of a machine.
    pub fn end_plugins(&mut self, machine: usize) {
        let (ended, continuing) = std::mem::take(&mut self.tasks)
            .into_iter()
            .partition(|task| task.is_plugin() && task.machine == machine);
        self.tasks = continuing;
        drop::<Vec<Task>>(ended);
    }

    /// Executes one random step.
    pub fn step(&mut self) {
        if !self.faults.is_empty() && self.chance(self.rarity) == 0 {
            let fault = self.faults[self.chance(self.faults.len())];
            self.inject(fault);
            return self.collect_spawned();
        }
        match self.chance(100) {
            0..=54 => drop(self.poll_any()),
            55..=74 => self.advance_request(),
            75..=83 => {
                let machine = self.any_machine();
                self.deliver_watch_events(machine);
            }
            84..=90 => self.call_runtime(),
            91..=97 => self.pass_time(),
            98 => self.start_agents(),
            _ => self.maintain(),
        }
        self.collect_spawned();
    }

    /// Adds the tasks that were started since.
    fn collect_spawned(&mut self) {
        let spawned = std::mem::take(&mut self.world.borrow_mut().spawned);
        self.tasks.extend(spawned);
        self.end_tasks();
    }

    /// Advances a random ready task. Returns false if no task is ready.
    fn poll_any(&mut self) -> bool {
        let ready: Vec<usize> = {
            let world = self.world.borrow();
            let is_ready = |task: &Task| !task.hangs && task.is_ready(&world);
            (0..self.tasks.len()).filter(|index| is_ready(&self.tasks[*index])).collect()
        };
        if ready.is_empty() {
            return false;
        }
        let index = ready[self.chance(ready.len())];
        if self.tasks[index].name == "ADD" && !self.tasks[index].has_hung && self.chance(20) == 0 {
            self.hang(index);
            return true;
        }
        self.poll(index);
        true
    }

    /// Lets an ADD hang. Its runtime may time out immediately.
    fn hang(&mut self, index: usize) {
        let Task { hangs, has_hung, deadline, owner, .. } = &mut self.tasks[index];
        (*hangs, *has_hung) = (true, true);
        let (container, is_over) = {
            let mut world = self.world.borrow_mut();
            *deadline = world.now + millis(HANGS);
            world.count(HUNG);
            let Owner::Plugin(number) = *owner else { return };
            let container =
                world.containers.iter().position(|one| one.plugins.contains(&number) && one.is_wanted);
            (container, world.random.once_in(2))
        };
        if let (Some(container), true) = (container, is_over) {
            self.end_container(container);
        }
    }

    fn poll(&mut self, index: usize) {
        if self.tasks[index].poll() {
            drop(self.tasks.swap_remove(index));
        }
    }

    /// Delivers a random request or reply.
    fn advance_request(&mut self) {
        let mut world = self.world.borrow_mut();
        let open: Vec<usize> = (0..world.requests.len())
            .filter(|index| !matches!(world.requests[*index].state, Progress::Answered(_)))
            .collect();
        if open.is_empty() {
            return;
        }
        let index = *world.random.one_of(&open);
        world.advance_request(index);
    }

    /// Delivers pending store updates to an agent. Returns false if nothing changed.
    fn deliver_watch_events(&mut self, machine: usize) -> bool {
        let mut world = self.world.borrow_mut();
        let World { machines, etcd, .. } = &mut *world;
        let Some(agent) = &mut machines[machine].agent else { return false };
        let before = (agent.view.revision, agent.view.lost.is_some());
        for update in agent.watcher.poll(etcd) {
            Arc::make_mut(&mut agent.view).apply(update);
        }
        let has_news = before != (agent.view.revision, agent.view.lost.is_some());
        agent.must_check_records |= has_news;
        has_news
    }

    /// Advances time, usually by a moment, sometimes by more. While lost records are being restored, time advances
    /// only when all tasks are idle.
    fn pass_time(&mut self) {
        if self.is_quiet() {
            self.run_until_idle();
            return self.advance(1_000);
        }
        let span = match self.chance(20) {
            0 => 1_000 + self.chance(24_000),
            1..=4 => 500 + self.chance(2_000),
            _ => self.chance(300),
        };
        self.advance(u64::try_from(span).unwrap_or(1));
    }

    /// Advances the time by `millis`, and each machine's clock at its own speed.
    pub fn advance(&mut self, millis: u64) {
        self.poll_due(millis);
        let mut world = self.world.borrow_mut();
        let (before, after) = (world.now / 1_000, (world.now + millis) / 1_000);
        world.now += millis;
        for machine in &mut world.machines {
            machine.clock += (millis * machine.rate).div_ceil(1_000);
        }
        if after > before {
            world.etcd.advance(after - before);
            world.observe();
        }
    }

    /// Runs plugins that have reached their deadline, and engines before a longer time step.
    fn poll_due(&mut self, millis: u64) {
        for _ in 0..50 {
            let index = {
                let world = self.world.borrow();
                let must = |task: &&Task| {
                    world.now + millis > task.deadline || millis > 500 && task.name == "engine"
                };
                let ready = |task: &Task| must(&task) && task.is_ready(&world);
                self.tasks.iter().position(ready)
            };
            let Some(index) = index else { return };
            if self.tasks[index].hangs {
                // From now on it continues like all other plugins.
                self.tasks[index].hangs = false;
                self.tasks[index].deadline = self.world.borrow().now + PLUGIN_TIMEOUT_MS;
            }
            self.poll(index);
            self.collect_spawned();
        }
    }

    /// Runs all tasks until they are idle. Returns false if they do not become idle in 3000 rounds.
    pub fn run_until_idle(&mut self) -> bool {
        for _ in 0..3_000 {
            self.collect_spawned();
            let mut has_progress = self.poll_any();
            {
                let mut world = self.world.borrow_mut();
                let open =
                    world.requests.iter().position(|request| !matches!(request.state, Progress::Answered(_)));
                if let Some(index) = open {
                    world.advance_request(index);
                    has_progress = true;
                }
            }
            let machines = self.world.borrow().machines.len();
            for machine in 0..machines {
                has_progress |= self.deliver_watch_events(machine);
            }
            if !has_progress {
                return true;
            }
        }
        false
    }

    /// Occasional actions of operators, such as backups.
    fn maintain(&mut self) {
        if self.is_quiet() {
            return;
        }
        self.rejoin();
        let mut world = self.world.borrow_mut();
        if world.random.once_in(2) {
            let backup = world.etcd.clone();
            world.backups.push(backup);
            if world.backups.len() > 2 {
                world.backups.remove(0);
            }
        }
    }

    /// Lets removed nodes join again once they have nothing left.
    pub fn rejoin(&mut self) {
        let removed: Vec<usize> = {
            let world = self.world.borrow();
            let removed = |index: &usize| {
                let agent = world.machines[*index].agent.as_ref();
                agent.is_some_and(|agent| agent.last_step.starts_with("Removed") && agent.is_forbidden())
            };
            (0..world.machines.len()).filter(removed).collect()
        };
        for machine in removed {
            let mut world = self.world.borrow_mut();
            world.kill_agent(machine);
            world.machines[machine].lose_disk();
            world.machines[machine].promised.clear();
            world.count("node joined again");
            world.note(|| format!("operator: {machine} joins again"));
        }
        self.end_tasks();
    }

    /// Executes a random action of a runtime.
    fn call_runtime(&mut self) {
        let (machine, choice) = {
            let mut world = self.world.borrow_mut();
            let end = world.machines.len();
            (world.random.below(end), world.random.below(12))
        };
        if self.world.borrow().machines[machine].is_destroyed {
            return;
        }
        match choice {
            0..=3 => {
                self.start_container(machine, None);
            }
            4..=8 => self.disturb_container(machine),
            9 => runtime::collect(&self.world, machine),
            _ => self.retry(machine),
        }
    }

    /// Starts a container, for a new pod or the given one. `pod` is the pod and whether it keeps its address.
    pub fn start_container(&mut self, machine: usize, pod: Option<(polder_api::Pod, bool)>) -> Option<usize> {
        let index = {
            let mut world = self.world.borrow_mut();
            let boot_id = world.machines[machine].boot_id.clone();
            let here = |one: &&Container| one.machine == machine && one.boot_id == boot_id && one.is_wanted;
            if pod.is_none() && world.containers.iter().filter(here).count() >= CONTAINERS {
                return None;
            }
            let number = world.number();
            let (pod, reserved) = match pod {
                Some(pod) => pod,
                None if world.random.once_in(4) => {
                    let name = format!("r{}", world.random.below(3));
                    (polder_api::Pod { namespace: "d".to_owned(), name, uid: None }, true)
                }
                None => {
                    let name = format!("p{number}");
                    (polder_api::Pod { namespace: "d".to_owned(), name, uid: None }, false)
                }
            };
            let attachment: polder_api::Attachment =
                format!("{NETWORK}/c{number}/eth0").parse().expect("a name");
            world.machines[machine].kernel.namespaces.insert(attachment.container.as_str().to_owned());
            world.containers.push(Container {
                attachment,
                pod,
                reserved,
                machine,
                boot_id,
                is_wanted: true,
                is_attached: false,
                plugins: Vec::new(),
            });
            world.containers.len() - 1
        };
        runtime::add(&self.world, index);
        Some(index)
    }

    /// The most recent containers of a machine in its current boot, newest first.
    fn containers(&self, machine: usize, is_wanted: bool) -> Vec<usize> {
        let world = self.world.borrow();
        let boot_id = &world.machines[machine].boot_id;
        let here = |(_, one): &(usize, &Container)| {
            one.machine == machine && one.boot_id == *boot_id && one.is_wanted == is_wanted
        };
        world
            .containers
            .iter()
            .enumerate()
            .rev()
            .filter(here)
            .map(|(index, _)| index)
            .take(REMEMBERED)
            .collect()
    }

    fn disturb_container(&mut self, machine: usize) {
        let (wanted, over) = (self.containers(machine, true), self.containers(machine, false));
        if !wanted.is_empty() && self.chance(2) == 0 {
            let index = wanted[self.chance(wanted.len())];
            match self.chance(8) {
                0 => self.repeat_add(index),
                1 => {
                    // A new sandbox starts before the DEL of the old one, possibly on another machine.
                    let (pod, reserved) = {
                        let world = self.world.borrow();
                        (world.containers[index].pod.clone(), world.containers[index].reserved)
                    };
                    let elsewhere = self.any_machine();
                    let to = if self.world.borrow().machines[elsewhere].is_destroyed {
                        machine
                    } else {
                        elsewhere
                    };
                    self.start_container(to, Some((pod, reserved)));
                    self.end_container(index);
                }
                _ => self.end_container(index),
            }
        } else if !over.is_empty() {
            let index = over[self.chance(over.len())];
            match self.chance(4) {
                0 => self.repeat_add(index),
                1 => self.remove_namespace(index),
                _ => runtime::del(&self.world, index),
            }
        }
    }

    /// Repeats the ADD of a container. A runtime does not repeat a hanging ADD: the first to end would remove the
    /// addresses guaranteed to the other.
    fn repeat_add(&mut self, index: usize) {
        let hangs =
            |plugin: &u64| self.tasks.iter().any(|task| task.owner == Owner::Plugin(*plugin) && task.hangs);
        let is_hung = self.world.borrow().containers[index].plugins.iter().any(hangs);
        if !is_hung {
            runtime::add(&self.world, index);
        }
    }

    /// Ends a container in one of several ways.
    pub fn end_container(&mut self, index: usize) {
        runtime::mark_ended(&mut self.world.borrow_mut(), index);
        match self.chance(4) {
            // Its DEL is lost, or arrives late.
            0 => self.remove_namespace(index),
            1 => {
                self.remove_namespace(index);
                runtime::del(&self.world, index);
            }
            _ => runtime::del(&self.world, index),
        }
    }

    /// Removes the namespace of an ended container, and its interface.
    pub fn remove_namespace(&mut self, index: usize) {
        let mut world = self.world.borrow_mut();
        let Container { attachment, machine, boot_id, .. } = world.containers[index].clone();
        if world.machines[machine].boot_id != boot_id {
            return;
        }
        let kernel = &mut world.machines[machine].kernel;
        kernel.namespaces.remove(attachment.container.as_str());
        kernel.interfaces.remove(&attachment);
        world.count("namespace gone");
        world.note(|| format!("runtime {machine}: the namespace of {attachment} is gone"));
    }

    /// Replaces the container of each pod whose ADD failed.
    pub fn retry(&mut self, machine: usize) {
        for index in self.containers(machine, true) {
            let (failed, pod, reserved) = {
                let world = self.world.borrow();
                let Container { attachment, is_attached, plugins, pod, reserved, .. } =
                    &world.containers[index];
                // A disconnected pod is treated like a pod that was never attached.
                let lives =
                    *is_attached && world.machines[machine].kernel.interfaces.contains_key(attachment);
                let runs = |plugin: &u64| self.tasks.iter().any(|task| task.owner == Owner::Plugin(*plugin));
                (!lives && !plugins.iter().any(runs), pod.clone(), *reserved)
            };
            if failed {
                self.end_container(index);
                self.start_container(machine, Some((pod, reserved)));
            }
        }
    }
}
