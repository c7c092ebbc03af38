//! Receives kernel notifications and wakes the tasks that handle them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;

use ipnetwork::IpNetwork;
use polder_api::{Family, IfName, Mac};
use polder_netlink::link::Link;
use polder_netlink::monitor::{Event, EventKind, Monitor};
use polder_netlink::neighbour::Destination;
use polder_netlink::nft::{Author, FilterMonitor};
use polder_netlink::{Error, IfIndex, RouteSocket, SocketError};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::bell::Bell;
use crate::engine::Expected;
use crate::in_flight::InFlight;
use crate::kernel::reaper::Reaper;
use crate::kernel::ruleset;
use crate::kernel::snapshot::pod_link;
use crate::kernel::state::Device;
use crate::local_pods::LocalPods;
use crate::repair::{self, DriftSignal};

/// The receivers of kernel notifications.
#[derive(Debug)]
pub struct Task {
    /// Netlink port ids of the agent's own sockets: their changes are ignored.
    pub own: BTreeSet<u32>,
    /// The state that the pods' interfaces should have, and the foreign interfaces that matter.
    pub expected: watch::Receiver<Expected>,
    /// The pods of this node.
    pub pods: Arc<LocalPods>,
    /// Attachments that are being added or deleted: their plugins change the kernel.
    pub in_flight: Arc<InFlight>,
    /// Waits for deleted interfaces to disappear.
    pub reaper: Reaper,
    /// Rings when foreign kernel state changed.
    pub underlay_changed: Bell,
    /// Rings when another program changed Polder's kernel state.
    pub drift_signal: Arc<DriftSignal>,
}

/// Starts the two monitor threads, which run as long as the process.
pub fn start(task: Task) -> Result<(), Error> {
    let mut monitor = Monitor::open()?;
    let mut kernel = RouteSocket::open()?;
    let devices = kernel.devices()?;
    let (own, drift_signal) = (task.own.clone(), Arc::clone(&task.drift_signal));
    let mut listener = Listener { task, devices, kernel };
    let mut filter = FilterMonitor::open(ruleset::NAME)?;
    spawn("monitor", move || {
        loop {
            match monitor.wait() {
                Ok(events) => events.iter().for_each(|event| listener.on_event(event)),
                Err(error) => return error,
            }
        }
    })?;
    spawn("filter-monitor", move || {
        loop {
            match filter.wait() {
                Ok(authors) => authors
                    .iter()
                    .filter(|author| !own.contains(&author.port))
                    .for_each(|author| of_filter(&drift_signal, author)),
                Err(error) => return error,
            }
        }
    })
}

fn spawn(name: &str, listen: impl FnOnce() -> Error + Send + 'static) -> Result<(), Error> {
    let until_it_fails = move || {
        // Lost messages do no lasting harm: every pass reads the complete state.
        let error = listen();
        warn!(%error, "kernel notifications stopped: changes by other programs are only found by periodic passes");
    };
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(until_it_fails);
    spawned.map(drop).map_err(|error| SocketError::StartThread(error).into())
}

/// Handles a change of the packet filter by another program.
fn of_filter(drift_signal: &DriftSignal, author: &Author) {
    debug!(?author, "the packet filter was changed");
    drift_signal.ring(author.thread.map(|id| repair::process(id, author.name.as_deref())));
}

/// The kernel, for a look at a single interface.
trait Links {
    /// The interface with that index; `None` if it does not exist.
    fn link(&mut self, index: IfIndex) -> Result<Option<Link>, Error>;

    /// Polder's devices.
    fn devices(&mut self) -> Result<BTreeMap<IfIndex, Device>, Error>;
}

impl Links for RouteSocket {
    fn link(&mut self, index: IfIndex) -> Result<Option<Link>, Error> {
        self.link_by_index(index)
    }

    fn devices(&mut self) -> Result<BTreeMap<IfIndex, Device>, Error> {
        let links = self.links()?.into_values();
        Ok(links.filter_map(|link| Some((link.index, Device::named(&link.name)?))).collect())
    }
}

struct Listener<L = RouteSocket> {
    task: Task,
    /// Polder's existing devices.
    devices: BTreeMap<IfIndex, Device>,
    kernel: L,
}

impl<L: Links> Listener<L> {
    fn on_event(&mut self, event: &Event) {
        let is_own = self.task.own.contains(&event.port);
        match &event.what {
            EventKind::LinkGone { index, name } => {
                self.task.reaper.is_gone(*index);
                match self.devices.remove(index).or_else(|| Device::named(name)) {
                    // A pod's interface is deleted with the pod: the orphan collector handles that.
                    Some(Device::Pod(_)) => {}
                    Some(_) => self.drifted_unless(is_own, event),
                    None => self.foreign_link_changed(*index, event),
                }
            }
            EventKind::Link(link) => self.link_changed(link, is_own, event),
            EventKind::Address { index, global } => match self.devices.get(index) {
                Some(Device::Pod(name)) => self.drifted_unless(is_own || self.is_in_flight(name), event),
                Some(_) => self.drifted_unless(is_own, event),
                None if *global => self.underlay_changed(event),
                None => self.foreign_link_changed(*index, event),
            },
            EventKind::Port { index } | EventKind::ForwardingStopped { index } => {
                match self.devices.get(index).cloned() {
                    Some(Device::Pod(name)) => self.check_pod(*index, &name, is_own, event),
                    Some(_) => self.drifted_unless(is_own, event),
                    None => {}
                }
            }
            EventKind::Neighbour { index, address, entry } => {
                let is_as_wanted = match self.devices.get(index) {
                    Some(Device::Tunnel(_)) => false,
                    Some(_) => self.is_neighbour_as_wanted(*address, entry.map(|entry| entry.mac)),
                    None => true,
                };
                self.drifted_unless(is_own || is_as_wanted, event);
            }
            EventKind::Forward { index, mac, to, exists } => {
                let is_as_wanted = match self.devices.get(index) {
                    Some(Device::Pod(name)) => self.is_forward_as_wanted(name, *mac, to.filter(|_| *exists)),
                    Some(_) => to.is_none(),
                    None => true,
                };
                self.drifted_unless(is_own || is_as_wanted, event);
            }
            EventKind::OwnRoute { destination, index, exists } => {
                let is_as_wanted = self.is_pod_route_as_wanted(destination, *index, *exists);
                self.drifted_unless(is_own || is_as_wanted, event);
            }
            EventKind::ForeignRoute => self.underlay_changed(event),
            EventKind::Overrun => {
                self.read_devices();
                self.underlay_changed(event);
                self.drifted_unless(false, event);
            }
        }
    }

    fn link_changed(&mut self, link: &Link, is_own: bool, event: &Event) {
        let before = match Device::named(&link.name) {
            Some(device) => {
                // Two interfaces cannot have one name.
                self.devices.retain(|index, other| *other != device || *index == link.index);
                self.devices.insert(link.index, device)
            }
            None => self.devices.remove(&link.index),
        };
        match (before, self.devices.get(&link.index).cloned()) {
            (None, None) => self.foreign_link_changed(link.index, event),
            // The notification has the state of the interface.
            (_, Some(Device::Pod(_))) if self.is_pod_link_as_wanted(link) => {}
            (_, Some(Device::Pod(name))) => self.check_pod(link.index, &name, is_own, event),
            _ => self.drifted_unless(is_own, event),
        }
    }

    /// Reads a pod's interface, unless its ADD or DEL is in progress: a notification may be older than the last change
    /// of the ADD.
    fn check_pod(&mut self, index: IfIndex, name: &IfName, is_own: bool, event: &Event) {
        if is_own || self.is_in_flight(name) {
            return;
        }
        let is_as_wanted = match self.kernel.link(index) {
            Ok(Some(link)) => self.is_pod_link_as_wanted(&link),
            Ok(None) => true,
            Err(_) => false,
        };
        self.drifted_unless(is_as_wanted, event);
    }

    fn is_in_flight(&self, name: &IfName) -> bool {
        self.task.in_flight.has_interface(name)
    }

    fn is_pod_link_as_wanted(&self, link: &Link) -> bool {
        let bridge = self.devices.iter().find(|(_, device)| **device == Device::Bridge);
        let found = pod_link(link, bridge.map(|(index, _)| *index));
        self.task.expected.borrow().pod_link.is_some_and(|wanted| found.is_like(&wanted))
    }

    /// Whether a pod with that address has that permanent neighbour entry, or no pod needs one.
    fn is_neighbour_as_wanted(&self, address: IpAddr, mac: Option<Mac>) -> bool {
        let pod = self.task.pods.with_address(address);
        pod.is_none_or(|pod| mac == Some(pod.mac) || self.is_in_flight(&pod.name))
    }

    /// Whether an FDB entry on a pod's port is as its plugin makes it; `to` is its destination after the change.
    fn is_forward_as_wanted(&self, name: &IfName, mac: Mac, to: Option<Destination>) -> bool {
        if self.is_in_flight(name) {
            return true;
        }
        let is_pods = self.task.pods.with_interface(name).is_some_and(|pod| pod.mac == mac);
        to == is_pods.then_some(Destination::Port)
    }

    /// Whether the change of a route is one that the plugin of a pod makes, or the kernel when it deletes an interface.
    fn is_pod_route_as_wanted(&self, destination: &IpNetwork, index: Option<IfIndex>, exists: bool) -> bool {
        if destination.prefix() != Family::of(destination.ip()).bits() {
            return false;
        }
        match self.task.pods.with_address(destination.ip()) {
            // The kernel deletes the routes of an interface with it. Any other route to one address leads to a peer.
            None => !exists && index.is_some_and(|index| self.is_pods_or_gone(index)),
            Some(pod) if self.is_in_flight(&pod.name) => true,
            Some(pod) => {
                let device = index.and_then(|index| self.devices.get(&index));
                let is_its = device
                    .is_some_and(|device| *device == Device::Bridge || *device == Device::Pod(pod.name));
                exists && is_its
            }
        }
    }

    /// Whether pods are or were behind that interface.
    fn is_pods_or_gone(&self, index: IfIndex) -> bool {
        match self.devices.get(&index) {
            Some(device) => matches!(device, Device::Bridge | Device::Pod(_)),
            None => self.task.expected.borrow().paths.as_ref().is_some_and(|paths| !paths.contains(&index)),
        }
    }

    /// Reads Polder's devices, because notifications about them were lost.
    fn read_devices(&mut self) {
        match self.kernel.devices() {
            Ok(devices) => self.devices = devices,
            Err(error) => warn!(%error, "cannot list interfaces after lost notifications"),
        }
    }

    /// Handles a change of a foreign interface. Most are interfaces of other programs' containers.
    fn foreign_link_changed(&self, index: IfIndex, event: &Event) {
        let may_matter =
            self.task.expected.borrow().paths.as_ref().is_none_or(|paths| paths.contains(&index));
        if may_matter {
            self.underlay_changed(event);
        }
    }

    fn underlay_changed(&self, event: &Event) {
        debug!(?event, "the underlay may have changed");
        self.task.underlay_changed.ring();
    }

    /// Reports that Polder's kernel state was changed, unless the new state is the desired one.
    fn drifted_unless(&self, is_as_wanted: bool, event: &Event) {
        if is_as_wanted {
            return;
        }
        debug!(?event, "Polder's kernel state was changed");
        // The port of a netlink socket is a process id only in the PID namespace of the sender, so it identifies no
        // process.
        self.task.drift_signal.ring(None);
    }
}

#[cfg(test)]
mod tests;
