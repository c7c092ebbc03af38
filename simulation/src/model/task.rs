//! Production tasks, each stopped where it waits for something outside.
//!
//! The state of a future can be neither copied nor compared. So a stopped task consists of its job and the answers
//! received so far. To continue, it runs again from the beginning, and finds in each part the same state as the first
//! time.

use std::net::IpAddr;
use std::sync::Arc;

use polder_api::Attachment;
use polder_api::message::AddRequest;
use polder_ipam::Revision;
use polder_ipam::change::Change;
use polder_ipam::claim::NoClaim;
use polder_ipam::ids::Incarnation;
use polder_ipam::key::Range;
use polder_ipam::membership::Step;
use polder_ipam::pool::BlockRequest;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn};
use polder_ipam::tasks::{Decided, NotHandedOver, ReservationRequest};

use super::machine::Machine;

/// The job of a task.
#[derive(Debug, Clone)]
pub enum Job {
    /// The registrar decides on its next step.
    Decide,
    /// The registrar executes the step.
    CarryOut(Decided),
    /// The registrar claims a block, for a waiting ADD or ahead.
    Serve {
        /// The requested block.
        wanted: BlockRequest,
        /// Whether an ADD waits.
        for_add: bool,
    },
    /// The registrar reserves an address for a workload, and hands it over to the attachment.
    HandOver(ReservationRequest, Attachment),
    /// The agent serves an ADD.
    Add(AddRequest),
    /// The agent serves a DEL.
    Del(Attachment),
    /// A new agent finishes the DELs of these attachments.
    Sweep(Vec<Attachment>),
}

/// The result of a task.
#[derive(Debug)]
pub enum TaskResult {
    /// The registrar has decided on a step.
    Decided(Decided),
    /// The registrar has executed a step or answered an ADD, or a pod is removed.
    Done,
    /// A new pod has these addresses.
    Added(Attachment, Vec<IpAddr>),
    /// The ADD is refused.
    Refused,
}

/// The condition that a task waits for.
#[derive(Debug, Clone)]
pub enum Wait {
    /// The outcome of a transaction.
    Commit(Sent),
    /// The contents of a range in the store.
    Read(Range),
    /// The view shows this revision.
    CaughtUp(Revision),
    /// The view has another revision than this one.
    Changed(Revision),
    /// A block from the registrar.
    Block(BlockRequest),
    /// A reserved address from the registrar.
    Address(ReservationRequest),
    /// Its turn; the registrar has answered already.
    Turn(Box<Answer>),
    /// The interface of a pod is removed.
    Interface(Attachment),
    /// The addresses of a pod are released.
    Free(Attachment),
    /// Time passes.
    Time,
}

/// The answer that a waiting task receives.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The outcome of a transaction.
    Committed(Result<Outcome, StoreError>),
    /// The contents of a range in the store.
    Contents(Result<Contents, StoreError>),
    /// Whether the view has caught up.
    CaughtUp(Result<(), StoreError>),
    /// The result of a request for a block.
    Block(Result<(), NoClaim>),
    /// The result of a request for a reserved address.
    Address(Result<IpAddr, NotHandedOver>),
    /// Continue.
    Continue,
}

/// A transaction and its sender.
#[derive(Debug, Clone)]
pub struct Sent {
    /// The incarnation that sent it; `None` for an operator, or before registration.
    pub by: Option<Incarnation>,
    /// The change that it makes.
    pub change: Arc<Change>,
    /// The transaction itself.
    pub txn: Arc<Txn>,
}

/// A task that waits.
#[derive(Debug, Clone)]
pub struct Stopped {
    /// The job of the task.
    pub job: Arc<Job>,
    /// The parts that it has executed.
    pub parts: Vec<Part>,
    /// The condition that it waits for.
    pub wait: Wait,
}

/// The part of a task between two waits.
#[derive(Debug, Clone)]
pub struct Part {
    /// The wait before this part, and its answer. `None` for the first part.
    pub resumed_with: Option<(Wait, Answer)>,
    /// The machine before this part.
    pub machine: Arc<Machine>,
    /// Time of this part, in ticks.
    pub tick: u8,
    /// The generated name, if any.
    pub fresh: Option<String>,
}

impl Job {
    /// Whether the job executes a change of the records for the membership rules.
    pub fn is_write(&self) -> bool {
        matches!(self, Self::CarryOut(decided) if matches!(decided.step(), Some(Step::Commit(_))))
    }
}

impl Sent {
    /// Whether it confirms a removal: the only write permitted to a removed node.
    pub fn confirms(&self) -> bool {
        matches!(*self.change, Change::ConfirmRemoval(_))
    }
}

impl Answer {
    /// Whether the registrar refuses the request of an ADD.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Block(Err(_)) | Self::Address(Err(_)))
    }
}

impl Stopped {
    /// The transaction in flight, if the task waits for one.
    pub fn in_flight(&self) -> Option<&Sent> {
        match &self.wait {
            Wait::Commit(sent) => Some(sent),
            _ => None,
        }
    }
}
