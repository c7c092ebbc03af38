//! The registrar of a machine: its own steps, and the requests of other tasks.

use std::sync::Arc;

use polder_api::Family;
use polder_ipam::change::Change;
use polder_ipam::pool::BlockRequest;
use polder_ipam::record::PodsGone;
use polder_ipam::store::Outcome;
use polder_ipam::transaction::trace;

use super::RESERVED;
use super::action::{Fate, Whose};
use super::flaw::Flaw;
use super::machine::Who;
use super::play::Play;
use super::tally::Happening;
use super::task::{Answer, Ended, Job, Stopped, Wait};
use crate::store_request::no_answer;

impl Play<'_> {
    /// Starts the next step of an idle registrar.
    pub(super) fn decide(&mut self, who: Who) -> bool {
        if self.space.flaw == Some(Flaw::NeedsNoRest) {
            self.believe_seen_before(who);
        }
        if let Some(identity) = self.space.mistake(&self.cluster.machines[who]) {
            self.machine(who).ipam().identify(&identity).expect("a ledger in memory");
        }
        let Ok(Ended::Decided(decided)) = self.begin(who, Job::Decide) else {
            unreachable!("what is decided on is at hand")
        };
        self.start(who, Job::CarryOut(decided))
    }

    /// A deliberate defect: the registrar treats the current view as known since boot.
    fn believe_seen_before(&mut self, who: Who) {
        let (before, tick) = (Arc::clone(&self.cluster.machines[who]), self.cluster.tick);
        self.machine(who).booted = tick;
        let _ = self.begin(who, Job::Decide);
        let state = self.cluster.machines[who].agent.state.clone();
        self.cluster.machines[who] = before;
        self.machine(who).agent.state = state;
    }

    /// Claims a block ahead.
    pub(super) fn wish(&mut self, who: Who) -> bool {
        self.start(who, Job::Serve { wanted: BlockRequest::Any(Family::V4, None), for_add: false })
    }

    /// Starts a task of the registrar.
    pub(super) fn start(&mut self, who: Who, job: Job) -> bool {
        if matches!(job, Job::HandOver(..)) {
            self.note_hand_over(who);
        }
        let next = self.cluster.machines[who].next_incarnation();
        let begun = self.begin(who, job);
        self.settle_registrar(who, begun);
        if self.cluster.machines[who].identity().is_some_and(|identity| identity.incarnation.as_str() == next)
        {
            self.machine(who).lives += 1;
        }
        true
    }

    /// Gives the registrar the answer that it waits for.
    fn tell_registrar(&mut self, who: Who, answer: Answer) -> bool {
        let Some(stopped) = self.machine(who).agent.registrar.take() else { return false };
        let resumed = self.resume(who, stopped, answer);
        self.settle_registrar(who, resumed);
        true
    }

    /// Records the progress of the registrar's task.
    pub(super) fn settle_registrar(&mut self, who: Who, came: Result<Ended, Stopped>) {
        match came {
            Err(stopped) => self.machine(who).agent.registrar = Some(stopped),
            Ok(_) => self.go_on_refused(who),
        }
    }

    /// Applies the fate to the registrar's transaction.
    pub(super) fn meet(&mut self, who: Who, fate: Fate) -> bool {
        let registrar = self.cluster.machines[who].agent.registrar.as_ref();
        let Some(sent) = registrar.and_then(Stopped::under_way).cloned() else { return false };
        let left = &mut self.cluster.left;
        match fate {
            Fate::Answered => {}
            Fate::ReplyLost | Fate::Lost => left.lost -= 1,
            Fate::AnsweredAndRepeated | Fate::Late => left.late -= 1,
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
            Ok(Outcome::Applied { .. }) => self.note_made(who, &sent.change),
            Ok(Outcome::Refused) if matches!(*sent.change, Change::ClaimBlock(_)) => {
                self.count(Happening::Beaten);
            }
            _ => {}
        }
        self.tell_registrar(who, Answer::Committed(answer))
    }

    fn note_made(&self, who: Who, change: &Change) {
        match change {
            Change::ClaimBlock(_) => self.count(Happening::Claimed),
            Change::ReleaseRemoved(_) | Change::ForgetFence { .. } => self.count(Happening::Inherited),
            Change::ConfirmRemoval(_) => self.count(Happening::Confirmed),
            Change::ReleaseAddress { .. } => self.count(Happening::LetGo),
            Change::RegisterNode { .. } | Change::TakeOverNode { .. } if who == 2 => {
                self.count(Happening::Registered);
            }
            _ => {}
        }
    }

    /// Lets the registrar read whether its transaction took effect; with `is_in_vain`, the read fails.
    pub(super) fn look(&mut self, who: Who, is_in_vain: bool) -> bool {
        let Some(Stopped { wait: Wait::Read(range), parts, .. }) =
            &self.cluster.machines[who].agent.registrar
        else {
            return false;
        };
        let contents = self.cluster.etcd.range(range);
        if is_in_vain {
            return self.tell_registrar(who, Answer::Contents(Err(no_answer())));
        }
        if let Some((Wait::Commit(sent), _)) = parts.last().and_then(|part| part.told.as_ref())
            && let Some(trace) = trace(&sent.change)
        {
            let is_made = contents.entries.iter().any(|entry| entry.value == trace.value);
            self.count(if is_made { Happening::FoundMade } else { Happening::FoundUnmade });
        }
        self.tell_registrar(who, Answer::Contents(Ok(contents)))
    }

    /// Lets the registrar time out while it waits for its view.
    pub(super) fn lose_patience(&mut self, who: Who) -> bool {
        let registrar = self.cluster.machines[who].agent.registrar.as_ref();
        let answer = match registrar.map(|stopped| &stopped.wait) {
            Some(Wait::CaughtUp(_)) => Answer::CaughtUp(Err(no_answer())),
            _ => Answer::GoOn,
        };
        self.tell_registrar(who, answer)
    }

    /// Delivers the next change of the store to a machine. A write that only waited for this change is complete.
    pub(super) fn hear(&mut self, who: Who) -> bool {
        let etcd = Arc::clone(&self.cluster.etcd);
        let agent = &mut self.machine(who).agent;
        agent.watcher.receive(&etcd);
        let is_over = agent.registrar.as_ref().is_some_and(|Stopped { job, wait, .. }| {
            matches!(wait, Wait::CaughtUp(revision) if agent.watcher.shows(*revision)) && job.is_write()
        });
        if is_over { self.go_on(who, Whose::Registrar) } else { true }
    }

    fn note_hand_over(&self, who: Who) {
        let view = &self.cluster.machines[who].agent.watcher.view;
        let Some(last) = view.reservations.get(&RESERVED).and_then(|known| known.record.holder.as_ref())
        else {
            return;
        };
        let fence = view.fences.get(&last.incarnation);
        if fence.is_some_and(|fence| fence.record.pods != PodsGone::Unknown) {
            self.count(Happening::HandedOverRemoved);
        } else if view.nodes.get(&last.node).is_some_and(|node| node.record.boot_id != last.boot_id) {
            self.count(Happening::HandedOverRebooted);
        }
    }
}
