//! Neighbour entries: which link-layer address has an IP address, and behind which port or peer a link-layer
//! address is.

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

/// A permanent entry of the ARP or neighbour discovery table. The kernel never asks for it, ages it, or counts it
/// against the limits of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Neighbour {
    /// The interface behind which the neighbour is.
    pub index: IfIndex,
    /// Its IP address.
    pub address: IpAddr,
    /// Its link-layer address.
    pub mac: Mac,
}

/// An entry of a forwarding database; of a bridge, of VLAN 0.
///
/// A bridge has one table for each VLAN. As long as it does not filter VLANs it looks all frames up in VLAN 0
/// (`br_allowed_ingress`, `net/bridge/br_vlan.c`). A kernel with `CONFIG_BRIDGE_VLAN_FILTERING` puts every port into VLAN 1, and
/// repeats there what is made in VLAN 0 (`br_fdb_add`, `net/bridge/br_fdb.c`); what is deleted from VLAN 0 it deletes from all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// The bridge port or VXLAN device.
    pub index: IfIndex,
    /// The link-layer address that it is about.
    pub mac: Mac,
    /// Where frames to it go.
    pub to: Destination,
}

/// Where a forwarding database entry leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Destination {
    /// Out of the bridge port that has the entry.
    Port,
    /// Through the tunnel, to the end point with this underlay address.
    Remote(IpAddr),
    /// Through the tunnel in a way that none of ours has: for a while, by a next hop object, or with a UDP port, a network
    /// identifier or an interface of its own. Only read, and deleted.
    Otherwise,
}

impl Neighbour {
    /// Makes the entry, whatever was there for its address.
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

impl Forward {
    /// Makes the entry, whatever was there for its link-layer address; but not in place of one [`Destination::Otherwise`],
    /// which is to be deleted before.
    pub fn replace(&self) -> Operation {
        let mut message = self.message();
        if let Destination::Remote(underlay) = self.to {
            message.attributes.push(NeighbourAttribute::Destination(underlay.into()));
        }
        Operation::new(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes the entry; of a tunnel all that it has for the link-layer address (`vxlan_fdb_delete`,
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
            // Not permanent in the bridge's words: that would be an address of the host. `NoArp` is a static entry.
            Destination::Port => {
                message.header.state = NeighbourState::Noarp;
                message.header.flags = NeighbourFlags::Controller;
            }
            Destination::Remote(_) | Destination::Otherwise => {
                message.header.state = NeighbourState::Permanent;
                message.header.flags = NeighbourFlags::Own;
            }
        }
        message
    }
}

impl RouteSocket {
    /// The permanent neighbours behind all interfaces, of both families.
    pub fn neighbours(&mut self) -> Result<Vec<Neighbour>, Error> {
        self.neighbours_in(|state| state == NeighbourState::Permanent)
    }

    /// The neighbours behind all interfaces, of both families, that packets are sent to: the permanent ones, and those that were
    /// learned (`NUD_VALID`, `include/net/neighbour.h`).
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

    /// The forwarding entries of all bridge ports and tunnels, without those that ports have learned, those of their
    /// own addresses, and those of other VLANs than 0.
    pub fn forwards(&mut self) -> Result<Vec<Forward>, Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        self.dump(RouteNetlinkMessage::GetNeighbour(message), |message| forward(&message))
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some((*v6).into()),
            _ => {}
        }
    }
    Some(Neighbour { index: IfIndex::new(message.header.ifindex), address: address?, mac: mac(message)? })
}

fn forward(message: &RouteNetlinkMessage) -> Option<Forward> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    if vlan(message) != 0 {
        return None;
    }
    let remote = message.attributes.iter().find_map(|attribute| match attribute {
        // The family of the entry is the bridge's, so the address comes as bytes.
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
        (_, Some(_)) => Destination::Otherwise,
        (_, None) if is_by_object => Destination::Otherwise,
        (NeighbourState::Noarp, None) => Destination::Port,
        _ => return None,
    };
    Some(Forward { index: IfIndex::new(message.header.ifindex), mac: mac(message)?, to })
}

/// The VLAN of a bridge's entry. The kernel does not name VLAN 0 (`fdb_fill_info`, `net/bridge/br_fdb.c`).
fn vlan(message: &NeighbourMessage) -> u16 {
    let vlan = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Vlan(vlan) => Some(*vlan),
        _ => None,
    });
    vlan.unwrap_or(0)
}

fn mac(message: &NeighbourMessage) -> Option<Mac> {
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

    /// An entry of a bridge port as the kernel tells it, through the bytes of the message.
    fn told(vlan: Option<u16>) -> RouteNetlinkMessage {
        let mut message = Forward { index: IfIndex::new(7), mac: POD, to: Destination::Port }.message();
        message.attributes.push(NeighbourAttribute::Controller(3));
        message.attributes.extend(vlan.map(NeighbourAttribute::Vlan));
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        RouteNetlinkMessage::NewNeighbour(NeighbourMessage::parse(&bytes).unwrap())
    }

    #[test]
    fn the_entry_that_a_bridge_uses_is_that_of_vlan_0_and_others_are_not_taken_for_it() {
        let ours = Forward { index: IfIndex::new(7), mac: POD, to: Destination::Port };
        assert_eq!(forward(&told(None)), Some(ours));
        assert_eq!(forward(&told(Some(0))), Some(ours));
        for vlan in [1, 77, 4094] {
            assert_eq!(forward(&told(Some(vlan))), None);
        }
    }
}
