//! Reads and changes the kernel of this node. All calls block: run them on an [`Owner`]'s thread.
//!
//! [`state`] has the types, [`desired`] computes the desired state, [`plan`] the changes; these do no I/O. [`Kernel`]
//! reads the kernel and applies the changes.
//!
//! [`Owner`]: crate::owner::Owner

pub mod desired;
pub mod endpoint;
pub mod features;
pub mod guard;
pub mod inspection;
pub mod plan;
pub mod reaper;
mod remove;
pub mod ruleset;
pub mod state;
pub mod sysctl;
pub mod tunnel;
pub mod unreachable;

pub mod apply;
pub mod foreign_state;
pub mod snapshot;

use std::net::IpAddr;

use polder_api::Family;
use polder_netlink::nft::{Element, FilterSocket};
use polder_netlink::route::RouteLookup;
use polder_netlink::{Error, RouteSocket};

use self::ruleset::Sets;
use self::sysctl::Sysctls;
use crate::local_pods::LocalPod;

/// The sockets to one node's kernel.
#[derive(Debug)]
pub struct Kernel {
    routes: RouteSocket,
    filter: FilterSocket,
    sysctls: Sysctls,
}

impl Kernel {
    /// Opens sockets in the network namespace of the calling thread.
    pub fn open(sysctls: &Sysctls) -> Result<Self, Error> {
        Ok(Self { routes: RouteSocket::open()?, filter: FilterSocket::open()?, sysctls: sysctls.clone() })
    }

    /// Opens read-only sockets: every change is refused.
    pub fn open_to_read(sysctls: &Sysctls) -> Result<Self, Error> {
        let (routes, filter) = (RouteSocket::open_to_read()?, FilterSocket::open_to_read()?);
        Ok(Self { routes, filter, sysctls: sysctls.read_only() })
    }

    /// The netlink port IDs of the sockets. The kernel's notifications contain the ID of the socket that made the
    /// change.
    pub fn ports(&self) -> Result<[u32; 2], Error> {
        Ok([self.routes.port()?, self.filter.port()?])
    }

    /// The route that the host would use for each of the addresses.
    pub fn look_up(&mut self, addresses: &[IpAddr]) -> Result<Vec<(IpAddr, Option<RouteLookup>)>, Error> {
        let look_up = |address: &IpAddr| Ok((*address, self.routes.look_up(*address)?));
        addresses.iter().map(look_up).collect()
    }
}

/// Adds a pod's addresses to the packet filter, before the pod has an interface.
pub fn admit_pod(filter: &mut FilterSocket, pod: &LocalPod) -> Result<(), Error> {
    let table = ruleset::sender_sets();
    senders(pod).try_for_each(|(set, element)| filter.commit(table.change(set, [&element], [])))
}

/// Deletes the addresses of a pod whose interface is gone from the packet filter. Missing ones are ignored.
pub fn forget_pod(filter: &mut FilterSocket, pod: &LocalPod) -> Result<(), Error> {
    let table = ruleset::sender_sets();
    senders(pod).try_for_each(|(set, element)| match filter.commit(table.change(set, [], [&element])) {
        Err(error) if !error.is_missing() => Err(error),
        _ => Ok(()),
    })
}

/// The elements of the packet filter that permit a pod to send, each with its set.
pub(crate) fn senders(pod: &LocalPod) -> impl Iterator<Item = (&'static str, Element)> {
    let set = |address: IpAddr| Sets::of(Family::of(address)).senders;
    pod.addresses.iter().map(move |address| (set(*address), Element::sender(pod.mac, *address)))
}
