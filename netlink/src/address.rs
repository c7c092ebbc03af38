//! Addresses of interfaces.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::{Error, IfIndex, Operation, RouteSocket};

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The index of the interface.
    pub index: IfIndex,
    /// The address with the length of its on-link prefix.
    pub address: IpNetwork,
    /// Whether its scope is global, not link or host.
    pub global: bool,
    /// Whether it may disappear soon: deprecated, temporary, or failed duplicate address detection.
    pub temporary: bool,
}

/// Adds the address with global scope, without duplicate address detection and without an automatic prefix route.
/// Succeeds if the interface already has it.
pub fn add(index: IfIndex, address: IpNetwork) -> Operation {
    let mut message = message(index, address);
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
    Operation::new(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Deletes the address from the interface.
pub fn delete(index: IfIndex, address: IpNetwork) -> Operation {
    Operation::new(RouteNetlinkMessage::DelAddress(message(index, address)), 0)
}

fn message(index: IfIndex, address: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index.number();
    message.header.family = family(address.ip());
    message.header.prefix_len = address.prefix();
    message.attributes = vec![AddressAttribute::Address(address.ip()), AddressAttribute::Local(address.ip())];
    message
}

pub(crate) fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

impl RouteSocket {
    /// All addresses of both families.
    pub fn addresses(&mut self) -> Result<Vec<Address>, Error> {
        self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| match message {
            RouteNetlinkMessage::NewAddress(message) => decode(&message),
            _ => None,
        })
    }
}

fn decode(message: &AddressMessage) -> Option<Address> {
    let mut address = None;
    let mut local = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            // On a point-to-point link, `Address` is the peer's address, and `Local` is the interface's own.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let passing = AddressFlags::Secondary | AddressFlags::Deprecated | AddressFlags::Dadfailed;
    // IFA_F_SECONDARY is IFA_F_TEMPORARY for IPv6; an IPv4 secondary address is permanent.
    let ip = local.or(address)?;
    let passing = if ip.is_ipv4() { AddressFlags::Deprecated } else { passing };
    Some(Address {
        index: IfIndex::new(message.header.index),
        address: IpNetwork::new(ip, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
        temporary: flags.intersects(passing),
    })
}
