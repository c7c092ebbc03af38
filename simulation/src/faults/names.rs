//! Identity faults: a machine is replaced, shares its name with another machine, or starts with the ledger of another
//! one.

use polder_ipam::ledger::Ledger;
use polder_ipam::record::PodsGone;
use polder_ipam::removal::OperatorConfirmation;

use super::store::cut;
use crate::agent;
use crate::disk::Disk;
use crate::etcd::Space;
use crate::operator;
use crate::schedule::{Schedule, add_machine};
use crate::world::{Ids, World};

/// Maximum number of machines, destroyed ones included.
const MACHINES: usize = 6;

/// Counted event: another machine joins under the name of an unreachable one, and that node is removed.
pub const CONFLICT_WITH_UNREACHABLE: &str = "name conflict with an unreachable machine";

/// Counted event: another machine joins with a copy of the ledger of a partitioned one.
pub const COPY_OF_UNREACHABLE: &str = "ledger copy of a partitioned machine";

impl Schedule {
    pub(super) fn replace(&mut self, machine: usize) -> bool {
        // Without space in the store the operator cannot remove the old node.
        let can_be_removed = {
            let world = self.world.borrow();
            world.machines.len() < MACHINES && world.etcd.space() != Space::None
        };
        if !can_be_removed || self.has_name_of_another(machine) {
            return false;
        }
        self.reboot(machine);
        let mut world = self.world.borrow_mut();
        let name = world.machines[machine].name.clone();
        world.machines[machine].is_destroyed = true;
        world.machines[machine].ledger_is_whole = false;
        operator::remove_node(&mut world, &name, OperatorConfirmation::Yes);
        add_machine(&mut world, name);
        true
    }

    /// Whether another machine has, or had, the name of this machine. A careful operator sees that and does not confirm
    /// that the pods of this machine are gone.
    fn has_name_of_another(&self, machine: usize) -> bool {
        let world = self.world.borrow();
        let this = &world.machines[machine];
        let registered = world.truth.nodes.get(&this.name).map(|node| &node.record.machine_id);
        let removed = world.truth.fences.values().map(|fence| &fence.record);
        let removed = removed.filter(|fence| fence.node == this.name && fence.pods == PodsGone::Unknown);
        let mut ids = registered.into_iter().chain(removed.map(|fence| &fence.machine_id));
        ids.any(|id| *id != this.machine_id)
    }

    /// A new machine joins under a name that is in use. In some cases the original becomes unreachable, and an
    /// operator removes its node without confirming that its pods are gone.
    pub(super) fn add_name_conflict(&mut self, machine: usize) -> bool {
        let Some(other) = self.add_machine_with_name_of(machine) else { return false };
        if self.world.borrow_mut().random.once_in(2) {
            self.make_unreachable(machine);
            agent::start(&self.world, other);
            // Then the new machine learns that the name belongs to another machine.
            self.sometimes_run_until_idle();
            let is_removed = {
                let mut world = self.world.borrow_mut();
                let name = world.machines[machine].name.clone();
                operator::remove_node(&mut world, &name, OperatorConfirmation::No)
            };
            if is_removed {
                self.world.borrow_mut().count(CONFLICT_WITH_UNREACHABLE);
                // Then the new machine learns of the removal long before the unreachable machine.
                self.sometimes_run_until_idle();
            }
        }
        true
    }

    fn sometimes_run_until_idle(&mut self) {
        if self.world.borrow_mut().random.once_in(2) {
            self.run_until_idle();
        }
    }

    /// A new machine joins with the name and a copy of the ledger of a machine. In some cases the original keeps
    /// running but is partitioned.
    pub(super) fn copy_ledger(&mut self, machine: usize) -> bool {
        // If the boot id of a container or only the ledger proves identity, copying a ledger is not allowed.
        if self.world.borrow().ids != Ids::Usual {
            return false;
        }
        let Some(copy) = self.add_machine_with_name_of(machine) else { return false };
        let mut world = self.world.borrow_mut();
        world.machines[copy].disk = world.machines[machine].disk.copy();
        if world.random.once_in(2) {
            cut_off(&mut world, machine);
            world.count(COPY_OF_UNREACHABLE);
        }
        true
    }

    /// Adds a machine with the same name, unless the limit is reached.
    fn add_machine_with_name_of(&self, machine: usize) -> Option<usize> {
        let mut world = self.world.borrow_mut();
        let name = world.machines[machine].name.clone();
        if world.machines.len() >= MACHINES || world.machines_named(&name).len() > 1 {
            return None;
        }
        add_machine(&mut world, name);
        Some(world.machines.len() - 1)
    }

    /// A machine becomes unreachable while its pods keep running: its agent stays stopped, or it is partitioned.
    fn make_unreachable(&mut self, machine: usize) {
        if self.world.borrow_mut().random.once_in(2) {
            self.crash(machine);
            self.world.borrow_mut().machines[machine].is_stopped = true;
        } else {
            cut_off(&mut self.world.borrow_mut(), machine);
        }
    }

    /// Restores a lost ledger after its machine has joined as another incarnation.
    pub(super) fn restore_lost_ledger(&mut self, machine: usize) -> bool {
        if self.world.borrow().machines[machine].lost_disk.is_none() && !self.rejoin_without_ledger(machine) {
            return false;
        }
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

    /// Reboots a machine without its ledger, removes its node, and lets it join again.
    fn rejoin_without_ledger(&mut self, machine: usize) -> bool {
        if self.has_name_of_another(machine) {
            return false;
        }
        // A full disk accepts no new ledger, and without space no node can be removed.
        self.restore();
        self.reboot(machine);
        let name = self.world.borrow().machines[machine].name.clone();
        self.lose_ledger(machine);
        if !operator::remove_node(&mut self.world.borrow_mut(), &name, OperatorConfirmation::Yes) {
            return false;
        }
        self.start_agents();
        self.run_until_idle()
    }

    /// Ends name conflicts: one machine of each name remains.
    pub fn end_name_conflicts(&mut self) {
        let machines = self.world.borrow().machines.len();
        for machine in 0..machines {
            let conflicting = {
                let world = self.world.borrow();
                world.machines_named(&world.machines[machine].name)
            };
            if conflicting.len() < 2 || conflicting[0] != machine {
                continue;
            }
            let stays = {
                let world = self.world.borrow();
                let record = world.truth.nodes.get(&world.machines[machine].name);
                let is_it = |index: &&usize| {
                    record.is_some_and(|node| node.record.machine_id == world.machines[**index].machine_id)
                };
                // In some cases the registered machine is destroyed: the other takes its place at the operator's
                // request.
                let registered = conflicting.iter().find(is_it).copied().unwrap_or(machine);
                let other =
                    conflicting.iter().copied().find(|other| *other != registered).unwrap_or(registered);
                drop(world);
                if self.world.borrow_mut().random.once_in(2) { registered } else { other }
            };
            for other in conflicting.into_iter().filter(|other| *other != stays) {
                self.reboot(other);
                let mut world = self.world.borrow_mut();
                world.machines[other].is_destroyed = true;
                world.machines[other].ledger_is_whole = false;
                world.note(|| format!("operator: {other} is destroyed"));
            }
            operator::replace_machine(&self.world, stays);
        }
    }
}

fn cut_off(world: &mut World, machine: usize) {
    if !world.machines[machine].is_partitioned {
        cut(world, machine);
    }
}
