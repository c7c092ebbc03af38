//! Applies one event after another to the cluster.

use std::sync::Arc;

use polder_ipam::membership::adopt;
use polder_ipam::record::Boot;
use polder_ipam::removal::{self, OperatorConfirmation};
use polder_ipam::store::Outcome;
use polder_ipam::transaction::transaction;

use super::Space;
use super::action::Action;
use super::cluster::{Cluster, RemovedPods};
use super::machine::{Container, Kernel, Machine, MachineIndex, Power};
use super::tally::Occurrence;
use super::task::Sent;
use super::watcher::Watcher;

/// A cluster and the rules by which events change it.
pub(super) struct Transition<'a> {
    /// The space whose rules apply.
    pub(super) space: &'a Space,
    /// The current state.
    pub(super) cluster: Cluster,
}

impl Transition<'_> {
    /// Applies an event. Returns false if it has no effect.
    pub(super) fn apply(&mut self, action: &Action) -> bool {
        match *action {
            Action::ReceiveChange(index) => self.receive_change(index),
            Action::Decide(index) => self.decide(index),
            Action::ServeAdd(index) => self.serve_add(index),
            Action::CompleteTransaction(index, fate) => self.complete_transaction(index, fate),
            Action::ReadOutcome(index) => self.read_outcome(index, false),
            Action::FailToReadOutcome(index) => {
                self.cluster.remaining.failed_reads -= 1;
                self.read_outcome(index, true)
            }
            Action::TimeOut(index) => {
                self.cluster.remaining.timeouts -= 1;
                self.time_out(index)
            }
            Action::DeliverLate(index) => self.deliver_late(index),
            Action::TimeOutAdd(index) => {
                self.cluster.remaining.timeouts -= 1;
                self.time_out_add(index)
            }
            Action::Continue(index, task) => self.continue_task(index, task),
            Action::Add(index) => self.add(index, false),
            Action::AddReserved(index) => self.add(index, true),
            Action::Del(index, container) => self.del(index, container),
            Action::End(index, container) => {
                self.cluster.remaining.ends -= 1;
                self.unplug(index, container)
            }
            Action::RequestBlock(index) => {
                self.cluster.remaining.block_requests -= 1;
                self.request_block(index)
            }
            Action::StartRelease(index, block) => {
                self.cluster.remaining.releases -= 1;
                let now = self.cluster.machines[index].now(self.cluster.tick);
                self.machine(index).ipam().leave(block, now).expect("a ledger in memory")
            }
            Action::Crash(index) => {
                self.cluster.remaining.crashes -= 1;
                self.abandon(index);
                self.restart(index)
            }
            Action::Reboot(index) => {
                self.cluster.remaining.reboots -= 1;
                self.reboot(index)
            }
            Action::FailPermanently(index) => {
                self.cluster.remaining.deaths -= 1;
                self.fail_permanently(index)
            }
            Action::StartMachine(index) => {
                self.cluster.remaining.starts -= 1;
                let tick = self.cluster.tick;
                let machine = self.machine(index);
                machine.power = Power::On;
                machine.booted = tick;
                true
            }
            Action::StartWithCopiedLedger(index) => {
                self.cluster.remaining.copies -= 1;
                self.start_with_copied_ledger(index)
            }
            Action::Adopt(index) => {
                self.cluster.remaining.adoptions -= 1;
                self.adopt(index)
            }
            Action::Rejoin(index) => {
                self.cluster.remaining.rejoins -= 1;
                self.abandon(index);
                self.machine(index).forget();
                true
            }
            Action::Remove(index, confirmed) => {
                self.cluster.remaining.removals -= 1;
                self.remove(index, confirmed)
            }
            Action::AdvanceTime => {
                self.cluster.remaining.ticks -= 1;
                self.advance_time()
            }
        }
    }

    pub(super) fn machine(&mut self, index: MachineIndex) -> &mut Machine {
        self.cluster.machine(index)
    }

    pub(super) fn count(&self, occurrence: Occurrence) {
        self.space.tally.count(occurrence);
    }

    /// Executes a transaction in the store.
    pub(super) fn commit(&mut self, sent: &Sent) -> Outcome {
        let outcome = self.cluster.commit(sent);
        let removed = sent.by.as_ref().is_some_and(|by| self.cluster.removed.contains_key(by));
        if removed && outcome == Outcome::Refused {
            self.count(Occurrence::FencedRefused);
        }
        outcome
    }

    fn deliver_late(&mut self, index: usize) -> bool {
        let sent = self.cluster.late.remove(index);
        let outcome = self.commit(&sent);
        self.count(if outcome == Outcome::Refused {
            Occurrence::LateRefused
        } else {
            Occurrence::LateApplied
        });
        true
    }

    /// Leaves the machine's transactions in flight: no task waits for them any more.
    fn abandon(&mut self, index: MachineIndex) {
        let machine = Arc::clone(&self.cluster.machines[index]);
        self.cluster.late.extend(machine.agent.in_flight().cloned());
    }

    /// Starts a new agent, which finishes the DELs of the previous one.
    fn restart(&mut self, index: MachineIndex) -> bool {
        self.machine(index).restart();
        self.sweep(index);
        true
    }

    /// Removes the interface of a pod.
    pub(super) fn unplug(&mut self, index: MachineIndex, container: Container) -> bool {
        let addresses = self.machine(index).plugged.remove(&container).unwrap_or_default();
        self.cluster.in_cool_down.extend(addresses);
        true
    }

    fn unplug_all(&mut self, index: MachineIndex) {
        for container in 1..=self.cluster.machines[index].containers {
            self.unplug(index, container);
        }
    }

    fn reboot(&mut self, index: MachineIndex) -> bool {
        self.abandon(index);
        self.unplug_all(index);
        let tick = self.cluster.tick;
        let machine = self.machine(index);
        machine.boots += 1;
        // The kernel owns the clock.
        if machine.kernel == Kernel::Own {
            machine.booted = tick;
        }
        self.restart(index)
    }

    fn fail_permanently(&mut self, index: MachineIndex) -> bool {
        self.abandon(index);
        self.unplug_all(index);
        let machine = self.machine(index);
        machine.restart();
        machine.agent.watcher = Watcher::default();
        machine.power = Power::Failed;
        true
    }

    fn start_with_copied_ledger(&mut self, index: MachineIndex) -> bool {
        let tick = self.cluster.tick;
        let name = &self.cluster.machines[index].name;
        let original = self
            .cluster
            .machines
            .iter()
            .find(|other| other.name == *name && other.power != Power::NotStarted);
        let Some(ipam) = original.map(|original| Arc::clone(&original.ipam)) else { return false };
        let machine = self.machine(index);
        machine.power = Power::On;
        machine.booted = tick;
        machine.copy(&ipam);
        true
    }

    fn adopt(&mut self, index: MachineIndex) -> bool {
        let machine = Arc::clone(&self.cluster.machines[index]);
        let (machine_id, boot_id) = (machine.machine_id(), machine.boot_id());
        let boot = Boot { machine_id: &machine_id, boot_id: &boot_id };
        let (view, identity) = (&self.cluster.truth.view, machine.identity());
        let Ok(Some(adopted)) = adopt(view, &machine.name, &machine.name, identity.as_ref(), boot) else {
            return false;
        };
        self.count(Occurrence::Adopted);
        self.machine(index).agent.adopted = Some(adopted);
        true
    }

    fn remove(&mut self, index: MachineIndex, confirmed: OperatorConfirmation) -> bool {
        let name = self.cluster.machines[index].name.clone();
        let Ok(Some(change)) = removal::remove(&self.cluster.truth.view, &name, confirmed) else {
            return false;
        };
        let txn = Arc::new(transaction(&change));
        self.commit(&Sent { by: None, change: Arc::new(change), txn });
        true
    }

    fn advance_time(&mut self) -> bool {
        self.cluster.tick += 1;
        self.cluster.in_cool_down.clear();
        for pods in self.cluster.removed.values_mut().filter(|pods| **pods == RemovedPods::InCoolDown) {
            *pods = RemovedPods::CooledDown;
        }
        true
    }
}
