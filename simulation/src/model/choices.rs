//! The events that are possible in a state.

use std::sync::Arc;

use polder_ipam::ids::Incarnation;
use polder_ipam::ledger::MemberState;
use polder_ipam::record::{NodeRecord, PodsGone};
use polder_ipam::removal::OperatorConfirmation;

use super::action::{Action, Fate, TaskKind};
use super::cluster::Cluster;
use super::machine::{Machine, MachineIndex, Power};
use super::task::{Stopped, Wait};
use super::watcher::Behind;

/// Appends all events that are possible next.
pub(super) fn choices(cluster: &Cluster, actions: &mut Vec<Action>) {
    for (index, machine) in cluster.machines.iter().enumerate() {
        match machine.power {
            Power::NotStarted => {
                if cluster.remaining.starts > 0 {
                    actions.push(Action::StartMachine(index));
                }
                if cluster.remaining.copies > 0 {
                    actions.push(Action::StartWithCopiedLedger(index));
                }
            }
            Power::Failed => {}
            Power::On => {
                agent(cluster, index, machine, actions);
                pods(cluster, index, machine, actions);
                faults(cluster, index, machine, actions);
            }
        }
    }
    actions.extend((0..cluster.late.len()).map(Action::DeliverLate));
    if cluster.remaining.removals > 0 {
        for index in [0, 1] {
            actions.push(Action::Remove(index, OperatorConfirmation::No));
            if may_confirm(cluster, index) {
                actions.push(Action::Remove(index, OperatorConfirmation::Yes));
            }
        }
    }
    if cluster.remaining.ticks > 0 {
        actions.push(Action::AdvanceTime);
    }
}

fn agent(cluster: &Cluster, index: MachineIndex, machine: &Machine, actions: &mut Vec<Action>) {
    let (remaining, agent) = (&cluster.remaining, &machine.agent);
    if !agent.watcher.is_current() {
        actions.push(Action::ReceiveChange(index));
    }
    match &agent.registrar {
        None => {
            let asks = |adding: &Stopped| matches!(adding.wait, Wait::Block(_) | Wait::Address(_));
            if agent.adding.as_ref().is_some_and(asks) {
                actions.push(Action::ServeAdd(index));
            }
            // The registrar waits until the first read is complete.
            if !matches!(agent.watcher.behind, Behind::Unread) {
                actions.push(Action::Decide(index));
            }
            let is_member =
                machine.identity().is_some_and(|identity| identity.member_state == MemberState::Member);
            if is_member && agent.may_serve() {
                if remaining.block_requests > 0 {
                    actions.push(Action::RequestBlock(index));
                }
                let open = || machine.ipam.blocks().iter().filter(|owned| !owned.leaving);
                if remaining.releases > 0 && open().count() > 1 {
                    actions.extend(open().map(|owned| Action::StartRelease(index, owned.block)));
                }
            }
        }
        Some(stopped) => registrar(cluster, index, stopped, actions),
    }
    if let Some(adding) = &agent.adding {
        match adding.wait {
            Wait::Turn(_) => actions.push(Action::Continue(index, TaskKind::Add)),
            Wait::Block(_) | Wait::Address(_) if remaining.timeouts > 0 => {
                actions.push(Action::TimeOutAdd(index));
            }
            _ => {}
        }
    }
    actions.extend(agent.deleting.keys().map(|container| Action::Continue(index, TaskKind::Del(*container))));
    actions.extend(agent.sweeping.iter().map(|_| Action::Continue(index, TaskKind::OrphanCollector)));
}

fn registrar(cluster: &Cluster, index: MachineIndex, stopped: &Stopped, actions: &mut Vec<Action>) {
    let (remaining, watcher) = (&cluster.remaining, &cluster.machines[index].agent.watcher);
    let continue_registrar = Action::Continue(index, TaskKind::Registrar);
    match &stopped.wait {
        Wait::Commit(_) => {
            let is_left = |fate: &Fate| match fate {
                Fate::Answered => true,
                Fate::ReplyLost | Fate::Lost => remaining.lost > 0,
                Fate::AnsweredAndRepeated | Fate::Late => remaining.late > 0,
            };
            let fates = Fate::ALL.into_iter().filter(is_left);
            actions.extend(fates.map(|fate| Action::CompleteTransaction(index, fate)));
        }
        Wait::Read(_) => {
            actions.push(Action::ReadOutcome(index));
            if remaining.failed_reads > 0 {
                actions.push(Action::FailToReadOutcome(index));
            }
        }
        Wait::CaughtUp(revision) if watcher.shows(*revision) => actions.push(continue_registrar),
        // If there are no more changes to receive, time passes.
        Wait::Changed(revision) if watcher.view.revision != *revision || watcher.is_current() => {
            actions.push(continue_registrar);
        }
        Wait::CaughtUp(_) | Wait::Changed(_) => {
            if remaining.timeouts > 0 {
                actions.push(Action::TimeOut(index));
            }
        }
        Wait::Interface(_) | Wait::Free(_) => actions.push(continue_registrar),
        Wait::Block(_) | Wait::Address(_) | Wait::Turn(_) | Wait::Time => {}
    }
}

fn pods(cluster: &Cluster, index: MachineIndex, machine: &Machine, actions: &mut Vec<Action>) {
    if cluster.remaining.pods > 0 {
        actions.push(Action::Add(index));
    }
    if cluster.remaining.reserved > 0 && machine.agent.adding.is_none() && machine.agent.is_idle() {
        actions.push(Action::AddReserved(index));
    }
    // The runtime can also send a late DEL for a pod that is long gone.
    let is_at_rest = |container: &u8| !machine.agent.deleting.contains_key(container);
    actions
        .extend((1..=machine.containers).filter(is_at_rest).map(|container| Action::Del(index, container)));
    if cluster.remaining.ends > 0 {
        actions.extend(machine.plugged.keys().map(|container| Action::End(index, *container)));
    }
}

fn faults(cluster: &Cluster, index: MachineIndex, machine: &Machine, actions: &mut Vec<Action>) {
    let remaining = &cluster.remaining;
    if remaining.crashes > 0 {
        actions.push(Action::Crash(index));
    }
    if remaining.reboots > 0 {
        actions.push(Action::Reboot(index));
    }
    if remaining.deaths > 0 {
        actions.push(Action::FailPermanently(index));
    }
    // A careful operator: adopts only if the machine with the name is gone.
    let is_other = |node: &NodeRecord| {
        cluster
            .machines
            .iter()
            .any(|other| other.machine_id() == node.machine_id && other.power == Power::Failed)
    };
    if remaining.adoptions > 0
        && cluster.truth.view.nodes.get(&machine.name).is_some_and(|node| is_other(&node.record))
    {
        actions.push(Action::Adopt(index));
    }
    let removed = || machine.identity().is_some_and(|identity| identity.member_state == MemberState::Removed);
    if remaining.rejoins > 0 && !machine.agent.may_serve() && removed() && machine.ipam.blocks().is_empty() {
        actions.push(Action::Rejoin(index));
    }
}

/// Whether an operator may confirm that every machine with that name is gone. The operator checks first.
fn may_confirm(cluster: &Cluster, index: MachineIndex) -> bool {
    let (view, name) = (&cluster.truth.view, &cluster.machines[index].name);
    if let Some(node) = view.nodes.get(name) {
        return is_gone(cluster, &node.record.incarnation);
    }
    let mut fences = view.fences.iter().filter(|(_, fence)| fence.record.node == *name);
    fences.all(|(incarnation, fence)| fence.record.pods != PodsGone::Unknown || is_gone(cluster, incarnation))
}

fn is_gone(cluster: &Cluster, incarnation: &Incarnation) -> bool {
    let has_generated = |machine: &&Arc<Machine>| incarnation.to_string().starts_with(machine.id);
    cluster.machines.iter().find(has_generated).is_some_and(|machine| machine.power == Power::Failed)
}
