//! VXLAN tunnel endpoints (RFC 7348).

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, InfoVxlan};
use polder_api::Mac;
use rtnetlink::{LinkMessageBuilder, LinkVxlan};

use super::{change, create, without_link_local};
use crate::{IfIndex, Operation};

/// The settings that identify a VXLAN device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vxlan {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP port, the same for local and remote endpoints.
    pub port: u16,
    /// The local underlay address, used as source. Its family is the tunnel's.
    pub local: Option<IpAddr>,
    /// Whether it learns FDB entries from received packets.
    pub learning: bool,
}

impl Vxlan {
    /// Whether an existing device can be changed to these settings: only the local address can be changed, and only
    /// within its family (`vxlan_nl2conf` in `drivers/net/vxlan/vxlan_core.c`).
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

/// Creates the device and sets it up, without an IPv6 link-local address. It is bound to an address, not to an
/// interface, so it follows the host's routes to a peer and survives the deletion of the interface.
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

/// Changes the local address of a device. FDB entries stay.
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
