//! What tasks ask of each other, each with who waits for the answer.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;

use polder_api::{Attachment, Pod};
use polder_ipam::claim::NoClaim;
use polder_ipam::pool::BlockRequest;

/// What an ADD asks for.
#[derive(Debug, Clone)]
pub struct Wanting {
    /// For which attachment.
    pub attachment: Attachment,
    /// The pod.
    pub pod: Pod,
    /// Whether the pod keeps its address by name.
    pub reserved: bool,
}

/// There is no address to be had for the pod now, for this reason.
#[derive(Debug, Clone)]
pub struct Refused(pub String);

/// Where the answer is put for whoever waits for it.
#[derive(Debug, Clone)]
pub struct Reply<T> {
    /// Whether it is there.
    pub given: Rc<Cell<bool>>,
    /// The answer.
    pub answer: Rc<RefCell<Option<T>>>,
}

impl<T> Default for Reply<T> {
    fn default() -> Self {
        Self { given: Rc::default(), answer: Rc::default() }
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
    /// For whom.
    pub wanting: Wanting,
    /// Who waits for it.
    pub reply: Reply<Result<IpAddr, Refused>>,
}
