//! Blocking netlink, in the kernel's own terms: the only place that speaks it.
//!
//! A [`Socket`] carries [`Operation`]s, which the modules make: [`link`](mod@link), [`address`], [`route`](mod@route),
//! [`rule`], [`neighbour`] and [`nft`]. What others have made is read by [`routing`], what a pod has by [`inside`]. Several operations go to the kernel in one send; each has its own outcome.
//!
//! Requests block, and that is right: the kernel has done the work when the send returns. What is
//! asynchronous are notifications, which have a socket of their own in [`monitor`].

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
pub mod route;
pub mod routing;
pub mod rule;
mod socket;

pub use error::Error;
pub use index::IfIndex;
pub use socket::{Operation, Protocol, RouteSocket, Socket};

/// The routing protocol number that all our routes carry, and no one else's.
pub const ROUTE_PROTOCOL: u8 = 84;
