//! The registrar of a machine: its own steps, and the requests of other tasks.

use std::sync::Arc;

use polder_api::Family;
use polder_ipam::change::Change;
use polder_ipam::pool::BlockRequest;
use polder_ipam::record::PodsGone;
use polder_ipam::store::Outcome;
use polder_ipam::transaction::trace;

use super::RESERVED;
use super::action::{Fate, TaskKind};
use super::flaw::Flaw;
use super::machine::MachineIndex;
use super::tally::Occurrence;
use super::task::{Answer, Job, Stopped, TaskResult, Wait};
use super::transition::Transition;
use crate::store_request::no_answer;

impl Transition<'_> {
    /// Starts the next step of an idle registrar.
    pub(super) fn decide(&mut self, index: MachineIndex) -> bool {
        if self.space.flaw == Some(Flaw::NeedsNoCoolDown) {
            self.pretend_view_is_known_since_boot(index);
        }
        if let Some(identity) = self.space.mistaken_identity(&self.cluster.machines[index]) {
            self.machine(index).ipam().identify(&identity).expect("a ledger in memory");
        }
        let Ok(TaskResult::Decided(decided)) = self.begin_task(index, Job::Decide) else {
            unreachable!("a decision waits for nothing")
        };
        self.start_registrar_task(index, Job::CarryOut(decided))
    }

    /// A deliberate defect: the registrar treats the current view as known since boot.
    fn pretend_view_is_known_since_boot(&mut self, index: MachineIndex) {
        let (before, tick) = (Arc::clone(&self.cluster.machines[index]), self.cluster.tick);
        self.machine(index).booted = tick;
        let _ = self.begin_task(index, Job::Decide);
        let state = self.cluster.machines[index].agent.state.clone();
        self.cluster.machines[index] = before;
        self.machine(index).agent.state = state;
    }

    /// Claims a block ahead.
    pub(super) fn request_block(&mut self, index: MachineIndex) -> bool {
        self.start_registrar_task(
            index,
            Job::Serve { wanted: BlockRequest::Any(Family::V4, None), for_add: false },
        )
    }

    /// Starts a task of the registrar.
    pub(super) fn start_registrar_task(&mut self, index: MachineIndex, job: Job) -> bool {
        if matches!(job, Job::HandOver(..)) {
            self.count_hand_over(index);
        }
        let next = self.cluster.machines[index].next_incarnation();
        let begun = self.begin_task(index, job);
        self.record_registrar_progress(index, begun);
        if self.cluster.machines[index]
            .identity()
            .is_some_and(|identity| identity.incarnation.to_string() == next)
        {
            self.machine(index).incarnations += 1;
        }
        true
    }

    /// Gives the registrar the answer that it waits for.
    fn answer_registrar(&mut self, index: MachineIndex, answer: Answer) -> bool {
        let Some(stopped) = self.machine(index).agent.registrar.take() else { return false };
        let resumed = self.resume(index, stopped, answer);
        self.record_registrar_progress(index, resumed);
        true
    }

    /// Records the progress of the registrar's task.
    pub(super) fn record_registrar_progress(
        &mut self,
        index: MachineIndex,
        result: Result<TaskResult, Stopped>,
    ) {
        match result {
            Err(stopped) => self.machine(index).agent.registrar = Some(stopped),
            Ok(_) => self.continue_refused_add(index),
        }
    }

    /// Applies the fate to the registrar's transaction.
    pub(super) fn complete_transaction(&mut self, index: MachineIndex, fate: Fate) -> bool {
        let registrar = self.cluster.machines[index].agent.registrar.as_ref();
        let Some(sent) = registrar.and_then(Stopped::in_flight).cloned() else { return false };
        let remaining = &mut self.cluster.remaining;
        match fate {
            Fate::Answered => {}
            Fate::ReplyLost | Fate::Lost => remaining.lost -= 1,
            Fate::AnsweredAndRepeated | Fate::Late => remaining.late -= 1,
        }
        let outcome = match fate {
            Fate::Answered | Fate::AnsweredAndRepeated | Fate::ReplyLost => Some(self.commit(&sent)),
            Fate::Lost | Fate::Late => None,
        };
        if matches!(fate, Fate::AnsweredAndRepeated | Fate::Late) {
            self.cluster.late.push(sent.clone());
        }
        let answer = match outcome {
            Some(outcome) if fate != Fate::ReplyLost => Ok(outcome),
            _ if self.space.flaw == Some(Flaw::RepeatsBlindly) => Ok(Outcome::Refused),
            _ => Err(no_answer()),
        };
        match answer {
            Ok(Outcome::Applied { .. }) => self.count_change(index, &sent.change),
            Ok(Outcome::Refused) if matches!(*sent.change, Change::ClaimBlock(_)) => {
                self.count(Occurrence::ClaimRefused);
            }
            _ => {}
        }
        self.answer_registrar(index, Answer::Committed(answer))
    }

    fn count_change(&self, index: MachineIndex, change: &Change) {
        match change {
            Change::ClaimBlock(_) => self.count(Occurrence::Claimed),
            Change::ReleaseRemoved(_) | Change::ForgetFence { .. } => {
                self.count(Occurrence::RemovedBlockReleased);
            }
            Change::ConfirmRemoval(_) => self.count(Occurrence::Confirmed),
            Change::ReleaseAddress { .. } => self.count(Occurrence::HolderCleared),
            Change::RegisterNode { .. } | Change::TakeOverNode { .. } if index == 2 => {
                self.count(Occurrence::Registered);
            }
            _ => {}
        }
    }

    /// Lets the registrar read whether its transaction took effect; with `fails`, the read fails.
    pub(super) fn read_outcome(&mut self, index: MachineIndex, fails: bool) -> bool {
        let Some(Stopped { wait: Wait::Read(range), parts, .. }) =
            &self.cluster.machines[index].agent.registrar
        else {
            return false;
        };
        let contents = self.cluster.etcd.range(range);
        if fails {
            return self.answer_registrar(index, Answer::Contents(Err(no_answer())));
        }
        if let Some((Wait::Commit(sent), _)) = parts.last().and_then(|part| part.resumed_with.as_ref())
            && let Some(trace) = trace(&sent.change)
        {
            let is_made = contents.entries.iter().any(|entry| entry.value == trace.value);
            self.count(if is_made { Occurrence::FoundApplied } else { Occurrence::FoundNotApplied });
        }
        self.answer_registrar(index, Answer::Contents(Ok(contents)))
    }

    /// Lets the registrar time out while it waits for its view.
    pub(super) fn time_out(&mut self, index: MachineIndex) -> bool {
        let registrar = self.cluster.machines[index].agent.registrar.as_ref();
        let answer = match registrar.map(|stopped| &stopped.wait) {
            Some(Wait::CaughtUp(_)) => Answer::CaughtUp(Err(no_answer())),
            _ => Answer::Continue,
        };
        self.answer_registrar(index, answer)
    }

    /// Delivers the next change of the store to a machine. A write that only waited for this change is complete.
    pub(super) fn receive_change(&mut self, index: MachineIndex) -> bool {
        let etcd = Arc::clone(&self.cluster.etcd);
        let agent = &mut self.machine(index).agent;
        agent.watcher.receive(&etcd);
        let is_over = agent.registrar.as_ref().is_some_and(|Stopped { job, wait, .. }| {
            matches!(wait, Wait::CaughtUp(revision) if agent.watcher.shows(*revision)) && job.is_write()
        });
        if is_over { self.continue_task(index, TaskKind::Registrar) } else { true }
    }

    fn count_hand_over(&self, index: MachineIndex) {
        let view = &self.cluster.machines[index].agent.watcher.view;
        let Some(last) = view.reservations.get(&RESERVED).and_then(|known| known.record.holder.as_ref())
        else {
            return;
        };
        let fence = view.fences.get(&last.incarnation);
        if fence.is_some_and(|fence| fence.record.pods != PodsGone::Unknown) {
            self.count(Occurrence::HandedOverRemoved);
        } else if view.nodes.get(&last.node).is_some_and(|node| node.record.boot_id != last.boot_id) {
            self.count(Occurrence::HandedOverRebooted);
        }
    }
}
