//! Why a node is not ready, as far as its peers have a say in it.

use std::net::IpAddr;

use polder_api::NodeName;
use polder_ipam::cause::Cause;

/// The ways to the peers were not seen to be open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotProbed {
    /// The prober has not come to it.
    #[error("the ways to the peers are not known yet")]
    NotYet,
    /// It cannot probe.
    #[error("{0}; probe_peers = false in the configuration does without")]
    Blind(#[from] Blind),
    /// There is nothing yet to probe from as pods do.
    #[error("the probe endpoint is being made")]
    NoEndpoint,
    /// Nothing has come back yet.
    #[error("the ways to the peers are being probed")]
    Probing,
    /// Nobody can say whether somebody should answer.
    #[error("no peer answers, and the store cannot be asked which of them live")]
    Unasked,
    /// Hosts answer, and do not forward.
    #[error(
        "no peer answers to packets that are forwarded as pods' are, although {} of them answer themselves, {} among them: \
         look at `polderctl status` on both nodes for forwarding settings and filters; probe_peers = false in the configuration \
         does without an answer",
        .0.count,
        listed(&.0.named)
    )]
    Dropped(Silent),
    /// Nobody answers who lives.
    #[error(
        "no peer answers over the way that pods would use, although {} of them live, {} among them: look whether the underlay \
         lets through what `polderctl node list` names as their paths, and ICMP; probe_peers = false in the configuration does \
         without an answer",
        .0.count,
        listed(&.0.named)
    )]
    Silent(Silent),
}

/// A node's own address has no socket for probes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("peers cannot be probed from {source_address}: {error}")]
pub struct Blind {
    /// The address.
    pub source_address: IpAddr,
    /// What the kernel says.
    #[source]
    pub error: Cause,
}

/// The peers that do not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Silent {
    count: usize,
    named: Vec<NodeName>,
}

/// How many of them are named.
const NAMED: usize = 5;

impl Silent {
    /// These.
    pub(super) fn of<'a>(names: impl ExactSizeIterator<Item = &'a NodeName>) -> Self {
        Self { count: names.len(), named: names.take(NAMED).cloned().collect() }
    }
}

fn listed(names: &[NodeName]) -> String {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    names.join(", ")
}
