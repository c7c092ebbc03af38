//! The registration state of the node, and its blocks and addresses: the registrar reports them to the other tasks.

use std::error::Error;
use std::net::IpAddr;

use polder_api::NodeName;

use crate::bootstrap::NotProposed;
use crate::cause::HostError;
use crate::ledger::{LedgerError, NodeIdentity, OwnedBlock};
use crate::membership::{Conflict, RemovedState, WaitReason};
use crate::release::NotReleased;
use crate::store::StoreError;

/// The identity, blocks and addresses of the node, from its ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Allocations {
    /// The identity of the node and its cluster.
    pub identity: Option<NodeIdentity>,
    /// The blocks of the node.
    pub blocks: Vec<OwnedBlock>,
    /// The node's own addresses.
    pub gateways: Vec<IpAddr>,
}

/// The registration state of the node in the datastore.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Registration {
    /// Not registered yet, or the record is outdated; the reason. The node may use its blocks and addresses
    /// meanwhile.
    Waiting(PendingReason),
    /// Registered, and the record is current.
    Registered,
    /// It is unknown whether another machine is alive as this node: it must not serve.
    Unproven(UnprovenReason),
    /// The node conflicts with another node or cluster: it must not serve.
    Conflict(Box<Conflict>),
    /// The node was removed from the cluster: it must not serve.
    Removed(RemovalProgress),
}

/// Why a node that may serve is not fully registered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PendingReason {
    /// An external condition is not met.
    #[error(transparent)]
    Waiting(#[from] WaitReason),
    /// The node is updating its records.
    /// Remedy: none, it is temporary.
    #[error("updating the node's records")]
    UnderWay,
    /// Registration continues in the next pass.
    /// Remedy: none, it is temporary.
    #[error("registration continues")]
    More,
    /// A step failed, and is retried.
    #[error(transparent)]
    Failed(#[from] StepError),
}

/// Why it is unknown whether another machine is alive as the node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum UnprovenReason {
    /// The agent has just started, and may run on another machine than the node in its ledger.
    /// Remedy: none, it is temporary.
    #[error("the agent has just started")]
    Started,
    /// No record has been read.
    #[error(transparent)]
    Waiting(#[from] WaitReason),
    /// The identity of the node cannot be saved in the ledger.
    /// Remedy: check the disk of the agent's state directory; the agent retries.
    #[error("cannot save the node's identity: {0}")]
    Unwritten(#[source] StepError),
    /// The datastore is being read.
    /// Remedy: none, it is temporary.
    #[error("checking whether another machine is alive as node {0}")]
    Asking(NodeName),
    /// The check failed.
    /// Remedy: correct the error of the datastore; the agent retries.
    #[error("cannot check whether another machine is alive as node {node}: {error}")]
    Unasked {
        /// The node.
        node: NodeName,
        /// The error.
        #[source]
        error: StoreError,
    },
    /// An earlier step failed, and is retried.
    #[error(transparent)]
    Failed(#[from] StepError),
}

/// The progress of a removed node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RemovalProgress {
    /// Its pods are being disconnected.
    /// Remedy: none, it is temporary.
    #[error("this node was removed: disconnecting its pods")]
    CuttingOff,
    /// A cleanup step failed, and is retried.
    /// Remedy: correct the error in the text; the agent retries.
    #[error("this node was removed from the cluster, and the remaining cleanup failed and is retried: {0}")]
    Failed(#[source] StepError),
    /// Its pods are gone.
    #[error(transparent)]
    Removed(#[from] RemovedState),
}

/// Why a step failed; it is retried.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum StepError {
    /// The ledger cannot be read or written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The datastore refuses the change or does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operation on the node failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A record that the change depends on has changed.
    /// Remedy: none, it is retried.
    #[error("the records have just changed")]
    Changed,
    /// No settings can be proposed for the cluster.
    #[error(transparent)]
    NotProposed(#[from] NotProposed),
    /// Another node is creating the settings.
    /// Remedy: none, it is retried.
    #[error("another node is creating the cluster settings")]
    Overtaken,
    /// An attachment cannot be released.
    #[error(transparent)]
    NotReleased(#[from] NotReleased),
}

/// An agent that has just started may run on another machine than the node in its ledger.
impl Default for Registration {
    fn default() -> Self {
        Self::Unproven(UnprovenReason::Started)
    }
}

impl Registration {
    /// The reason why the node must not serve, if there is one.
    pub fn not_serving_reason(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unproven(reason) => Some(reason),
            Self::Conflict(reason) => Some(&**reason),
            Self::Removed(reason) => Some(reason),
            Self::Waiting(_) | Self::Registered => None,
        }
    }

    /// The state after a failed step: a node that must not serve still must not.
    #[must_use]
    pub fn after_failure(&self, why: StepError) -> Self {
        match self {
            Self::Removed(_) => Self::Removed(RemovalProgress::Failed(why)),
            Self::Unproven(_) | Self::Conflict(_) => Self::Unproven(why.into()),
            Self::Waiting(_) | Self::Registered => Self::Waiting(why.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_does_not_change_whether_the_node_may_serve() {
        let name = || "n1".parse::<NodeName>().unwrap();
        let conflict = Conflict::Name { ledger: name(), me: name() };
        for (before, may_serve) in [
            (Registration::default(), false),
            (Registration::Unproven(UnprovenReason::Asking(name())), false),
            (Registration::Conflict(conflict.into()), false),
            (Registration::Removed(RemovalProgress::CuttingOff), false),
            (Registration::Waiting(PendingReason::More), true),
            (Registration::Registered, true),
        ] {
            let after = before.after_failure(StepError::Changed);
            assert_eq!(
                (before.not_serving_reason().is_none(), after.not_serving_reason().is_none()),
                (may_serve, may_serve),
                "{before:?}"
            );
        }
    }
}
