//! The node's probe endpoint: the agent's own network endpoint, connected like a pod. The host forwards its packets
//! like pods' packets, so the agent probes its peers from it, and the peers probe it.
//!
//! It is an unnamed network namespace, held open by the agent, and an interface pair. Both are deleted when the agent
//! ends. Its addresses are in the ledger, and the next agent uses them again.

pub mod keeper;

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::sync::Arc;

use polder_api::Family;
use polder_ipam::cause::SharedError;
use polder_ipam::ledger::LedgerError;
use polder_ipam::node::{SMALLEST_BLOCK, SMALLEST_POOL};

/// Whether the node has a probe endpoint.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// Not created yet.
    Awaited,
    /// It exists.
    Open(Arc<OpenEndpoint>),
    /// It does not exist, for this reason.
    Unavailable(NoEndpoint),
    /// Not needed: the node cannot have peers.
    Unneeded,
}

/// Why the node has no probe endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    /// The agent lacks the permission to create a network namespace.
    ///
    /// Remedy: give the agent the capability `SYS_ADMIN`, or set `probe_peers = false`.
    #[error("cannot create a network namespace, which needs SYS_ADMIN: {0}")]
    NoNamespace(SharedError),
    /// The configuration disables the probes.
    ///
    /// Remedy: none needed. Remove the setting to probe the peers.
    #[error("probe_peers = false in the configuration")]
    Disabled,
    /// All blocks of the node are too small to allocate an address to the endpoint, or all their addresses are used.
    ///
    /// Remedy: add a larger pool with `polderctl pool add`, if the paths of pods are to be probed.
    #[error(
        "no block of this node has a spare address (pools with fewer than {SMALLEST_POOL} addresses and blocks with \
         fewer than {SMALLEST_BLOCK} have none)"
    )]
    NoAddress,
    /// The database of the ledger returned an error.
    ///
    /// Remedy: check free space and errors of the file system with the state directory. The agent retries.
    #[error("cannot save the probe endpoint's address in the ledger: {0}")]
    NotSaved(LedgerError),
    /// The kernel refused a step of the creation. The text ends with the step and the kernel's error.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The agent retries after 60 s.
    #[error("cannot create the probe endpoint: {reason}", reason = in_full(.0))]
    NotCreated(SharedError),
}

/// The error with all its causes.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text = format!("{text}: {source}");
        cause = source.source();
    }
    text
}

/// An open probe endpoint.
#[derive(Debug)]
pub struct OpenEndpoint {
    /// Its network namespace.
    pub namespace: Arc<File>,
    /// Its addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
}

impl OpenEndpoint {
    /// Its address of that family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| Family::of(*address) == family)
    }
}

impl Endpoint {
    /// The limitation of probes in these families, if part of the endpoint is missing.
    pub fn missing(&self, families: &BTreeSet<Family>) -> Option<String> {
        let (of, reason) = match self {
            Self::Awaited | Self::Unneeded => return None,
            Self::Unavailable(reason) => (String::new(), reason.clone()),
            Self::Open(open) => {
                let missing = families.iter().find(|family| open.address(**family).is_none())?;
                (format!("{missing} "), NoEndpoint::NoAddress)
            }
        };
        Some(format!(
            "the {of}paths to peers are probed from the host only, not with packets that are forwarded like those of \
             pods: {reason}"
        ))
    }
}
