//! Tasks that ship, each stopped where it waits for the outside.
//!
//! What a future has come to can neither be copied nor compared. So a stopped task is what it began as, and the answers that it has
//! been given since. To go on it is run again from its beginning, and finds in each part what it found the first time.

use std::net::IpAddr;
use std::sync::Arc;

use polder_api::Attachment;
use polder_api::message::AddRequest;
use polder_ipam::Revision;
use polder_ipam::change::Change;
use polder_ipam::claim::NoClaim;
use polder_ipam::ids::Incarnation;
use polder_ipam::key::Range;
use polder_ipam::pool::BlockRequest;
use polder_ipam::steward::Step;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn};
use polder_ipam::tasks::{Decided, Unreserved, Workload};

use super::machine::Machine;

/// What a task is for.
#[derive(Debug, Clone)]
pub enum Job {
    /// The registrar decides on its next step.
    Decide,
    /// It carries the step out.
    CarryOut(Decided),
    /// It gets a block, for an ADD that waits for it or for later.
    Serve {
        /// Which.
        wanted: BlockRequest,
        /// Whether an ADD waits.
        for_add: bool,
    },
    /// It gets a reserved address.
    HandOver(Workload, Attachment),
    /// A pod is added.
    Add(AddRequest),
    /// A pod is taken away.
    Del(Attachment),
    /// An agent has just started, and finishes taking these away.
    Sweep(Vec<Attachment>),
}

/// What came of a task.
#[derive(Debug)]
pub enum Ended {
    /// A step is decided on.
    Decided(Decided),
    /// The registrar has made a step, or answered an ADD; or a pod is gone.
    Done,
    /// A new pod has these addresses.
    Added(Attachment, Vec<IpAddr>),
    /// A pod gets none.
    Refused,
}

/// What a task waits for.
#[derive(Debug, Clone)]
pub enum Wait {
    /// What the store makes of a transaction.
    Commit(Sent),
    /// What the store holds.
    Read(Range),
    /// That the view shows what was written at that revision.
    CaughtUp(Revision),
    /// That the view is another one than that of this revision.
    Changed(Revision),
    /// A block from the registrar.
    Block(BlockRequest),
    /// A reserved address from the registrar.
    Address(Workload),
    /// Its turn, now that the registrar has answered that.
    Turn(Box<Answer>),
    /// That the interface of a pod goes.
    Interface(Attachment),
    /// That its addresses are freed.
    Free(Attachment),
    /// That time passes.
    Time,
}

/// What a task is told.
#[derive(Debug, Clone)]
pub enum Answer {
    /// What became of a transaction.
    Committed(Result<Outcome, StoreError>),
    /// What the store holds.
    Contents(Result<Contents, StoreError>),
    /// Whether the view shows what was written.
    CaughtUp(Result<(), StoreError>),
    /// What became of a wish for a block.
    Block(Result<(), NoClaim>),
    /// What became of a wish for a reserved address.
    Address(Result<IpAddr, Unreserved>),
    /// Go on.
    GoOn,
}

/// A transaction, and who sent it.
#[derive(Debug, Clone)]
pub struct Sent {
    /// Who.
    pub by: Option<Incarnation>,
    /// What for.
    pub change: Arc<Change>,
    /// What.
    pub txn: Arc<Txn>,
}

/// A task that waits.
#[derive(Debug, Clone)]
pub struct Stopped {
    /// What for.
    pub job: Arc<Job>,
    /// What it has done so far.
    pub parts: Vec<Part>,
    /// What it waits for.
    pub wait: Wait,
}

/// What a task did without waiting.
#[derive(Debug, Clone)]
pub struct Part {
    /// What it had been waiting for, and was told.
    pub told: Option<(Wait, Answer)>,
    /// The machine as it was before.
    pub machine: Arc<Machine>,
    /// When that was.
    pub tick: u8,
    /// The name that it made up.
    pub fresh: Option<String>,
}

impl Job {
    /// Whether it is a change of the records that the steward wants.
    pub fn is_write(&self) -> bool {
        matches!(self, Self::CarryOut(decided) if matches!(decided.step(), Some(Step::Commit(_))))
    }
}

impl Sent {
    /// Whether it is the one that a removed node may still write.
    pub fn confirms(&self) -> bool {
        matches!(*self.change, Change::ConfirmRemoval(_))
    }
}

impl Answer {
    /// Whether a registrar gives an ADD nothing.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Block(Err(_)) | Self::Address(Err(_)))
    }
}

impl Stopped {
    /// The transaction that is under way for it.
    pub fn under_way(&self) -> Option<&Sent> {
        match &self.wait {
            Wait::Commit(sent) => Some(sent),
            _ => None,
        }
    }
}
