//! The possible next events.

use std::fmt;

use polder_ipam::Block;
use polder_ipam::removal::OperatorConfirmation;

use super::machine::{Container, Who};

/// An event of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The next change in the store reaches the machine.
    Hear(Who),
    /// The registrar executes the next step of the membership rules.
    Decide(Who),
    /// The registrar serves the waiting ADD.
    Ask(Who),
    /// The transaction of the registrar meets the fate.
    Meet(Who, Fate),
    /// The registrar reads whether its transaction took effect.
    Look(Who),
    /// The registrar fails to read whether its transaction took effect.
    LookInVain(Who),
    /// The registrar times out while it waits for its view.
    LosePatience(Who),
    /// An ADD times out while it waits for the registrar.
    GiveUp(Who),
    /// A task continues.
    GoOn(Who, Whose),
    /// A late transaction, by index, reaches the store. No task waits for it.
    Arrive(usize),
    /// ADD of a new pod.
    Add(Who),
    /// ADD of a new pod with the reserved address.
    AddReserved(Who),
    /// The runtime calls DEL for a pod, at any time, possibly again.
    Del(Who, Container),
    /// A pod ends without a DEL.
    End(Who, Container),
    /// The node claims a block before it needs one.
    Wish(Who),
    /// The node starts to release a block that it does not need.
    Spare(Who, Block),
    /// The agent crashes and is restarted.
    Crash(Who),
    /// The machine reboots.
    Reboot(Who),
    /// The machine fails permanently.
    Die(Who),
    /// The machine starts for the first time.
    Begin(Who),
    /// The machine starts for the first time, with a copy of the ledger of the machine that has its name.
    BeginCopied(Who),
    /// An operator declares that the machine replaces a failed one.
    Adopt(Who),
    /// The ledger of a removed node is deleted, and its agent is restarted.
    Rejoin(Who),
    /// An operator removes the node that has the machine's name.
    Remove(Who, OperatorConfirmation),
    /// Time passes, longer than any cool-down.
    Rest,
}

/// A task of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The task of the registrar.
    Registrar,
    /// The ADD that waits for the registrar.
    Add,
    /// The DEL of a pod.
    Del(Container),
    /// The task that finishes the DELs of the previous agent.
    OrphanCollector,
}

/// The fate of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It takes effect, and the reply arrives.
    Answered,
    /// It takes effect, the reply arrives, and a copy of the transaction arrives later.
    AnsweredAndRepeated,
    /// It takes effect, but the reply is lost.
    ReplyLost,
    /// The transaction is lost.
    Lost,
    /// It arrives later, when no task waits for it.
    Late,
}

impl Fate {
    /// All fates.
    pub const ALL: [Self; 5] =
        [Self::Answered, Self::AnsweredAndRepeated, Self::ReplyLost, Self::Lost, Self::Late];
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registrar => f.write_str("registrar"),
            Self::Add => f.write_str("ADD"),
            Self::Del(container) => write!(f, "DEL of pod {container}"),
            Self::OrphanCollector => f.write_str("orphan collector"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = |who: &Who| format!("m{}", who + 1);
        match self {
            Self::Hear(who) => write!(f, "{} hears what changed next in the store", m(who)),
            Self::Decide(who) => write!(f, "the registrar of {} makes its next step", m(who)),
            Self::Ask(who) => write!(f, "the registrar of {} serves the ADD", m(who)),
            Self::Meet(who, fate) => {
                let what = match fate {
                    Fate::Answered => "is carried out and answered",
                    Fate::AnsweredAndRepeated => "is carried out and answered, and a copy of it is under way",
                    Fate::ReplyLost => "is carried out, and the answer is lost",
                    Fate::Lost => "is lost",
                    Fate::Late => "is given up, and still under way",
                };
                write!(f, "the transaction of {}'s registrar {what}", m(who))
            }
            Self::Look(who) => write!(f, "{}'s registrar looks up what became of it", m(who)),
            Self::LookInVain(who) => write!(f, "{}'s registrar cannot look up what became of it", m(who)),
            Self::LosePatience(who) => write!(f, "{} does not see in time what it waits for", m(who)),
            Self::GiveUp(who) => write!(f, "the ADD on {} waits no longer for the registrar", m(who)),
            Self::GoOn(who, whose) => write!(f, "the {whose} on {} goes on", m(who)),
            Self::Arrive(index) => write!(f, "late transaction {} arrives", index + 1),
            Self::Add(who) => write!(f, "ADD of a new pod on {}", m(who)),
            Self::AddReserved(who) => write!(f, "ADD of a new pod with the reserved address on {}", m(who)),
            Self::Del(who, container) => write!(f, "DEL of pod {container} on {}", m(who)),
            Self::End(who, container) => write!(f, "pod {container} on {} ends without a word", m(who)),
            Self::Wish(who) => write!(f, "{} wants another block", m(who)),
            Self::Spare(who, block) => write!(f, "{} begins to give {block} back", m(who)),
            Self::Crash(who) => write!(f, "the agent of {} dies and is started again", m(who)),
            Self::Reboot(who) => write!(f, "{} is rebooted", m(who)),
            Self::Die(who) => write!(f, "{} is gone for good", m(who)),
            Self::Begin(who) => write!(f, "{} is started", m(who)),
            Self::BeginCopied(who) => write!(f, "{} is started with a copy of a ledger", m(who)),
            Self::Adopt(who) => write!(f, "the operator says that {} is in place of another machine", m(who)),
            Self::Rejoin(who) => write!(f, "{} is started again without its ledger", m(who)),
            Self::Remove(who, OperatorConfirmation::No) => {
                write!(f, "the operator removes the node named as {}", m(who))
            }
            Self::Remove(who, OperatorConfirmation::Yes) => {
                write!(f, "the operator removes the node named as {}, and vouches that it is gone", m(who))
            }
            Self::Remove(who, OperatorConfirmation::Earlier) => {
                write!(f, "the operator vouches that all removed nodes named as {} are gone", m(who))
            }
            Self::Rest => f.write_str("time passes"),
        }
    }
}
