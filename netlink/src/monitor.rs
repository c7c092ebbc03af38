//! Notifications: what changes in the kernel, as it changes.

use std::time::Duration;

use netlink_packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::{Error, ROUTE_PROTOCOL};

/// `RTNLGRP_LINK` (`include/uapi/linux/rtnetlink.h`).
const LINKS: u32 = 1;

/// Addresses and routes of both families: `RTNLGRP_IPV4_IFADDR` and so on.
const ADDRESSES_AND_ROUTES: [u32; 4] = [5, 7, 9, 11];

/// `include/uapi/linux/rtnetlink.h`
const RT_TABLE_LOCAL: u8 = 255;

/// A burst of notifications waits in the kernel while we are busy; what does not fit is reported as an overrun.
const RECEIVE_QUEUE: usize = 4 << 20;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The interface is gone.
    LinkGone {
        /// The number that it had.
        index: u32,
        /// The name that it had.
        name: String,
    },
    /// The interface appeared or changed.
    Link {
        /// Its number.
        index: u32,
        /// Its name.
        name: String,
    },
    /// An address came or went.
    Address {
        /// The interface that has or had it.
        index: u32,
    },
    /// A route that is not one of ours came or went.
    ForeignRoute,
    /// Notifications were lost, or could not be read: anything may have happened.
    Overrun,
}

/// A socket that hears what happens in one network namespace.
#[derive(Debug)]
pub struct Monitor {
    inner: netlink_sys::Socket,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Starts listening to everything in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        let monitor = Self::of_links()?;
        for group in ADDRESSES_AND_ROUTES {
            monitor.inner.add_membership(group).map_err(Error::socket("subscribe"))?;
        }
        Ok(monitor)
    }

    /// Starts listening to what happens to interfaces.
    pub fn of_links() -> Result<Self, Error> {
        let mut inner = netlink_sys::Socket::new(NETLINK_ROUTE).map_err(Error::socket("open"))?;
        inner.bind_auto().map_err(Error::socket("bind"))?;
        setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_QUEUE)
            .map_err(|errno| Error::socket("configure")(errno.into()))?;
        inner.add_membership(LINKS).map_err(Error::socket("subscribe"))?;
        Ok(Self { inner, buffer: Vec::with_capacity(64 << 10) })
    }

    /// Gives up waiting after that time: [`Monitor::wait`] is then an error.
    pub fn set_patience(&self, patience: Duration) -> Result<(), Error> {
        let patience = TimeVal::milliseconds(i64::try_from(patience.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&self.inner, sockopt::ReceiveTimeout, &patience)
            .map_err(|errno| Error::socket("configure")(errno.into()))
    }

    /// Waits for the next events, as many as came together. There may be none: some of what is heard is not told.
    pub fn wait(&mut self) -> Result<Vec<Event>, Error> {
        self.buffer.clear();
        match self.inner.recv(&mut self.buffer, 0) {
            Ok(_) => Ok(self.events()),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => Ok(vec![Event::Overrun]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(error) => Err(Error::socket("receive from")(error)),
        }
    }

    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            let Ok(buffer) = NetlinkBuffer::new_checked(rest) else {
                events.push(Event::Overrun);
                break;
            };
            let length = buffer.length() as usize;
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]) {
                Ok(message) => events.extend(event(message.payload)),
                Err(_) => events.push(Event::Overrun),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        events
    }
}

fn event(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Event> {
    let NetlinkPayload::InnerMessage(message) = payload else { return None };
    match message {
        // A bridge tells of its ports in its own family: one that only left the bridge is not gone.
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
            if link.header.interface_family != AddressFamily::Unspec =>
        {
            None
        }
        RouteNetlinkMessage::NewLink(link) => {
            Some(Event::Link { index: link.header.index, name: name(link) })
        }
        RouteNetlinkMessage::DelLink(link) => {
            Some(Event::LinkGone { index: link.header.index, name: name(link) })
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Some(Event::Address { index: address.header.index })
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            let ours = route.header.protocol == RouteProtocol::from(ROUTE_PROTOCOL);
            // What the kernel itself routes for each address and interface goes with those.
            let kernels = route.header.table == RT_TABLE_LOCAL;
            (!ours && !kernels).then_some(Event::ForeignRoute)
        }
        _ => None,
    }
}

fn name(link: LinkMessage) -> String {
    let name = link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    });
    name.unwrap_or_default()
}
