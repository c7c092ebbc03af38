//! Listens to the kernel, and rings for whom it concerns.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;

use polder_netlink::monitor::{Event, Monitor, What};
use polder_netlink::nft::{Author, FilterMonitor};
use polder_netlink::{Error, IfIndex, RouteSocket};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::bell::Bell;
use crate::kernel::reaper::Reaper;
use crate::kernel::ruleset;
use crate::kernel::state::Device;
use crate::repair::{self, Alarm};

/// Whom it concerns.
#[derive(Debug)]
pub struct Task {
    /// The ports of the agent's own sockets: what goes through those is no news.
    pub own: BTreeSet<u32>,
    /// The neighbours that devices of ours are to have.
    pub neighbours: watch::Receiver<BTreeSet<IpAddr>>,
    /// Waits for interfaces to go.
    pub reaper: Reaper,
    /// Rings when something that is not ours changed.
    pub underlay_changed: Bell,
    /// Rings when somebody else has changed something of ours.
    pub alarm: Arc<Alarm>,
}

/// Starts listening, on threads of their own that live as long as the process.
pub fn start(task: Task) -> Result<(), Error> {
    let mut monitor = Monitor::open()?;
    let links = RouteSocket::open()?.links()?;
    let ours = links.into_values().filter_map(|link| Some((link.index, Device::named(&link.name)?)));
    let (own, alarm) = (task.own.clone(), Arc::clone(&task.alarm));
    let mut listener = Listener { task, devices: ours.collect() };
    let mut filter = FilterMonitor::open(ruleset::NAME)?;
    spawn("monitor", move || {
        loop {
            match monitor.wait() {
                Ok(events) => events.iter().for_each(|event| listener.hear(event)),
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
                    .for_each(|author| of_filter(&alarm, author)),
                Err(error) => return error,
            }
        }
    })
}

fn spawn(name: &str, listen: impl FnOnce() -> Error + Send + 'static) -> Result<(), Error> {
    let until_it_fails = move || {
        // Nothing is lost for good: every pass reads everything.
        let error = listen();
        warn!(%error, "notifications of the kernel are not heard any more");
    };
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(until_it_fails);
    spawned.map(drop).map_err(|source| Error::Socket { action: "start a thread for", source })
}

/// Somebody has changed the packet filter.
fn of_filter(alarm: &Alarm, author: &Author) {
    debug!(?author, "the packet filter was changed");
    alarm.ring(author.thread.map(|id| repair::process(id, author.name.as_deref())));
}

struct Listener {
    task: Task,
    /// Which devices of ours there are.
    devices: BTreeMap<IfIndex, Device>,
}

impl Listener {
    fn hear(&mut self, event: &Event) {
        let is_own = self.task.own.contains(&event.port);
        match &event.what {
            What::LinkGone { index, name } => {
                self.task.reaper.is_gone(*index);
                match self.devices.remove(index).or_else(|| Device::named(name)) {
                    // A pod's end goes with the pod. Who looks for such is the sweeper.
                    Some(Device::Pod(_)) => {}
                    Some(_) => self.disturbed(event, is_own),
                    None => self.underlay_changed(event),
                }
            }
            What::Link { index, name } => {
                let was_ours = self.devices.contains_key(index);
                match Device::named(name) {
                    Some(device) => drop(self.devices.insert(*index, device)),
                    None => drop(self.devices.remove(index)),
                }
                match (was_ours, self.devices.contains_key(index)) {
                    (false, false) => self.underlay_changed(event),
                    _ => self.disturbed(event, is_own),
                }
            }
            What::Address { index } | What::Port { index } if self.devices.contains_key(index) => {
                self.disturbed(event, is_own);
            }
            What::Neighbour { index, address } => {
                // Pods that come and go have theirs on the bridge. In a tunnel there is nobody's but ours.
                let is_expected =
                    address.is_none_or(|address| self.task.neighbours.borrow().contains(&address));
                match self.devices.get(index) {
                    Some(Device::Tunnel(_)) => self.disturbed(event, is_own),
                    Some(_) if is_expected => self.disturbed(event, is_own),
                    _ => {}
                }
            }
            What::ForwardsNoMore { index } if self.devices.contains_key(index) => {
                self.disturbed(event, is_own);
            }
            What::OwnRoute => self.disturbed(event, is_own),
            What::Port { .. } | What::ForwardsNoMore { .. } => {}
            What::Address { .. } | What::ForeignRoute => self.underlay_changed(event),
            What::Overrun => {
                self.underlay_changed(event);
                self.disturbed(event, false);
            }
        }
    }

    fn underlay_changed(&self, event: &Event) {
        debug!(?event, "the underlay may have changed");
        self.task.underlay_changed.ring();
    }

    fn disturbed(&self, event: &Event, is_own: bool) {
        if is_own {
            return;
        }
        debug!(?event, "something of ours was changed");
        // The first socket of a process has its number, as a rule; others have numbers that no process can have.
        let process = (1..=PID_MAX).contains(&event.port).then(|| repair::process(event.port, None));
        self.task.alarm.ring(process);
    }
}

/// `PID_MAX_LIMIT` of the kernel (`include/linux/threads.h`).
const PID_MAX: u32 = 4 << 20;
