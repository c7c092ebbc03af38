//! Errands: transactions meet their fate, and what is not known of them is looked up. It mirrors the agent's registrar.

use polder_ipam::change::Change;
use polder_ipam::key::Range;
use polder_ipam::store::{Entry, Outcome, Write};

use super::action::{Errands, Fate};
use super::flaw::Flaw;
use super::machine::{Errand, Goal, Sent, Stage, Who};
use super::play::Play;
use super::tally::Happening;

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
        match outcome {
            Some(Outcome::Applied { revision }) => self.win(who, whose, goal, revision),
            Some(Outcome::Refused) => self.lose(who, whose, goal),
            None if self.space.flaw == Some(Flaw::RepeatsBlindly) => self.ask_again(who, whose, goal),
            None => self.doubt(who, whose, goal, &sent),
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

    fn doubt(&mut self, who: Who, whose: Errands, goal: Goal, sent: &Sent) {
        if let Goal::Write(_) = goal {
            return self.machine(who).agent.end_round();
        }
        let put = sent.txn.writes.iter().find_map(|write| match write {
            Write::Put { key, value } => Some((key.clone(), value.clone())),
            Write::Delete { .. } => None,
        });
        let Some((key, value)) = put else { return };
        let stage = Stage::Unknown(Entry { key, value, revision: 0 });
        *self.errand(who, whose) = Some(Errand { goal, stage });
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
        let Some(Errand { goal, stage: Stage::Unknown(entry) }) = self.errand(who, whose).clone() else {
            return false;
        };
        let found = self.cluster.etcd.range(&Range::single(entry.key.clone()));
        if found.entries.first().is_some_and(|found| found.value == entry.value) {
            self.count(Happening::FoundMade);
            *self.errand(who, whose) = Some(Errand { goal, stage: Stage::Won(0) });
        } else {
            self.count(Happening::FoundUnmade);
            self.lose(who, whose, goal);
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
