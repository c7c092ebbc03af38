//! Reads Polder's part of the kernel state, in the types of the desired state.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use polder_api::{Family, IfName, NodeName, PortMapping, is_host_interface};
use polder_ipam::recovery::LivingPod;
use polder_netlink::address::Address;
use polder_netlink::link::{Link, LinkKind};
use polder_netlink::nft::Table;
use polder_netlink::route::{ForeignRoute, KernelTarget, Route, RouteLookup};
use polder_netlink::{Error, IfIndex};

use super::Kernel;
use super::ruleset::{self, Sets, host_ports};
use super::state::{
    Actual, Device, DeviceIdentity, DeviceKind, OwnLink, OwnRoute, PodLink, RouteTarget, State,
};
use super::tunnel::Tunnel;

/// The interfaces, addresses and routes of the host.
#[derive(Debug, Clone, Default)]
pub struct HostNetwork {
    /// Name and MTU, in bytes, of every foreign interface that is up, by index.
    pub interfaces: BTreeMap<IfIndex, (String, u32)>,
    /// Interfaces that deliver a packet by its IP addresses ([`Link::has_neighbours`] is false). Includes interfaces
    /// that are down.
    pub layer3_interfaces: BTreeSet<IfIndex>,
    /// Polder's interfaces.
    pub own: BTreeSet<IfIndex>,
    /// Interfaces whose addresses are those of Kubernetes services, or of a name server on every node.
    pub service_interfaces: BTreeSet<IfIndex>,
    /// The addresses of all interfaces.
    pub addresses: Vec<Address>,
    /// The host's routes to the requested destinations, in the order of the request. Destinations without a route are
    /// left out.
    pub routes: Vec<(RouteTo, RouteLookup)>,
    /// The configured routes of other origin in the main table.
    pub configured: Vec<ForeignRoute>,
}

/// The interfaces of kube-proxy (mode ipvs), of kube-router's service proxy, and of the name server cache of Kubernetes
/// on each node. Packets to their addresses are not for the host.
const SERVICE_INTERFACES: [&str; 3] = ["kube-ipvs0", "kube-dummy-if", "nodelocaldns"];

impl HostNetwork {
    /// The addresses at which others reach the host, which therefore have the host ports.
    pub fn host_addresses(&self) -> BTreeSet<IpAddr> {
        let is_host = |found: &&Address| found.global && !self.service_interfaces.contains(&found.index);
        let host = self.addresses.iter().filter(is_host).map(|found| found.address.ip());
        host.filter(|address| !address.is_loopback()).collect()
    }
}

/// Destinations whose route the agent looks up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteTo {
    /// An underlay address of that node.
    Node(NodeName),
    /// A member of etcd.
    Etcd,
    /// Destinations outside the cluster.
    World,
}

impl fmt::Display for RouteTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node {name}"),
            Self::Etcd => f.write_str("etcd"),
            Self::World => f.write_str("destinations outside the cluster"),
        }
    }
}

impl Kernel {
    /// Reads Polder's kernel state. The packet filter is compared with `table`.
    pub fn snapshot(&mut self, table: &Table) -> Result<Actual, Error> {
        // Addresses, routes and entries are read before the interfaces. A plugin creates the interface first, so an
        // entry that it creates meanwhile does not seem to lack its interface.
        let addresses = self.routes.addresses()?;
        let (routes, conflicting_routes) = self.routes.routes()?;
        let neighbours = self.routes.neighbours()?;
        let fdb = self.routes.fdb()?;
        let links = self.routes.links()?;
        let mut state =
            State { conflicting_routes: conflicting_routes.into_iter().collect(), ..State::default() };
        let mut indexes = BTreeMap::new();
        let is_bridge = |link: &&Link| {
            device(link).or_else(|| renamed(link, &links)).is_some_and(|device| device == Device::Bridge)
        };
        let bridge = links.values().find(is_bridge).map(|bridge| bridge.index);
        for link in links.values() {
            let Some(device) = device(link).or_else(|| renamed(link, &links)) else { continue };
            match &device {
                Device::Pod(name) => {
                    state.pods.insert(name.clone(), pod_link(link, bridge));
                }
                _ => drop(state.links.insert(device.clone(), own_link(link, &device))),
            }
            indexes.insert(device, link.index);
        }
        let devices: BTreeMap<IfIndex, Device> =
            indexes.iter().map(|(device, index)| (*index, device.clone())).collect();
        let ours = |index: IfIndex| devices.get(&index).cloned();
        for address in addresses {
            // The kernel manages link-local addresses.
            if let Some(device) = ours(address.index).filter(|_| address.global) {
                state.addresses.insert((device, address.address));
            }
        }
        let own_route = |route: Route| OwnRoute {
            target: target(route.target, &devices),
            source: route.source,
            mtu: route.mtu,
        };
        // The kernel lists most of them in ascending order: inserted one by one, they leave the nodes of the B-tree half
        // full (more memory).
        state.routes = routes.into_iter().map(|route| (route.destination, own_route(route))).collect();
        let neighbours = neighbours
            .into_iter()
            .filter_map(|neighbour| Some(((ours(neighbour.index)?, neighbour.address), neighbour.mac)));
        state.neighbours = neighbours.collect();
        state.fdb =
            fdb.into_iter().filter_map(|entry| Some(((ours(entry.index)?, entry.mac), entry.to))).collect();
        let filter = self.filter.table_state(table)?;
        Ok(Actual {
            state,
            sysctls: BTreeMap::new(),
            filter,
            indexes,
            accept_ra_paths: self.sysctls.accept_ra_paths(),
        })
    }

    /// Reads the host's interfaces, addresses and routes, and the routes to the destinations in `asked`.
    pub fn host_network(&mut self, asked: &[(RouteTo, IpAddr)]) -> Result<HostNetwork, Error> {
        let links = self.routes.links()?;
        let usable = links.values().filter(|link| link.up && device(link).is_none());
        let mut network = HostNetwork {
            interfaces: usable.map(|link| (link.index, (link.name.clone(), link.mtu))).collect(),
            layer3_interfaces: links
                .values()
                .filter(|link| !link.has_neighbours)
                .map(|link| link.index)
                .collect(),
            own: links.values().filter(|link| device(link).is_some()).map(|link| link.index).collect(),
            service_interfaces: links
                .values()
                .filter(|link| SERVICE_INTERFACES.contains(&link.name.as_str()))
                .map(|link| link.index)
                .collect(),
            addresses: self.routes.addresses()?,
            configured: self.routes.foreign_routes()?,
            ..HostNetwork::default()
        };
        for (what, address) in asked {
            if let Some(lookup) = self.routes.look_up(*address)? {
                network.routes.push((what.clone(), lookup));
            }
        }
        Ok(network)
    }

    /// The indexes of all devices of Polder.
    pub(super) fn own_devices(&mut self) -> Result<BTreeSet<IfIndex>, Error> {
        let links = self.routes.links()?;
        let is_ours = |link: &&Link| device(link).or_else(|| renamed(link, &links)).is_some();
        Ok(links.values().filter(is_ours).map(|link| link.index).collect())
    }

    /// The names of the pod interfaces.
    pub fn pod_interfaces(&mut self) -> Result<BTreeSet<IfName>, Error> {
        let links = self.routes.links()?;
        Ok(links.values().filter_map(pod).collect())
    }

    /// The node's own addresses, on the bridge.
    pub fn gateways(&mut self) -> Result<Vec<IpAddr>, Error> {
        Ok(self.bridge_addresses()?.into_iter().map(|found| found.address.ip()).collect())
    }

    /// The addresses of the bridge, without the link-local ones that the kernel assigns.
    pub(super) fn bridge_addresses(&mut self) -> Result<Vec<Address>, Error> {
        let Some(bridge) = self.routes.link(polder_api::BRIDGE)? else { return Ok(Vec::new()) };
        let on_bridge = self.routes.addresses()?.into_iter().filter(|found| found.index == bridge.index);
        Ok(on_bridge.filter(|found| found.global).collect())
    }

    /// The pod interfaces with their aliases, and the addresses behind each: the state of attachments in the kernel.
    /// Interfaces without an alias or a neighbour entry are left out.
    pub fn attached(&mut self) -> Result<Vec<LivingPod>, Error> {
        let links = self.routes.links()?;
        let fdb = self.routes.fdb()?;
        let neighbours = self.routes.neighbours()?;
        let ports = self.host_ports()?;
        let mut pods = Vec::new();
        for link in links.values() {
            let (Some(name), Some(alias)) = (pod(link), &link.alias) else { continue };
            // Neighbour entries are on the interface itself, or on the bridge with a MAC address of the port's FDB
            // entries.
            let macs: BTreeSet<_> = fdb.iter().filter(|f| f.index == link.index).map(|f| f.mac).collect();
            let behind = neighbours.iter().filter(|n| n.index == link.index || macs.contains(&n.mac));
            let found: Vec<_> = behind.collect();
            let Some(mac) = found.first().map(|neighbour| neighbour.mac) else { continue };
            let mut addresses: Vec<IpAddr> = found.iter().map(|neighbour| neighbour.address).collect();
            addresses.sort();
            let ports = ports.iter().filter(|(address, _)| addresses.contains(address));
            let ports = ports.map(|(_, port)| *port).collect();
            pods.push(LivingPod { name, alias: alias.clone(), mac, mtu: link.mtu, addresses, ports });
        }
        Ok(pods)
    }

    /// The host ports in the packet filter that lead to these addresses.
    pub(super) fn host_ports_of(&mut self, addresses: &[IpAddr]) -> Result<Vec<PortMapping>, Error> {
        let ports = self.host_ports()?.into_iter().filter(|(address, _)| addresses.contains(address));
        Ok(ports.map(|(_, port)| port).collect())
    }

    /// The host ports in the packet filter, each with the address of its pod.
    fn host_ports(&mut self) -> Result<Vec<(IpAddr, PortMapping)>, Error> {
        let table = ruleset::pod_sets();
        let mut ports = Vec::new();
        for family in Family::BOTH {
            let sets = Sets::of(family);
            for set in table.sets.iter().filter(|set| [sets.ports, sets.address_ports].contains(&set.name)) {
                match self.filter.elements(&table, set) {
                    Ok(elements) => ports.extend(host_ports::found(family, &elements)),
                    Err(error) if error.is_missing() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(ports)
    }
}

/// The settings of a pod's interface on the host. A port of another bridge is no port.
pub(crate) fn pod_link(link: &Link, bridge: Option<IfIndex>) -> PodLink {
    let port = link.port.filter(|_| link.controller == bridge);
    PodLink { port, up: link.up, ipv4_forwarding: link.ipv4_forwarding }
}

/// The name of the interface, if it is a pod interface.
pub(super) fn pod(link: &Link) -> Option<IfName> {
    match device(link) {
        Some(Device::Pod(name)) if is_host_interface(name.as_str()) => Some(name),
        _ => None,
    }
}

/// The device that the interface is, if it is Polder's.
fn device(link: &Link) -> Option<Device> {
    // An interface with the name of a pod interface that is not a veth belongs to another program.
    Device::named(&link.name)
        .filter(|device| !matches!(device, Device::Pod(_)) || link.kind == LinkKind::Veth)
}

/// The device that was renamed to this interface, if no interface has the device's own name.
fn renamed(link: &Link, links: &BTreeMap<String, Link>) -> Option<Device> {
    let device = link.alias.as_deref().and_then(Device::marked)?;
    let is_of_kind = match device {
        Device::Bridge => link.kind == LinkKind::Bridge,
        _ => Tunnel::of(&link.kind).is_some(),
    };
    (is_of_kind && !links.contains_key(device.name()?)).then_some(device)
}

fn own_link(link: &Link, device: &Device) -> OwnLink {
    let kind = match &link.kind {
        LinkKind::Bridge => DeviceKind::Bridge { filters_vlans: link.filters_vlans },
        kind => Tunnel::of(kind).map_or(DeviceKind::Foreign, DeviceKind::Tunnel),
    };
    let identity = match (device.name() == Some(&link.name), device.mark() == link.alias) {
        (true, true) => DeviceIdentity::Correct,
        (true, false) => DeviceIdentity::Unmarked,
        (false, _) => DeviceIdentity::Renamed,
    };
    let mac = link.mac.unwrap_or(polder_api::Mac([0; 6]));
    OwnLink { kind, mac, mtu: link.mtu, up: link.up, identity }
}

fn target(target: KernelTarget, devices: &BTreeMap<IfIndex, Device>) -> RouteTarget {
    let device = |index| devices.get(&index).cloned().unwrap_or(Device::Uplink(index));
    match target {
        KernelTarget::Link { index } => RouteTarget::Device(device(index)),
        KernelTarget::Unreachable => RouteTarget::Unreachable,
        KernelTarget::Gateway { index, gateway, onlink } => match device(index) {
            Device::Tunnel(family) if onlink => RouteTarget::Tunnel(family, gateway),
            other => RouteTarget::Direct(other, gateway),
        },
    }
}
