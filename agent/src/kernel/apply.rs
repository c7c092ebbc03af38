//! Applies a plan to the kernel.

use std::collections::BTreeMap;

use polder_fastpath::Records;
use polder_netlink::link::{self, create_bridge};
use polder_netlink::neighbour::{FdbEntry, Neighbour};
use polder_netlink::route::{self, KernelTarget, Route};
use polder_netlink::{Error, IfIndex, Operation, address};
use tracing::warn;

use super::Kernel;
use super::desired::Desired;
use super::plan::KernelChange;
use super::state::{Device, DeviceKind, OwnRoute, RouteTarget};
use super::sysctl;
use super::tunnel::ConflictRemedy;

/// A change of the kernel's state failed. Each cause is listed by itself.
///
/// Remedy: see the cause. The next pass retries the change.
#[derive(Debug, thiserror::Error)]
#[error("{change}: {reason}{}", remedy.as_ref().map(|remedy| format!(". {remedy}")).unwrap_or_default())]
pub struct Failure {
    /// The change.
    pub change: KernelChange,
    /// The cause.
    #[source]
    pub reason: NotApplied,
    /// The remedy, if another device prevents the change.
    pub remedy: Option<ConflictRemedy>,
    /// Whether it is a consequence of another failure: its device could not be created.
    pub follows: bool,
}

/// Maximum number of changes whose operations are in memory at once. At a start there are three changes for each peer.
const BATCH: usize = 512;

impl Kernel {
    /// Applies the changes in order. A failed change does not stop the others. Returns the failed changes.
    pub fn apply(
        &mut self,
        changes: Vec<KernelChange>,
        desired: &Desired,
        indexes: BTreeMap<Device, IfIndex>,
    ) -> Result<Vec<Failure>, Error> {
        let mut failures = Vec::new();
        let mut indexes = indexes;
        // Netlink operations, collected so that they are sent together.
        let mut waiting: Vec<(KernelChange, Vec<Operation>)> = Vec::new();
        let mut deleting = false;
        for change in changes {
            // Packets leave on the new paths before the old ones end.
            if is_deletion(&change) && !deleting {
                self.send(std::mem::take(&mut waiting), &mut failures)?;
                self.forget_flows();
            }
            deleting = is_deletion(&change);
            match operations(&change, &indexes) {
                Some(operations) => {
                    waiting.push((change, operations));
                    if waiting.len() == BATCH {
                        self.send(std::mem::take(&mut waiting), &mut failures)?;
                    }
                }
                None => {
                    self.send(std::mem::take(&mut waiting), &mut failures)?;
                    let outcome = self.apply_alone(&change, desired, &mut indexes);
                    record(&mut failures, change, outcome);
                }
            }
        }
        self.send(waiting, &mut failures)?;
        self.forget_flows();
        self.explain(&mut failures);
        Ok(failures)
    }

    /// Makes the records of the fast path invalid. They also become so by themselves within a second.
    fn forget_flows(&mut self) {
        if let Some(Err(error)) = self.flows.as_mut().map(Records::forget) {
            warn!(%error, "packets may take earlier paths for a second");
        }
    }

    /// Adds the remedy for the device that occupies the port or VNI of a tunnel to the tunnel's failure.
    fn explain(&mut self, failures: &mut [Failure]) {
        let of_tunnel = |failure: &&mut Failure| {
            matches!(
                &failure.change,
                KernelChange::CreateLink(Device::Tunnel(_), _)
                    | KernelChange::AdjustLink(Device::Tunnel(_), _)
            )
        };
        for failure in failures.iter_mut().filter(of_tunnel) {
            let (KernelChange::CreateLink(_, own) | KernelChange::AdjustLink(_, own)) = &failure.change
            else {
                continue;
            };
            let (DeviceKind::Tunnel(tunnel), Ok(links)) = (&own.kind, self.routes.links()) else { continue };
            failure.remedy = links.values().find_map(|link| tunnel.conflict_remedy(link));
        }
    }

    fn send(
        &mut self,
        changes: Vec<(KernelChange, Vec<Operation>)>,
        failures: &mut Vec<Failure>,
    ) -> Result<(), Error> {
        let counts: Vec<_> = changes.iter().map(|(_, operations)| operations.len()).collect();
        let (changes, operations): (Vec<_>, Vec<_>) = changes.into_iter().unzip();
        let mut outcomes = self.routes.execute(operations.into_iter().flatten())?.into_iter();
        for (change, count) in changes.into_iter().zip(counts) {
            let outcome = outcomes.by_ref().take(count).collect::<Result<Vec<()>, Error>>();
            record(failures, change, outcome.map(|_| ()).map_err(NotApplied::from));
        }
        Ok(())
    }

    /// Applies a change that later changes depend on, or that does not use the route socket.
    fn apply_alone(
        &mut self,
        change: &KernelChange,
        desired: &Desired,
        indexes: &mut BTreeMap<Device, IfIndex>,
    ) -> Result<(), NotApplied> {
        match change {
            KernelChange::CreateLink(device, own) => {
                let name = device.name().ok_or(NotApplied::NotOurs)?;
                let operations = match &own.kind {
                    DeviceKind::Bridge { .. } => create_bridge(name, own.mac, own.mtu),
                    DeviceKind::Tunnel(tunnel) => tunnel.create(name, own.mac, own.mtu),
                    DeviceKind::Foreign => return Err(NotApplied::NotOurs),
                };
                let mark = device.mark().map(|mark| link::change(name).alias(&mark).into());
                self.routes.execute_all(operations.into_iter().chain(mark))?;
                let made = self.routes.link(name)?.ok_or(NotApplied::Vanished)?;
                indexes.insert(device.clone(), made.index);
                Ok(())
            }
            KernelChange::DeleteLink(device, index) => {
                indexes.remove(device);
                Ok(self.routes.execute_all([link::delete(*index)])?)
            }
            KernelChange::SetSysctl { path, value } => self
                .sysctls
                .set(path, value)
                .map_err(|source| NotApplied::Sysctl { source, command: sysctl::command(path, value) }),
            KernelChange::InstallFilter(_) => {
                Ok(self.filter.commit(desired.table.install(&desired.elements))?)
            }
            KernelChange::UpdateSet { set, add, remove } => {
                Ok(self.filter.commit(desired.table.change(set, add, remove))?)
            }
            KernelChange::RefillSet { set, elements } => {
                Ok(self.filter.commit(desired.table.refill(set, elements))?)
            }
            // All other changes are operations. They get here only if their device does not exist.
            _ => Err(NotApplied::NoDevice),
        }
    }
}

fn record(failures: &mut Vec<Failure>, change: KernelChange, outcome: Result<(), NotApplied>) {
    match outcome {
        Ok(()) => {}
        // The object to delete does not exist, or the object to set was deleted with its pod. The next pass checks it.
        Err(NotApplied::Netlink(error)) if error.is_missing() && may_be_gone(&change) => {}
        Err(NotApplied::Sysctl { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound && may_be_gone(&change) => {}
        Err(reason) => {
            let is_gone = match &reason {
                NotApplied::NoDevice => true,
                NotApplied::Sysctl { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
                _ => false,
            };
            let not_made = |failure: &Failure| match (&failure.change, &change) {
                (KernelChange::CreateLink(device, _), KernelChange::SetSysctl { path, .. }) => {
                    device.name().is_some_and(|name| path.contains(&format!("/{name}/")))
                }
                (KernelChange::CreateLink(..), _) => true,
                _ => false,
            };
            let follows = is_gone && failures.iter().any(not_made);
            failures.push(Failure { change, reason, remedy: None, follows });
        }
    }
}

/// Whether the change deletes an object. Packets whose path needs it are lost from then on.
fn is_deletion(change: &KernelChange) -> bool {
    matches!(
        change,
        KernelChange::DeleteLink(..)
            | KernelChange::DeleteRoute(_)
            | KernelChange::DeleteConflicting(_)
            | KernelChange::DeleteFdbEntry(..)
            | KernelChange::DeleteNeighbour(..)
            | KernelChange::DeleteAddress(..)
            | KernelChange::DeletePod(..)
    )
}

/// Whether a missing object is not a failure of the change.
fn may_be_gone(change: &KernelChange) -> bool {
    match change {
        change if is_deletion(change) => true,
        KernelChange::UpdateSet { .. }
        | KernelChange::SetPod(..)
        | KernelChange::SetFdbEntry(Device::Pod(_), ..)
        | KernelChange::SetNeighbour(Device::Pod(_), ..) => true,
        KernelChange::SetRoute(_, route) => matches!(route.target, RouteTarget::Device(Device::Pod(_))),
        KernelChange::SetSysctl { path, .. } => sysctl::may_be_missing(path),
        _ => false,
    }
}

/// Why a change failed.
#[derive(Debug, thiserror::Error)]
pub enum NotApplied {
    /// The kernel refused the change.
    #[error(transparent)]
    Netlink(#[from] Error),
    /// The kernel setting cannot be written: `/proc/sys` is read-only in the container, or a security module denies it.
    ///
    /// Remedy: run the command in the text on the host, or follow the other remedy in the text.
    #[error("{source}. Run `{command}` on the host and make it persistent, or {}", sysctl::remedy(source))]
    Sysctl {
        /// Error of the kernel.
        source: std::io::Error,
        /// The command that writes the setting.
        command: String,
    },
    /// The interface that the change belongs to does not exist: its creation failed, or another program deleted it.
    ///
    /// Remedy: correct the failed creation of the interface, if there is one. The next pass retries the change.
    #[error("its device does not exist")]
    NoDevice,
    /// Another program deleted the interface immediately after its creation.
    ///
    /// Remedy: find the program that deletes interfaces of Polder. The next pass creates the interface again.
    #[error("the device was created, but does not exist any more")]
    Vanished,
    /// The plan contains the creation of an interface that Polder does not create.
    ///
    /// Remedy: none, this is an error in Polder: report it with the output of `polderctl plan`.
    #[error("it is not a device of Polder")]
    NotOurs,
}

/// The netlink operations of the change; `None` if it has none, or if its device does not exist.
fn operations(change: &KernelChange, indexes: &BTreeMap<Device, IfIndex>) -> Option<Vec<Operation>> {
    let index = |device: &Device| match device {
        Device::Uplink(index) => Some(*index),
        _ => indexes.get(device).copied(),
    };
    let one = |operation| Some(vec![operation]);
    match change {
        KernelChange::AdjustLink(device, own) => {
            let index = index(device)?;
            let adjusted = link::change_index(index).mac(own.mac).mtu(own.mtu);
            let mut operations = vec![adjusted.alias(&device.mark()?).up().into()];
            match &own.kind {
                DeviceKind::Tunnel(tunnel) => operations.extend(tunnel.adjust(index)),
                DeviceKind::Bridge { filters_vlans: false } => operations.push(link::without_vlans(index)),
                _ => {}
            }
            Some(operations)
        }
        KernelChange::RenameLink(device, index) => {
            let link = || link::change_index(*index);
            Some(vec![link().down().into(), link().name(device.name()?).into(), link().up().into()])
        }
        KernelChange::AddAddress(device, network) => one(address::add(index(device)?, *network)),
        KernelChange::DeleteAddress(device, network) => one(address::delete(index(device)?, *network)),
        KernelChange::SetPod(name, port) => {
            let pod = index(&Device::Pod(name.clone()))?;
            let bridge = if port.is_some() { Some(index(&Device::Bridge)?) } else { None };
            let mut operations = vec![link::change_index(pod).controller(bridge).into()];
            operations.extend(port.map(|port| link::change_index(pod).port(&port).into()));
            // Without a bridge, the pod's packets arrive on this interface.
            let settings = link::change_index(pod);
            let settings = if port.is_none() { settings.forwarding() } else { settings };
            operations.push(settings.up().into());
            Some(operations)
        }
        KernelChange::SetNeighbour(device, address, mac) => {
            one(Neighbour { index: index(device)?, address: *address, mac: *mac }.replace())
        }
        KernelChange::DeleteNeighbour(device, address, mac) => {
            one(Neighbour { index: index(device)?, address: *address, mac: *mac }.delete())
        }
        KernelChange::SetFdbEntry(device, mac, to) => {
            one(FdbEntry { index: index(device)?, mac: *mac, to: *to }.replace())
        }
        KernelChange::DeleteFdbEntry(device, mac, to) => {
            one(FdbEntry { index: index(device)?, mac: *mac, to: *to }.delete())
        }
        KernelChange::SetRoute(destination, route) => one(route::replace(&Route {
            destination: *destination,
            target: kernel_target(route, &index)?,
            source: route.source,
            mtu: route.mtu,
        })),
        KernelChange::DeleteRoute(destination) => one(route::delete(*destination)),
        KernelChange::DeleteConflicting(conflicting) => one(conflicting.delete()),
        KernelChange::DeletePod(_, index) => one(link::delete(*index)),
        KernelChange::CreateLink(..)
        | KernelChange::DeleteLink(..)
        | KernelChange::SetSysctl { .. }
        | KernelChange::InstallFilter(_)
        | KernelChange::UpdateSet { .. }
        | KernelChange::RefillSet { .. } => None,
    }
}

fn kernel_target(route: &OwnRoute, index: &impl Fn(&Device) -> Option<IfIndex>) -> Option<KernelTarget> {
    Some(match &route.target {
        RouteTarget::Device(device) => KernelTarget::Link { index: index(device)? },
        RouteTarget::Unreachable => KernelTarget::Unreachable,
        RouteTarget::Direct(device, via) => {
            KernelTarget::Gateway { index: index(device)?, gateway: *via, onlink: false }
        }
        RouteTarget::Tunnel(family, gateway) => {
            let index = index(&Device::Tunnel(*family))?;
            KernelTarget::Gateway { index, gateway: *gateway, onlink: true }
        }
    })
}

#[cfg(test)]
mod tests {
    use polder_api::{Family, PerFamily};
    use polder_netlink::link::{Link, LinkKind, Vxlan};

    use super::super::tunnel::Tunnel;
    use super::*;

    fn vxlan(vni: u32) -> Vxlan {
        Vxlan { vni, port: 8472, local: None, learning: false }
    }

    fn link(name: &str, vni: u32) -> Link {
        Link {
            index: IfIndex::new(7),
            name: name.to_owned(),
            up: true,
            running: true,
            has_neighbours: true,
            mac: None,
            mtu: 1450,
            controller: None,
            peer: None,
            alias: None,
            kind: LinkKind::Vxlan(vxlan(vni)),
            filters_vlans: false,
            calls_iptables: PerFamily::default(),
            port: None,
            makes_link_local: None,
            ipv4_forwarding: false,
        }
    }

    #[test]
    fn the_failure_of_a_tunnel_names_the_device_that_prevents_it() {
        let change = KernelChange::DeleteLink(Device::Tunnel(Family::V4), IfIndex::new(3));
        let text = |remedy| {
            let (change, reason) = (change.clone(), NotApplied::NoDevice);
            Failure { change, reason, remedy, follows: false }.to_string()
        };
        let own = Tunnel::Vxlan(vxlan(1));
        for (name, vni) in [("vx9", 2), ("polder.vx6", 1)] {
            let remedy = own.conflict_remedy(&link(name, vni));
            assert_eq!(text(remedy), format!("{change}: its device does not exist"), "{name}");
        }
        for vni in [0, 1] {
            let expected = format!(
                "{change}: its device does not exist. Device vx9 has port 8472 and VNI {vni}. If no other network uses \
                 it: ip link delete vx9. Otherwise give Polder another port or VNI: polderctl cluster set --help"
            );
            assert_eq!(text(own.conflict_remedy(&link("vx9", vni))), expected);
        }
    }
}
