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

use std::collections::BTreeMap;
use std::net::IpAddr;

use polder_netlink::nft::{Element, FilterSocket, Transaction};
use polder_netlink::route::RouteLookup;
use polder_netlink::{Error, RouteSocket};

use self::ruleset::pod_elements;
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

/// Adds a pod's addresses and host ports to the packet filter, before the pod has an interface. Host ports of an
/// earlier pod whose elements remain are replaced.
pub fn admit_pod(filter: &mut FilterSocket, pod: &LocalPod) -> Result<(), Error> {
    match filter.commit(change(pod_elements(pod), [])) {
        Err(error) if error.is_exists() => {}
        result => return result,
    }
    for (set, element) in pod_elements(pod) {
        // Other data of the same key. The kernel finds it by the key alone.
        delete(filter, set, &element)?;
        filter.commit(change([(set, element)], []))?;
    }
    Ok(())
}

/// Deletes the addresses and host ports of pods whose interfaces are gone from the packet filter. Missing ones are
/// ignored. The kernel waits some 15 ms in each transaction that deletes, so one call takes many pods.
pub fn forget_pods(filter: &mut FilterSocket, pods: &[LocalPod]) -> Result<(), Error> {
    let elements = || pods.iter().flat_map(pod_elements);
    match filter.commit(change([], elements())) {
        Err(error) if error.is_missing() => {}
        result => return result,
    }
    elements().try_for_each(|(set, element)| delete(filter, set, &element))
}

/// Deletes an element. Succeeds if it does not exist.
fn delete(filter: &mut FilterSocket, set: &'static str, element: &Element) -> Result<(), Error> {
    match filter.commit(change([], [(set, element.clone())])) {
        Err(error) if !error.is_missing() => Err(error),
        _ => Ok(()),
    }
}

/// The transaction that adds and removes elements of pods, each with its set.
fn change(
    add: impl IntoIterator<Item = (&'static str, Element)>,
    remove: impl IntoIterator<Item = (&'static str, Element)>,
) -> Transaction {
    let mut sets: BTreeMap<&'static str, (Vec<Element>, Vec<Element>)> = BTreeMap::new();
    for (set, element) in add {
        sets.entry(set).or_default().0.push(element);
    }
    for (set, element) in remove {
        sets.entry(set).or_default().1.push(element);
    }
    let table = ruleset::pod_sets();
    let changes = sets.iter().map(|(set, (add, remove))| table.change(set, add, remove));
    changes.fold(Transaction::default(), Transaction::and)
}
