//! Requests between tasks, each with the channel for its answer.

use std::net::IpAddr;

use polder_api::Attachment;
use polder_api::message::{RefusalKind, Refuse};
use polder_ipam::claim::NoClaim;
use polder_ipam::pool::BlockRequest;
use polder_ipam::tasks::{NotHandedOver, ReservationRequest};
use tokio::sync::oneshot;

/// A request to the engine for the changes of the next pass.
pub type PlanRequest = oneshot::Sender<Result<Vec<String>, NoPlan>>;

/// Why no plan can be made.
#[derive(Debug, thiserror::Error)]
pub enum NoPlan {
    /// The engine's task has ended, because the agent stops.
    ///
    /// Remedy: repeat the command once polder-agent runs again.
    #[error("the engine has stopped")]
    Stopped,
    /// An ADD would not be served, for these reasons: the next pass changes nothing.
    ///
    /// Remedy: correct the listed reasons. `polderctl status` shows them, too.
    #[error("kernel state is left unchanged: {}", .0.join("; "))]
    Obstacles(Vec<String>),
    /// The node's addresses changed, and the records are not validated for them yet.
    ///
    /// Remedy: none, repeat the command in a few seconds.
    #[error(
        "kernel state is left unchanged: an address of this node changed and the records are being read again"
    )]
    Moving,
    /// The kernel returned an error when its links, routes or packet filter were read.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The agent retries at the next pass.
    #[error("cannot read kernel state: {0}")]
    Unread(#[source] polder_netlink::Error),
}

impl Refuse for NoPlan {
    fn kind(&self) -> RefusalKind {
        RefusalKind::TryAgain
    }
}

/// A request for another block.
#[derive(Debug)]
pub struct ClaimRequest {
    /// The requested block.
    pub wanted: BlockRequest,
    /// The channel for the answer; `None` if the block is requested in advance.
    pub reply: Option<oneshot::Sender<Result<(), NoClaim>>>,
}

/// A request for a reserved address.
#[derive(Debug)]
pub struct ReserveRequest {
    /// The pod that the address is reserved for.
    pub wanted: ReservationRequest,
    /// `namespace/name` of the pod.
    pub owner: String,
    /// The pod's attachment.
    pub attachment: Attachment,
    /// The channel for the answer.
    pub reply: oneshot::Sender<Result<IpAddr, NotHandedOver>>,
}
