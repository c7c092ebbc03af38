//! Tunnels to peers. Each encapsulation has its own submodule, such as `vxlan`. Each method here selects the submodule
//! with one `match`. Other modules use the term "tunnel" only.

mod vxlan;

use std::fmt;
use std::net::IpAddr;

use polder_api::status::PathKind;
use polder_api::{Backend, Family, Mac, NodeName};
use polder_ipam::record::{ClusterRecord, NodeRecord};
use polder_netlink::link::{Link, LinkKind, Vxlan, create_vxlan};
use polder_netlink::neighbour::Destination;
use polder_netlink::nft::Rule;
use polder_netlink::{IfIndex, Operation};

use super::ruleset::sets::TunnelSources;

/// The prefix of the names of all tunnel devices: the name over IPv4 is the prefix itself.
pub const PREFIX: &str = "polder.vx";

/// The name of the tunnel device over an underlay of that family. It does not depend on the encapsulation: a device of
/// another kind with this name is replaced.
pub const fn name(over: Family) -> &'static str {
    match over {
        Family::V4 => "polder.vx",
        Family::V6 => "polder.vx6",
    }
}

/// How packets to peers are encapsulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encapsulation {
    /// VXLAN (RFC 7348).
    Vxlan,
}

/// The contents of the neighbour entry and the FDB entry for a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entries {
    /// The MAC address of the next hop.
    pub mac: Mac,
    /// The destination of frames to that address.
    pub to: Destination,
}

impl Encapsulation {
    /// The encapsulation of the cluster's tunnels. They exist with every backend: a node with a direct path still
    /// receives tunnel packets from a peer without one.
    pub fn of(cluster: &ClusterRecord) -> Self {
        match cluster.backend {
            Backend::Auto | Backend::Direct | Backend::Vxlan => Self::Vxlan,
        }
    }

    /// The kind of the path, for the status.
    pub const fn path_kind(self) -> PathKind {
        match self {
            Self::Vxlan => vxlan::PATH,
        }
    }

    /// The text of the problem if the kernel does not support this encapsulation: it states what does not work.
    pub const fn unsupported_message(self) -> &'static str {
        match self {
            Self::Vxlan => vxlan::UNSUPPORTED,
        }
    }

    /// The bytes that it adds to a packet over an underlay of that family.
    pub const fn overhead(self, over: Family) -> u32 {
        match self {
            Self::Vxlan => vxlan::overhead(over),
        }
    }

    /// The UDP port on which all nodes receive its packets.
    pub const fn port(self, cluster: &ClusterRecord) -> u16 {
        match self {
            Self::Vxlan => cluster.tunnel_port(),
        }
    }

    /// The MAC address of the node's tunnel devices.
    pub fn mac(self, cluster: &ClusterRecord, node: &NodeName) -> Mac {
        match self {
            Self::Vxlan => vxlan::mac(cluster, node),
        }
    }

    /// The tunnel device that sends from that underlay address.
    pub fn device(self, cluster: &ClusterRecord, local: Option<IpAddr>) -> Tunnel {
        match self {
            Self::Vxlan => Tunnel::Vxlan(vxlan::device(cluster.vxlan, local)),
        }
    }

    /// The next hop of the routes to the peer's pods. `gateway` is the peer's own address in the pod network.
    pub fn next_hop(self, peer: &NodeRecord, gateway: IpAddr) -> IpAddr {
        match self {
            Self::Vxlan => vxlan::next_hop(peer, gateway),
        }
    }

    /// The neighbour entry and the FDB entry for the peer with that underlay address.
    pub fn entries(self, peer: &NodeRecord, remote: IpAddr) -> Entries {
        match self {
            Self::Vxlan => vxlan::entries(peer, remote),
        }
    }

    /// The packet filter's rules for packets that arrive through tunnels.
    pub fn rules(self, cluster: &ClusterRecord, tunnel_sources: &[TunnelSources]) -> Vec<Rule> {
        match self {
            Self::Vxlan => vxlan::rules(cluster.vxlan, tunnel_sources),
        }
    }
}

impl fmt::Display for Encapsulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Vxlan => vxlan::TITLE,
        })
    }
}

/// A tunnel device, with the settings of its encapsulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tunnel {
    /// A VXLAN tunnel end point.
    Vxlan(Vxlan),
}

impl Tunnel {
    /// The tunnel device for an interface of that kind; `None` if the kind is not a tunnel of the agent.
    pub const fn of(kind: &LinkKind) -> Option<Self> {
        match kind {
            LinkKind::Vxlan(vxlan) => Some(Self::Vxlan(*vxlan)),
            LinkKind::Bridge | LinkKind::Veth | LinkKind::Other => None,
        }
    }

    /// Whether an existing device like this can be changed into the other.
    pub fn can_become(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Vxlan(current), Self::Vxlan(other)) => current.can_become(other),
        }
    }

    /// Creates the device with this MAC address and MTU, and sets its link state to up.
    pub fn create(&self, name: &str, mac: Mac, mtu: u32) -> [Operation; 3] {
        match self {
            Self::Vxlan(vxlan) => create_vxlan(name, vxlan, mac, mtu),
        }
    }

    /// The remedy if that other device prevents the creation of this one; `None` if there is no conflict.
    pub fn conflict_remedy(&self, link: &Link) -> Option<ConflictRemedy> {
        if link.name.starts_with(PREFIX) {
            return None;
        }
        let other = Self::of(&link.kind)?;
        let is_conflict = match (self, &other) {
            (Self::Vxlan(own), Self::Vxlan(other)) => vxlan::is_conflict(own, other),
        };
        is_conflict.then(|| ConflictRemedy { name: link.name.clone(), tunnel: other })
    }

    /// Changes the device with that index into this one, except for its MAC address and MTU.
    pub fn adjust(&self, index: IfIndex) -> Option<Operation> {
        match self {
            Self::Vxlan(vxlan) => vxlan::adjust(vxlan, index),
        }
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vxlan(vxlan) => vxlan::describe(vxlan, f),
        }
    }
}

/// The remedy for a foreign tunnel device that prevents the creation of one of Polder.
#[derive(Debug)]
pub struct ConflictRemedy {
    name: String,
    tunnel: Tunnel,
}

impl fmt::Display for ConflictRemedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tunnel {
            Tunnel::Vxlan(vxlan) => vxlan::conflict_remedy(&self.name, vxlan, f),
        }
    }
}
