//! The possible next events.

use std::fmt;

use polder_ipam::Block;
use polder_ipam::removal::OperatorConfirmation;

use super::machine::{Container, MachineIndex};

/// An event of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The next change in the store reaches the machine.
    ReceiveChange(MachineIndex),
    /// The registrar executes the next step of the membership rules.
    Decide(MachineIndex),
    /// The registrar serves the waiting ADD.
    ServeAdd(MachineIndex),
    /// The transaction of the registrar meets the fate.
    CompleteTransaction(MachineIndex, Fate),
    /// The registrar reads whether its transaction took effect.
    ReadOutcome(MachineIndex),
    /// The registrar fails to read whether its transaction took effect.
    FailToReadOutcome(MachineIndex),
    /// The registrar times out while it waits for its view.
    TimeOut(MachineIndex),
    /// An ADD times out while it waits for the registrar.
    TimeOutAdd(MachineIndex),
    /// A task continues.
    Continue(MachineIndex, TaskKind),
    /// A late transaction, by index, reaches the store. No task waits for it.
    DeliverLate(usize),
    /// ADD of a new pod.
    Add(MachineIndex),
    /// ADD of a new pod with the reserved address.
    AddReserved(MachineIndex),
    /// The runtime calls DEL for a pod, at any time, possibly again.
    Del(MachineIndex, Container),
    /// A pod ends without a DEL.
    End(MachineIndex, Container),
    /// The node claims a block before it needs one.
    RequestBlock(MachineIndex),
    /// The node starts to release a block that it does not need.
    StartRelease(MachineIndex, Block),
    /// The agent crashes and is restarted.
    Crash(MachineIndex),
    /// The machine reboots.
    Reboot(MachineIndex),
    /// The machine fails permanently.
    FailPermanently(MachineIndex),
    /// The machine starts for the first time.
    StartMachine(MachineIndex),
    /// The machine starts for the first time, with a copy of the ledger of the machine that has its name.
    StartWithCopiedLedger(MachineIndex),
    /// An operator declares that the machine replaces a failed one.
    Adopt(MachineIndex),
    /// The ledger of a removed node is deleted, and its agent is restarted.
    Rejoin(MachineIndex),
    /// An operator removes the node that has the machine's name.
    Remove(MachineIndex, OperatorConfirmation),
    /// Time passes, longer than any cool-down.
    AdvanceTime,
}

/// A task of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
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

impl fmt::Display for TaskKind {
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
        let m = |index: &MachineIndex| format!("m{}", index + 1);
        match self {
            Self::ReceiveChange(index) => write!(f, "{} receives the next change of the store", m(index)),
            Self::Decide(index) => write!(f, "the registrar of {} executes its next step", m(index)),
            Self::ServeAdd(index) => write!(f, "the registrar of {} serves the ADD", m(index)),
            Self::CompleteTransaction(index, fate) => {
                let outcome = match fate {
                    Fate::Answered => "takes effect and is answered",
                    Fate::AnsweredAndRepeated => {
                        "takes effect and is answered, and a copy of it is in flight"
                    }
                    Fate::ReplyLost => "takes effect, and the reply is lost",
                    Fate::Lost => "is lost",
                    Fate::Late => "is abandoned while in flight",
                };
                write!(f, "the transaction of {}'s registrar {outcome}", m(index))
            }
            Self::ReadOutcome(index) => write!(f, "{}'s registrar reads whether it took effect", m(index)),
            Self::FailToReadOutcome(index) => {
                write!(f, "{}'s registrar cannot read whether it took effect", m(index))
            }
            Self::TimeOut(index) => write!(f, "the registrar of {} times out", m(index)),
            Self::TimeOutAdd(index) => write!(f, "the ADD on {} times out", m(index)),
            Self::Continue(index, task) => write!(f, "the {task} on {} continues", m(index)),
            Self::DeliverLate(index) => write!(f, "late transaction {} arrives", index + 1),
            Self::Add(index) => write!(f, "ADD of a new pod on {}", m(index)),
            Self::AddReserved(index) => {
                write!(f, "ADD of a new pod with the reserved address on {}", m(index))
            }
            Self::Del(index, container) => write!(f, "DEL of pod {container} on {}", m(index)),
            Self::End(index, container) => write!(f, "pod {container} on {} ends without a DEL", m(index)),
            Self::RequestBlock(index) => write!(f, "{} claims another block", m(index)),
            Self::StartRelease(index, block) => write!(f, "{} starts to release {block}", m(index)),
            Self::Crash(index) => write!(f, "the agent of {} crashes and is restarted", m(index)),
            Self::Reboot(index) => write!(f, "{} is rebooted", m(index)),
            Self::FailPermanently(index) => write!(f, "{} fails permanently", m(index)),
            Self::StartMachine(index) => write!(f, "{} is started", m(index)),
            Self::StartWithCopiedLedger(index) => {
                write!(f, "{} is started with a copy of a ledger", m(index))
            }
            Self::Adopt(index) => {
                write!(f, "the operator declares that {} replaces another machine", m(index))
            }
            Self::Rejoin(index) => write!(f, "{} is started again without its ledger", m(index)),
            Self::Remove(index, OperatorConfirmation::No) => {
                write!(f, "the operator removes the node with the name of {}", m(index))
            }
            Self::Remove(index, OperatorConfirmation::Yes) => {
                write!(
                    f,
                    "the operator removes the node with the name of {}, and confirms that it is gone",
                    m(index)
                )
            }
            Self::Remove(index, OperatorConfirmation::Earlier) => {
                write!(
                    f,
                    "the operator confirms that all removed nodes with the name of {} are gone",
                    m(index)
                )
            }
            Self::AdvanceTime => f.write_str("time passes"),
        }
    }
}
