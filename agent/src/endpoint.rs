//! The node's probe endpoint: an end point like a pod, of the agent's own. Packets from it and to it are forwarded as
//! those of pods, so the agent probes its peers from there, and the peers probe it.
//!
//! It is a network namespace without a name, held open by the agent, and a pair of interfaces. Both end with the agent. Its
//! addresses are in the ledger, and the next agent takes the same ones.

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
    /// Not yet.
    Awaited,
    /// It has.
    Open(Arc<Open>),
    /// It has none, and why.
    Without(String),
    /// It needs none: there can be no peers.
    Unneeded,
}

/// A probe endpoint that is wired.
#[derive(Debug)]
pub struct Open {
    /// Its network namespace.
    pub namespace: Arc<File>,
    /// Its addresses, at most one of a family.
    pub addresses: Vec<IpAddr>,
}

impl Open {
    /// Its address of that family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| Family::of(*address) == family)
    }
}

impl Endpoint {
    /// What is done without, of these families, if anything is.
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
            "the {of}paths to peers are probed from the host alone, and not with packets that are forwarded as pods' are: {reason}"
        ))
    }
}

fn no_address() -> String {
    format!(
        "no block of this node has an address to spare (pools of fewer than {SMALLEST_POOL} addresses and blocks of fewer than \
         {SMALLEST_BLOCK} have none)"
    )
}
