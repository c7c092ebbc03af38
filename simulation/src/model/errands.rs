//! Errands: transactions meet their fate, and what is not known of them is looked up, by the rules of
//! [`polder_ipam::attempt`].

use polder_ipam::attempt::{Answered, Found};
use polder_ipam::change::Change;

use super::action::{Errands, Fate};
use super::flaw::Flaw;
use super::machine::{Errand, Goal, Stage, Who};
use super::play::Play;
use super::tally::Happening;
use crate::world::no_answer;

impl Play<'_> {
    /// Lets the transaction of an errand meet its fate.
    pub(super) fn meet(&mut self, who: Who, whose: Errands, fate: Fate) -> bool {
        let Some(Errand { goal, stage: Stage::UnderWay(sent) }) = self.errand(who, whose).clone() else {
            return false;
        };
        let left = &mut self.cluster.left;
        match fate {
            Fate::Answered => {}
            Fate::ReplyLost | Fate::Lost => left.lost -= 1,
            Fate::AnsweredAndRepeated | Fate::Late => left.late -= 1,
        }
        let outcome = match fate {
            Fate::Answered => Some(self.commit(&sent)),
            Fate::AnsweredAndRepeated => {
                let outcome = self.commit(&sent);
                self.cluster.late.push(sent.clone());
                Some(outcome)
            }
            Fate::ReplyLost => {
                self.commit(&sent);
                None
            }
            Fate::Lost => None,
            Fate::Late => {
                self.cluster.late.push(sent.clone());
                None
            }
        };
        match sent.attempt.answered(outcome.ok_or_else(no_answer)) {
            Answered::Made(revision) => self.win(who, whose, goal, revision),
            Answered::Refused => self.lose(who, whose, goal),
            _ if self.space.flaw == Some(Flaw::RepeatsBlindly) => self.ask_again(who, whose, goal),
            Answered::InDoubt(doubt) => {
                *self.errand(who, whose) = Some(Errand { goal, stage: Stage::Unknown(doubt) });
            }
            // What the steward wants is decided on anew.
            Answered::Failed(_) => self.machine(who).agent.end_round(),
        }
        true
    }

    fn win(&mut self, who: Who, whose: Errands, goal: Goal, revision: i64) {
        match &goal {
            Goal::Claim { .. } => self.count(Happening::Claimed),
            Goal::Write(change) => match &**change {
                Change::InheritFrom(_) | Change::ForgetFence { .. } => self.count(Happening::Inherited),
                Change::ConfirmRemoval(_) => self.count(Happening::Confirmed),
                Change::LetGoAddress { .. } => self.count(Happening::LetGo),
                Change::RegisterNode { .. } | Change::TakeOverNode { .. } if who == 2 => {
                    self.count(Happening::Registered);
                }
                _ => {}
            },
            Goal::HandOver { .. } => {}
        }
        *self.errand(who, whose) = Some(Errand { goal, stage: Stage::Won(revision) });
    }

    fn lose(&mut self, who: Who, whose: Errands, goal: Goal) {
        match goal {
            Goal::Write(_) => self.machine(who).agent.end_round(),
            Goal::Claim { mut lost, attempt } => {
                self.count(Happening::Beaten);
                lost.extend(attempt.map(|owned| owned.block));
                let goal = Goal::Claim { lost, attempt: None };
                *self.errand(who, whose) = Some(Errand { goal, stage: Stage::Ready });
            }
            Goal::HandOver { .. } => drop(self.fail(who, whose)),
        }
    }

    /// A deliberate defect.
    fn ask_again(&mut self, who: Who, whose: Errands, goal: Goal) {
        match goal {
            Goal::Write(_) => self.machine(who).agent.end_round(),
            Goal::Claim { lost, .. } => {
                let goal = Goal::Claim { lost, attempt: None };
                *self.errand(who, whose) = Some(Errand { goal, stage: Stage::Ready });
            }
            Goal::HandOver { .. } => drop(self.fail(who, whose)),
        }
    }

    /// Looks up what became of a transaction.
    pub(super) fn look(&mut self, who: Who, whose: Errands) -> bool {
        let Some(Errand { goal, stage: Stage::Unknown(doubt) }) = self.errand(who, whose).clone() else {
            return false;
        };
        let contents = self.cluster.etcd.range(&doubt.range());
        match doubt.found(&contents) {
            Found::Made => {
                self.count(Happening::FoundMade);
                *self.errand(who, whose) = Some(Errand { goal, stage: Stage::Won(0) });
            }
            Found::NotMade(_) => {
                self.count(Happening::FoundUnmade);
                self.lose(who, whose, goal);
            }
        }
        true
    }

    /// Gives an errand up.
    pub(super) fn fail(&mut self, who: Who, whose: Errands) -> bool {
        let agent = &mut self.machine(who).agent;
        match whose {
            Errands::Registrar => {
                agent.unclaimable = true;
                agent.registrar = None;
            }
            Errands::Adding => {
                if let Some(Errand { goal: Goal::HandOver { container, address }, .. }) = agent.adding.take()
                {
                    let machine = self.machine(who);
                    let attachment = machine.attachment(container);
                    machine.ipam().give_up(address, attachment);
                }
            }
        }
        true
    }

    /// Takes down what was won.
    pub(super) fn take(&mut self, who: Who, whose: Errands) -> bool {
        match self.errand(who, whose).take() {
            Some(Errand { goal: Goal::Claim { attempt: Some(owned), .. }, .. }) => self.add_block(who, owned),
            Some(Errand { goal: Goal::HandOver { container, address }, .. }) => {
                return self.allocate_reserved(who, container, address);
            }
            _ => return false,
        }
        true
    }

    /// Does not see in time what was written.
    pub(super) fn lose_patience(&mut self, who: Who) -> bool {
        if let Some(Errand { goal: Goal::Write(_), .. }) = &self.cluster.machines[who].agent.registrar {
            self.machine(who).agent.end_round();
            return true;
        }
        self.fail(who, Errands::Registrar)
    }
}
