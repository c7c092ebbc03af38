//! Receives kernel notifications and wakes the tasks that handle them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;

use polder_netlink::monitor::{Event, EventKind, Monitor};
use polder_netlink::nft::{Author, FilterMonitor};
use polder_netlink::{Error, IfIndex, RouteSocket, SocketError};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::bell::Bell;
use crate::kernel::reaper::Reaper;
use crate::kernel::ruleset;
use crate::kernel::state::Device;
use crate::repair::{self, DriftSignal};

/// The receivers of kernel notifications.
#[derive(Debug)]
pub struct Task {
    /// Netlink port ids of the agent's own sockets: their changes are ignored.
    pub own: BTreeSet<u32>,
    /// The neighbour entries that Polder's devices should have.
    pub neighbours: watch::Receiver<BTreeSet<IpAddr>>,
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
    let links = RouteSocket::open()?.links()?;
    let ours = links.into_values().filter_map(|link| Some((link.index, Device::named(&link.name)?)));
    let (own, drift_signal) = (task.own.clone(), Arc::clone(&task.drift_signal));
    let mut listener = Listener { task, devices: ours.collect() };
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

struct Listener {
    task: Task,
    /// Polder's existing devices.
    devices: BTreeMap<IfIndex, Device>,
}

impl Listener {
    fn on_event(&mut self, event: &Event) {
        let is_own = self.task.own.contains(&event.port);
        match &event.what {
            EventKind::LinkGone { index, name } => {
                self.task.reaper.is_gone(*index);
                match self.devices.remove(index).or_else(|| Device::named(name)) {
                    // A pod's interface is deleted with the pod: the orphan collector handles that.
                    Some(Device::Pod(_)) => {}
                    Some(_) => self.drifted(event, is_own),
                    None => self.underlay_changed(event),
                }
            }
            EventKind::Link { index, name } => {
                let was_ours = self.devices.contains_key(index);
                match Device::named(name) {
                    Some(device) => drop(self.devices.insert(*index, device)),
                    None => drop(self.devices.remove(index)),
                }
                match (was_ours, self.devices.contains_key(index)) {
                    (false, false) => self.underlay_changed(event),
                    _ => self.drifted(event, is_own),
                }
            }
            EventKind::Address { index } | EventKind::Port { index } if self.devices.contains_key(index) => {
                self.drifted(event, is_own);
            }
            EventKind::Neighbour { index, address } => {
                // The bridge has entries for pods. A tunnel has only Polder's entries.
                let is_expected =
                    address.is_none_or(|address| self.task.neighbours.borrow().contains(&address));
                match self.devices.get(index) {
                    Some(Device::Tunnel(_)) => self.drifted(event, is_own),
                    Some(_) if is_expected => self.drifted(event, is_own),
                    _ => {}
                }
            }
            EventKind::ForwardingStopped { index } if self.devices.contains_key(index) => {
                self.drifted(event, is_own);
            }
            EventKind::OwnRoute => self.drifted(event, is_own),
            EventKind::Port { .. } | EventKind::ForwardingStopped { .. } => {}
            EventKind::Address { .. } | EventKind::ForeignRoute => self.underlay_changed(event),
            EventKind::Overrun => {
                self.underlay_changed(event);
                self.drifted(event, false);
            }
        }
    }

    fn underlay_changed(&self, event: &Event) {
        debug!(?event, "the underlay may have changed");
        self.task.underlay_changed.ring();
    }

    fn drifted(&self, event: &Event, is_own: bool) {
        if is_own {
            return;
        }
        debug!(?event, "Polder's kernel state was changed");
        // The port of a netlink socket is a process id only in the PID namespace of the sender, so it identifies no
        // process.
        self.task.drift_signal.ring(None);
    }
}

#[cfg(test)]
mod tests {
    use polder_api::BRIDGE;
    use tokio::time::timeout;

    use super::*;
    use crate::bell::{Wake, bell};

    /// Port ids of a socket of the agent, and of another program.
    const OWN: u32 = 7;
    const OTHER: u32 = 5_000_000;

    /// A listener and the bells that it rings.
    struct Fixture {
        listener: Listener,
        underlay: Wake,
        drift_signal: Arc<DriftSignal>,
    }

    /// A host with a bridge, a tunnel and a pod, with interface indexes from 1.
    fn fixture() -> Fixture {
        let (underlay_changed, underlay) = bell();
        let drift_signal = Arc::<DriftSignal>::default();
        let task = Task {
            own: [OWN].into(),
            neighbours: watch::channel(["10.0.0.9".parse().unwrap()].into()).1,
            reaper: Reaper::idle(),
            underlay_changed,
            drift_signal: Arc::clone(&drift_signal),
        };
        let pod = "net/c1/eth0".parse::<polder_api::Attachment>().unwrap().host_interface();
        let devices = [Device::Bridge, Device::OWN[1].clone(), Device::Pod(pod)];
        let devices = (1..).map(IfIndex::new).zip(devices).collect();
        Fixture { listener: Listener { task, devices }, underlay, drift_signal }
    }

    #[derive(Debug, PartialEq, Eq)]
    enum Rung {
        Nobody,
        Underlay,
        Drift,
        Both,
    }

    impl Fixture {
        /// Handles one event. Returns the bells that it rang.
        async fn on_event(&mut self, what: EventKind, port: u32) -> Rung {
            self.listener.on_event(&Event { what, port });
            let underlay = timeout(std::time::Duration::ZERO, self.underlay.rung()).await.is_ok();
            let drift_signal = timeout(std::time::Duration::ZERO, self.drift_signal.rung()).await.is_ok();
            match (underlay, drift_signal) {
                (false, false) => Rung::Nobody,
                (true, false) => Rung::Underlay,
                (false, true) => Rung::Drift,
                (true, true) => Rung::Both,
            }
        }
    }

    fn link(index: u32, name: &str) -> EventKind {
        EventKind::Link { index: IfIndex::new(index), name: name.to_owned() }
    }

    fn gone(index: u32, name: &str) -> EventKind {
        EventKind::LinkGone { index: IfIndex::new(index), name: name.to_owned() }
    }

    #[tokio::test]
    async fn what_others_do_to_what_is_ours_is_an_alarm_and_what_the_agent_does_is_none() {
        let mut fixture = fixture();
        for what in [
            link(1, BRIDGE),
            EventKind::Address { index: IfIndex::new(1) },
            EventKind::Port { index: IfIndex::new(3) },
            EventKind::OwnRoute,
        ] {
            assert_eq!(fixture.on_event(what.clone(), OTHER).await, Rung::Drift, "{what:?}");
            assert_eq!(fixture.on_event(what.clone(), OWN).await, Rung::Nobody, "{what:?}");
        }
        assert_eq!(
            fixture.on_event(EventKind::ForwardingStopped { index: IfIndex::new(2) }, OTHER).await,
            Rung::Drift
        );
        assert_eq!(
            fixture.on_event(EventKind::ForwardingStopped { index: IfIndex::new(9) }, OTHER).await,
            Rung::Nobody
        );
    }

    #[tokio::test]
    async fn what_is_not_ours_may_be_the_underlay() {
        let mut fixture = fixture();
        for what in [
            link(9, "eth0"),
            gone(9, "eth0"),
            EventKind::Address { index: IfIndex::new(9) },
            EventKind::ForeignRoute,
        ] {
            assert_eq!(fixture.on_event(what.clone(), OTHER).await, Rung::Underlay, "{what:?}");
        }
        assert_eq!(fixture.on_event(EventKind::Overrun, 0).await, Rung::Both, "anything may have changed");
    }

    #[tokio::test]
    async fn a_device_is_ours_as_long_as_it_has_our_name_and_a_pods_end_goes_without_an_alarm() {
        let mut fixture = fixture();
        assert_eq!(fixture.on_event(link(1, "renamed"), OTHER).await, Rung::Drift);
        assert_eq!(fixture.on_event(link(1, "renamed"), OTHER).await, Rung::Underlay);
        assert_eq!(fixture.on_event(link(8, BRIDGE), OTHER).await, Rung::Drift);
        assert_eq!(fixture.on_event(gone(8, BRIDGE), OTHER).await, Rung::Drift);
        assert_eq!(fixture.on_event(gone(3, "whatever"), OTHER).await, Rung::Nobody);
    }

    #[tokio::test]
    async fn neighbours_are_looked_after_in_tunnels_and_where_they_are_to_be() {
        let mut fixture = fixture();
        let neighbour = |index, address: &str| EventKind::Neighbour {
            index: IfIndex::new(index),
            address: address.parse().ok(),
        };
        assert_eq!(fixture.on_event(neighbour(2, "10.0.0.1"), OTHER).await, Rung::Drift);
        assert_eq!(
            fixture.on_event(neighbour(1, "10.0.0.1"), OTHER).await,
            Rung::Nobody,
            "a pod comes or goes"
        );
        assert_eq!(fixture.on_event(neighbour(1, "10.0.0.9"), OTHER).await, Rung::Drift);
        assert_eq!(fixture.on_event(neighbour(9, "10.0.0.9"), OTHER).await, Rung::Nobody);
    }
}
