//! What tasks ask of each other, each with who waits for the answer.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;

use polder_api::Attachment;
use polder_ipam::claim::NoClaim;
use polder_ipam::pool::BlockRequest;
use polder_ipam::tasks::{Unreserved, Workload};

/// Where the answer is put for whoever waits for it.
#[derive(Debug)]
pub struct Reply<T> {
    /// Whether it is there.
    pub given: Rc<Cell<bool>>,
    /// The answer.
    pub answer: Rc<RefCell<Option<T>>>,
    /// Whether nobody waits for it any more.
    pub given_up: Rc<Cell<bool>>,
}

impl<T> Default for Reply<T> {
    fn default() -> Self {
        Self { given: Rc::default(), answer: Rc::default(), given_up: Rc::default() }
    }
}

impl<T> Clone for Reply<T> {
    fn clone(&self) -> Self {
        Self {
            given: Rc::clone(&self.given),
            answer: Rc::clone(&self.answer),
            given_up: Rc::clone(&self.given_up),
        }
    }
}

impl<T> Reply<T> {
    /// Answers. False if nobody waits for it any more.
    pub fn give(&self, answer: T) -> bool {
        *self.answer.borrow_mut() = Some(answer);
        self.given.set(true);
        !self.given_up.get()
    }
}

/// A request for another block.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// Which one.
    pub wanted: BlockRequest,
    /// Who waits for it. With nobody waiting, it is for later.
    pub reply: Option<Reply<Result<(), NoClaim>>>,
}

/// A request for a reserved address.
#[derive(Debug, Clone)]
pub struct ReserveRequest {
    /// Which one.
    pub wanted: Workload,
    /// The workload.
    pub owner: String,
    /// The pod's attachment.
    pub attachment: Attachment,
    /// Who waits for it.
    pub reply: Reply<Result<IpAddr, Unreserved>>,
}
