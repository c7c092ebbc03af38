//! Blocking netlink. No other crate talks to the kernel over netlink.
//!
//! A [`Socket`] executes [`Operation`]s, which the modules create: [`link`](mod@link), [`address`],
//! [`route`](mod@route), [`rule`], [`neighbour`], [`qdisc`], [`program`] and [`nft`]. [`routing`] reads routes and rules of other
//! programs, [`inside`] compares a pod's configuration. Several operations go to the kernel in one send; each has its
//! own outcome.
//!
//! Requests block, because the kernel has done the work when the send returns. Notifications are asynchronous and have
//! their own socket in [`monitor`].

pub mod address;
pub mod conntrack;
mod error;
mod index;
pub mod inside;
pub mod link;
pub mod monitor;
pub mod namespace;
pub mod neighbour;
pub mod nft;
pub mod program;
pub mod qdisc;
pub mod route;
pub mod routing;
pub mod rule;
mod socket;

pub use error::{Error, SocketError};
pub use index::IfIndex;
pub use socket::{Operation, Protocol, RouteSocket, Socket};

/// The routing protocol number of all of Polder's routes. No other program uses it.
pub const ROUTE_PROTOCOL: u8 = 84;
