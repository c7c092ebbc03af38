//! The kernel objects of a pod, as messages.

use std::net::Ipv4Addr;
use std::os::fd::RawFd;

use nix::libc;

use crate::batch::{Batch, Nest};

/// `NLMSG_ERROR`: an acknowledgement, or an error.
pub(crate) const ERROR: u16 = 2;

/// The index of the pod's interface, the first after lo.
const INSIDE: u32 = 2;
/// The index of lo in every namespace.
const LO: u32 = 1;
/// The gateway of pods, and its link-layer address.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_MAC: [u8; 6] = [0x02, 0x84, 0, 0, 0, 1];
/// MTU of both ends, in bytes.
const MTU: u32 = 1500;

// include/uapi/linux/netlink.h
const ECHO: u16 = 8;
const CREATE: u16 = 0x400;
const NEW: u16 = CREATE | 0x200;
const REPLACE: u16 = CREATE | 0x100;
// include/uapi/linux/veth.h and if_link.h
const VETH_PEER: u16 = 1;
const ADDRESS_MODE: u16 = 8;
const NO_ADDRESS: u8 = 1;
const INET_CONF: u16 = 1;
const FORWARDING: u16 = 1;
const PORT_KIND: u16 = 4;
const PORT_DATA: u16 = 5;
const PORT_LEARNING: u16 = 8;
// include/uapi/linux/neighbour.h
const NEIGHBOUR_ADDRESS: u16 = 1;
const NEIGHBOUR_MAC: u16 = 2;
const NO_ARP: u16 = 0x40;
const PERMANENT: u16 = 0x80;
const OF_CONTROLLER: u8 = 4;
// include/uapi/linux/rtnetlink.h
const ONLINK: u32 = 4;

/// A pod, with everything that is decided elsewhere.
#[derive(Debug)]
pub(crate) struct Pod {
    /// Its address.
    pub(crate) address: Ipv4Addr,
    /// The index of its host interface.
    pub(crate) index: u32,
    /// The bridge, or `None` for a routed pod.
    pub(crate) bridge: Option<u32>,
}

impl Pod {
    fn mac(&self) -> [u8; 6] {
        let [a, b, c, d] = self.address.octets();
        [2, 0, a, b, c, d]
    }

    /// The pair and all that is in the node's namespace. The host end is up at the end.
    pub(crate) fn on_host(&self, namespace: RawFd) -> Batch {
        let mut batch = Batch::default();
        self.create(&mut batch, namespace);
        without_link_local(&mut batch, self.index);
        match self.bridge {
            Some(bridge) => {
                let settings = Nest::default().attribute(PORT_LEARNING, &[0]);
                let port =
                    Nest::default().attribute(PORT_KIND, b"bridge\0").attribute(PORT_DATA, settings.bytes());
                batch
                    .message(libc::RTM_NEWLINK, 0, &link(self.index, true))
                    .attribute(libc::IFLA_LINKINFO, port.bytes());
                batch
                    .message(
                        libc::RTM_NEWNEIGH,
                        REPLACE,
                        &neighbour(libc::PF_BRIDGE, self.index, NO_ARP, OF_CONTROLLER),
                    )
                    .attribute(NEIGHBOUR_MAC, &self.mac());
                self.resolve(&mut batch, libc::RTM_NEWNEIGH, bridge);
            }
            None => {
                let settings = Nest::default().attribute(FORWARDING, &1_u32.to_ne_bytes());
                let family = Nest::default().attribute(INET_CONF, settings.bytes());
                let families = Nest::default().attribute(number(libc::AF_INET), family.bytes());
                batch
                    .message(libc::RTM_NEWLINK, 0, &link(self.index, true))
                    .attribute(libc::IFLA_AF_SPEC, families.bytes());
                batch
                    .message(libc::RTM_NEWROUTE, NEW, &route(32, libc::RT_SCOPE_LINK, 0))
                    .attribute(libc::RTA_DST, &self.address.octets())
                    .attribute(libc::RTA_OIF, &self.index.to_ne_bytes());
                self.resolve(&mut batch, libc::RTM_NEWNEIGH, self.index);
            }
        }
        batch.acknowledged()
    }

    /// The pair: one queue each, and the pod's end directly in its namespace with its name and index.
    fn create(&self, batch: &mut Batch, namespace: RawFd) {
        let peer = Nest::with(&link(INSIDE, false))
            .attribute(libc::IFLA_IFNAME, b"eth0\0")
            .attribute(libc::IFLA_ADDRESS, &self.mac())
            .attribute(libc::IFLA_MTU, &MTU.to_ne_bytes())
            .attribute(libc::IFLA_NUM_TX_QUEUES, &1_u32.to_ne_bytes())
            .attribute(libc::IFLA_NUM_RX_QUEUES, &1_u32.to_ne_bytes())
            .attribute(libc::IFLA_NET_NS_FD, &namespace.to_ne_bytes());
        let data = Nest::default().attribute(VETH_PEER, peer.bytes());
        let info = Nest::default()
            .attribute(libc::IFLA_INFO_KIND, b"veth\0")
            .attribute(libc::IFLA_INFO_DATA, data.bytes());
        batch
            .message(libc::RTM_NEWLINK, NEW, &link(self.index, false))
            .attribute(libc::IFLA_IFNAME, format!("flo{}\0", self.index).as_bytes())
            .attribute(libc::IFLA_MTU, &MTU.to_ne_bytes())
            .attribute(libc::IFLA_NUM_TX_QUEUES, &1_u32.to_ne_bytes())
            .attribute(libc::IFLA_NUM_RX_QUEUES, &1_u32.to_ne_bytes())
            .attribute(libc::IFLA_LINKINFO, info.bytes());
        match self.bridge {
            Some(bridge) => batch.attribute(libc::IFLA_MASTER, &bridge.to_ne_bytes()),
            None => batch.attribute(libc::IFLA_ADDRESS, &GATEWAY_MAC),
        };
    }

    /// The neighbour entry with which the node reaches the pod.
    fn resolve(&self, batch: &mut Batch, kind: u16, index: u32) {
        batch
            .message(kind, REPLACE, &neighbour(libc::AF_INET, index, PERMANENT, 0))
            .attribute(NEIGHBOUR_ADDRESS, &self.address.octets())
            .attribute(NEIGHBOUR_MAC, &self.mac());
    }

    /// All that is in the pod's namespace.
    pub(crate) fn inside(&self) -> Batch {
        let mut batch = Batch::default();
        batch.message(libc::RTM_NEWLINK, 0, &link(LO, true));
        without_link_local(&mut batch, INSIDE);
        let address = [&[2, 32, 0, 0][..], &INSIDE.to_ne_bytes()].concat();
        batch
            .message(libc::RTM_NEWADDR, NEW, &address)
            .attribute(libc::IFA_LOCAL, &self.address.octets())
            .attribute(libc::IFA_ADDRESS, &self.address.octets());
        batch.message(libc::RTM_NEWLINK, 0, &link(INSIDE, true));
        batch
            .message(libc::RTM_NEWNEIGH, REPLACE, &neighbour(libc::AF_INET, INSIDE, PERMANENT, 0))
            .attribute(NEIGHBOUR_ADDRESS, &GATEWAY.octets())
            .attribute(NEIGHBOUR_MAC, &GATEWAY_MAC);
        batch
            .message(libc::RTM_NEWROUTE, NEW, &route(0, libc::RT_SCOPE_UNIVERSE, ONLINK))
            .attribute(libc::RTA_GATEWAY, &GATEWAY.octets())
            .attribute(libc::RTA_OIF, &INSIDE.to_ne_bytes());
        batch.acknowledged()
    }

    /// Deletes what does not disappear with the interface, then the interface.
    pub(crate) fn deletion(&self) -> Batch {
        let mut batch = Batch::default();
        if let Some(bridge) = self.bridge {
            self.resolve(&mut batch, libc::RTM_DELNEIGH, bridge);
        }
        batch.message(libc::RTM_DELLINK, ECHO, &link(self.index, false));
        batch.acknowledged()
    }
}

/// Prevents a link-local address. It has to come before the interface is up.
fn without_link_local(batch: &mut Batch, index: u32) {
    let family = Nest::default().attribute(ADDRESS_MODE, &[NO_ADDRESS]);
    let families = Nest::default().attribute(number(libc::AF_INET6), family.bytes());
    batch.message(libc::RTM_NEWLINK, 0, &link(index, false)).attribute(libc::IFLA_AF_SPEC, families.bytes());
}

/// `struct ifinfomsg`.
fn link(index: u32, up: bool) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    let up = u32::from(up).to_ne_bytes();
    bytes[8..12].copy_from_slice(&up);
    bytes[12..16].copy_from_slice(&up);
    bytes
}

/// `struct ndmsg`.
fn neighbour(family: i32, index: u32, state: u16, flags: u8) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0] = number(family).to_ne_bytes()[0];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..10].copy_from_slice(&state.to_ne_bytes());
    bytes[10] = flags;
    bytes
}

/// `struct rtmsg` of an IPv4 route in table main.
fn route(prefix: u8, scope: u8, flags: u32) -> [u8; 12] {
    let mut bytes =
        [2, prefix, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, scope, libc::RTN_UNICAST, 0, 0, 0, 0];
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

fn number(family: i32) -> u16 {
    u16::try_from(family).expect("a small constant")
}
