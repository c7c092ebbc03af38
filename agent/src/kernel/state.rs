//! The part of a node's kernel that is ours: as it is, and as it should be, in the same words.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, IfName, Mac, PROBE_INTERFACE, PROBE_INTERFACE_ROUTED, is_host_interface};
use polder_netlink::IfIndex;
use polder_netlink::link::Port;
use polder_netlink::neighbour::Destination;
use polder_netlink::nft::Found;
use polder_netlink::route::Impostor;

use super::tunnel::{self, Tunnel};

/// An interface, by what it is for. Its number in the kernel changes whenever it is made anew.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// `polder0`.
    Bridge,
    /// The tunnels over an underlay of that family.
    Tunnel(Family),
    /// The host's end of a pod's pair, or of that of the probe endpoint, which is wired like a pod.
    Pod(IfName),
    /// An interface of the underlay, which is not ours.
    Uplink(IfIndex),
}

impl Device {
    /// The devices that the agent makes.
    pub const OWN: [Self; 3] = [Self::Bridge, Self::Tunnel(Family::V4), Self::Tunnel(Family::V6)];

    /// The device of that name, if it is a name of ours.
    pub fn named(name: &str) -> Option<Self> {
        let own = Self::OWN.into_iter().find(|device| device.name() == Some(name));
        let is_pod = is_host_interface(name) || [PROBE_INTERFACE, PROBE_INTERFACE_ROUTED].contains(&name);
        own.or_else(|| is_pod.then(|| name.parse().ok().map(Self::Pod)).flatten())
    }

    /// The `ifalias` by which a device that the agent made is known even under another name.
    pub fn mark(&self) -> Option<String> {
        Some(format!("polder: {}", self.name()?))
    }

    /// The device that the agent made with that `ifalias`.
    pub fn marked(alias: &str) -> Option<Self> {
        Self::OWN.into_iter().find(|device| device.mark().as_deref() == Some(alias))
    }

    /// The name of a device of ours.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Bridge => Some(BRIDGE),
            Self::Tunnel(over) => Some(tunnel::name(*over)),
            Self::Pod(name) => Some(name.as_str()),
            Self::Uplink(_) => None,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self) {
            (Some(name), _) => f.pad(name),
            (None, Self::Uplink(index)) => write!(f, "interface {index}"),
            (None, _) => Ok(()),
        }
    }
}

/// A device that the agent makes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OwnLink {
    /// What it is.
    pub kind: OwnKind,
    /// Its MAC address.
    pub mac: Mac,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// Whether it is switched on.
    pub up: bool,
    /// What of its identity is right.
    pub identity: Identity,
}

/// By what a device of ours is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Identity {
    /// By its name and its mark.
    Whole,
    /// By its name alone.
    Unmarked,
    /// By its mark alone: somebody has renamed it.
    Renamed,
}

/// What a device of ours is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum OwnKind {
    /// The bridge of the pods.
    Bridge {
        /// Whether it looks frames up by their VLAN. Forwarding entries of ours are of VLAN 0.
        filters_vlans: bool,
    },
    /// A tunnel end point.
    Tunnel(Tunnel),
    /// Not ours, although it has a name of ours.
    Foreign,
}

impl OwnKind {
    /// Whether a device of this kind can be made into one of the other while it is there.
    pub fn can_become(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tunnel(is), Self::Tunnel(other)) => is.can_become(other),
            (Self::Bridge { .. }, Self::Bridge { .. }) => true,
            _ => self == other,
        }
    }
}

/// The host's end of a pod's pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PodLink {
    /// Its settings as a port of the bridge, if it is one.
    pub port: Option<Port>,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether IPv4 packets of the pod are forwarded. Those of a port of the bridge come in through the bridge.
    pub forwards: bool,
}

/// A route of ours.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Way {
    /// Which way.
    pub target: Target,
    /// The source address of what the node itself sends this way.
    pub source: Option<IpAddr>,
    /// The longest packet, in bytes, if that is less than the interface takes.
    pub mtu: Option<u32>,
}

/// Which way a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// The destinations are on the device.
    Device(Device),
    /// Through a tunnel, to the peer that has this address there.
    Tunnel(Family, IpAddr),
    /// Straight to a peer's underlay address.
    Direct(Device, IpAddr),
    /// Nowhere.
    Unreachable,
}

/// Interfaces, addresses, routes, neighbours and forwarding entries.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct State {
    /// Bridge and tunnels.
    pub links: BTreeMap<Device, OwnLink>,
    /// The pods' interfaces.
    pub pods: BTreeMap<IfName, PodLink>,
    /// Addresses of devices of ours.
    pub addresses: BTreeSet<(Device, IpNetwork)>,
    /// Routes, by destination.
    pub routes: BTreeMap<IpNetwork, Way>,
    /// Routes that look like ours and are none.
    pub impostors: BTreeSet<Impostor>,
    /// Permanent neighbours behind devices of ours.
    pub neighbours: BTreeMap<(Device, IpAddr), Mac>,
    /// Forwarding entries of devices of ours.
    pub forwards: BTreeMap<(Device, Mac), Destination>,
}

/// The smallest MTU of an interface with IPv6, in bytes (`IPV6_MIN_MTU`, RFC 8200 section 5).
const SMALLEST_WITH_IPV6: u32 = 1280;

impl State {
    /// Whether that device of ours can have addresses of the family. The kernel takes IPv6 from an interface whose MTU is too small,
    /// with all its settings.
    pub fn has_family(&self, device: &Device, family: Family) -> bool {
        let is_narrow = |link: &OwnLink| link.mtu < SMALLEST_WITH_IPV6;
        family == Family::V4 || !self.links.get(device).is_some_and(is_narrow)
    }
}

/// How the kernel is.
#[derive(Debug, Clone)]
pub struct Actual {
    /// Everything that netlink tells.
    pub state: State,
    /// Kernel settings, by their path under `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
    /// The packet filter.
    pub filter: Found,
    /// The number of each device that is there now.
    pub indexes: BTreeMap<Device, IfIndex>,
    /// Settings of interfaces that are not ours which take in router advertisements only as long as the host does
    /// not forward IPv6, which it does not yet.
    pub advertised_to: Vec<String>,
}
