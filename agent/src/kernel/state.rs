//! Polder's part of a node's kernel state. The same types describe the actual and the desired state.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, IfName, Mac, PROBE_INTERFACE, PROBE_INTERFACE_ROUTED, is_host_interface};
use polder_netlink::IfIndex;
use polder_netlink::link::Port;
use polder_netlink::neighbour::Destination;
use polder_netlink::nft::TableState;
use polder_netlink::route::ConflictingRoute;

use super::tunnel::{self, Tunnel};

/// An interface, by its purpose. Its index in the kernel changes when it is created again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// `polder0`.
    Bridge,
    /// The tunnel device over an underlay of that family.
    Tunnel(Family),
    /// The host's end of the veth pair of a pod, or of the probe endpoint, which is wired like a pod.
    Pod(IfName),
    /// An interface of the underlay, not created by Polder.
    Uplink(IfIndex),
}

impl Device {
    /// The devices that the agent creates.
    pub const OWN: [Self; 3] = [Self::Bridge, Self::Tunnel(Family::V4), Self::Tunnel(Family::V6)];

    /// The device with that name; `None` if it is not a name of Polder's devices.
    pub fn named(name: &str) -> Option<Self> {
        let own = Self::OWN.into_iter().find(|device| device.name() == Some(name));
        let is_pod = is_host_interface(name) || [PROBE_INTERFACE, PROBE_INTERFACE_ROUTED].contains(&name);
        own.or_else(|| is_pod.then(|| name.parse().ok().map(Self::Pod)).flatten())
    }

    /// The `ifalias` that identifies a device of the agent even under another name.
    pub fn mark(&self) -> Option<String> {
        Some(format!("polder: {}", self.name()?))
    }

    /// The device of the agent with that `ifalias`.
    pub fn marked(alias: &str) -> Option<Self> {
        Self::OWN.into_iter().find(|device| device.mark().as_deref() == Some(alias))
    }

    /// The name of a device of Polder; `None` for an uplink.
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

/// A device that the agent creates.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OwnLink {
    /// Its type, with the settings of that type.
    pub kind: DeviceKind,
    /// MAC address; all zero if the kernel reports none.
    pub mac: Mac,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// `IFF_UP`: administratively up.
    pub up: bool,
    /// Which of its identifiers are correct.
    pub identity: DeviceIdentity,
}

/// The identifiers of a device of Polder: its name and its mark, an `ifalias`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceIdentity {
    /// Name and mark are correct.
    Correct,
    /// Only the name is correct.
    Unmarked,
    /// Only the mark is correct: another program has renamed the device.
    Renamed,
}

/// The type of a device of Polder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The bridge of the pods.
    Bridge {
        /// Whether FDB lookups use the VLAN. Polder's FDB entries have VLAN 0.
        filters_vlans: bool,
    },
    /// A tunnel device.
    Tunnel(Tunnel),
    /// A foreign device that has a name of Polder's devices.
    Foreign,
}

impl DeviceKind {
    /// Whether an existing device of this kind can be changed into the other kind.
    pub fn can_become(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Tunnel(current), Self::Tunnel(other)) => current.can_become(other),
            (Self::Bridge { .. }, Self::Bridge { .. }) => true,
            _ => self == other,
        }
    }
}

/// The host's end of a pod's pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PodLink {
    /// Its settings as a port of the bridge, if it is a port.
    pub port: Option<Port>,
    /// `IFF_UP`: administratively up.
    pub up: bool,
    /// Whether IPv4 packets that arrive on this interface are forwarded. Packets of a bridge port arrive on the bridge.
    pub ipv4_forwarding: bool,
}

impl PodLink {
    /// Whether this link has the settings of `wanted`.
    pub fn is_like(&self, wanted: &Self) -> bool {
        let is_port_like = match (wanted.port, self.port) {
            (Some(wanted), Some(found)) => found.is_set_like(&wanted),
            (wanted, found) => wanted.is_none() && found.is_none(),
        };
        is_port_like && self.up == wanted.up && (self.ipv4_forwarding || !wanted.ipv4_forwarding)
    }
}

/// A route of Polder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OwnRoute {
    /// The target of the route.
    pub target: RouteTarget,
    /// The preferred source address for packets of the node itself.
    pub source: Option<IpAddr>,
    /// The largest packet, in bytes, if that is less than the MTU of the interface.
    pub mtu: Option<u32>,
}

/// The target of a route.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RouteTarget {
    /// The destinations are on-link on the device.
    Device(Device),
    /// Through the tunnel over an underlay of that family, with this next hop.
    Tunnel(Family, IpAddr),
    /// Through the underlay interface, directly to a peer's underlay address.
    Direct(Device, IpAddr),
    /// The kernel rejects packets to the destination.
    Unreachable,
}

/// Interfaces, addresses, routes, neighbour entries and FDB entries.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct State {
    /// The bridge and the tunnel devices.
    pub links: BTreeMap<Device, OwnLink>,
    /// The pod interfaces, by name on the host.
    pub pods: BTreeMap<IfName, PodLink>,
    /// Addresses of Polder's devices.
    pub addresses: BTreeSet<(Device, IpNetwork)>,
    /// Routes, by destination.
    pub routes: BTreeMap<IpNetwork, OwnRoute>,
    /// Routes with Polder's protocol number that Polder did not create.
    pub conflicting_routes: BTreeSet<ConflictingRoute>,
    /// Permanent neighbour entries on Polder's devices.
    pub neighbours: BTreeMap<(Device, IpAddr), Mac>,
    /// FDB entries of Polder's devices.
    pub fdb: BTreeMap<(Device, Mac), Destination>,
}

/// The smallest MTU of an interface with IPv6, in bytes (`IPV6_MIN_MTU`, RFC 8200 section 5).
const SMALLEST_WITH_IPV6: u32 = 1280;

impl State {
    /// Whether the device can have addresses of the family. The kernel disables IPv6 on an interface whose MTU is too
    /// small, and removes its IPv6 settings.
    pub fn has_family(&self, device: &Device, family: Family) -> bool {
        let is_narrow = |link: &OwnLink| link.mtu < SMALLEST_WITH_IPV6;
        family == Family::V4 || !self.links.get(device).is_some_and(is_narrow)
    }
}

/// The actual kernel state.
#[derive(Debug, Clone)]
pub struct Actual {
    /// State that is read by netlink.
    pub state: State,
    /// Kernel settings, by their path under `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
    /// The packet filter, compared with the desired table.
    pub filter: TableState,
    /// The index of each existing device.
    pub indexes: BTreeMap<Device, IfIndex>,
    /// The `accept_ra` settings of foreign interfaces that accept router advertisements only while the host does not
    /// forward IPv6. Empty if the host forwards IPv6 already.
    pub accept_ra_paths: Vec<String>,
}
