//! Why a node is not ready because of the paths to its peers.

use std::fmt;
use std::net::IpAddr;

use polder_api::NodeName;
use polder_ipam::cause::SharedError;

/// Why the paths to the peers do not make the node ready.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotProbed {
    /// The prober has not started.
    ///
    /// Remedy: none, the agent has just started and retries.
    #[error("the paths to the peers are not known yet")]
    NotYet,
    /// A probe socket cannot be opened.
    ///
    /// Remedy: correct the cause that the kernel reports in the text, or set `probe_peers = false`.
    #[error("{0}; set probe_peers = false to skip this check")]
    NoSocket(#[from] NoSocket),
    /// This node's probe endpoint does not exist yet.
    ///
    /// Remedy: none, it takes a few seconds.
    #[error("the probe endpoint is being created")]
    NoEndpoint,
    /// No reply has arrived yet, and none is overdue.
    ///
    /// Remedy: none, it takes a few seconds.
    #[error("the paths to the peers are being probed")]
    Probing,
    /// No peer answers, and the leases cannot be read.
    ///
    /// Remedy: check the network between the nodes and to the datastore. After a while the
    /// node becomes ready without an answer.
    #[error("no peer answers, and the datastore is unreachable, so it is not known which peers are alive")]
    LeasesUnreadable,
    /// The peers' hosts answer, but their probe endpoints do not.
    #[error(
        "no peer answers packets that are forwarded like those of pods, although their hosts answer (hosts: {0}): \
         check `polderctl status` on this node and on the peer for forwarding settings and packet filters; set \
         probe_peers = false to skip this check"
    )]
    Dropped(Peers),
    /// No live peer answers.
    #[error(
        "no peer answers on the pod path (alive: {0}): check that the underlay permits the paths that \
         `polderctl node list` shows, and ICMP; set probe_peers = false to skip this check"
    )]
    Silent(Peers),
}

/// A probe socket with the node's own address cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
///
/// Remedy: give the agent the capability `NET_RAW`, and correct the cause that the kernel reports at the end of the
/// text.
#[error("peers cannot be probed from {source_address}: {error}")]
pub struct NoSocket {
    /// The node's own address in the pod network.
    pub source_address: IpAddr,
    /// The kernel's error.
    #[source]
    pub error: SharedError,
}

/// A number of peers, with the first names for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peers {
    count: usize,
    named: Vec<NodeName>,
}

/// Maximum number of names.
const NAMED: usize = 5;

impl Peers {
    /// Counts these peers and keeps the first names.
    pub(super) fn of<'a>(names: impl ExactSizeIterator<Item = &'a NodeName>) -> Self {
        Self { count: names.len(), named: names.take(NAMED).cloned().collect() }
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.named.iter().map(NodeName::as_str).collect();
        write!(f, "{}, e.g. {}", self.count, names.join(", "))
    }
}
