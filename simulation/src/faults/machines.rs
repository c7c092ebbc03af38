//! Faults of a machine: its agent, its kernel, its disk, and its plugins.

use polder_ipam::ids::MachineId;

use super::file::CRASHED_WITH_EMBEDDED_STORE;
use crate::agent;
use crate::runtime;
use crate::schedule::Schedule;
use crate::world::{Ids, Kernel, Machine, StoreKind};

impl Schedule {
    pub(super) fn crash(&mut self, machine: usize) -> bool {
        let was_there = self.world.borrow().machines[machine].agent.is_some();
        let mut world = self.world.borrow_mut();
        world.kill_agent(machine);
        if was_there && world.store_kind == StoreKind::Embedded {
            world.count(CRASHED_WITH_EMBEDDED_STORE);
        }
        drop(world);
        self.end_tasks();
        was_there
    }

    pub(super) fn reboot(&mut self, machine: usize) -> bool {
        self.end_plugins(machine);
        self.crash(machine);
        let mut world = self.world.borrow_mut();
        let (boot, number, ids) = (world.new_boot_id(), world.number(), world.ids);
        let is_new = ids == Ids::LedgerAlone || ids == Ids::OneKernel && world.random.once_in(2);
        let Machine { machine_id, boot_id, clock, kernel, promised, tombstones, is_stopped, .. } =
            &mut world.machines[machine];
        if is_new {
            *machine_id = MachineId::new(format!("machine-{number}"));
        }
        // The kernel owns the clock.
        if ids != Ids::OneKernel {
            *clock = 0;
        }
        *boot_id = boot;
        *kernel = Kernel::default();
        *is_stopped = false;
        promised.clear();
        tombstones.clear();
        for index in 0..world.containers.len() {
            if world.containers[index].machine == machine {
                runtime::mark_ended(&mut world, index);
            }
        }
        true
    }

    pub(super) fn lose_ledger(&self, machine: usize) {
        let mut world = self.world.borrow_mut();
        world.machines[machine].lose_disk();
        // Facts that only the ledger recorded are lost: a guarantee survives only if the interface exists.
        let Machine { promised, kernel, .. } = &mut world.machines[machine];
        promised.retain(|attachment, _| kernel.interfaces.contains_key(attachment));
    }

    pub(super) fn kill_plugin(&mut self) -> bool {
        let plugins: Vec<usize> =
            (0..self.tasks.len()).filter(|index| self.tasks[*index].is_plugin()).collect();
        if plugins.is_empty() {
            return false;
        }
        let index = *self.world.borrow_mut().random.one_of(&plugins);
        drop(self.tasks.swap_remove(index));
        true
    }

    /// Starts the agent of each machine that has none and can run one.
    pub fn start_agents(&mut self) {
        let down: Vec<usize> = {
            let world = self.world.borrow();
            let down = |index: &usize| {
                let machine = &world.machines[*index];
                machine.agent.is_none() && !machine.is_destroyed && !machine.is_stopped
            };
            (0..world.machines.len()).filter(down).collect()
        };
        for machine in down {
            agent::start(&self.world, machine);
        }
    }
}
