//! Deletes the tracked connections of released addresses, so that the next pod with such an address does not receive
//! packets for the last one, and the UDP connections to host ports that lead elsewhere.
//!
//! The kernel walks its complete table of connections for that, so one walk serves all addresses that were released
//! within some seconds. It ends long before the cool-down of the addresses. A host port does not wait for more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_api::{Attachment, PortMapping, TransportProtocol};
use polder_netlink::Error;
use polder_netlink::conntrack::StaleEntries;
use polder_netlink::nft::FilterSocket;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, warn};

use crate::local_pods::LocalPods;
use crate::node_state::Passes;
use crate::owner::Owner;

/// Addresses that are released within this time are handled together. The shortest cool-down is 10 s.
const BATCH: Duration = Duration::from_secs(2);

/// Shortest time between two walks for host ports of new pods. A walk takes some 12 ms of a core, without preemption.
const PORT_INTERVAL: Duration = Duration::from_millis(500);

/// Tracked connections that are not deleted yet: of released addresses, and to host ports that lead to another pod now.
#[derive(Debug, Default)]
pub struct StaleConnections {
    queue: Mutex<Queue>,
    added: Notify,
    /// An address is needed before its turn.
    needed: Notify,
    /// A pod has a host port now.
    port_added: Notify,
    deleted: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    /// The next walk deletes their connections. With the attachment that had the address last, if it is known.
    waiting: BTreeMap<IpAddr, Option<Attachment>>,
    /// UDP host ports: the next walk deletes the connections to them that lead elsewhere.
    ports: BTreeSet<u16>,
    /// Whether one of `ports` is that of a new pod: flows that lead elsewhere do not reach it.
    has_new_port: bool,
    /// The current walk deletes their connections.
    in_progress: BTreeSet<IpAddr>,
}

/// Whether the packet filter translates packets to a host port now, or no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortChange {
    Added,
    Released,
}

impl StaleConnections {
    /// Starts with the released addresses of the ledger: an earlier agent may have ended before it deleted their
    /// connections.
    pub fn of_ledger(cooling_down: &[IpAddr]) -> Self {
        let stale = Self::default();
        stale.add_released(cooling_down, None);
        stale
    }

    /// Adds addresses that no pod uses any more.
    pub fn add_released(&self, released: &[IpAddr], last: Option<&Attachment>) {
        if !released.is_empty() {
            let released = released.iter().map(|address| (*address, last.cloned()));
            self.lock().waiting.extend(released);
            self.added.notify_one();
        }
    }

    /// Adds the UDP ports of these host ports, because the packet filter now translates packets to them. A flow that
    /// was tracked before would never reach the pod, as long as it sends.
    pub fn add_ports<'a>(&self, ports: impl IntoIterator<Item = &'a PortMapping>) {
        self.add_udp_ports(ports, PortChange::Added);
    }

    /// Adds the UDP ports of these host ports, because the packet filter no longer translates packets to them.
    pub fn add_released_ports<'a>(&self, ports: impl IntoIterator<Item = &'a PortMapping>) {
        self.add_udp_ports(ports, PortChange::Released);
    }

    fn add_udp_ports<'a>(&self, ports: impl IntoIterator<Item = &'a PortMapping>, change: PortChange) {
        let is_udp = |port: &&PortMapping| port.protocol == TransportProtocol::Udp;
        let udp: Vec<u16> = ports.into_iter().filter(is_udp).map(|port| port.host_port.get()).collect();
        if udp.is_empty() {
            return;
        }
        let mut queue = self.lock();
        queue.ports.extend(udp);
        self.added.notify_one();
        if change == PortChange::Added {
            queue.has_new_port = true;
            self.port_added.notify_one();
        }
    }

    /// Removes addresses that are given out again, before the attachment uses them. The connections of an address that
    /// it had itself go on. Those of an address that another attachment had are deleted first: a reserved address and
    /// an address of another IPAM plugin need no cool-down.
    pub async fn reuse(&self, addresses: &[IpAddr], attachment: &Attachment) {
        loop {
            let deleted = self.deleted.notified();
            {
                let mut released = self.lock();
                let has_again = |address: &IpAddr, last: &Option<Attachment>| {
                    addresses.contains(address) && last.as_ref() == Some(attachment)
                };
                released.waiting.retain(|address, last| !has_again(address, last));
                let is_waiting = addresses.iter().any(|address| released.waiting.contains_key(address));
                if is_waiting {
                    self.needed.notify_one();
                }
                let is_in_progress = addresses.iter().any(|address| released.in_progress.contains(address));
                if !is_waiting && !is_in_progress {
                    return;
                }
            }
            deleted.await;
        }
    }

    /// Waits for addresses or ports, and moves all to the current walk. `last` is the time of the last walk.
    async fn begin(&self, last: Option<Instant>) -> (BTreeSet<IpAddr>, BTreeSet<u16>) {
        loop {
            self.added.notified().await;
            let new_port = async {
                while !self.lock().has_new_port {
                    self.port_added.notified().await;
                }
                if let Some(last) = last {
                    sleep_until(last + PORT_INTERVAL).await;
                }
            };
            tokio::select! {
                () = sleep(BATCH) => {}
                () = self.needed.notified() => {}
                () = new_port => {}
            }
            let mut queue = self.lock();
            if !queue.waiting.is_empty() || !queue.ports.is_empty() {
                queue.in_progress = std::mem::take(&mut queue.waiting).into_keys().collect();
                queue.has_new_port = false;
                return (queue.in_progress.clone(), std::mem::take(&mut queue.ports));
            }
        }
    }

    fn end(&self) {
        self.lock().in_progress.clear();
        self.deleted.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Each change of the sets is complete: a panic elsewhere leaves them valid.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernel's table of tracked connections.
pub trait Connections {
    /// Deletes stale connections. Returns their number.
    fn delete(&self, stale: StaleEntries) -> impl Future<Output = Result<usize, Error>>;
}

impl Connections for Owner<FilterSocket> {
    async fn delete(&self, stale: StaleEntries) -> Result<usize, Error> {
        self.run(move |socket| match socket.connections()? {
            0 => Ok(0),
            _ => socket.forget_connections(&stale),
        })
        .await
    }
}

/// Deletes the stale connections that are added.
#[derive(Debug)]
pub struct Task<C = Owner<FilterSocket>> {
    /// The addresses and host ports.
    pub stale: Arc<StaleConnections>,
    /// The pods of this node, to which host ports lead.
    pub pods: Arc<LocalPods>,
    /// The addresses of the host are those of the last pass.
    pub passes: Passes,
    /// The kernel's table.
    pub connections: C,
}

impl<C: Connections> Task<C> {
    /// Runs for ever.
    pub async fn run(self) {
        let mut last = None;
        loop {
            let (addresses, ports) = self.stale.begin(last).await;
            last = Some(Instant::now());
            let udp_ports = ports.into_iter().map(|port| (port, self.pods.with_udp_port(port))).collect();
            let host = self.passes.last().map(|pass| pass.host_addresses.clone()).unwrap_or_default();
            match self.connections.delete(StaleEntries { addresses, udp_ports, host }).await {
                Ok(deleted) => {
                    debug!(deleted, "deleted the tracked connections of released addresses and ports");
                }
                // The next pod with such an address or port may receive packets for the last one until they expire.
                Err(error) => {
                    warn!(%error, "cannot delete the tracked connections of released addresses and ports");
                }
            }
            self.stale.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use polder_api::Mac;
    use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
    use tokio::sync::watch;
    use tokio::time::timeout;

    use super::*;
    use crate::local_pods::LocalPod;
    use crate::node_state::Pass;
    use crate::underlay::NotChosen;

    /// A table whose walks end when the test allows it.
    struct Fake {
        walks: UnboundedSender<StaleEntries>,
        may_end: Arc<Notify>,
    }

    impl Connections for Fake {
        async fn delete(&self, stale: StaleEntries) -> Result<usize, Error> {
            let _ = self.walks.send(stale);
            self.may_end.notified().await;
            Ok(0)
        }
    }

    /// The queue, the walks, and the signal that ends a walk. The node has one pod with a UDP host port 53.
    fn start() -> (Arc<StaleConnections>, UnboundedReceiver<StaleEntries>, Arc<Notify>) {
        let (walks, begun) = mpsc::unbounded_channel();
        let (stale, may_end) = (Arc::<StaleConnections>::default(), Arc::<Notify>::default());
        let connections = Fake { walks, may_end: Arc::clone(&may_end) };
        let pods = Arc::<LocalPods>::default();
        pods.add(LocalPod {
            name: "pld1".parse().unwrap(),
            mac: Mac([2; 6]),
            addresses: addresses(["10.0.0.9"]),
            ports: vec!["53:5353/udp".parse().unwrap(), "80:80/tcp".parse().unwrap()],
        });
        let pass = Pass { host_addresses: set(["192.0.2.1"]), ..Pass::default() };
        let (underlay, pass) = (Err(NotChosen::NotYet), Some(Arc::new(pass)));
        let passes = Passes::new(watch::channel(underlay).1, watch::channel(pass).1);
        tokio::spawn(Task { stale: Arc::clone(&stale), pods, passes, connections }.run());
        (stale, begun, may_end)
    }

    /// A walk for these addresses.
    fn walk<const N: usize>(these: [&str; N]) -> StaleEntries {
        StaleEntries { addresses: set(these), host: set(["192.0.2.1"]), ..StaleEntries::default() }
    }

    fn addresses<const N: usize>(these: [&str; N]) -> Vec<IpAddr> {
        these.map(|address| address.parse().unwrap()).into()
    }

    fn set<const N: usize>(these: [&str; N]) -> BTreeSet<IpAddr> {
        addresses(these).into_iter().collect()
    }

    fn attachment(container: &str) -> Attachment {
        format!("net/{container}/eth0").parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_released_within_two_seconds_need_one_walk() {
        let (released, mut walks, may_end) = start();
        released.add_released(&addresses(["10.0.0.1"]), None);
        sleep(BATCH / 2).await;
        released.add_released(&addresses(["10.0.0.2", "fd00::2"]), Some(&attachment("c1")));
        assert_eq!(walks.recv().await.unwrap(), walk(["10.0.0.1", "10.0.0.2", "fd00::2"]));
        released.add_released(&addresses(["10.0.0.3"]), None);
        may_end.notify_one();
        assert_eq!(walks.recv().await.unwrap(), walk(["10.0.0.3"]), "it was released during the walk");
        may_end.notify_one();
        assert!(timeout(10 * BATCH, walks.recv()).await.is_err(), "nothing was released since");
    }

    #[tokio::test(start_paused = true)]
    async fn an_attachment_that_gets_its_address_again_keeps_its_connections() {
        let (released, mut walks, _) = start();
        let last = attachment("c1");
        released.add_released(&addresses(["10.0.0.1", "10.0.0.2"]), Some(&last));
        released.reuse(&addresses(["10.0.0.1"]), &last).await;
        assert_eq!(walks.recv().await.unwrap(), walk(["10.0.0.2"]));
        // The walk for the other address does not delay it.
        released.reuse(&addresses(["10.0.0.1"]), &last).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_goes_to_another_attachment_only_after_a_walk() {
        let (released, mut walks, may_end) = start();
        for last in [None, Some(attachment("c1"))] {
            released.add_released(&addresses(["10.0.0.1"]), last.as_ref());
            let (again, other) = (addresses(["10.0.0.1"]), attachment("c2"));
            let mut reuse = Box::pin(released.reuse(&again, &other));
            let begun = Instant::now();
            tokio::select! {
                () = &mut reuse => panic!("it got the connections of the last one"),
                begun = walks.recv() => assert_eq!(begun.unwrap(), walk(["10.0.0.1"])),
            }
            assert!(begun.elapsed() < BATCH, "an ADD waits for the walk, not for further addresses");
            may_end.notify_one();
            reuse.await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_given_out_again_only_after_a_walk_that_has_begun() {
        let (released, mut walks, may_end) = start();
        let last = attachment("c1");
        released.add_released(&addresses(["10.0.0.1"]), Some(&last));
        walks.recv().await.unwrap();
        let again = addresses(["10.0.0.1"]);
        let mut reuse = Box::pin(released.reuse(&again, &last));
        assert!(timeout(BATCH, &mut reuse).await.is_err(), "the walk would delete its new connections");
        may_end.notify_one();
        reuse.await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_udp_host_port_needs_a_walk_at_once_and_another_protocol_none() {
        let (stale, mut walks, may_end) = start();
        let ports: [PortMapping; 2] = ["53:5353/udp", "80:80/tcp"].map(|port| port.parse().unwrap());
        let begun = Instant::now();
        stale.add_ports(&ports);
        let expected = StaleEntries { udp_ports: [(53, set(["10.0.0.9"]))].into(), ..walk([]) };
        assert_eq!(walks.recv().await.unwrap(), expected);
        assert!(begun.elapsed() < BATCH);
        may_end.notify_one();
        // Two more pods, one after the other.
        stale.add_ports(&ports);
        sleep(PORT_INTERVAL / 4).await;
        stale.add_ports(&ports);
        assert_eq!(walks.recv().await.unwrap(), expected, "one walk for both");
        assert!(begun.elapsed() >= PORT_INTERVAL && begun.elapsed() < BATCH);
        may_end.notify_one();
        let released = Instant::now();
        stale.add_released_ports(&ports);
        assert_eq!(walks.recv().await.unwrap(), expected);
        assert!(released.elapsed() >= BATCH, "nobody waits for a port that is released");
        may_end.notify_one();
        stale.add_ports(&ports[1..]);
        assert!(timeout(10 * BATCH, walks.recv()).await.is_err(), "TCP connections end by themselves");
    }
}
