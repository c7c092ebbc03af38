//! The pods of this node with the addresses that their kernel entries should have: for the monitor, which compares
//! notifications with them, and for the record of repairs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_api::{IfName, Mac, PortMapping, TransportProtocol};
use polder_ipam::ledger::AttachmentEntry;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How long a pod counts as changing after its ADD or DEL has begun and was last in progress: longer than a pass takes.
const CHANGING: Duration = Duration::from_secs(5);

/// The longest time of an ADD or DEL: the agent closes a connection that is silent for longer.
const LONGEST: Duration = Duration::from_secs(60);

/// A pod whose interface exists or is being created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPod {
    /// Its interface on the host.
    pub name: IfName,
    /// MAC address of its interface in the pod.
    pub mac: Mac,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The host ports that lead to it.
    pub ports: Vec<PortMapping>,
}

impl LocalPod {
    /// The pod of an attachment whose interface Polder creates.
    pub fn of(held: &AttachmentEntry) -> Self {
        let (addresses, ports) = (held.addresses.clone(), held.ports.clone());
        Self { name: held.attachment.host_interface(), mac: held.mac, addresses, ports }
    }
}

/// The pods of this node.
#[derive(Debug, Default)]
pub struct LocalPods {
    pods: Mutex<Pods>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Pods {
    all: BTreeMap<IfName, LocalPod>,
    by_address: BTreeMap<IpAddr, IfName>,
    /// Pods with the time when their ADD or DEL began or was last in progress.
    changing: Vec<(Instant, LocalPod)>,
}

impl LocalPods {
    /// The pods of the ledger, whose ADDs an earlier agent has served.
    pub fn of_ledger<'a>(attachments: impl Iterator<Item = &'a AttachmentEntry>) -> Self {
        let pods = Self::default();
        attachments.filter(|held| held.has_interface()).for_each(|held| pods.add(LocalPod::of(held)));
        pods
    }

    /// Adds a pod whose ADD has begun, or that an earlier agent has added.
    pub fn add(&self, pod: LocalPod) {
        let mut pods = self.lock();
        pods.by_address.extend(pod.addresses.iter().map(|address| (*address, pod.name.clone())));
        pods.all.insert(pod.name.clone(), pod.clone());
        pods.note_change(pod);
        self.changed.notify_one();
    }

    /// Removes a pod whose DEL has begun. Succeeds if it does not exist.
    pub fn remove(&self, pod: LocalPod) {
        let mut pods = self.lock();
        pods.all.remove(&pod.name);
        for address in &pod.addresses {
            // Another pod may have the address already.
            if pods.by_address.get(address) == Some(&pod.name) {
                pods.by_address.remove(address);
            }
        }
        pods.note_change(pod);
        self.changed.notify_one();
    }

    /// Waits until a pod was added or removed since the last call. For one task: the one that attaches programs to pods'
    /// interfaces.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Removes the pod with that interface. Succeeds if it does not exist.
    pub fn remove_interface(&self, name: &IfName) {
        if let Some(pod) = self.with_interface(name) {
            self.remove(pod);
        }
    }

    /// The pod with that address.
    pub fn with_address(&self, address: IpAddr) -> Option<LocalPod> {
        let pods = self.lock();
        pods.by_address.get(&address).and_then(|name| pods.all.get(name)).cloned()
    }

    /// The pod with that interface on the host.
    pub fn with_interface(&self, name: &IfName) -> Option<LocalPod> {
        self.lock().all.get(name).cloned()
    }

    /// The addresses of the pods with that UDP host port.
    pub fn with_udp_port(&self, port: u16) -> BTreeSet<IpAddr> {
        let has_port = |pod: &&LocalPod| {
            let mut udp = pod.ports.iter().filter(|known| known.protocol == TransportProtocol::Udp);
            udp.any(|known| known.host_port.get() == port)
        };
        self.lock().all.values().filter(has_port).flat_map(|pod| pod.addresses.iter().copied()).collect()
    }

    /// All pods.
    pub fn all(&self) -> Vec<LocalPod> {
        self.lock().all.values().cloned().collect()
    }

    /// The pods whose ADD or DEL is in progress or has just ended: their kernel entries may be incomplete.
    pub fn changing(&self, is_in_flight: impl Fn(&IfName) -> bool) -> Vec<LocalPod> {
        let mut pods = self.lock();
        for (last, pod) in &mut pods.changing {
            if is_in_flight(&pod.name) {
                *last = Instant::now();
            }
        }
        pods.changing.retain(|(last, _)| last.elapsed() <= CHANGING);
        pods.changing.iter().map(|(_, pod)| pod.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Pods> {
        // The monitor reads notifications also after a panic elsewhere; at worst a pass finds no difference.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pods {
    fn note_change(&mut self, pod: LocalPod) {
        self.changing.retain(|(last, _)| last.elapsed() <= LONGEST);
        self.changing.push((Instant::now(), pod));
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn pod(name: &str, addresses: &[&str]) -> LocalPod {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        LocalPod { name: name.parse().unwrap(), mac: Mac([2, 0, 0, 0, 0, 1]), addresses, ports: Vec::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_is_found_by_interface_and_address_until_its_del() {
        let pods = LocalPods::default();
        let first = pod("pld1", &["10.0.0.1", "fd00::1"]);
        pods.add(first.clone());
        assert_eq!(pods.with_interface(&first.name), Some(first.clone()));
        assert_eq!(pods.with_address(first.addresses[1]), Some(first.clone()));
        pods.remove(first.clone());
        assert_eq!(pods.with_interface(&first.name), None);
        assert_eq!(pods.with_address(first.addresses[0]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_address_of_a_released_pod_belongs_to_the_next_one() {
        let pods = LocalPods::default();
        let (old, new) = (pod("pld1", &["10.0.0.1"]), pod("pld2", &["10.0.0.1"]));
        pods.add(old.clone());
        pods.add(new.clone());
        pods.remove(old);
        assert_eq!(pods.with_address(new.addresses[0]), Some(new));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_counts_as_changing_during_its_add_or_del_and_for_some_seconds_after() {
        let pods = LocalPods::default();
        let first = pod("pld1", &["10.0.0.1"]);
        pods.add(first.clone());
        assert_eq!(pods.changing(|_| false), std::slice::from_ref(&first));
        advance(CHANGING / 2).await;
        assert_eq!(pods.changing(|_| true), std::slice::from_ref(&first), "a slow ADD");
        advance(CHANGING / 2 + CHANGING / 4).await;
        assert_eq!(pods.changing(|_| false), std::slice::from_ref(&first), "it has just ended");
        advance(CHANGING).await;
        assert_eq!(pods.changing(|_| false), []);
        pods.remove(first.clone());
        assert_eq!(pods.changing(|_| false), [first]);
    }
}
