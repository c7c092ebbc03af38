//! The pod's network namespace: compares the interface with what ADD made. Additions of other programs are ignored.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::message::PodAddress;
use polder_api::{Family, IfName, Mac};

use crate::neighbour::Neighbour;
use crate::route::{DefaultRoute, Table};
use crate::rule::Rule;
use crate::{Error, IfIndex, RouteSocket};

/// The configuration that ADD made in the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// The name of the pod's interface.
    pub interface: IfName,
    /// The MAC address of the interface.
    pub mac: Mac,
    /// The addresses of the interface and their gateways.
    pub addresses: Vec<PodAddress>,
    /// The MAC address of all gateways.
    pub gateway_mac: Mac,
}

impl Inside {
    /// The first difference between this configuration and the kernel, read through `pod`, a socket in the pod's
    /// namespace. `None` if there is no difference.
    pub fn difference(&self, pod: &mut RouteSocket) -> Result<Option<String>, Error> {
        let Self { interface: name, mac, addresses, gateway_mac } = self;
        let Some(link) = pod.link(name.as_str())? else {
            return Ok(Some(format!("the pod has no interface {name}")));
        };
        if !link.up {
            return Ok(Some(format!("{name} in the pod is down")));
        }
        if link.mac != Some(*mac) {
            let found = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
            return Ok(Some(format!("{name} in the pod has MAC address {found} instead of {mac}")));
        }
        let found_addresses = pod.addresses()?;
        let neighbours = pod.known_neighbours()?;
        for own in addresses {
            let prefix = host_prefix(own.address);
            if !found_addresses.iter().any(|found| found.index == link.index && found.address == prefix) {
                return Ok(Some(format!("{name} in the pod does not have the address {prefix}")));
            }
            // A missing entry is not an error: the kernel drops it when another plugin changes the MAC address, and
            // the pod resolves the gateway with ARP or neighbour discovery.
            let is_wrong = |found: &&Neighbour| {
                found.index == link.index && found.address == own.gateway && found.mac != *gateway_mac
            };
            if let Some(wrong) = neighbours.iter().find(is_wrong) {
                return Ok(Some(format!(
                    "the pod's neighbour entry of gateway {} has MAC address {} instead of {gateway_mac}",
                    own.gateway, wrong.mac
                )));
            }
            if !has_way_out(pod, link.index, own)? {
                return Ok(Some(format!("the pod has no default route through {}", own.gateway)));
            }
        }
        Ok(None)
    }
}

/// Whether packets from the address are routed to the gateway: by a default route in table main, or in the
/// interface's own table.
fn has_way_out(pod: &mut RouteSocket, index: IfIndex, own: &PodAddress) -> Result<bool, Error> {
    let leads = |route: &DefaultRoute| route.index == Some(index) && route.gateway == Some(own.gateway);
    if pod.default_routes(Table::MAIN)?.iter().any(leads) {
        return Ok(true);
    }
    let table = Table::of_interface(index);
    let rule = Rule { source: own.address, table };
    Ok(pod.rules()?.contains(&rule) && pod.default_routes(table)?.iter().any(leads))
}

/// The prefix of one address: /32 or /128.
fn host_prefix(address: IpAddr) -> IpNetwork {
    IpNetwork::new(address, Family::of(address).bits()).expect("the length of a whole address")
}
