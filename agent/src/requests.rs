//! What tasks ask of each other, each with who waits for the answer.

use std::net::IpAddr;

use polder_api::Attachment;
use polder_ipam::claim::NoClaim;
use polder_ipam::pool::BlockRequest;
use polder_ipam::tasks::{Unreserved, Workload};
use tokio::sync::oneshot;

/// A question to the engine: what the next pass would change.
pub type PlanRequest = oneshot::Sender<Result<Vec<String>, String>>;

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
