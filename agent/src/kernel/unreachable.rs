//! Why a peer's pods cannot be reached.

use std::net::IpAddr;

use polder_api::status::PathKind;
use polder_api::{Backend, Family};

/// Why a peer's pods cannot be reached without a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OffLink {
    /// The peer has no underlay address of the family.
    #[error("it has no {0} underlay address")]
    NoAddress(Family),
    /// The kernel has no route.
    #[error("there is no route to {0}")]
    NoRoute(IpAddr),
    /// The record of the peer, or the addresses of this node, are out of date.
    #[error("{0} is an address of this node")]
    OwnAddress(IpAddr),
    /// The route has several next hops, or an unknown type.
    #[error(
        "cannot determine whether {0} is on the same link: its route has several next hops, or one of an unknown type"
    )]
    Unclear(IpAddr),
    /// The link carries only packets between the nodes' own addresses.
    #[error(
        "the link to {0} has no link-layer addresses (e.g. WireGuard) and may drop packets with pod addresses"
    )]
    Mesh(IpAddr),
    /// The peer is behind a router.
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
    #[error("{why}, and the backend is {backend}")]
    OffLink {
        /// Why the peer needs a tunnel.
        #[source]
        why: OffLink,
        /// The configured backend.
        backend: Backend,
    },
    /// The kernel has no tunnels.
    #[error("it is not on the same link, and this kernel has no {0}")]
    NoTunnels(PathKind),
    /// The peer has no gateway address, which is the next hop in the tunnel.
    #[error("it has no {0} gateway address yet")]
    NoGateway(Family),
    /// No tunnel to the peer is possible, over either family.
    #[error("{}", joined(.0))]
    NoTunnel(Vec<NoTunnel>),
}

/// Why no tunnel to a peer is possible over an underlay of one family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoTunnel {
    /// The peer has no underlay address of the family.
    #[error("it has no {0} underlay address")]
    NoAddress(Family),
    /// The peer's underlay address cannot be reached.
    #[error("there is no route to {0}: add one, or a default route")]
    NoRoute(IpAddr),
}

fn joined(reasons: &[NoTunnel]) -> String {
    let all: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    all.join("; ")
}
