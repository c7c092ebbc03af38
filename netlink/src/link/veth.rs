//! Creation of a veth pair, with each end directly in its final namespace.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage};
use polder_api::{IfName, Mac};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::create;
use crate::{IfIndex, Operation};

/// A veth pair with one end in this and one end in another network namespace.
#[derive(Debug, Clone)]
pub struct VethPair<'a> {
    /// Name of the end in this namespace.
    pub name: &'a IfName,
    /// MAC address of this end; if `None`, the kernel chooses one.
    pub mac: Option<Mac>,
    /// Name of the other end.
    pub peer_name: &'a IfName,
    /// MAC address of the other end.
    pub peer_mac: Mac,
    /// The network namespace of the other end.
    pub peer_namespace: BorrowedFd<'a>,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// The bridge to which this end is added as a port.
    pub controller: Option<IfIndex>,
}

/// Creates the pair with both ends down: the kernel refuses a peer that is up before its other end exists, and the
/// link-local address must be turned off before an end is up.
///
/// Each end has one queue: more queues cost two RCU grace periods under the kernel's lock (20 % of an ADD), without a
/// benefit for a pod. The peer is created in its namespace with its final name: moving it there later would take 20 ms
/// under that lock.
pub fn create_veth(pair: &VethPair<'_>) -> Operation {
    let peer = one_end(LinkMessageBuilder::<LinkUnspec>::new(), pair.peer_name, pair.mtu)
        .address(pair.peer_mac.0.to_vec())
        .setns_by_fd(pair.peer_namespace.as_raw_fd())
        .build();
    let veth = LinkMessageBuilder::<Veth>::new_with_info_kind(InfoKind::Veth);
    let mut here = one_end(veth, pair.name, pair.mtu).set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
    if let Some(mac) = pair.mac {
        here = here.address(mac.0.to_vec());
    }
    if let Some(controller) = pair.controller {
        here = here.controller(controller.number());
    }
    let message: LinkMessage = here.build();
    create(message)
}

/// Type parameter of the builder for this end.
#[derive(Debug, Default)]
struct Veth;

fn one_end<T>(builder: LinkMessageBuilder<T>, name: &IfName, mtu: u32) -> LinkMessageBuilder<T> {
    builder
        .name(name.as_str())
        .mtu(mtu)
        .append_extra_attribute(LinkAttribute::NumTxQueues(1))
        .append_extra_attribute(LinkAttribute::NumRxQueues(1))
}
