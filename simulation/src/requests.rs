//! Requests between tasks, each with a slot for the reply.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;

use polder_api::Attachment;
use polder_ipam::claim::NoClaim;
use polder_ipam::pool::BlockRequest;
use polder_ipam::tasks::{NotHandedOver, ReservationRequest};

/// A reply slot, shared by the task that answers and the task that waits.
#[derive(Debug)]
pub struct Reply<T> {
    /// Whether the reply is available.
    pub given: Rc<Cell<bool>>,
    /// The reply.
    pub answer: Rc<RefCell<Option<T>>>,
    /// Whether the waiting task has given up.
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
    /// Stores the reply. Returns false if the waiting task has given up.
    pub fn give(&self, answer: T) -> bool {
        *self.answer.borrow_mut() = Some(answer);
        self.given.set(true);
        !self.given_up.get()
    }
}

/// A request for another block.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// The requested block.
    pub wanted: BlockRequest,
    /// The reply slot; `None` if the block is claimed ahead.
    pub reply: Option<Reply<Result<(), NoClaim>>>,
}

/// A request for a reserved address.
#[derive(Debug, Clone)]
pub struct ReserveRequest {
    /// The requested address, or the pool of the requested address.
    pub wanted: ReservationRequest,
    /// Owner of the reservation, as namespace/name.
    pub owner: String,
    /// The pod's attachment.
    pub attachment: Attachment,
    /// The reply slot.
    pub reply: Reply<Result<IpAddr, NotHandedOver>>,
}
