//! The engine's state between passes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_netlink::IfIndex;
use polder_netlink::route::RouteLookup;
use tokio::time::Instant;

use crate::kernel::desired::DesiredDigest;
use crate::kernel::snapshot::{HostNetwork, RouteTo};
use crate::kernel::sysctl::WatchedSettings;
use crate::repair::Pace;
use crate::underlay::Underlay;

/// The host's interfaces and routes.
#[derive(Debug, Default)]
pub(super) struct Network {
    /// The host's routes to the peers' underlay addresses; `None` if the host has no route.
    pub(super) underlay_routes: BTreeMap<IpAddr, Option<RouteLookup>>,
    /// Whether the last lookup of these routes failed.
    pub(super) doubt: bool,
    /// The addresses of all interfaces of the host.
    pub(super) own: BTreeSet<IpAddr>,
    /// The addresses of the host that have host ports.
    pub(super) host_addresses: BTreeSet<IpAddr>,
    /// The foreign interfaces.
    pub(super) outward: Outward,
    /// Whether the last read has found an interface that was on no path before.
    pub(super) has_new_path: bool,
    /// Whether the last read of the interfaces failed.
    pub(super) unread: bool,
    /// The node's underlay addresses, as last chosen.
    pub(super) underlay: Option<Arc<Underlay>>,
}

impl Network {
    /// The interfaces on the paths to peers, to etcd and out of the cluster.
    pub(super) fn path_interfaces(&self, underlay: &Underlay) -> BTreeSet<IfIndex> {
        let uplinks = underlay.uplinks.values().map(|uplink| uplink.index);
        let peers = self.underlay_routes.values().flatten().map(|route| route.index);
        uplinks.chain(peers).chain(self.outward.asked.iter().copied()).collect()
    }
}

/// Foreign interfaces.
#[derive(Debug, Default)]
pub(super) struct Outward {
    /// Names, by index.
    pub(super) interfaces: BTreeMap<IfIndex, String>,
    /// Interfaces that deliver a packet by its IP addresses, without link-layer addresses (e.g. `WireGuard`).
    pub(super) layer3_interfaces: BTreeSet<IfIndex>,
    /// Interfaces with a route out of the cluster.
    pub(super) world: BTreeSet<IfIndex>,
    /// Interfaces with a route to a peer, to etcd or out of the cluster.
    pub(super) asked: BTreeSet<IfIndex>,
}

impl Outward {
    pub(super) fn of(network: &HostNetwork) -> Self {
        let interfaces = network.interfaces.iter().map(|(index, (name, _))| (*index, name.clone())).collect();
        let world = network.routes.iter().filter(|(what, route)| *what == RouteTo::World && !route.local);
        Self {
            interfaces,
            layer3_interfaces: network.layer3_interfaces.clone(),
            world: world.map(|(_, route)| route.index).collect(),
            asked: network.routes.iter().map(|(_, route)| route.index).collect(),
        }
    }
}

/// Records that the datastore lost.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Number of losses detected so far.
    pub(super) known: u64,
    /// When kernel state without a record may be deleted again.
    pub(super) prune_from: Option<Instant>,
}

/// The passes so far.
#[derive(Debug, Default)]
pub(super) struct Passes {
    /// Number of passes.
    pub(super) count: u64,
    /// Number of changes to the kernel.
    pub(super) written: u64,
    /// Whether the current pass has added host ports to the packet filter.
    pub(super) has_added_ports: bool,
    /// The pause before a failed pass is repeated; `None` if the last pass succeeded.
    pub(super) retry: Option<Duration>,
}

/// Changes by other programs, and their repair.
#[derive(Debug)]
pub(super) struct Repairing {
    /// The limit of the repair rate.
    pub(super) pace: Pace,
    /// The desired state when a pass last had no changes to make.
    pub(super) in_place: Option<DesiredDigest>,
    /// The kernel settings of that state.
    pub(super) settings: WatchedSettings,
    /// When another program changed Polder's kernel state; `None` if not since the last pass.
    pub(super) drift_at: Option<Instant>,
    /// When the kernel settings are checked again.
    pub(super) settings_due: Instant,
}

impl Default for Repairing {
    fn default() -> Self {
        Self {
            pace: Pace::default(),
            in_place: None,
            settings: WatchedSettings::default(),
            drift_at: None,
            settings_due: Instant::now(),
        }
    }
}
