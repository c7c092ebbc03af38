//! Applies one event after another to the cluster.

use std::sync::Arc;

use polder_ipam::membership::adopt;
use polder_ipam::record::Boot;
use polder_ipam::removal::{self, OperatorConfirmation};
use polder_ipam::store::Outcome;
use polder_ipam::transaction::transaction;

use super::Space;
use super::action::Action;
use super::cluster::{Cluster, Remains};
use super::machine::{Container, Kernel, Machine, Power, Who};
use super::tally::Happening;
use super::task::Sent;
use super::watcher::Watcher;

/// A cluster and the rules by which events change it.
pub(super) struct Play<'a> {
    /// The space whose rules apply.
    pub(super) space: &'a Space,
    /// The current state.
    pub(super) cluster: Cluster,
}

impl Play<'_> {
    /// Applies an event. Returns false if it has no effect.
    pub(super) fn act(&mut self, action: &Action) -> bool {
        match *action {
            Action::Hear(who) => self.hear(who),
            Action::Decide(who) => self.decide(who),
            Action::Ask(who) => self.ask(who),
            Action::Meet(who, fate) => self.meet(who, fate),
            Action::Look(who) => self.look(who, false),
            Action::LookInVain(who) => {
                self.cluster.left.in_vain -= 1;
                self.look(who, true)
            }
            Action::LosePatience(who) => {
                self.cluster.left.impatience -= 1;
                self.lose_patience(who)
            }
            Action::Arrive(index) => self.arrive(index),
            Action::GiveUp(who) => {
                self.cluster.left.impatience -= 1;
                self.give_up(who)
            }
            Action::GoOn(who, whose) => self.go_on(who, whose),
            Action::Add(who) => self.add(who, false),
            Action::AddReserved(who) => self.add(who, true),
            Action::Del(who, container) => self.del(who, container),
            Action::End(who, container) => {
                self.cluster.left.ends -= 1;
                self.unplug(who, container)
            }
            Action::Wish(who) => {
                self.cluster.left.appetite -= 1;
                self.wish(who)
            }
            Action::Spare(who, block) => {
                self.cluster.left.spares -= 1;
                let now = self.cluster.machines[who].now(self.cluster.tick);
                self.machine(who).ipam().leave(block, now).expect("a ledger in memory")
            }
            Action::Crash(who) => {
                self.cluster.left.crashes -= 1;
                self.abandon(who);
                self.restart(who)
            }
            Action::Reboot(who) => {
                self.cluster.left.reboots -= 1;
                self.reboot(who)
            }
            Action::Die(who) => {
                self.cluster.left.deaths -= 1;
                self.die(who)
            }
            Action::Begin(who) => {
                self.cluster.left.newcomers -= 1;
                let tick = self.cluster.tick;
                let machine = self.machine(who);
                machine.power = Power::On;
                machine.booted = tick;
                true
            }
            Action::BeginCopied(who) => {
                self.cluster.left.copies -= 1;
                self.begin_copied(who)
            }
            Action::Adopt(who) => {
                self.cluster.left.adoptions -= 1;
                self.adopt(who)
            }
            Action::Rejoin(who) => {
                self.cluster.left.rejoins -= 1;
                self.abandon(who);
                self.machine(who).forget();
                true
            }
            Action::Remove(who, confirmed) => {
                self.cluster.left.removals -= 1;
                self.remove(who, confirmed)
            }
            Action::Rest => {
                self.cluster.left.ticks -= 1;
                self.rest()
            }
        }
    }

    pub(super) fn machine(&mut self, who: Who) -> &mut Machine {
        self.cluster.machine(who)
    }

    pub(super) fn count(&self, happening: Happening) {
        self.space.tally.count(happening);
    }

    /// Executes a transaction in the store.
    pub(super) fn commit(&mut self, sent: &Sent) -> Outcome {
        let outcome = self.cluster.commit(sent);
        let removed = sent.by.as_ref().is_some_and(|by| self.cluster.removed.contains_key(by));
        if removed && outcome == Outcome::Refused {
            self.count(Happening::FencedRefused);
        }
        outcome
    }

    fn arrive(&mut self, index: usize) -> bool {
        let sent = self.cluster.late.remove(index);
        let outcome = self.commit(&sent);
        self.count(if outcome == Outcome::Refused { Happening::LateRefused } else { Happening::LateApplied });
        true
    }

    /// Leaves the machine's transactions in flight: no task waits for them any more.
    fn abandon(&mut self, who: Who) {
        let machine = Arc::clone(&self.cluster.machines[who]);
        self.cluster.late.extend(machine.agent.under_way().cloned());
    }

    /// Starts a new agent, which finishes the DELs of the previous one.
    fn restart(&mut self, who: Who) -> bool {
        self.machine(who).restart();
        self.sweep(who);
        true
    }

    /// Removes the interface of a pod.
    pub(super) fn unplug(&mut self, who: Who, container: Container) -> bool {
        let addresses = self.machine(who).plugged.remove(&container).unwrap_or_default();
        self.cluster.warm.extend(addresses);
        true
    }

    fn unplug_all(&mut self, who: Who) {
        for container in 1..=self.cluster.machines[who].containers {
            self.unplug(who, container);
        }
    }

    fn reboot(&mut self, who: Who) -> bool {
        self.abandon(who);
        self.unplug_all(who);
        let tick = self.cluster.tick;
        let machine = self.machine(who);
        machine.boots += 1;
        // The kernel owns the clock.
        if machine.kernel == Kernel::Own {
            machine.booted = tick;
        }
        self.restart(who)
    }

    fn die(&mut self, who: Who) -> bool {
        self.abandon(who);
        self.unplug_all(who);
        let machine = self.machine(who);
        machine.restart();
        machine.agent.watcher = Watcher::default();
        machine.power = Power::Gone;
        true
    }

    fn begin_copied(&mut self, who: Who) -> bool {
        let tick = self.cluster.tick;
        let name = &self.cluster.machines[who].name;
        let original =
            self.cluster.machines.iter().find(|other| other.name == *name && other.power != Power::Blank);
        let Some(ipam) = original.map(|original| Arc::clone(&original.ipam)) else { return false };
        let machine = self.machine(who);
        machine.power = Power::On;
        machine.booted = tick;
        machine.copy(&ipam);
        true
    }

    fn adopt(&mut self, who: Who) -> bool {
        let machine = Arc::clone(&self.cluster.machines[who]);
        let (machine_id, boot_id) = (machine.machine_id(), machine.boot_id());
        let life = Boot { machine_id: &machine_id, boot_id: &boot_id };
        let (view, identity) = (&self.cluster.truth.view, machine.identity());
        let Ok(Some(adopted)) = adopt(view, &machine.name, &machine.name, identity.as_ref(), life) else {
            return false;
        };
        self.count(Happening::Adopted);
        self.machine(who).agent.adopted = Some(adopted);
        true
    }

    fn remove(&mut self, who: Who, confirmed: OperatorConfirmation) -> bool {
        let name = self.cluster.machines[who].name.clone();
        let Ok(Some(change)) = removal::remove(&self.cluster.truth.view, &name, confirmed) else {
            return false;
        };
        let txn = Arc::new(transaction(&change));
        self.commit(&Sent { by: None, change: Arc::new(change), txn });
        true
    }

    fn rest(&mut self) -> bool {
        self.cluster.tick += 1;
        self.cluster.warm.clear();
        for remains in self.cluster.removed.values_mut().filter(|remains| **remains == Remains::Warm) {
            *remains = Remains::Cold;
        }
        true
    }
}
