//! The fast path: BPF programs on the interfaces of pods, tunnels and uplinks forward packets of flows that the host has
//! just forwarded itself. `docs/fastpath.md` describes it.
//!
//! It is a cache of the normal path. Pods do not depend on it: nothing waits for it, and where a program is missing,
//! packets take the normal path. So it is no part of the desired state of passes.

mod interfaces;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::status::{FastPathState, FastPathStatus, PacketCount, PacketPath};
use polder_api::{IfName, is_host_interface};
use polder_fastpath::{Count, FastPathError, Programs, Records};
use polder_ipam::cause::SharedError;
use polder_netlink::IfIndex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

pub use self::interfaces::{AttachError, Interfaces, Users};

use crate::config::FastPathSetting;
use crate::in_flight::InFlight;
use crate::kernel::desired::Path;
use crate::kernel::sysctl::{self, Sysctls};
use crate::local_pods::{LocalPod, LocalPods};
use crate::node_state::{Pass, Passes, set_if_changed};
use crate::owner::Owner;
use crate::wake::WakeReceiver;

/// The programs are attached to the interfaces of new pods together, after this time: a pod that has just started has few
/// packets to send, and its ADD is not slower.
const SETTLE: Duration = Duration::from_secs(1);

/// Why the fast path is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotUsed {
    /// The agent has just started.
    ///
    /// Remedy: none, it takes a few seconds.
    #[error("the agent has just started")]
    NotYet,
    /// The configuration switches it off.
    ///
    /// Remedy: none is needed. To use it, set `fastpath = "auto"` and restart the agent.
    #[error("the setting fastpath is \"off\"")]
    Off,
    /// The kernel does not load the programs.
    ///
    /// Remedy: see the text. Without the fast path, all packets take the normal path.
    #[error("{0}. Linux 5.11 or newer with BPF, and the capabilities NET_ADMIN and BPF, are needed")]
    NotLoaded(String),
    /// Connection tracking would take flows of the fast path for invalid, and rules that drop invalid packets would end
    /// them.
    #[error("{setting} is not 1, and without it, rules that drop invalid packets would end connections: set it to 1", setting = sysctl::LIBERAL)]
    Strict,
    /// The programs cannot be attached to an interface. Its packets take the normal path.
    ///
    /// Remedy: see the cause.
    #[error(transparent)]
    NotAttached(SharedError),
}

/// The programs, or why they are not loaded.
#[derive(Debug)]
pub struct Loaded {
    programs: Option<Programs>,
    /// Why the fast path is not used from the beginning.
    pub refused: Option<NotUsed>,
}

impl Loaded {
    /// Loads the programs, unless the fast path is switched off.
    pub fn load(setting: FastPathSetting) -> Self {
        if setting == FastPathSetting::Off {
            return Self { programs: None, refused: Some(NotUsed::Off) };
        }
        match Programs::load() {
            Ok(programs) => Self { programs: Some(programs), refused: None },
            Err(error) => {
                let reason = NotUsed::NotLoaded(with_sources(&error));
                info!("the fast path is not used: {reason}");
                Self { programs: None, refused: Some(reason) }
            }
        }
    }

    /// The records of the programs, for the first caller.
    pub fn take_records(&mut self) -> Option<Records> {
        self.programs.as_mut().and_then(Programs::take_records)
    }

    /// The interfaces in the network namespace of the calling thread, with these programs.
    pub fn interfaces(self) -> Result<(Interfaces, Option<NotUsed>), polder_netlink::Error> {
        Ok((Interfaces::open(self.programs)?, self.refused))
    }
}

/// The first line of the error and of its sources: the log of the kernel's verifier has hundreds.
fn with_sources(error: &FastPathError) -> String {
    let mut texts = Vec::new();
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = next {
        texts.extend(error.to_string().lines().next().map(str::to_owned));
        next = error.source();
    }
    texts.dedup();
    texts.join(": ")
}

/// The interfaces, for tests.
pub trait Attachment {
    /// [`Interfaces::check_all`].
    fn check_all(&self, users: Users) -> impl Future<Output = Result<usize, AttachError>> + Send;

    /// [`Interfaces::add`], with the addresses that are gone.
    fn add(
        &self,
        pods: Vec<LocalPod>,
        gone: BTreeSet<IpAddr>,
    ) -> impl Future<Output = Result<usize, AttachError>> + Send;
}

impl Attachment for Owner<Interfaces> {
    async fn check_all(&self, users: Users) -> Result<usize, AttachError> {
        self.run(move |interfaces| interfaces.check_all(&users)).await
    }

    async fn add(&self, pods: Vec<LocalPod>, gone: BTreeSet<IpAddr>) -> Result<usize, AttachError> {
        self.run(move |interfaces| interfaces.add(pods, |address| gone.contains(&address))).await
    }
}

/// Attaches the programs to the interfaces of pods, tunnels and uplinks.
#[derive(Debug)]
pub struct Task<A = Owner<Interfaces>> {
    /// How often all interfaces are checked.
    pub resync: Duration,
    /// Why the programs are not loaded.
    pub refused: Option<NotUsed>,
    /// The interfaces.
    pub interfaces: A,
    /// The pods of this node.
    pub pods: Arc<LocalPods>,
    /// Attachments that are being added or deleted.
    pub in_flight: Arc<InFlight>,
    /// The paths to peers are those of the last pass.
    pub passes: Passes,
    /// The kernel's settings.
    pub sysctls: Sysctls,
    /// Another program changed what runs on an interface.
    pub changed: WakeReceiver,
    /// Why the fast path is not used. `None` if it is.
    pub not_used: watch::Sender<Option<NotUsed>>,
}

/// What to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// All interfaces.
    All,
    /// Those of pods that were added or deleted.
    Pods,
}

impl<A: Attachment> Task<A> {
    /// Runs for ever.
    pub async fn run(self) {
        let mut pass = self.passes.changes();
        // The pods whose interfaces have programs.
        let mut served: BTreeMap<IfName, LocalPod> = BTreeMap::new();
        // An uplink keeps its programs when its last direct path ends: to detach them drops packets.
        let mut uplinks: BTreeSet<IfIndex> = BTreeSet::new();
        let mut scope = Scope::All;
        loop {
            pass.mark_unchanged();
            let found = self::uplinks(self.passes.last().as_deref());
            // Whatever woke the task: a pass may have come meanwhile.
            if self.is_waiting() || !found.is_subset(&uplinks) {
                scope = Scope::All;
            }
            uplinks.extend(found);
            let mut all = self.pods.all();
            // The probe endpoint sends and receives only ICMP.
            all.retain(|pod| is_host_interface(pod.name.as_str()));
            let (waiting, pods): (Vec<_>, Vec<_>) =
                all.into_iter().partition(|pod| self.in_flight.has_interface(&pod.name));
            self.attach(scope, &mut served, pods, &uplinks).await;
            let due = Instant::now() + self.resync;
            scope = loop {
                break tokio::select! {
                    () = self.pods.changed() => {
                        sleep(SETTLE).await;
                        Scope::Pods
                    }
                    () = sleep(SETTLE), if !waiting.is_empty() => Scope::Pods,
                    () = self.changed.woken() => {
                        sleep(SETTLE / 4).await;
                        Scope::All
                    }
                    () = sleep_until(due) => Scope::All,
                    _ = pass.changed() => {
                        if !self.is_waiting() && self::uplinks(self.passes.last().as_deref()).is_subset(&uplinks) {
                            continue;
                        }
                        Scope::All
                    }
                };
            };
        }
    }

    /// Attaches and detaches what differs, and publishes whether the fast path is used.
    async fn attach(
        &self,
        scope: Scope,
        served: &mut BTreeMap<IfName, LocalPod>,
        pods: Vec<LocalPod>,
        uplinks: &BTreeSet<IfIndex>,
    ) {
        if self.refused.is_none() {
            // The first pass finds the paths, and changes the setting.
            if self.passes.last().is_none() {
                return;
            }
            if !self.is_liberal() {
                return self.publish(Some(NotUsed::Strict));
            }
        }
        let now: BTreeMap<IfName, LocalPod> = pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect();
        let outcome = match scope {
            Scope::All => {
                let users = match self.refused {
                    None => Users { pods: now.values().cloned().collect(), uplinks: uplinks.clone() },
                    Some(_) => Users::default(),
                };
                self.interfaces.check_all(users).await
            }
            Scope::Pods if self.refused.is_some() => return,
            Scope::Pods => {
                let is_new = |pod: &&LocalPod| served.get(&pod.name) != Some(*pod);
                let new = now.values().filter(is_new).cloned().collect();
                let addresses = |pods: &BTreeMap<IfName, LocalPod>| -> BTreeSet<IpAddr> {
                    pods.values().flat_map(|pod| pod.addresses.iter().copied()).collect()
                };
                let gone = &addresses(served) - &addresses(&now);
                self.interfaces.add(new, gone).await
            }
        };
        *served = now;
        match (outcome, &self.refused) {
            (_, Some(refused)) => self.publish(Some(refused.clone())),
            (Ok(_), None) => self.publish(None),
            (Err(error), None) => self.publish(Some(NotUsed::NotAttached(SharedError::new(error)))),
        }
    }

    /// Whether a pass may be what the programs wait for.
    fn is_waiting(&self) -> bool {
        matches!(*self.not_used.borrow(), Some(NotUsed::NotYet | NotUsed::Strict))
    }

    /// Whether connection tracking accepts flows of which it sees only some packets.
    fn is_liberal(&self) -> bool {
        match self.sysctls.get(sysctl::LIBERAL) {
            Ok(value) => value == "1",
            // Without connection tracking, nothing takes a packet for invalid.
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    fn publish(&self, reason: Option<NotUsed>) {
        if set_if_changed(&self.not_used, reason.clone()) {
            match reason {
                None => info!("the fast path is used"),
                Some(NotUsed::Off) => {}
                Some(reason) => warn!("the fast path is not used, or not for all pods: {reason}"),
            }
        }
    }
}

/// The uplinks with a direct path to a peer.
fn uplinks(pass: Option<&Pass>) -> BTreeSet<IfIndex> {
    let paths = pass.into_iter().flat_map(|pass| pass.paths.values());
    let direct = paths.filter_map(|path| match path.path {
        Path::Direct { index, .. } => Some(index),
        _ => None,
    });
    direct.collect()
}

/// The answer to `polderctl status`.
pub fn status(
    not_used: Option<&NotUsed>,
    counts: Result<Vec<(Count, u64)>, FastPathError>,
) -> FastPathStatus {
    let (counts, unread) = match counts {
        Ok(counts) => (counts, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let is_on = matches!(not_used, None | Some(NotUsed::NotAttached(_)));
    FastPathStatus {
        state: if is_on { FastPathState::On } else { FastPathState::Off },
        reason: not_used.map(ToString::to_string).or(unread),
        packets: counts.into_iter().filter_map(packet_count).collect(),
    }
}

/// The path and reason as in status and metrics. `None` for what is counted a second time when it leaves the host.
fn packet_count((count, packets): (Count, u64)) -> Option<PacketCount> {
    use PacketPath::{Fast, Normal};
    let (path, reason) = match count {
        Count::PodToPod => (Fast, "pod_to_pod"),
        Count::PodToNode => (Fast, "pod_to_node"),
        Count::NodeToPod => (Fast, "node_to_pod"),
        Count::NoRecord => (Normal, "no_record"),
        Count::Expired => (Normal, "expired"),
        Count::Larger => (Normal, "larger"),
        Count::OtherSender => (Normal, "other_sender"),
        Count::Control => (Normal, "tcp_control"),
        Count::Fragment => (Normal, "fragment"),
        Count::Options => (Normal, "ip_options"),
        Count::Protocol => (Normal, "other_protocol"),
        Count::LastHop => (Normal, "last_hop"),
        Count::Changed | Count::Recorded => return None,
    };
    Some(PacketCount { path, reason: reason.to_owned(), packets })
}

#[cfg(test)]
mod tests;
