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
use polder_netlink::nft::{FilterMonitor, Originator};
use polder_netlink::{Error, IfIndex, RouteSocket, SocketError};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::engine::Expected;
use crate::in_flight::InFlight;
use crate::kernel::reaper::Reaper;
use crate::kernel::ruleset;
use crate::kernel::snapshot::pod_link;
use crate::kernel::state::Device;
use crate::local_pods::LocalPods;
use crate::repair::{self, DriftSignal};
use crate::wake::WakeSender;

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
    /// Wakes the engine when foreign kernel state changed.
    pub underlay_changed: WakeSender,
    /// Wakes the engine when another program changed Polder's kernel state.
    pub drift_signal: Arc<DriftSignal>,
    /// Wakes the fast path when another program changed which BPF programs run on an interface.
    pub programs_changed: WakeSender,
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
                Ok(originators) => originators
                    .iter()
                    .filter(|originator| !own.contains(&originator.port))
                    .for_each(|originator| on_filter_change(&drift_signal, originator)),
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
fn on_filter_change(drift_signal: &DriftSignal, originator: &Originator) {
    debug!(?originator, "the packet filter was changed");
    drift_signal.wake(originator.thread.map(|id| repair::process(id, originator.name.as_deref())));
}

/// Reads interfaces from the kernel.
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
                self.task.reaper.on_deleted(*index);
                match self.devices.remove(index).or_else(|| Device::named(name)) {
                    // A pod's interface is deleted with the pod: the orphan collector handles that.
                    Some(Device::Pod(_)) => {}
                    Some(_) => self.report_drift_unless(is_own, event),
                    None => self.foreign_link_changed(*index, event),
                }
            }
            EventKind::Link(link) => self.link_changed(link, is_own, event),
            EventKind::Address { index, global } => match self.devices.get(index) {
                Some(Device::Pod(name)) => self.report_drift_unless(is_own || self.is_in_flight(name), event),
                Some(_) => self.report_drift_unless(is_own, event),
                None if *global => self.underlay_changed(event),
                None => self.foreign_link_changed(*index, event),
            },
            EventKind::Port { index } | EventKind::ForwardingStopped { index } => {
                match self.devices.get(index).cloned() {
                    Some(Device::Pod(name)) => self.check_pod(*index, &name, is_own, event),
                    Some(_) => self.report_drift_unless(is_own, event),
                    None => {}
                }
            }
            EventKind::Neighbour { index, address, entry } => {
                let is_as_wanted = match self.devices.get(index) {
                    Some(Device::Tunnel(_)) => false,
                    Some(_) => self.is_neighbour_as_wanted(*address, entry.map(|entry| entry.mac)),
                    None => true,
                };
                self.report_drift_unless(is_own || is_as_wanted, event);
            }
            EventKind::FdbEntry { index, mac, to, exists } => {
                let is_as_wanted = match self.devices.get(index) {
                    Some(Device::Pod(name)) => {
                        self.is_fdb_entry_as_wanted(name, *mac, to.filter(|_| *exists))
                    }
                    // Bridge and tunnels: an entry of a kind that no pass reads (learned, or the device's own address)
                    // is no drift.
                    Some(_) => to.is_none(),
                    None => true,
                };
                self.report_drift_unless(is_own || is_as_wanted, event);
            }
            EventKind::OwnRoute { destination, index, exists } => {
                let is_as_wanted = self.is_pod_route_as_wanted(destination, *index, *exists);
                self.report_drift_unless(is_own || is_as_wanted, event);
            }
            EventKind::Programs { index } => {
                let expected = self.task.expected.borrow();
                let is_path =
                    expected.path_interfaces.as_ref().is_some_and(|on_paths| on_paths.contains(index));
                if !is_own && (is_path || self.devices.contains_key(index)) {
                    self.task.programs_changed.wake();
                }
            }
            EventKind::ForeignRoute => self.underlay_changed(event),
            EventKind::Overrun => {
                self.read_devices();
                self.underlay_changed(event);
                self.report_drift_unless(false, event);
            }
        }
    }

    fn link_changed(&mut self, link: &Link, is_own: bool, event: &Event) {
        let before = match Device::named(&link.name) {
            Some(device) => {
                // Two interfaces cannot have the same name.
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
            _ => self.report_drift_unless(is_own, event),
        }
    }

    /// Checks the current state of a pod's interface, because the notification may be older than the last change.
    /// Skipped while an ADD or DEL of the pod is in progress.
    fn check_pod(&mut self, index: IfIndex, name: &IfName, is_own: bool, event: &Event) {
        if is_own || self.is_in_flight(name) {
            return;
        }
        let is_as_wanted = match self.kernel.link(index) {
            Ok(Some(link)) => self.is_pod_link_as_wanted(&link),
            Ok(None) => true,
            Err(_) => false,
        };
        self.report_drift_unless(is_as_wanted, event);
    }

    fn is_in_flight(&self, name: &IfName) -> bool {
        self.task.in_flight.has_interface(name)
    }

    fn is_pod_link_as_wanted(&self, link: &Link) -> bool {
        let bridge = self.devices.iter().find(|(_, device)| **device == Device::Bridge);
        let found = pod_link(link, bridge.map(|(index, _)| *index));
        self.task.expected.borrow().pod_link.is_some_and(|wanted| found.is_like(&wanted))
    }

    /// Whether the entry has the MAC of the pod with this address, or no pod has this address.
    fn is_neighbour_as_wanted(&self, address: IpAddr, mac: Option<Mac>) -> bool {
        let pod = self.task.pods.with_address(address);
        pod.is_none_or(|pod| mac == Some(pod.mac) || self.is_in_flight(&pod.name))
    }

    /// Whether an FDB entry on a pod's port is the one that the CNI plugin adds. `to`: the entry's destination after
    /// the change.
    fn is_fdb_entry_as_wanted(&self, name: &IfName, mac: Mac, to: Option<Destination>) -> bool {
        if self.is_in_flight(name) {
            return true;
        }
        let is_pod_mac = self.task.pods.with_interface(name).is_some_and(|pod| pod.mac == mac);
        to == is_pod_mac.then_some(Destination::Port)
    }

    /// Whether the change of a route is expected: made by the CNI plugin, or by the kernel at the deletion of an
    /// interface.
    fn is_pod_route_as_wanted(&self, destination: &IpNetwork, index: Option<IfIndex>, exists: bool) -> bool {
        if destination.prefix() != Family::of(destination.ip()).bits() {
            return false;
        }
        match self.task.pods.with_address(destination.ip()) {
            // The kernel deletes an interface's routes together with the interface. Every other host route belongs to a
            // peer.
            None => !exists && index.is_some_and(|index| self.belongs_to_pods_or_is_deleted(index)),
            Some(pod) if self.is_in_flight(&pod.name) => true,
            Some(pod) => {
                let device = index.and_then(|index| self.devices.get(&index));
                let is_pod_device = device
                    .is_some_and(|device| *device == Device::Bridge || *device == Device::Pod(pod.name));
                exists && is_pod_device
            }
        }
    }

    /// Whether the interface belongs to pods, or is deleted and was on no path.
    fn belongs_to_pods_or_is_deleted(&self, index: IfIndex) -> bool {
        match self.devices.get(&index) {
            Some(device) => matches!(device, Device::Bridge | Device::Pod(_)),
            None => {
                let expected = self.task.expected.borrow();
                expected.path_interfaces.as_ref().is_some_and(|on_paths| !on_paths.contains(&index))
            }
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
        let expected = self.task.expected.borrow();
        let may_matter = expected.path_interfaces.as_ref().is_none_or(|on_paths| on_paths.contains(&index));
        drop(expected);
        if may_matter {
            self.underlay_changed(event);
        }
    }

    fn underlay_changed(&self, event: &Event) {
        debug!(?event, "the underlay may have changed");
        self.task.underlay_changed.wake();
    }

    /// Reports a change of Polder's kernel state as drift, unless the new state is the desired one.
    fn report_drift_unless(&self, is_as_wanted: bool, event: &Event) {
        if is_as_wanted {
            return;
        }
        debug!(?event, "Polder's kernel state was changed");
        // The port of a netlink socket is a process id only in the PID namespace of the sender, so it identifies no
        // process.
        self.task.drift_signal.wake(None);
    }
}

#[cfg(test)]
mod tests;
