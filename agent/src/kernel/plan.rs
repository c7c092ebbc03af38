//! The plan: the ordered list of changes from the actual to the desired kernel state.
//!
//! The order matters. Packet filter changes come before routes; a tunnel's FDB entry is created before the neighbour
//! entry that needs it, and the neighbour entry before the route. Deletion is in the reverse order. Replacements are
//! done in one step.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{Family, IfName, Mac};
use polder_netlink::IfIndex;
use polder_netlink::link::Port;
use polder_netlink::neighbour::Destination;
use polder_netlink::nft::{Element, ElementKey, Elements, TableState, union};
use polder_netlink::route::ConflictingRoute;

use super::desired::Desired;
use super::ruleset::{Sets, host_ports};
use super::state::{Actual, Device, DeviceIdentity, DeviceKind, OwnLink, OwnRoute, RouteTarget, State};
use super::sysctl;

/// One change to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelChange {
    /// Writes a kernel setting.
    SetSysctl {
        /// Its path under `/proc/sys`.
        path: String,
        /// The desired value.
        value: String,
    },
    /// Creates a device of Polder.
    CreateLink(Device, OwnLink),
    /// Deletes the device with that index: it has a name of Polder's devices, but the wrong type.
    DeleteLink(Device, IfIndex),
    /// Restores the name of the device with that index.
    RenameLink(Device, IfIndex),
    /// Adjusts the settings of an existing device.
    AdjustLink(Device, OwnLink),
    /// Installs the packet filter again; the text is the reason.
    InstallFilter(String),
    /// Adds and removes elements of an nftables set.
    UpdateSet {
        /// The set.
        set: &'static str,
        /// Elements to add.
        add: Vec<Element>,
        /// Elements to remove.
        remove: Vec<Element>,
    },
    /// Replaces all elements of an nftables set.
    RefillSet {
        /// The set.
        set: &'static str,
        /// The new elements.
        elements: BTreeSet<Element>,
    },
    /// Gives a device an address.
    AddAddress(Device, IpNetwork),
    /// Makes a pod's interface a port of the bridge, with these settings, or detaches it (`None`), and sets it up.
    SetPod(IfName, Option<Port>),
    /// Creates or replaces a neighbour entry.
    SetNeighbour(Device, IpAddr, Mac),
    /// Creates or replaces an FDB entry.
    SetFdbEntry(Device, Mac, Destination),
    /// Creates or replaces a route.
    SetRoute(IpNetwork, OwnRoute),
    /// Deletes a route.
    DeleteRoute(IpNetwork),
    /// Deletes a route that has Polder's protocol number, but was not created by Polder.
    DeleteConflicting(ConflictingRoute),
    /// Deletes an FDB entry.
    DeleteFdbEntry(Device, Mac, Destination),
    /// Deletes a neighbour entry.
    DeleteNeighbour(Device, IpAddr, Mac),
    /// Deletes an address of a device.
    DeleteAddress(Device, IpNetwork),
    /// Deletes the pod interface with that index: it belongs to no attachment.
    DeletePod(IfName, IfIndex),
}

/// Whether unwanted objects may be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prune {
    /// All records are known: objects without a record are deleted.
    Yes,
    /// Records may be missing: objects without a record may belong to a peer and are kept.
    No,
}

/// The changes that turn `actual` into `desired`, in order. Empty if there is no difference.
pub fn plan(desired: &Desired, actual: &Actual, prune: Prune) -> Vec<KernelChange> {
    let mut changes = Vec::new();
    let (want, have) = (&desired.state, &actual.state);
    filter(desired, &actual.filter, prune, &mut changes);
    let remade = links(want, actual, &mut changes);
    // The kernel deletes the addresses, routes and entries of a device that is created again.
    let gone = |device: &Device| remade.contains(device);
    let forgot_fdb =
        |device: &Device| gone(device) || (matches!(device, Device::Pod(_)) && gone(&Device::Bridge));
    sysctls(desired, actual, &mut changes);

    for (device, address) in &want.addresses {
        if gone(device) || !have.addresses.contains(&(device.clone(), *address)) {
            changes.push(KernelChange::AddAddress(device.clone(), *address));
        }
    }
    for (name, link) in &want.pods {
        let right = have.pods.get(name).is_some_and(|found| found.is_like(link));
        if !right || (link.port.is_some() && gone(&Device::Bridge)) {
            changes.push(KernelChange::SetPod(name.clone(), link.port));
        }
    }
    for ((device, mac), to) in &want.fdb {
        let found = have.fdb.get(&(device.clone(), *mac)).filter(|_| !forgot_fdb(device));
        if let Some(odd @ Destination::Unsupported) = found {
            changes.push(KernelChange::DeleteFdbEntry(device.clone(), *mac, *odd));
        }
        if found != Some(to) {
            changes.push(KernelChange::SetFdbEntry(device.clone(), *mac, *to));
        }
    }
    for ((device, address), mac) in &want.neighbours {
        if gone(device) || have.neighbours.get(&(device.clone(), *address)) != Some(mac) {
            changes.push(KernelChange::SetNeighbour(device.clone(), *address, *mac));
        }
    }
    for (destination, route) in &want.routes {
        if device_of(route).is_some_and(|device| gone(&device)) || have.routes.get(destination) != Some(route)
        {
            changes.push(KernelChange::SetRoute(*destination, route.clone()));
        }
    }
    if prune == Prune::No {
        // A captured route can make etcd, and with it all records, unreachable: it is deleted even if records may be
        // missing.
        let captured = have.routes.iter().filter(|(destination, route)| {
            !want.routes.contains_key(*destination) && desired.guard.is_captured_by(destination, route)
        });
        changes.extend(captured.map(|(destination, _)| KernelChange::DeleteRoute(*destination)));
        let conflicting = have.conflicting_routes.iter();
        // One beside a desired route can have precedence over it.
        let harmful = conflicting.filter(|route| {
            want.routes.contains_key(&route.destination) || desired.guard.is_captured(&route.destination)
        });
        changes.extend(harmful.map(|conflicting| KernelChange::DeleteConflicting(*conflicting)));
    }
    if prune == Prune::Yes {
        garbage(want, actual, gone, forgot_fdb, &mut changes);
    }
    changes
}

/// Plans the changes of the bridge and the tunnels. Returns the devices that are created.
fn links(want: &State, actual: &Actual, changes: &mut Vec<KernelChange>) -> BTreeSet<Device> {
    let mut remade = BTreeSet::new();
    for (device, link) in &want.links {
        match actual.state.links.get(device) {
            Some(found) if found == link => {}
            Some(found) if found.kind.can_become(&link.kind) => {
                if let (DeviceIdentity::Renamed, Some(index)) = (found.identity, actual.indexes.get(device)) {
                    changes.push(KernelChange::RenameLink(device.clone(), *index));
                }
                changes.push(KernelChange::AdjustLink(device.clone(), link.clone()));
            }
            found => {
                if let (Some(_), Some(index)) = (found, actual.indexes.get(device)) {
                    changes.push(KernelChange::DeleteLink(device.clone(), *index));
                }
                changes.push(KernelChange::CreateLink(device.clone(), link.clone()));
                remade.insert(device.clone());
            }
        }
    }
    remade
}

fn sysctls(desired: &Desired, actual: &Actual, changes: &mut Vec<KernelChange>) {
    for (path, value) in &desired.sysctls {
        let found = actual.sysctls.get(path);
        if found != Some(value) && (found.is_some() || !sysctl::may_be_missing(path)) {
            changes.push(KernelChange::SetSysctl { path: path.clone(), value: value.clone() });
        }
    }
}

fn filter(desired: &Desired, found: &TableState, prune: Prune, changes: &mut Vec<KernelChange>) {
    let have: &Elements = match found {
        TableState::Intact(elements) => elements,
        TableState::Different(why) => return changes.push(KernelChange::InstallFilter(why.clone())),
    };
    let none = BTreeSet::new();
    // One change covers both sides, IP and ARP, of a set that exists on both.
    let mut seen = BTreeSet::new();
    for set in desired.table.sets.iter().filter(|set| seen.insert(set.name)) {
        let want = desired.elements.get(set.name).unwrap_or(&none);
        let have = have.get(set.name).unwrap_or(&none);
        if want == have {
            continue;
        }
        if matches!(set.key, ElementKey::Network(_)) {
            let elements = match prune {
                Prune::Yes => want.clone(),
                Prune::No => union(want, have),
            };
            if elements != *have {
                changes.push(KernelChange::RefillSet { set: set.name, elements });
            }
            continue;
        }
        let add: Vec<_> = want.difference(have).cloned().collect();
        // Only the ledger has host ports, so a host port without an attachment belongs to no pod. It would lead to the
        // next pod with the address, and the kernel would refuse that port for another pod.
        let remove: Vec<_> = match prune {
            Prune::No if !host_ports::is_set(set.name) => Vec::new(),
            _ => have.difference(want).cloned().collect(),
        };
        if !add.is_empty() || !remove.is_empty() {
            changes.push(KernelChange::UpdateSet { set: set.name, add, remove });
        }
    }
}

/// Plans the deletion of existing objects that are not desired, in the reverse order of their creation.
fn garbage(
    want: &State,
    actual: &Actual,
    gone: impl Fn(&Device) -> bool,
    forgot_fdb: impl Fn(&Device) -> bool,
    changes: &mut Vec<KernelChange>,
) {
    let have = &actual.state;
    changes.extend(
        have.conflicting_routes
            .difference(&want.conflicting_routes)
            .map(|conflicting| KernelChange::DeleteConflicting(*conflicting)),
    );
    for (destination, route) in have.routes.iter().filter(|(key, _)| !want.routes.contains_key(key)) {
        if !device_of(route).is_some_and(|device| gone(&device)) {
            changes.push(KernelChange::DeleteRoute(*destination));
        }
    }
    for (key, mac) in have.neighbours.iter().filter(|(key, _)| !want.neighbours.contains_key(key)) {
        if !gone(&key.0) {
            changes.push(KernelChange::DeleteNeighbour(key.0.clone(), key.1, *mac));
        }
    }
    for (key, to) in have.fdb.iter().filter(|(key, _)| !want.fdb.contains_key(key)) {
        if !forgot_fdb(&key.0) {
            changes.push(KernelChange::DeleteFdbEntry(key.0.clone(), key.1, *to));
        }
    }
    for (device, address) in have.addresses.difference(&want.addresses) {
        if !gone(device) {
            changes.push(KernelChange::DeleteAddress(device.clone(), *address));
        }
    }
    let orphaned = have.pods.keys().filter(|name| !want.pods.contains_key(name));
    changes.extend(orphaned.filter_map(|name| {
        let index = actual.indexes.get(&Device::Pod(name.clone()))?;
        Some(KernelChange::DeletePod(name.clone(), *index))
    }));
    for device in have.links.keys().filter(|device| !want.links.contains_key(device)) {
        if let Some(index) = actual.indexes.get(device) {
            changes.push(KernelChange::DeleteLink(device.clone(), *index));
        }
    }
}

fn device_of(route: &OwnRoute) -> Option<Device> {
    match &route.target {
        RouteTarget::Device(device) | RouteTarget::Direct(device, _) => Some(device.clone()),
        RouteTarget::Tunnel(family, _) => Some(Device::Tunnel(*family)),
        RouteTarget::Unreachable => None,
    }
}

impl KernelChange {
    /// Whether both change the same object; for an nftables set, also with other elements.
    pub fn is_same_object(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::UpdateSet { set, .. }, Self::UpdateSet { set: other, .. }) => set == other,
            _ => self == other,
        }
    }

    /// Whether packets to host ports may be translated otherwise after the change.
    pub fn adds_host_ports(&self) -> bool {
        let is_of_host = |set: &str| Family::BOTH.iter().any(|family| Sets::of(*family).host == set);
        match self {
            Self::InstallFilter(_) => true,
            Self::UpdateSet { set, add, .. } => {
                !add.is_empty() && (host_ports::is_set(set) || is_of_host(set))
            }
            _ => false,
        }
    }

    /// Whether the node needs the change to serve its own pods. False for paths to peers and for most deletions.
    pub fn is_local(&self) -> bool {
        match self {
            Self::SetRoute(_, route) => {
                !matches!(route.target, RouteTarget::Tunnel(..) | RouteTarget::Direct(..))
            }
            Self::SetNeighbour(device, ..) | Self::SetFdbEntry(device, ..) => {
                !matches!(device, Device::Tunnel(_))
            }
            Self::SetSysctl { path, .. } => {
                ![sysctl::ROUTE_LOCALNET, sysctl::LIBERAL].contains(&path.as_str())
            }
            Self::DeleteRoute(_)
            | Self::DeleteConflicting(_)
            | Self::DeleteFdbEntry(..)
            | Self::DeleteNeighbour(..)
            | Self::DeleteAddress(..)
            | Self::DeletePod(..) => false,
            _ => true,
        }
    }
}

impl fmt::Display for KernelChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetSysctl { path, value } => write!(f, "set {path} to {value}"),
            Self::CreateLink(device, link) => write!(f, "create {device}: {link}"),
            Self::DeleteLink(device, _) => write!(f, "delete {device}"),
            Self::RenameLink(device, _) => write!(f, "restore the name of {device}"),
            Self::AdjustLink(device, link) => write!(f, "adjust {device}: {link}"),
            Self::InstallFilter(why) => write!(f, "install the packet filter: {why}"),
            Self::UpdateSet { set, add, remove } => {
                write!(f, "nft set {set}: add {}, remove {}", add.len(), remove.len())
            }
            Self::RefillSet { set, .. } => write!(f, "nft set {set}: replace all elements"),
            Self::AddAddress(device, address) => write!(f, "add address {address} to {device}"),
            Self::SetPod(name, Some(_)) => write!(f, "attach pod interface {name} to the bridge"),
            Self::SetPod(name, None) => write!(f, "configure pod interface {name}"),
            Self::SetNeighbour(device, address, mac) => {
                write!(f, "set neighbour {address} to {mac} on {device}")
            }
            Self::SetFdbEntry(device, mac, Destination::Remote(remote)) => {
                write!(f, "set FDB entry {mac} on {device} to {remote}")
            }
            Self::SetFdbEntry(device, mac, _) => write!(f, "set FDB entry {mac} on port {device}"),
            Self::SetRoute(destination, route) => write!(f, "set route {destination} {route}"),
            Self::DeleteRoute(destination) => write!(f, "delete route {destination}"),
            Self::DeleteConflicting(ConflictingRoute { destination, priority }) => {
                write!(f, "delete route {destination} metric {priority}, which Polder did not create")
            }
            Self::DeleteFdbEntry(device, mac, _) => write!(f, "delete FDB entry {mac} on {device}"),
            Self::DeleteNeighbour(device, address, _) => write!(f, "delete neighbour {address} on {device}"),
            Self::DeleteAddress(device, address) => write!(f, "delete address {address} from {device}"),
            Self::DeletePod(name, _) => write!(f, "delete {name}, which belongs to no attachment"),
        }
    }
}

impl fmt::Display for OwnLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            DeviceKind::Bridge { filters_vlans: false } => write!(f, "bridge")?,
            DeviceKind::Bridge { filters_vlans: true } => write!(f, "bridge with VLAN filtering")?,
            DeviceKind::Tunnel(tunnel) => write!(f, "{tunnel}")?,
            DeviceKind::Foreign => write!(f, "not a device of Polder")?,
        }
        write!(f, ", {}, mtu {}", self.mac, self.mtu)
    }
}

impl fmt::Display for OwnRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            RouteTarget::Device(device) => write!(f, "dev {device}")?,
            RouteTarget::Tunnel(family, gateway) => {
                write!(f, "via {gateway} dev {}", Device::Tunnel(*family))?;
            }
            RouteTarget::Direct(_, via) => write!(f, "direct via {via}")?,
            RouteTarget::Unreachable => write!(f, "unreachable")?,
        }
        self.mtu.map_or(Ok(()), |mtu| write!(f, ", mtu {mtu}"))
    }
}

/// Number of changes of each kind, for the log.
pub fn summary(changes: &[KernelChange]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for change in changes {
        let kind = match change {
            KernelChange::SetSysctl { .. } => "sysctls",
            KernelChange::CreateLink(..)
            | KernelChange::DeleteLink(..)
            | KernelChange::RenameLink(..)
            | KernelChange::AdjustLink(..) => "links",
            KernelChange::InstallFilter(_)
            | KernelChange::UpdateSet { .. }
            | KernelChange::RefillSet { .. } => "filter changes",
            KernelChange::AddAddress(..) | KernelChange::DeleteAddress(..) => "addresses",
            KernelChange::SetPod(..) | KernelChange::DeletePod(..) => "pod interfaces",
            KernelChange::SetNeighbour(..) | KernelChange::DeleteNeighbour(..) => "neighbours",
            KernelChange::SetFdbEntry(..) | KernelChange::DeleteFdbEntry(..) => "FDB entries",
            KernelChange::SetRoute(..)
            | KernelChange::DeleteRoute(_)
            | KernelChange::DeleteConflicting(_) => "routes",
        };
        *counts.entry(kind).or_default() += 1;
    }
    let parts: Vec<_> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    parts.join(", ")
}

#[cfg(test)]
pub(crate) mod tests;
