//! The engine's state between passes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_netlink::IfIndex;
use polder_netlink::route::Lookup;
use tokio::time::Instant;

use crate::kernel::desired::Known;
use crate::kernel::snapshot::{HostNetwork, WayTo};
use crate::repair::Pace;
use crate::underlay::Underlay;

/// The host's interfaces and routes.
#[derive(Debug, Default)]
pub(super) struct Network {
    /// How the host reaches the peers' underlay addresses.
    pub(super) reach: BTreeMap<IpAddr, Option<Lookup>>,
    /// Whether a lookup of these routes failed.
    pub(super) doubt: bool,
    /// All addresses of this node that are not its pods'.
    pub(super) own: BTreeSet<IpAddr>,
    /// The foreign interfaces.
    pub(super) outward: Outward,
    /// Whether the interfaces could not be read.
    pub(super) unread: bool,
    /// The node's addresses on the underlay, as they were chosen last.
    pub(super) underlay: Option<Arc<Underlay>>,
}

/// Foreign interfaces.
#[derive(Debug, Default)]
pub(super) struct Outward {
    /// Their names, by index.
    pub(super) interfaces: BTreeMap<IfIndex, String>,
    /// Those that deliver a packet by its IP addresses, without neighbours (such as `WireGuard`).
    pub(super) meshes: BTreeSet<IfIndex>,
    /// Those with a route out of the cluster.
    pub(super) world: BTreeSet<IfIndex>,
}

impl Outward {
    pub(super) fn of(network: &HostNetwork) -> Self {
        let interfaces = network.interfaces.iter().map(|(index, (name, _))| (*index, name.clone())).collect();
        let world = network.routes.iter().filter(|(what, way)| *what == WayTo::World && !way.local);
        Self { interfaces, meshes: network.meshes.clone(), world: world.map(|(_, way)| way.index).collect() }
    }
}

/// Records that the datastore lost.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Number of losses seen so far.
    pub(super) known: u64,
    /// When kernel state without a record may be deleted again.
    pub(super) prune_from: Option<Instant>,
}

/// The passes so far.
#[derive(Debug, Default)]
pub(super) struct Passes {
    /// How many there were.
    pub(super) count: u64,
    /// Changes to the kernel so far.
    pub(super) written: u64,
    /// When a pass that failed is tried again.
    pub(super) retry: Option<Duration>,
}

/// Changes by other programs, and their repair.
#[derive(Debug)]
pub(super) struct Repairing {
    /// How soon the next repair may follow.
    pub(super) pace: Pace,
    /// The state when a pass last found nothing to do.
    pub(super) in_place: Option<Known>,
    /// When another program changed Polder's kernel state since the last pass.
    pub(super) rung: Option<Instant>,
    /// When the kernel settings are checked next.
    pub(super) settings_due: Instant,
}

impl Default for Repairing {
    fn default() -> Self {
        Self { pace: Pace::default(), in_place: None, rung: None, settings_due: Instant::now() }
    }
}
