//! What the engine remembers from pass to pass.

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
    /// Whether some of that could not be asked.
    pub(super) doubt: bool,
    /// All addresses of this node that are not its pods'.
    pub(super) own: BTreeSet<IpAddr>,
    /// What is known of the interfaces that are not ours.
    pub(super) outward: Outward,
    /// Whether the interfaces could not be read.
    pub(super) unread: bool,
    /// The node's addresses on the underlay, as they were chosen last.
    pub(super) underlay: Option<Arc<Underlay>>,
}

/// What is known of the interfaces that are not ours.
#[derive(Debug, Default)]
pub(super) struct Outward {
    /// Their names, by index.
    pub(super) interfaces: BTreeMap<IfIndex, String>,
    /// Those on which a packet goes to whom its IP addresses say.
    pub(super) meshes: BTreeSet<IfIndex>,
    /// Those that lead out of the cluster.
    pub(super) world: BTreeSet<IfIndex>,
}

impl Outward {
    pub(super) fn of(network: &HostNetwork) -> Self {
        let interfaces = network.interfaces.iter().map(|(index, (name, _))| (*index, name.clone())).collect();
        let world = network.routes.iter().filter(|(what, way)| *what == WayTo::World && !way.local);
        Self { interfaces, meshes: network.meshes.clone(), world: world.map(|(_, way)| way.index).collect() }
    }
}

/// What the store has lost.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Losses of the store that are known.
    pub(super) known: u64,
    /// When what is in no record is garbage again.
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

/// What others have changed.
#[derive(Debug)]
pub(super) struct Repairing {
    /// How soon the next repair may follow.
    pub(super) pace: Pace,
    /// What was in place when a pass last found nothing to do.
    pub(super) in_place: Option<Known>,
    /// When somebody has changed something of ours, since the last pass.
    pub(super) rung: Option<Instant>,
    /// When it is looked next whether the kernel settings are as they should be.
    pub(super) settings_due: Instant,
}

impl Default for Repairing {
    fn default() -> Self {
        Self { pace: Pace::default(), in_place: None, rung: None, settings_due: Instant::now() }
    }
}
