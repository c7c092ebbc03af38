//! A veth pair, made at once where both ends are to be.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage};
use polder_api::{IfName, Mac};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

use super::create;
use crate::{IfIndex, Operation};

/// A pair with one end here and one end in another network namespace.
#[derive(Debug, Clone)]
pub struct VethPair<'a> {
    /// Name of the end that is here.
    pub name: &'a IfName,
    /// Its MAC address; the kernel makes one up where it does not matter.
    pub mac: Option<Mac>,
    /// Name of the other end.
    pub peer_name: &'a IfName,
    /// MAC address of the other end.
    pub peer_mac: Mac,
    /// Where the other end is to be.
    pub peer_namespace: BorrowedFd<'a>,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// The bridge that this end is to be a port of.
    pub controller: Option<IfIndex>,
}

/// Creates the pair, both ends down: the kernel refuses a peer that is up before its other end exists, and what
/// keeps an end from making itself an address has to be said before it is up.
///
/// Each end has one queue: more cost two RCU grace periods with the kernel's lock held (20 % of an ADD), and a
/// pod's interface has no use for them. The peer is made in its namespace under its last name: moving it there
/// later would take 20 ms, and the lock with it.
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

/// Marks the builder for the end that is here.
#[derive(Debug, Default)]
struct Veth;

fn one_end<T>(builder: LinkMessageBuilder<T>, name: &IfName, mtu: u32) -> LinkMessageBuilder<T> {
    builder
        .name(name.as_str())
        .mtu(mtu)
        .append_extra_attribute(LinkAttribute::NumTxQueues(1))
        .append_extra_attribute(LinkAttribute::NumRxQueues(1))
}
