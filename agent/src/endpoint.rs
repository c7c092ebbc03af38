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
use polder_ipam::node::{SMALLEST_BLOCK, SMALLEST_POOL};

/// Whether the node has a probe endpoint.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// Not created yet.
    Awaited,
    /// It exists.
    Open(Arc<Open>),
    /// It does not exist, for this reason.
    Without(String),
    /// Not needed: the node cannot have peers.
    Unneeded,
}

/// An open probe endpoint.
#[derive(Debug)]
pub struct Open {
    /// Its network namespace.
    pub namespace: Arc<File>,
    /// Its addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
}

impl Open {
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
            Self::Without(reason) => (String::new(), reason.clone()),
            Self::Open(open) => {
                let missing = families.iter().find(|family| open.address(**family).is_none())?;
                (format!("{missing} "), no_address())
            }
        };
        Some(format!(
            "the {of}paths to peers are probed from the host only, not with packets that are forwarded like those of \
             pods: {reason}"
        ))
    }
}

fn no_address() -> String {
    format!(
        "no block of this node has a spare address (pools with fewer than {SMALLEST_POOL} addresses and blocks with \
         fewer than {SMALLEST_BLOCK} have none)"
    )
}
