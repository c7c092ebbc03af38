//! What can happen next.

use std::fmt;

use polder_ipam::Block;
use polder_ipam::removal::Vouched;

use super::machine::{Container, Who};

/// What happens next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The next change in the store reaches a machine.
    Hear(Who),
    /// Its registrar does what its steward says.
    Decide(Who),
    /// Its registrar serves the ADD that waits for it.
    Ask(Who),
    /// The transaction of its registrar meets its fate.
    Meet(Who, Fate),
    /// What became of a transaction is looked up.
    Look(Who),
    /// What became of it cannot be looked up.
    LookInVain(Who),
    /// Its registrar does not see in time what it waits for.
    LosePatience(Who),
    /// An ADD has waited long enough for the registrar.
    GiveUp(Who),
    /// A task goes on.
    GoOn(Who, Whose),
    /// A transaction takes effect, or does not, that nobody waits for.
    Arrive(usize),
    /// A pod begins.
    Add(Who),
    /// A pod begins whose address is reserved.
    AddReserved(Who),
    /// The runtime says that a pod has ended. It may say so at any time, and again.
    Del(Who, Container),
    /// A pod ends.
    End(Who, Container),
    /// A block is wanted before it is needed.
    Wish(Who),
    /// A block is not needed.
    Spare(Who, Block),
    /// An agent dies, and is started again.
    Crash(Who),
    /// A machine dies, and is booted again.
    Reboot(Who),
    /// A machine dies for good.
    Die(Who),
    /// A machine is started for the first time.
    Begin(Who),
    /// A machine is started for the first time, with a copy of the ledger of the one that has its name.
    BeginCopied(Who),
    /// An operator says that a machine is in place of one that is gone.
    Adopt(Who),
    /// The ledger of a removed node is thrown away, and its agent started again.
    Rejoin(Who),
    /// An operator removes the node that has a machine's name.
    Remove(Who, Vouched),
    /// Time passes, more than any rest.
    Rest,
}

/// Which of the tasks of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The registrar's.
    Registrar,
    /// That of the ADD that waits for the registrar.
    Add,
    /// That of the DEL of a pod.
    Del(Container),
    /// The one that finishes what the agent before had begun.
    Sweeper,
}

/// What becomes of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is carried out and answered.
    Answered,
    /// It is, and arrives again later.
    AnsweredAndRepeated,
    /// It is carried out, and the answer is lost.
    ReplyLost,
    /// It is lost.
    Lost,
    /// It arrives later, when nobody waits for it.
    Late,
}

impl Fate {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Answered, Self::AnsweredAndRepeated, Self::ReplyLost, Self::Lost, Self::Late];
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registrar => f.write_str("registrar"),
            Self::Add => f.write_str("ADD"),
            Self::Del(container) => write!(f, "DEL of pod {container}"),
            Self::Sweeper => f.write_str("sweeper"),
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
            Self::Remove(who, Vouched::No) => write!(f, "the operator removes the node named as {}", m(who)),
            Self::Remove(who, Vouched::Yes) => {
                write!(f, "the operator removes the node named as {}, and vouches that it is gone", m(who))
            }
            Self::Remove(who, Vouched::Earlier) => {
                write!(f, "the operator vouches that all removed nodes named as {} are gone", m(who))
            }
            Self::Rest => f.write_str("time passes"),
        }
    }
}
