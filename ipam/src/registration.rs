//! Whether the store knows the node, and what the node owns: what its registrar tells the other tasks.

use std::error::Error;
use std::net::IpAddr;

use polder_api::NodeName;

use crate::bootstrap::NotProposed;
use crate::cause::HostError;
use crate::ledger::{Identity, LedgerError, OwnedBlock};
use crate::release::NotReleased;
use crate::steward::{Conflict, Removed, Waiting};
use crate::store::StoreError;

/// What the node owns, as its ledger says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holdings {
    /// Who it is, in which cluster.
    pub identity: Option<Identity>,
    /// Its blocks.
    pub blocks: Vec<OwnedBlock>,
    /// Its own addresses.
    pub gateways: Vec<IpAddr>,
}

/// Whether the store knows the node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Registration {
    /// Not yet, or not as it is now; what is waited for. What the node owns it may use meanwhile.
    Waiting(Pending),
    /// As it is.
    Registered,
    /// Whether another machine is this node is not known: it must not serve.
    Unproven(Unproven),
    /// Somebody else is who this node says it is: it must not serve.
    Conflict(Box<Conflict>),
    /// The node was removed from the cluster: it must not serve.
    Removed(Leaving),
}

/// What a node waits for that may serve.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Pending {
    /// Something has to change outside.
    #[error(transparent)]
    Waiting(#[from] Waiting),
    /// The node is at it.
    #[error("updating the node's records")]
    UnderWay,
    /// It goes on with the next look.
    #[error("registration continues")]
    More,
    /// It is tried again.
    #[error(transparent)]
    Failed(#[from] Failed),
}

/// Why it is not known whether another machine is the node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Unproven {
    /// An agent that has just started may be on another machine than the node that its ledger names.
    #[error("the agent has just started")]
    Started,
    /// No record was read.
    #[error(transparent)]
    Waiting(#[from] Waiting),
    /// The ledger does not say who the node is.
    #[error("cannot save the node's identity: {0}")]
    Unwritten(#[source] Failed),
    /// The store is being asked.
    #[error("checking whether another machine is alive as node {0}")]
    Asking(NodeName),
    /// The store does not say.
    #[error("cannot check whether another machine is alive as node {node}: {error}")]
    Unasked {
        /// The node.
        node: NodeName,
        /// Why not.
        #[source]
        error: StoreError,
    },
    /// Something on the way there failed, and is tried again.
    #[error(transparent)]
    Failed(#[from] Failed),
}

/// How far a node is that was removed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Leaving {
    /// Its pods go.
    #[error("this node was removed: disconnecting its pods")]
    CuttingOff,
    /// Something of that failed.
    #[error("this node was removed from the cluster, and the remaining cleanup failed and is retried: {0}")]
    Failed(#[source] Failed),
    /// Its pods are gone.
    #[error(transparent)]
    Removed(#[from] Removed),
}

/// Why a step was not carried out: it is tried again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Failed {
    /// The ledger cannot be read or written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The store does not do it, or does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node does not do it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// What the change rests on is not so any more.
    #[error("the records have just changed")]
    Changed,
    /// The cluster gets no settings.
    #[error(transparent)]
    NotProposed(#[from] NotProposed),
    /// They are another node's.
    #[error("another node is creating the cluster settings")]
    Overtaken,
    /// A pod stays.
    #[error(transparent)]
    NotReleased(#[from] NotReleased),
}

/// An agent that has just started may be on another machine than the node that its ledger names.
impl Default for Registration {
    fn default() -> Self {
        Self::Unproven(Unproven::Started)
    }
}

impl Registration {
    /// Why the node must not serve, if it must not.
    pub fn forbids(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unproven(reason) => Some(reason),
            Self::Conflict(reason) => Some(&**reason),
            Self::Removed(reason) => Some(reason),
            Self::Waiting(_) | Self::Registered => None,
        }
    }

    /// What becomes of it when a step fails: a node that must not serve does not begin to because of that.
    #[must_use]
    pub fn stalled(&self, why: Failed) -> Self {
        match self {
            Self::Removed(_) => Self::Removed(Leaving::Failed(why)),
            Self::Unproven(_) | Self::Conflict(_) => Self::Unproven(why.into()),
            Self::Waiting(_) | Self::Registered => Self::Waiting(why.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_changes_nothing_about_whether_the_node_may_serve() {
        let name = || "n1".parse::<NodeName>().unwrap();
        let conflict = Conflict::Name { ledger: name(), me: name() };
        for (before, may_serve) in [
            (Registration::default(), false),
            (Registration::Unproven(Unproven::Asking(name())), false),
            (Registration::Conflict(conflict.into()), false),
            (Registration::Removed(Leaving::CuttingOff), false),
            (Registration::Waiting(Pending::More), true),
            (Registration::Registered, true),
        ] {
            let after = before.stalled(Failed::Changed);
            assert_eq!(
                (before.forbids().is_none(), after.forbids().is_none()),
                (may_serve, may_serve),
                "{before:?}"
            );
        }
    }
}
