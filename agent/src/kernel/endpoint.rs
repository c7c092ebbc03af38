//! Creates the interfaces of the node's probe endpoint, in the same way as the plugin creates those of a pod.

use std::fs::File;
use std::os::fd::AsFd;

use ipnetwork::IpNetwork;
use polder_api::message::{Attach, Wiring};
use polder_api::{BRIDGE, Family, IfName, PROBE_INTERFACE, PROBE_INTERFACE_ROUTED};
use polder_ipam::record::AttachMode;
use polder_netlink::link::{self, Port, VethPair};
use polder_netlink::neighbour::{Destination, FdbEntry, Neighbour};
use polder_netlink::route::{self, KernelTarget, OnlinkRoute, Route, RouteTable};
use polder_netlink::{Error, IfIndex, Operation, RouteSocket, address, namespace};

use super::Kernel;

/// The interface inside the endpoint's namespace.
const INSIDE: &str = "eth0";

/// Why the endpoint's interfaces were not created.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The kernel refused an operation.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The agent retries after 60 s.
    #[error("cannot create the interfaces of the probe endpoint")]
    Netlink(#[from] Error),
    /// The endpoint's namespace cannot be entered.
    ///
    /// Remedy: give the agent the capability `SYS_ADMIN`, or set `probe_peers = false`.
    #[error("cannot enter the network namespace of the probe endpoint")]
    Namespace(#[from] std::io::Error),
    /// The bridge or the interface does not exist any more.
    ///
    /// Remedy: none, the agent retries after 60 s. If it repeats, find the program that deletes interfaces of Polder.
    #[error("{0} does not exist")]
    Gone(IfName),
}

/// The name of the endpoint's interface on the host.
pub fn interface(attach: AttachMode) -> IfName {
    name(match attach {
        AttachMode::Bridge => PROBE_INTERFACE,
        AttachMode::Routed => PROBE_INTERFACE_ROUTED,
    })
}

fn name(name: &str) -> IfName {
    IfName::try_from(name.to_owned()).expect("a name of ours is valid")
}

impl Kernel {
    /// The index of the interface with that name; `None` if it does not exist.
    pub fn index_of(&mut self, name: &IfName) -> Result<Option<IfIndex>, Error> {
        Ok(self.routes.link(name.as_str())?.map(|link| link.index))
    }

    /// Creates the veth pair with one end in `namespace`, with its addresses, entries and routes. The pair must not
    /// exist yet. Returns the index of the host's end.
    pub fn make_probe(&mut self, namespace: &File, wiring: &Wiring) -> Result<IfIndex, EndpointError> {
        let mut inside = namespace::within(namespace, || {
            // IPv6 may be disabled by default in new namespaces. The error is ignored: a kernel without IPv6 lacks the
            // setting.
            let _ = self.sysctls.set("net/ipv6/conf/default/disable_ipv6", "0");
            RouteSocket::open()
        })??;
        let bridge = match wiring.attach {
            Attach::Bridge { .. } => {
                Some(self.routes.link(BRIDGE)?.ok_or_else(|| EndpointError::Gone(name(BRIDGE)))?.index)
            }
            Attach::Routed => None,
        };
        let host = wiring.host_interface.as_str();
        let gone = || EndpointError::Gone(wiring.host_interface.clone());
        let pair = VethPair {
            name: &wiring.host_interface,
            mac: bridge.is_none().then_some(wiring.gateway_mac),
            peer_name: &name(INSIDE),
            peer_mac: wiring.mac,
            peer_namespace: namespace.as_fd(),
            mtu: wiring.mtu,
            controller: bridge,
        };
        let mut settings = link::change(host).alias(&wiring.alias);
        if let Attach::Bridge { locked } = wiring.attach {
            settings = settings.port(&Port::of_pod(locked));
        }
        self.routes.execute_all([
            link::create_veth(&pair),
            link::without_link_local(host),
            settings.into(),
            link::change(host).up().into(),
        ])?;
        let index = self.index_of(&wiring.host_interface)?.ok_or_else(gone)?;
        self.routes.execute_all(towards(wiring, bridge, index))?;
        let index_inside = inside.link(INSIDE)?.ok_or_else(gone)?.index;
        inside.execute_all(outwards(wiring, index_inside))?;
        Ok(index)
    }
}

/// The operations on the host: neighbour entries, and an FDB entry or routes to the endpoint.
fn towards(wiring: &Wiring, bridge: Option<IfIndex>, index: IfIndex) -> Vec<Operation> {
    let behind = bridge.unwrap_or(index);
    let neighbours = wiring.addresses.iter().map(|own| own.address);
    let neighbours =
        neighbours.map(|address| Neighbour { index: behind, address, mac: wiring.mac }.replace());
    if bridge.is_some() {
        let fdb_entry = FdbEntry { index, mac: wiring.mac, to: Destination::Port };
        return std::iter::once(fdb_entry.replace()).chain(neighbours).collect();
    }
    let routes = wiring.addresses.iter().map(|own| {
        let destination = host_prefix(own.address);
        route::replace(&Route { destination, target: KernelTarget::Link { index }, source: None, mtu: None })
    });
    routes.chain(neighbours).collect()
}

/// The operations in the endpoint's namespace: addresses, neighbour entries of the gateways and default routes.
fn outwards(wiring: &Wiring, index: IfIndex) -> Vec<Operation> {
    let mut operations = vec![link::change("lo").up().into(), link::without_link_local(INSIDE)];
    operations.extend(wiring.addresses.iter().map(|own| address::add(index, host_prefix(own.address))));
    operations.push(link::change_index(index).up().into());
    for own in &wiring.addresses {
        operations.push(Neighbour { index, address: own.gateway, mac: wiring.gateway_mac }.replace());
        operations.push(route::onlink(index, own.gateway, &OnlinkRoute::to_everywhere(RouteTable::MAIN)));
    }
    operations
}

fn host_prefix(address: std::net::IpAddr) -> IpNetwork {
    IpNetwork::new(address, Family::of(address).bits()).expect("the length of a whole address")
}
