//! Whether the store knows the node, and what the node owns: what its registrar tells the other tasks.

use std::net::IpAddr;

use crate::ledger::{Identity, OwnedBlock};

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registration {
    /// Not yet, or not as it is now; what is waited for. What the node owns it may use meanwhile.
    Waiting(String),
    /// As it is.
    Registered,
    /// Whether another machine is this node is not known: it must not serve.
    Unproven(String),
    /// Somebody else is who this node says it is: it must not serve.
    Conflict(String),
    /// The node was removed from the cluster: it must not serve.
    Removed(String),
}

/// An agent that has just started may be on another machine than the node that its ledger names.
impl Default for Registration {
    fn default() -> Self {
        Self::Unproven("the agent has just started".to_owned())
    }
}

impl Registration {
    /// Why the node must not serve, if it must not.
    pub fn forbids(&self) -> Option<&str> {
        match self {
            Self::Unproven(reason) | Self::Conflict(reason) | Self::Removed(reason) => Some(reason),
            Self::Waiting(_) | Self::Registered => None,
        }
    }

    /// What becomes of it when a step fails: a node that must not serve does not begin to because of that.
    #[must_use]
    pub fn stalled(&self, why: String) -> Self {
        match self {
            Self::Removed(_) => Self::Removed(format!(
                "this node was removed from the cluster, and what is left to do about that fails and is tried again: {why}"
            )),
            Self::Unproven(_) | Self::Conflict(_) => Self::Unproven(why),
            Self::Waiting(_) | Self::Registered => Self::Waiting(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_changes_nothing_about_whether_the_node_may_serve() {
        let reason = || "a reason".to_owned();
        for (before, may_serve) in [
            (Registration::default(), false),
            (Registration::Unproven(reason()), false),
            (Registration::Conflict(reason()), false),
            (Registration::Removed(reason()), false),
            (Registration::Waiting(reason()), true),
            (Registration::Registered, true),
        ] {
            let after = before.stalled("etcd is away".to_owned());
            assert_eq!(
                (before.forbids().is_none(), after.forbids().is_none()),
                (may_serve, may_serve),
                "{before:?}"
            );
        }
    }
}
