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
    pub is_sent: Rc<Cell<bool>>,
    /// The reply.
    pub answer: Rc<RefCell<Option<T>>>,
    /// Whether the waiting task has given up.
    pub abandoned: Rc<Cell<bool>>,
}

impl<T> Default for Reply<T> {
    fn default() -> Self {
        Self { is_sent: Rc::default(), answer: Rc::default(), abandoned: Rc::default() }
    }
}

impl<T> Clone for Reply<T> {
    fn clone(&self) -> Self {
        Self {
            is_sent: Rc::clone(&self.is_sent),
            answer: Rc::clone(&self.answer),
            abandoned: Rc::clone(&self.abandoned),
        }
    }
}

impl<T> Reply<T> {
    /// Stores the reply. Returns false if the waiting task has given up.
    pub fn send(&self, answer: T) -> bool {
        *self.answer.borrow_mut() = Some(answer);
        self.is_sent.set(true);
        !self.abandoned.get()
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
