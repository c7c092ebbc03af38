//! The pod's network namespace: compares the interface with what ADD made. Additions of other programs are ignored.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::message::PodAddress;
use polder_api::{Family, IfName, Mac};

use crate::neighbour::Neighbour;
use crate::route::{DefaultRoute, RouteTable};
use crate::rule::RoutingRule;
use crate::{Error, IfIndex, RouteSocket};

/// The configuration that ADD made in the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInterface {
    /// The name of the pod's interface.
    pub interface: IfName,
    /// The MAC address of the interface.
    pub mac: Mac,
    /// The addresses of the interface and their gateways.
    pub addresses: Vec<PodAddress>,
    /// The MAC address of all gateways.
    pub gateway_mac: Mac,
}

/// A difference between the configuration that ADD made in the pod and the kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PodInterfaceDifference {
    /// The interface was deleted or renamed, or moved to another network namespace.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("the pod has no interface {interface}")]
    NoInterface {
        /// The name of the pod's interface.
        interface: IfName,
    },
    /// Another program set the interface down. Its routes and neighbour entries are gone, also after it is set up.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("{interface} in the pod is down")]
    Down {
        /// The name of the pod's interface.
        interface: IfName,
    },
    /// Another program changed the MAC address of the interface.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("{interface} in the pod has MAC address {} instead of {expected}", shown(*found))]
    Mac {
        /// The name of the pod's interface.
        interface: IfName,
        /// The MAC address in the kernel.
        found: Option<Mac>,
        /// The MAC address that ADD set.
        expected: Mac,
    },
    /// Another program removed the address, or setting the interface down removed it.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("{interface} in the pod does not have the address {address}")]
    NoAddress {
        /// The name of the pod's interface.
        interface: IfName,
        /// The missing address, as a host prefix.
        address: IpNetwork,
    },
    /// Another program replaced the neighbour entry of the gateway, or another machine claims the gateway's address.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("the pod's neighbour entry of gateway {gateway} has MAC address {found} instead of {expected}")]
    GatewayMac {
        /// The address of the gateway.
        gateway: IpAddr,
        /// The MAC address in the kernel.
        found: Mac,
        /// The MAC address of all gateways.
        expected: Mac,
    },
    /// Another program removed the default route, or setting the interface down removed it.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("the pod has no default route through {gateway}")]
    NoDefaultRoute {
        /// The address of the gateway.
        gateway: IpAddr,
    },
}

/// The MAC address as text; empty without one.
fn shown(mac: Option<Mac>) -> String {
    mac.map(|mac| mac.to_string()).unwrap_or_default()
}

impl PodInterface {
    /// The first difference between this configuration and the kernel, read through `pod`, a socket in the pod's
    /// namespace. `None` if there is no difference.
    pub fn difference(&self, pod: &mut RouteSocket) -> Result<Option<PodInterfaceDifference>, Error> {
        let Self { interface: name, mac, addresses, gateway_mac } = self;
        let Some(link) = pod.link(name.as_str())? else {
            return Ok(Some(PodInterfaceDifference::NoInterface { interface: name.clone() }));
        };
        if !link.up {
            return Ok(Some(PodInterfaceDifference::Down { interface: name.clone() }));
        }
        if link.mac != Some(*mac) {
            let (interface, found) = (name.clone(), link.mac);
            return Ok(Some(PodInterfaceDifference::Mac { interface, found, expected: *mac }));
        }
        let found_addresses = pod.addresses()?;
        let neighbours = pod.known_neighbours()?;
        for own in addresses {
            let address = host_prefix(own.address);
            if !found_addresses.iter().any(|found| found.index == link.index && found.address == address) {
                return Ok(Some(PodInterfaceDifference::NoAddress { interface: name.clone(), address }));
            }
            // A missing entry is not an error: the kernel drops it when another plugin changes the MAC address, and
            // the pod resolves the gateway with ARP or neighbour discovery.
            let is_wrong = |found: &&Neighbour| {
                found.index == link.index && found.address == own.gateway && found.mac != *gateway_mac
            };
            if let Some(wrong) = neighbours.iter().find(is_wrong) {
                return Ok(Some(PodInterfaceDifference::GatewayMac {
                    gateway: own.gateway,
                    found: wrong.mac,
                    expected: *gateway_mac,
                }));
            }
            if !has_way_out(pod, link.index, own)? {
                return Ok(Some(PodInterfaceDifference::NoDefaultRoute { gateway: own.gateway }));
            }
        }
        Ok(None)
    }
}

/// Whether packets from the address are routed to the gateway: by a default route in table main, or in the
/// interface's own table.
fn has_way_out(pod: &mut RouteSocket, index: IfIndex, own: &PodAddress) -> Result<bool, Error> {
    let leads = |route: &DefaultRoute| route.index == Some(index) && route.gateway == Some(own.gateway);
    let family = Family::of(own.address);
    if pod.default_routes(family, RouteTable::MAIN)?.iter().any(leads) {
        return Ok(true);
    }
    let table = RouteTable::of_interface(index);
    let rule = RoutingRule { source: own.address, table };
    Ok(pod.rules()?.contains(&rule) && pod.default_routes(family, table)?.iter().any(leads))
}

/// The prefix of one address: /32 or /128.
fn host_prefix(address: IpAddr) -> IpNetwork {
    IpNetwork::new(address, Family::of(address).bits()).expect("the length of a whole address")
}
