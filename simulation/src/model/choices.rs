//! The events that are possible in a state.

use std::sync::Arc;

use polder_ipam::ids::Incarnation;
use polder_ipam::ledger::MemberState;
use polder_ipam::record::{NodeRecord, PodsGone};
use polder_ipam::removal::OperatorConfirmation;

use super::action::{Action, Fate, Whose};
use super::cluster::Cluster;
use super::machine::{Machine, Power, Who};
use super::task::{Stopped, Wait};
use super::watcher::Behind;

/// Appends all events that are possible next.
pub(super) fn choices(cluster: &Cluster, actions: &mut Vec<Action>) {
    for (who, machine) in cluster.machines.iter().enumerate() {
        match machine.power {
            Power::Blank => {
                if cluster.left.newcomers > 0 {
                    actions.push(Action::Begin(who));
                }
                if cluster.left.copies > 0 {
                    actions.push(Action::BeginCopied(who));
                }
            }
            Power::Gone => {}
            Power::On => {
                agent(cluster, who, machine, actions);
                pods(cluster, who, machine, actions);
                faults(cluster, who, machine, actions);
            }
        }
    }
    actions.extend((0..cluster.late.len()).map(Action::Arrive));
    if cluster.left.removals > 0 {
        for who in [0, 1] {
            actions.push(Action::Remove(who, OperatorConfirmation::No));
            if may_vouch(cluster, who) {
                actions.push(Action::Remove(who, OperatorConfirmation::Yes));
            }
        }
    }
    if cluster.left.ticks > 0 {
        actions.push(Action::Rest);
    }
}

fn agent(cluster: &Cluster, who: Who, machine: &Machine, actions: &mut Vec<Action>) {
    let (left, agent) = (&cluster.left, &machine.agent);
    if !agent.watcher.is_current() {
        actions.push(Action::Hear(who));
    }
    match &agent.registrar {
        None => {
            let asks = |adding: &Stopped| matches!(adding.wait, Wait::Block(_) | Wait::Address(_));
            if agent.adding.as_ref().is_some_and(asks) {
                actions.push(Action::Ask(who));
            }
            // The registrar waits until the first read is complete.
            if !matches!(agent.watcher.behind, Behind::Unread) {
                actions.push(Action::Decide(who));
            }
            let is_member =
                machine.identity().is_some_and(|identity| identity.member_state == MemberState::Member);
            if is_member && agent.may_serve() {
                if left.appetite > 0 {
                    actions.push(Action::Wish(who));
                }
                let open = || machine.ipam.blocks().iter().filter(|owned| !owned.leaving);
                if left.spares > 0 && open().count() > 1 {
                    actions.extend(open().map(|owned| Action::Spare(who, owned.block)));
                }
            }
        }
        Some(stopped) => registrar(cluster, who, stopped, actions),
    }
    if let Some(adding) = &agent.adding {
        match adding.wait {
            Wait::Turn(_) => actions.push(Action::GoOn(who, Whose::Add)),
            Wait::Block(_) | Wait::Address(_) if left.impatience > 0 => actions.push(Action::GiveUp(who)),
            _ => {}
        }
    }
    actions.extend(agent.deleting.keys().map(|container| Action::GoOn(who, Whose::Del(*container))));
    actions.extend(agent.sweeping.iter().map(|_| Action::GoOn(who, Whose::OrphanCollector)));
}

fn registrar(cluster: &Cluster, who: Who, stopped: &Stopped, actions: &mut Vec<Action>) {
    let (left, watcher) = (&cluster.left, &cluster.machines[who].agent.watcher);
    let go_on = Action::GoOn(who, Whose::Registrar);
    match &stopped.wait {
        Wait::Commit(_) => {
            let is_left = |fate: &Fate| match fate {
                Fate::Answered => true,
                Fate::ReplyLost | Fate::Lost => left.lost > 0,
                Fate::AnsweredAndRepeated | Fate::Late => left.late > 0,
            };
            let fates = Fate::ALL.into_iter().filter(is_left);
            actions.extend(fates.map(|fate| Action::Meet(who, fate)));
        }
        Wait::Read(_) => {
            actions.push(Action::Look(who));
            if left.in_vain > 0 {
                actions.push(Action::LookInVain(who));
            }
        }
        Wait::CaughtUp(revision) if watcher.shows(*revision) => actions.push(go_on),
        // If there are no more changes to receive, time passes.
        Wait::Changed(revision) if watcher.view.revision != *revision || watcher.is_current() => {
            actions.push(go_on);
        }
        Wait::CaughtUp(_) | Wait::Changed(_) => {
            if left.impatience > 0 {
                actions.push(Action::LosePatience(who));
            }
        }
        Wait::Interface(_) | Wait::Free(_) => actions.push(go_on),
        Wait::Block(_) | Wait::Address(_) | Wait::Turn(_) | Wait::Time => {}
    }
}

fn pods(cluster: &Cluster, who: Who, machine: &Machine, actions: &mut Vec<Action>) {
    if cluster.left.pods > 0 {
        actions.push(Action::Add(who));
    }
    if cluster.left.reserved > 0 && machine.agent.adding.is_none() && machine.agent.is_idle() {
        actions.push(Action::AddReserved(who));
    }
    // The runtime can also send a late DEL for a pod that is long gone.
    let is_at_rest = |container: &u8| !machine.agent.deleting.contains_key(container);
    actions.extend((1..=machine.containers).filter(is_at_rest).map(|container| Action::Del(who, container)));
    if cluster.left.ends > 0 {
        actions.extend(machine.plugged.keys().map(|container| Action::End(who, *container)));
    }
}

fn faults(cluster: &Cluster, who: Who, machine: &Machine, actions: &mut Vec<Action>) {
    let left = &cluster.left;
    if left.crashes > 0 {
        actions.push(Action::Crash(who));
    }
    if left.reboots > 0 {
        actions.push(Action::Reboot(who));
    }
    if left.deaths > 0 {
        actions.push(Action::Die(who));
    }
    // A careful operator: adopts only if the machine with the name is gone.
    let is_other = |node: &NodeRecord| {
        cluster
            .machines
            .iter()
            .any(|other| other.machine_id() == node.machine_id && other.power == Power::Gone)
    };
    if left.adoptions > 0
        && cluster.truth.view.nodes.get(&machine.name).is_some_and(|node| is_other(&node.record))
    {
        actions.push(Action::Adopt(who));
    }
    let removed = || machine.identity().is_some_and(|identity| identity.member_state == MemberState::Removed);
    if left.rejoins > 0 && !machine.agent.may_serve() && removed() && machine.ipam.blocks().is_empty() {
        actions.push(Action::Rejoin(who));
    }
}

/// Whether an operator may confirm that every machine with that name is gone. The operator checks first.
fn may_vouch(cluster: &Cluster, who: Who) -> bool {
    let (view, name) = (&cluster.truth.view, &cluster.machines[who].name);
    if let Some(node) = view.nodes.get(name) {
        return is_gone(cluster, &node.record.incarnation);
    }
    let mut fences = view.fences.iter().filter(|(_, fence)| fence.record.node == *name);
    fences.all(|(incarnation, fence)| fence.record.pods != PodsGone::Unknown || is_gone(cluster, incarnation))
}

fn is_gone(cluster: &Cluster, incarnation: &Incarnation) -> bool {
    let made_it = |machine: &&Arc<Machine>| incarnation.as_str().starts_with(machine.id);
    cluster.machines.iter().find(made_it).is_some_and(|machine| machine.power == Power::Gone)
}
