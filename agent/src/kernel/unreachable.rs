//! Why a peer's pods cannot be reached.

use std::net::IpAddr;

use polder_api::status::PathKind;
use polder_api::{Backend, Family};

/// Why a peer's pods cannot be reached without a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OffLink {
    /// The peer has no underlay address of the family.
    ///
    /// Remedy: set an address of that family in `underlay.addresses` of the peer, or add one to its underlay interface.
    #[error("the peer has no {0} underlay address")]
    NoAddress(Family),
    /// The kernel has no route.
    #[error("there is no route to {0}: add a route to it, or a default route")]
    NoRoute(IpAddr),
    /// The record of the peer, or the addresses of this node, are out of date.
    #[error(
        "the peer's underlay address {0} is an address of this node: wait until the records are updated; if this \
         persists, check with `polderctl node list` that no two nodes have this address"
    )]
    OwnAddress(IpAddr),
    /// The route has several next hops, or an unknown type.
    ///
    /// Remedy: configure a route with one next hop, or run `polderctl cluster set --backend auto` to use a tunnel.
    #[error(
        "cannot determine whether {0} is on the same link, because the route to it has several next hops or an unknown \
         type"
    )]
    Unsupported(IpAddr),
    /// The link carries only packets between the nodes' own addresses.
    ///
    /// Remedy: none, a tunnel is used.
    #[error(
        "the link to {0} has no link-layer addresses (e.g. WireGuard) and may drop packets with pod addresses"
    )]
    NoLinkLayer(IpAddr),
    /// The peer is behind a router.
    ///
    /// Remedy: use a tunnel: `polderctl cluster set --backend auto`. Or connect the nodes to one link.
    #[error("{address} is behind router {router}")]
    Behind {
        /// The underlay address of the peer.
        address: IpAddr,
        /// The next hop to it.
        router: IpAddr,
    },
}

/// Why a peer's pods cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// The cluster has no tunnels.
    ///
    /// Remedy: permit tunnels with `polderctl cluster set --backend auto`, or connect the nodes to one link.
    #[error("{why}{remedy}", remedy = remedy(why, *backend))]
    OffLink {
        /// Why the peer needs a tunnel.
        #[source]
        why: OffLink,
        /// The configured backend.
        backend: Backend,
    },
    /// The kernel has no tunnels.
    #[error(
        "the path to the peer needs {0}, which this kernel does not have: load module {0}, and restart polder-agent"
    )]
    TunnelsUnsupported(PathKind),
    /// The peer has no gateway address, which is the next hop in the tunnel. It publishes one with its first block.
    #[error(
        "the peer has no usable {0} gateway address yet: it gets one with its first {0} block; if this persists, run \
         `polderctl status` on this node and on the peer"
    )]
    NoGateway(Family),
    /// No tunnel to the peer is possible, over either family.
    ///
    /// Remedy: see the reasons in the text, one for each address family of the underlay.
    #[error("{reasons}", reasons = joined(.0))]
    NoTunnelPath(Vec<TunnelObstacle>),
}

/// Why no tunnel to a peer is possible over an underlay of one family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TunnelObstacle {
    /// The peer has no underlay address of the family.
    #[error(
        "the peer has no {0} underlay address: add one to its underlay interface, or to underlay.addresses in its \
         agent.toml"
    )]
    NoAddress(Family),
    /// The peer's underlay address cannot be reached.
    #[error("there is no route to {0}: add a route to it, or a default route")]
    NoRoute(IpAddr),
    /// The record of the peer, or the addresses of this node, are out of date.
    #[error(transparent)]
    OwnAddress(OffLink),
}

/// The remedy for a peer that needs a tunnel while the backend has none, if the reason has no remedy of its own.
fn remedy(why: &OffLink, backend: Backend) -> String {
    match why {
        OffLink::NoRoute(_) | OffLink::OwnAddress(_) => String::new(),
        OffLink::NoAddress(_)
        | OffLink::Unsupported(_)
        | OffLink::NoLinkLayer(_)
        | OffLink::Behind { .. } => {
            format!(
                ", and the backend is {backend}: run `polderctl cluster set --backend auto` to permit tunnels"
            )
        }
    }
}

fn joined(reasons: &[TunnelObstacle]) -> String {
    let all: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    all.join("; ")
}
