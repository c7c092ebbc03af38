//! A VXLAN tunnel end point (RFC 7348).

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, InfoVxlan};
use polder_api::Mac;
use rtnetlink::{LinkMessageBuilder, LinkVxlan};

use super::{change, create, without_link_local};
use crate::{IfIndex, Operation};

/// What makes one VXLAN device another than the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vxlan {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP port, its own and that of its peers.
    pub port: u16,
    /// The underlay address that it sends from; its family is that of the tunnel.
    pub local: Option<IpAddr>,
    /// Whether it learns peers from what they send.
    pub learning: bool,
}

impl Vxlan {
    /// Whether a device like this can be made into one like the other while it is there: only the address that it sends from
    /// can be changed, and only within its family (`vxlan_nl2conf` in `drivers/net/vxlan/vxlan_core.c`).
    pub fn can_become(&self, other: &Self) -> bool {
        let same_family = match (self.local, other.local) {
            (Some(is), Some(other)) => is.is_ipv4() == other.is_ipv4(),
            (is, other) => is == other,
        };
        same_family && Self { local: other.local, ..*self } == *other
    }

    pub(super) fn from_attributes(attributes: &[InfoVxlan]) -> Self {
        let mut vxlan = Self { vni: 0, port: 0, local: None, learning: false };
        for attribute in attributes {
            match attribute {
                InfoVxlan::Id(vni) => vxlan.vni = *vni,
                InfoVxlan::Port(port) => vxlan.port = *port,
                InfoVxlan::Local(local) => vxlan.local = Some((*local).into()),
                InfoVxlan::Local6(local) => vxlan.local = Some((*local).into()),
                InfoVxlan::Learning(on) => vxlan.learning = *on,
                _ => {}
            }
        }
        vxlan
    }
}

/// Creates the device, up, without an IPv6 address of its own making. It is bound to an address and not to an
/// interface, so that it follows the host's routes to a peer, and outlives the interface.
pub fn create_vxlan(name: &str, vxlan: &Vxlan, mac: Mac, mtu: u32) -> [Operation; 3] {
    let mut device = LinkMessageBuilder::<LinkVxlan>::new(name)
        .id(vxlan.vni)
        .port(vxlan.port)
        .learning(vxlan.learning)
        .address(mac.0.to_vec())
        .mtu(mtu);
    if let Some(local) = vxlan.local {
        device = from(device, local);
    }
    [create(device.build()), without_link_local(name), change(name).up().into()]
}

/// Lets a device send from that address. What it forwards, and to whom, stays.
pub fn send_from(index: IfIndex, local: IpAddr) -> Operation {
    let device = LinkMessageBuilder::<LinkVxlan>::new_with_info_kind(InfoKind::Vxlan).index(index.number());
    Operation::new(RouteNetlinkMessage::NewLink(from(device, local).build()), 0)
}

fn from(device: LinkMessageBuilder<LinkVxlan>, local: IpAddr) -> LinkMessageBuilder<LinkVxlan> {
    match local {
        IpAddr::V4(local) => device.local(local),
        IpAddr::V6(local) => device.local6(local),
    }
}
