//! Whether a runtime can use the node. More than that it would serve an ADD: a path to a peer was seen to be open, and the CNI
//! configuration is in place.

use tokio::sync::watch;

use crate::board::Board;
use crate::conflist::NotWritten;
use crate::probe::NotProbed;

/// What it is told by.
#[derive(Debug, Clone)]
pub struct Readiness {
    /// Whether an ADD would be served.
    pub board: Board,
    /// Whether the paths to the peers were seen to be open.
    probed: watch::Receiver<Result<(), NotProbed>>,
    /// Whether the CNI configuration is in place.
    announced: watch::Receiver<Result<(), NotWritten>>,
}

impl Readiness {
    /// What the prober and the engine write is read from there.
    pub fn new(
        board: Board,
        probed: watch::Receiver<Result<(), NotProbed>>,
        announced: watch::Receiver<Result<(), NotWritten>>,
    ) -> Self {
        Self { board, probed, announced }
    }

    /// Why the node is not ready for pods. Empty if it is: then a runtime finds the CNI configuration, too.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = self.unannounced();
        if let (true, Err(reason)) = (reasons.is_empty(), &*self.announced.borrow()) {
            reasons.push(reason.to_string());
        }
        reasons
    }

    /// Why the CNI configuration is not put in place. Empty if it is.
    pub fn unannounced(&self) -> Vec<String> {
        let mut reasons = self.board.obstacles();
        if let (true, Err(reason)) = (reasons.is_empty(), &*self.probed.borrow()) {
            reasons.push(reason.to_string());
        }
        reasons
    }

    /// Whether the paths to the peers were seen to be open, from now on.
    pub fn probes(&self) -> watch::Receiver<Result<(), NotProbed>> {
        let mut probed = self.probed.clone();
        probed.mark_unchanged();
        probed
    }
}
