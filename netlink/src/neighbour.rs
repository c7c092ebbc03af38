//! Neighbour entries (IP address to link-layer address) and FDB entries (link-layer address to bridge port or tunnel
//! endpoint).

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE, Nla};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use polder_api::Mac;

use crate::address::family;
use crate::{Error, IfIndex, Operation, RouteSocket};

/// `NDA_NH_ID` (`include/uapi/linux/neighbour.h`).
const NEXT_HOP_OBJECT: u16 = 13;

/// A permanent neighbour entry (ARP or neighbour discovery). The kernel does not resolve it, age it, or count it
/// against the table's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Neighbour {
    /// The interface of the entry.
    pub index: IfIndex,
    /// The IP address of the neighbour.
    pub address: IpAddr,
    /// The link-layer address of the neighbour.
    pub mac: Mac,
}

/// An FDB entry of a VXLAN device or a bridge; for a bridge, in VLAN 0.
///
/// A bridge has one table for each VLAN. While VLAN filtering is off, it looks up all frames in VLAN 0
/// (`br_allowed_ingress`, `net/bridge/br_vlan.c`). A kernel with `CONFIG_BRIDGE_VLAN_FILTERING` puts every port into
/// VLAN 1, and copies entries added to VLAN 0 there (`br_fdb_add`, `net/bridge/br_fdb.c`); an entry that is deleted
/// from VLAN 0 is deleted from all VLANs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FdbEntry {
    /// The bridge port or VXLAN device.
    pub index: IfIndex,
    /// The destination link-layer address.
    pub mac: Mac,
    /// Where frames to that address are sent.
    pub to: Destination,
}

/// The destination of an FDB entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Destination {
    /// The bridge port that has the entry.
    Port,
    /// The tunnel endpoint with this underlay address.
    Remote(IpAddr),
    /// A tunnel destination that Polder never uses: not permanent, a next hop object, or with its own UDP port, VNI or
    /// interface. Such entries are only read and deleted.
    Unsupported,
}

impl Neighbour {
    /// Creates the entry, or replaces the one for its address.
    pub fn replace(&self) -> Operation {
        Operation::new(RouteNetlinkMessage::NewNeighbour(self.message()), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes the entry.
    pub fn delete(&self) -> Operation {
        Operation::new(RouteNetlinkMessage::DelNeighbour(self.message()), 0)
    }

    fn message(&self) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = family(self.address);
        message.header.ifindex = self.index.number();
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(self.address.into()),
            NeighbourAttribute::LinkLayerAddress(self.mac.0.to_vec()),
        ];
        message
    }
}

impl FdbEntry {
    /// Creates the entry, or replaces the one for its link-layer address. An entry with [`Destination::Unsupported`]
    /// must be deleted first.
    pub fn replace(&self) -> Operation {
        let mut message = self.message();
        if let Destination::Remote(underlay) = self.to {
            message.attributes.push(NeighbourAttribute::Destination(underlay.into()));
        }
        Operation::new(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes the entry; for a tunnel, all entries of the link-layer address (`vxlan_fdb_delete`,
    /// `drivers/net/vxlan/vxlan_core.c`).
    pub fn delete(&self) -> Operation {
        Operation::new(RouteNetlinkMessage::DelNeighbour(self.message()), 0)
    }

    fn message(&self) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = self.index.number();
        message.attributes = vec![NeighbourAttribute::LinkLayerAddress(self.mac.0.to_vec())];
        match self.to {
            // Not `Permanent`: for a bridge that is an address of the host. `Noarp` is a static entry.
            Destination::Port => {
                message.header.state = NeighbourState::Noarp;
                message.header.flags = NeighbourFlags::Controller;
            }
            Destination::Remote(_) | Destination::Unsupported => {
                message.header.state = NeighbourState::Permanent;
                message.header.flags = NeighbourFlags::Own;
            }
        }
        message
    }
}

impl RouteSocket {
    /// The permanent neighbour entries of all interfaces, of both families.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, Error> {
        self.neighbours_in(|state| state == NeighbourState::Permanent)
    }

    /// The usable neighbour entries of all interfaces, of both families: permanent and learned ones (`NUD_VALID`,
    /// `include/net/neighbour.h`).
    pub fn known_neighbours(&mut self) -> Result<Vec<Neighbour>, Error> {
        use NeighbourState::{Delay, Noarp, Permanent, Probe, Reachable, Stale};
        self.neighbours_in(|state| matches!(state, Permanent | Noarp | Reachable | Stale | Delay | Probe))
    }

    fn neighbours_in(&mut self, is_wanted: impl Fn(NeighbourState) -> bool) -> Result<Vec<Neighbour>, Error> {
        let message = NeighbourMessage::default();
        self.dump(RouteNetlinkMessage::GetNeighbour(message), |message| match &message {
            RouteNetlinkMessage::NewNeighbour(entry) if is_wanted(entry.header.state) => neighbour(entry),
            _ => None,
        })
    }

    /// The FDB entries of all bridge ports and tunnels, except learned ones, the ports' own addresses, and entries of
    /// VLANs other than 0.
    pub fn fdb(&mut self) -> Result<Vec<FdbEntry>, Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        self.dump(RouteNetlinkMessage::GetNeighbour(message), |message| match &message {
            RouteNetlinkMessage::NewNeighbour(entry) => fdb_entry(entry),
            _ => None,
        })
    }
}

/// The IP address of a neighbour entry.
pub(crate) fn address(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some((*v4).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some((*v6).into()),
        _ => None,
    })
}

/// The entry with its addresses; `None` if it has no link-layer address.
pub(crate) fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let index = IfIndex::new(message.header.ifindex);
    Some(Neighbour { index, address: address(message)?, mac: mac(message)? })
}

/// The FDB entry, if [`RouteSocket::fdb`] reads entries of its kind.
pub(crate) fn fdb_entry(message: &NeighbourMessage) -> Option<FdbEntry> {
    if vlan(message) != 0 {
        return None;
    }
    let remote = message.attributes.iter().find_map(|attribute| match attribute {
        // The family of the entry is AF_BRIDGE, so the library returns the address as bytes.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => ip(bytes),
        _ => None,
    });
    let is_by_object = message.attributes.iter().any(|attribute| attribute.kind() == NEXT_HOP_OBJECT);
    let is_odd = message.attributes.iter().any(|attribute| {
        use NeighbourAttribute::{IfIndex, Port, Vni};
        matches!(attribute, Port(_) | Vni(_) | IfIndex(_))
    });
    let to = match (message.header.state, remote) {
        (NeighbourState::Permanent, Some(underlay)) if !is_odd => Destination::Remote(underlay),
        (_, Some(_)) => Destination::Unsupported,
        (_, None) if is_by_object => Destination::Unsupported,
        (NeighbourState::Noarp, None) => Destination::Port,
        _ => return None,
    };
    Some(FdbEntry { index: IfIndex::new(message.header.ifindex), mac: mac(message)?, to })
}

/// The VLAN of a bridge's FDB entry. The kernel omits VLAN 0 (`fdb_fill_info`, `net/bridge/br_fdb.c`).
pub(crate) fn vlan(message: &NeighbourMessage) -> u16 {
    let vlan = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Vlan(vlan) => Some(*vlan),
        _ => None,
    });
    vlan.unwrap_or(0)
}

/// The link-layer address of an entry.
pub(crate) fn mac(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from).ok();
    v4.or_else(|| <[u8; 16]>::try_from(bytes).map(IpAddr::from).ok())
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable, Parseable};

    use super::*;

    const POD: Mac = Mac([2, 0, 0, 0, 0, 2]);

    /// An FDB entry of a bridge port, decoded from the bytes that the kernel would send.
    fn message_of_vlan(vlan: Option<u16>) -> NeighbourMessage {
        let mut message = FdbEntry { index: IfIndex::new(7), mac: POD, to: Destination::Port }.message();
        message.attributes.push(NeighbourAttribute::Controller(3));
        message.attributes.extend(vlan.map(NeighbourAttribute::Vlan));
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        NeighbourMessage::parse(&bytes).unwrap()
    }

    #[test]
    fn only_an_fdb_entry_without_vlan_is_ours() {
        let ours = FdbEntry { index: IfIndex::new(7), mac: POD, to: Destination::Port };
        assert_eq!(fdb_entry(&message_of_vlan(None)), Some(ours));
        assert_eq!(fdb_entry(&message_of_vlan(Some(0))), Some(ours));
        for vlan in [1, 77, 4094] {
            assert_eq!(fdb_entry(&message_of_vlan(Some(vlan))), None);
        }
    }
}
