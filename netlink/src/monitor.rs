//! rtnetlink notifications of changes in the kernel.

mod netconf;

use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use polder_api::Mac;

use crate::link::Link;
use crate::neighbour::{self, Destination, Neighbour};
use crate::{Error, IfIndex, ROUTE_PROTOCOL, SocketError, route};

/// `RTNLGRP_LINK` (`include/uapi/linux/rtnetlink.h`).
const LINKS: u32 = 1;

/// `RTNLGRP_NEIGH`, `RTNLGRP_TC`, addresses and routes of both families (`RTNLGRP_IPV4_IFADDR` and so on), and
/// `RTNLGRP_IPV4_NETCONF`.
const ALL_ELSE: [u32; 7] = [3, 4, 5, 7, 9, 11, 24];

/// `include/uapi/linux/rtnetlink.h`
const RT_TABLE_LOCAL: u8 = 255;

/// Size of the receive queue, in bytes. Notifications that do not fit are lost, which is reported as an overrun.
const RECEIVE_QUEUE: usize = 4 << 20;

/// A change, and the socket that requested it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The change.
    pub what: EventKind,
    /// The port of the netlink socket that requested it, as in [`crate::Socket::port`]. 0 if no socket did, or if the
    /// kernel does not report it.
    pub port: u32,
}

/// A change in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// The interface was deleted.
    LinkGone {
        /// The former index.
        index: IfIndex,
        /// The former name.
        name: String,
    },
    /// The interface appeared or changed; its state after the change.
    Link(Box<Link>),
    /// A bridge port was added, removed or changed. Some of these changes cause no other event.
    Port {
        /// The interface that is or was the port.
        index: IfIndex,
    },
    /// An address was added or removed.
    Address {
        /// The interface that has or had it.
        index: IfIndex,
        /// Whether it is valid outside the link.
        global: bool,
    },
    /// A neighbour entry was added, removed or changed.
    Neighbour {
        /// The interface that has or had it.
        index: IfIndex,
        /// The IP address of the neighbour.
        address: IpAddr,
        /// The permanent entry after the change; `None` if there is none.
        entry: Option<Neighbour>,
    },
    /// An FDB entry in VLAN 0 was added, removed or changed.
    FdbEntry {
        /// The bridge port or tunnel that has or had it.
        index: IfIndex,
        /// The link-layer address.
        mac: Mac,
        /// The destination, if it is or was of a kind that [`RouteSocket::fdb`] reads.
        ///
        /// [`RouteSocket::fdb`]: crate::RouteSocket::fdb
        to: Option<Destination>,
        /// Whether the entry exists now.
        exists: bool,
    },
    /// IPv4 forwarding was turned off on an interface.
    ForwardingStopped {
        /// The index of the interface.
        index: IfIndex,
    },
    /// A queueing discipline or a program of the interface was added, removed or replaced. No event when the interface is
    /// deleted.
    Programs {
        /// The interface.
        index: IfIndex,
    },
    /// A route with Polder's protocol number was added or removed.
    OwnRoute {
        /// The destination.
        destination: IpNetwork,
        /// The outgoing interface, if it has one.
        index: Option<IfIndex>,
        /// Whether it exists now.
        exists: bool,
    },
    /// Any other route was added or removed. Routes to link-local destinations are no event.
    ForeignRoute,
    /// Notifications were lost or could not be decoded: anything may have changed.
    Overrun,
}

impl Event {
    const OVERRUN: Self = Self { what: EventKind::Overrun, port: 0 };
}

/// A socket that receives the notifications of one network namespace.
#[derive(Debug)]
pub struct Monitor(Inbox);

impl Monitor {
    /// Subscribes to all changes in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Inbox::open(NETLINK_ROUTE, ALL_ELSE.into_iter().chain([LINKS])).map(Self)
    }

    /// Subscribes to changes of interfaces only.
    pub fn of_links() -> Result<Self, Error> {
        Inbox::open(NETLINK_ROUTE, [LINKS]).map(Self)
    }

    /// Sets the receive timeout, after which [`Monitor::wait`] returns an error.
    pub fn set_timeout(&self, max_wait: Duration) -> Result<(), Error> {
        self.0.set_timeout(max_wait)
    }

    /// Waits for the next notifications and returns their events. The list may be empty: some notifications are not
    /// events.
    pub fn wait(&mut self) -> Result<Vec<Event>, Error> {
        Ok(match self.0.receive()? {
            Received::Messages(messages) => events(messages),
            Received::Overrun => vec![Event::OVERRUN],
        })
    }
}

/// A socket for netlink notifications.
#[derive(Debug)]
pub(crate) struct Inbox {
    inner: netlink_sys::Socket,
    buffer: Vec<u8>,
}

/// The result of one receive call.
#[derive(Debug)]
pub(crate) enum Received<'a> {
    /// Netlink messages, one after another. Empty if the wait was interrupted.
    Messages(&'a [u8]),
    /// The receive queue overflowed: notifications were lost.
    Overrun,
}

impl Inbox {
    /// Subscribes to these multicast groups in the network namespace of the calling thread.
    pub(crate) fn open(protocol: isize, groups: impl IntoIterator<Item = u32>) -> Result<Self, Error> {
        let mut inner = netlink_sys::Socket::new(protocol).map_err(SocketError::Open)?;
        inner.bind_auto().map_err(SocketError::Bind)?;
        setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_QUEUE)
            .map_err(|errno| SocketError::Configure(errno.into()))?;
        for group in groups {
            inner.add_membership(group).map_err(SocketError::Join)?;
        }
        Ok(Self { inner, buffer: Vec::with_capacity(64 << 10) })
    }

    /// Sets the receive timeout, after which [`Inbox::receive`] returns an error.
    pub(crate) fn set_timeout(&self, max_wait: Duration) -> Result<(), Error> {
        let max_wait = TimeVal::milliseconds(i64::try_from(max_wait.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&self.inner, sockopt::ReceiveTimeout, &max_wait)
            .map_err(|errno| SocketError::Configure(errno.into()).into())
    }

    /// Waits for the next messages.
    pub(crate) fn receive(&mut self) -> Result<Received<'_>, Error> {
        self.buffer.clear();
        match self.inner.recv(&mut self.buffer, 0) {
            Ok(_) => Ok(Received::Messages(&self.buffer)),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => Ok(Received::Overrun),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(Received::Messages(&[])),
            Err(error) => Err(SocketError::Receive(error).into()),
        }
    }
}

fn events(mut rest: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while !rest.is_empty() {
        let Ok(buffer) = NetlinkBuffer::new_checked(rest) else {
            events.push(Event::OVERRUN);
            break;
        };
        let length = buffer.length() as usize;
        if [netconf::NEW, netconf::DELETED].contains(&buffer.message_type()) {
            let index = netconf::forwarding_stopped(&rest[..length]);
            events.extend(index.map(|index| Event { what: EventKind::ForwardingStopped { index }, port: 0 }));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            continue;
        }
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]) {
            Ok(message) => {
                let port = message.header.port_number;
                events.extend(what(message.payload).map(|what| Event { what, port }));
            }
            Err(_) => events.push(Event::OVERRUN),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    events
}

fn what(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<EventKind> {
    let NetlinkPayload::InnerMessage(message) = payload else { return None };
    match message {
        // A bridge reports its ports in family AF_BRIDGE: a port that left the bridge is not a deleted interface.
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
            if link.header.interface_family != AddressFamily::Unspec =>
        {
            let is_port = link.header.interface_family == AddressFamily::Bridge;
            is_port.then_some(EventKind::Port { index: IfIndex::new(link.header.index) })
        }
        RouteNetlinkMessage::NewLink(link) => Some(EventKind::Link(Box::new(Link::from(link)))),
        RouteNetlinkMessage::DelLink(link) => {
            Some(EventKind::LinkGone { index: IfIndex::new(link.header.index), name: name(link) })
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            let index = IfIndex::new(address.header.index);
            Some(EventKind::Address { index, global: address.header.scope == AddressScope::Universe })
        }
        RouteNetlinkMessage::NewRoute(route) => of_route(&route, true),
        RouteNetlinkMessage::DelRoute(route) => of_route(&route, false),
        RouteNetlinkMessage::NewNeighbour(entry) => of_neighbour(&entry, true),
        RouteNetlinkMessage::DelNeighbour(entry) => of_neighbour(&entry, false),
        RouteNetlinkMessage::NewQueueDiscipline(message)
        | RouteNetlinkMessage::DelQueueDiscipline(message)
        | RouteNetlinkMessage::NewTrafficFilter(message)
        | RouteNetlinkMessage::DelTrafficFilter(message) => {
            Some(EventKind::Programs { index: IfIndex::new(message.header.index.cast_unsigned()) })
        }
        _ => None,
    }
}

fn of_route(message: &RouteMessage, exists: bool) -> Option<EventKind> {
    let destination = route::destination(message)?;
    if message.header.protocol == RouteProtocol::from(ROUTE_PROTOCOL) {
        return Some(EventKind::OwnRoute { destination, index: route::outgoing(message), exists });
    }
    // The kernel's own routes in table local, and those to link-local destinations, follow addresses and interfaces,
    // which have their own events.
    let is_local = match destination {
        IpNetwork::V4(network) => network.ip().is_link_local(),
        IpNetwork::V6(network) => network.ip().is_unicast_link_local() || network.ip().is_multicast(),
    };
    (message.header.table != RT_TABLE_LOCAL && !is_local).then_some(EventKind::ForeignRoute)
}

fn of_neighbour(message: &NeighbourMessage, exists: bool) -> Option<EventKind> {
    if message.header.family == AddressFamily::Bridge {
        let (index, mac) = (IfIndex::new(message.header.ifindex), neighbour::mac(message)?);
        let to = neighbour::fdb_entry(message).map(|entry| entry.to);
        return (neighbour::vlan(message) == 0).then_some(EventKind::FdbEntry { index, mac, to, exists });
    }
    let address = neighbour::address(message)?;
    let is_permanent = exists && message.header.state == NeighbourState::Permanent;
    let entry = is_permanent.then(|| neighbour::neighbour(message)).flatten();
    Some(EventKind::Neighbour { index: IfIndex::new(message.header.ifindex), address, entry })
}

fn name(link: LinkMessage) -> String {
    let name = link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    });
    name.unwrap_or_default()
}
