//! What goes wrong about who is who: machines that are replaced, that have a name in common, or another's ledger.

use polder_ipam::ledger::Ledger;
use polder_ipam::record::PodsGone;
use polder_ipam::removal::Vouched;

use super::store::cut;
use crate::agent;
use crate::disk::Disk;
use crate::etcd::Space;
use crate::operator;
use crate::schedule::{Schedule, add_machine};
use crate::world::{Ids, World};

/// How many machines there are at most, with those that are gone.
const MACHINES: usize = 6;

/// What is counted when another machine comes under a name of whose machine nothing is heard, and that node is removed.
pub const RIVAL_OF_SILENT: &str = "rival of a silent machine";

/// What is counted when another machine comes with a copy of the ledger of one that is cut off.
pub const COPY_OF_SILENT: &str = "copy of a silent machine";

impl Schedule {
    pub(super) fn replace(&mut self, machine: usize) -> bool {
        // Without space the operator cannot remove the old node.
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
        operator::remove_node(&mut world, &name, Vouched::Yes);
        add_machine(&mut world, name);
        true
    }

    /// Whether the machine's name is another machine's, or was: an operator who looks sees that, and swears to nothing about that one.
    fn has_name_of_another(&self, machine: usize) -> bool {
        let world = self.world.borrow();
        let this = &world.machines[machine];
        let registered = world.truth.nodes.get(&this.name).map(|node| &node.record.machine_id);
        let removed = world.truth.fences.values().map(|fence| &fence.record);
        let removed = removed.filter(|fence| fence.node == this.name && fence.pods == PodsGone::Unknown);
        let mut ids = registered.into_iter().chain(removed.map(|fence| &fence.machine_id));
        ids.any(|id| *id != this.machine_id)
    }

    /// Another machine begins under a name that is in use. It has never been in the cluster. Sometimes nothing more is
    /// heard of the one that has the name, and an operator removes the node without a word about its pods.
    pub(super) fn let_rival_come(&mut self, machine: usize) -> bool {
        let Some(rival) = self.add_namesake(machine) else { return false };
        if self.world.borrow_mut().random.once_in(2) {
            self.silence(machine);
            agent::start(&self.world, rival);
            // Then it is told that the name is another machine's.
            self.settle_sometimes();
            let is_removed = {
                let mut world = self.world.borrow_mut();
                let name = world.machines[machine].name.clone();
                operator::remove_node(&mut world, &name, Vouched::No)
            };
            if is_removed {
                self.world.borrow_mut().count(RIVAL_OF_SILENT);
                // Then it hears of it long before the silent one does.
                self.settle_sometimes();
            }
        }
        true
    }

    fn settle_sometimes(&mut self) {
        if self.world.borrow_mut().random.once_in(2) {
            self.settle();
        }
    }

    /// Another machine begins under the name, with a copy of the ledger. Sometimes the original lives on and is cut off.
    pub(super) fn copy_ledger(&mut self, machine: usize) -> bool {
        // Where the boot id of a container or the ledger alone counts, nobody may copy one.
        if self.world.borrow().ids != Ids::Usual {
            return false;
        }
        let Some(copy) = self.add_namesake(machine) else { return false };
        let mut world = self.world.borrow_mut();
        world.machines[copy].disk = world.machines[machine].disk.copy();
        if world.random.once_in(2) {
            cut_off(&mut world, machine);
            world.count(COPY_OF_SILENT);
        }
        true
    }

    /// Adds another machine of the same name, unless there are enough.
    fn add_namesake(&self, machine: usize) -> Option<usize> {
        let mut world = self.world.borrow_mut();
        let name = world.machines[machine].name.clone();
        if world.machines.len() >= MACHINES || world.namesakes(&name).len() > 1 {
            return None;
        }
        add_machine(&mut world, name);
        Some(world.machines.len() - 1)
    }

    /// Nothing more is heard of a machine, and its pods live on: its agent does not come back, or it is cut off.
    fn silence(&mut self, machine: usize) {
        if self.world.borrow_mut().random.once_in(2) {
            self.crash(machine);
            self.world.borrow_mut().machines[machine].is_stopped = true;
        } else {
            cut_off(&mut self.world.borrow_mut(), machine);
        }
    }

    /// A ledger that was lost comes back, when its machine has been another incarnation since.
    pub(super) fn bring_ledger_back(&mut self, machine: usize) -> bool {
        if self.world.borrow().machines[machine].lost_disk.is_none() && !self.let_it_begin_anew(machine) {
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

    /// A machine is booted without its ledger, its node is removed, and it joins again.
    fn let_it_begin_anew(&mut self, machine: usize) -> bool {
        if self.has_name_of_another(machine) {
            return false;
        }
        // What is full takes no new ledger, and without space no node is removed.
        self.mend();
        self.reboot(machine);
        let name = self.world.borrow().machines[machine].name.clone();
        self.lose_ledger(machine);
        if !operator::remove_node(&mut self.world.borrow_mut(), &name, Vouched::Yes) {
            return false;
        }
        self.start_agents();
        self.settle()
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
            operator::take_place(&self.world, stays);
        }
    }
}

fn cut_off(world: &mut World, machine: usize) {
    if !world.machines[machine].is_cut {
        cut(world, machine);
    }
}
