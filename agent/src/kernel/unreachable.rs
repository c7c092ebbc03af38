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
    #[error("it has no {0} underlay address")]
    NoAddress(Family),
    /// The kernel has no route.
    ///
    /// Remedy: add a route to the address, or a default route, on this node.
    #[error("there is no route to {0}")]
    NoRoute(IpAddr),
    /// The record of the peer, or the addresses of this node, are out of date.
    ///
    /// Remedy: none, the record is updated. If it persists, check with `polderctl node list` that no two nodes have the
    /// address.
    #[error("{0} is an address of this node")]
    OwnAddress(IpAddr),
    /// The route has several next hops, or an unknown type.
    ///
    /// Remedy: configure a route with one next hop, or run `polderctl cluster set --backend auto` to use a tunnel.
    #[error(
        "cannot determine whether {0} is on the same link: its route has several next hops, or one of an unknown type"
    )]
    Unclear(IpAddr),
    /// The link carries only packets between the nodes' own addresses.
    ///
    /// Remedy: use a tunnel: `polderctl cluster set --backend auto`.
    #[error(
        "the link to {0} has no link-layer addresses (e.g. WireGuard) and may drop packets with pod addresses"
    )]
    Mesh(IpAddr),
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
    #[error("{why}, and the backend is {backend}")]
    OffLink {
        /// Why the peer needs a tunnel.
        #[source]
        why: OffLink,
        /// The configured backend.
        backend: Backend,
    },
    /// The kernel has no tunnels.
    ///
    /// Remedy: load the kernel module of the tunnel, e.g. `modprobe vxlan`, and restart polder-agent.
    #[error("it is not on the same link, and this kernel has no {0}")]
    NoTunnels(PathKind),
    /// The peer has no gateway address, which is the next hop in the tunnel.
    ///
    /// Remedy: none, the peer publishes it when it has claimed a block. If it persists, run
    /// `polderctl status` on the peer.
    #[error("it has no {0} gateway address yet")]
    NoGateway(Family),
    /// No tunnel to the peer is possible, over either family.
    ///
    /// Remedy: see the reasons in the text, one for each address family of the underlay.
    #[error("{reasons}", reasons = joined(.0))]
    NoTunnel(Vec<NoTunnel>),
}

/// Why no tunnel to a peer is possible over an underlay of one family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoTunnel {
    /// The peer has no underlay address of the family.
    ///
    /// Remedy: set an address of that family in `underlay.addresses` of the peer, or add one to its underlay interface.
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
