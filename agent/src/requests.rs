//! What tasks ask of each other, each with who waits for the answer.

use std::net::IpAddr;

use polder_api::Attachment;
use polder_ipam::claim::NoClaim;
use polder_ipam::pool::BlockRequest;
use polder_ipam::tasks::{Unreserved, Workload};
use tokio::sync::oneshot;

/// A question to the engine: what the next pass would change.
pub type PlanRequest = oneshot::Sender<Result<Vec<String>, NoPlan>>;

/// Why there is no plan for the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NoPlan {
    /// Nobody plans any more.
    #[error("the engine has stopped")]
    Stopped,
    /// An ADD would not be served, for these reasons.
    #[error("the kernel is left alone as it is: {}", .0.join("; "))]
    Obstacles(Vec<String>),
    /// Which records can be believed is not known just now.
    #[error(
        "the kernel is left alone as it is: the records are being read anew, after an address of this node changed"
    )]
    Moving,
    /// It is not known what is there.
    #[error("read the kernel's state: {0}")]
    Unread(#[source] polder_netlink::Error),
}

/// A wish for another block.
#[derive(Debug)]
pub struct ClaimRequest {
    /// Which one.
    pub wanted: BlockRequest,
    /// Who waits for it. With nobody waiting, it is for later.
    pub reply: Option<oneshot::Sender<Result<(), NoClaim>>>,
}

/// A wish for a reserved address.
#[derive(Debug)]
pub struct ReserveRequest {
    /// Which one.
    pub wanted: Workload,
    /// The workload: `namespace/name` of its pod.
    pub owner: String,
    /// The pod's attachment.
    pub attachment: Attachment,
    /// Who waits for it.
    pub reply: oneshot::Sender<Result<IpAddr, Unreserved>>,
}
