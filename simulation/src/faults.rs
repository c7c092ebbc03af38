//! Injects faults at any step: into agents, machines, disks, and the connection to the store.

mod file;
mod machines;
mod names;
mod store;

pub use file::CRASHED_WITH_EMBEDDED_STORE;
pub use names::{CONFLICT_WITH_UNREACHABLE, COPY_OF_UNREACHABLE};

use crate::fault::Fault;
use crate::operator;
use crate::schedule::Schedule;
use crate::world::Ids;

impl Schedule {
    /// Injects the fault if it is currently possible.
    pub fn inject(&mut self, fault: Fault) {
        let machine = {
            let mut world = self.world.borrow_mut();
            let end = world.machines.len();
            world.random.below(end)
        };
        if self.world.borrow().machines[machine].is_destroyed || self.is_quiet() {
            return;
        }
        if self.try_inject(fault, machine) {
            let mut world = self.world.borrow_mut();
            world.count(fault.name());
            world.note(|| format!("FAULT {fault:?} on {machine}"));
        }
    }

    fn try_inject(&mut self, fault: Fault, machine: usize) -> bool {
        match fault {
            Fault::Crash => self.crash(machine),
            Fault::Reboot => self.reboot(machine),
            Fault::PowerCut => {
                // A single container cannot lose power.
                if self.world.borrow().ids == Ids::OneKernel {
                    return false;
                }
                let tail = self.world.borrow_mut().random.below(4);
                self.reboot(machine);
                let mut world = self.world.borrow_mut();
                world.machines[machine].disk.lose_tail(tail);
                file::lose_tail(&mut world);
                true
            }
            Fault::LedgerDeleted => {
                // Nothing would record a plugin that has addresses but has not yet created its interface.
                self.end_plugins(machine);
                self.crash(machine);
                self.lose_ledger(machine);
                true
            }
            Fault::DiskWiped => {
                self.reboot(machine);
                self.lose_ledger(machine);
                file::lose(&mut self.world.borrow_mut());
                true
            }
            asked if asked.is_operator_request() => operator::send_request(&self.world, machine, asked),
            Fault::NodeReplaced => self.replace(machine),
            Fault::NameConflict => self.add_name_conflict(machine),
            Fault::LedgerCopied => self.copy_ledger(machine),
            Fault::LedgerBack => self.restore_lost_ledger(machine),
            Fault::PluginKilled => self.kill_plugin(),
            Fault::StoreEmptied | Fault::StoreRestored => self.lose_or_restore_store(fault),
            _ => store::try_inject(&mut self.world.borrow_mut(), fault, machine),
        }
    }
}
