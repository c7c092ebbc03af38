//! The pod's own side: whether what was wired in its namespace is still there. What others have added is not our business.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::message::PodAddress;
use polder_api::{Family, IfName, Mac};

use crate::neighbour::Neighbour;
use crate::route::{DefaultRoute, Table};
use crate::rule::Rule;
use crate::{Error, IfIndex, RouteSocket};

/// What was wired in the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// The pod's interface.
    pub interface: IfName,
    /// Its MAC address.
    pub mac: Mac,
    /// Its addresses and their gateways.
    pub addresses: Vec<PodAddress>,
    /// The MAC address of every gateway.
    pub gateway_mac: Mac,
}

impl Inside {
    /// The first difference between that and what `pod`, a socket in the pod's namespace, shows. `None` if all is there.
    pub fn difference(&self, pod: &mut RouteSocket) -> Result<Option<String>, Error> {
        let Self { interface: name, mac, addresses, gateway_mac } = self;
        let Some(link) = pod.link(name.as_str())? else {
            return Ok(Some(format!("the pod has no interface {name}")));
        };
        if !link.up {
            return Ok(Some(format!("{name} in the pod is switched off")));
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
            // None at all is no fault, as where another plugin has set the MAC address anew: then the pod asks for it.
            let is_wrong = |found: &&Neighbour| {
                found.index == link.index && found.address == own.gateway && found.mac != *gateway_mac
            };
            if let Some(wrong) = neighbours.iter().find(is_wrong) {
                return Ok(Some(format!(
                    "the pod knows its gateway {} at {} instead of {gateway_mac}",
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

/// Whether what the interface sends from the address goes to the gateway: by the pod's default route, or by one that it
/// has for itself.
fn has_way_out(pod: &mut RouteSocket, index: IfIndex, own: &PodAddress) -> Result<bool, Error> {
    let leads = |route: &DefaultRoute| route.index == Some(index) && route.gateway == Some(own.gateway);
    if pod.default_routes(Table::MAIN)?.iter().any(leads) {
        return Ok(true);
    }
    let table = Table::of_interface(index);
    let rule = Rule { source: own.address, table };
    Ok(pod.rules()?.contains(&rule) && pod.default_routes(table)?.iter().any(leads))
}

/// The prefix that has only that address.
fn host_prefix(address: IpAddr) -> IpNetwork {
    IpNetwork::new(address, Family::of(address).bits()).expect("the length of a whole address")
}
