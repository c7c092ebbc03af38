//! Deletes the tracked connections of released addresses, so that the next pod with such an address does not receive
//! packets for the last one.
//!
//! The kernel walks its complete table of connections for that, so one walk serves all addresses that were released
//! within some seconds. It ends long before the cool-down of the addresses.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_netlink::Error;
use polder_netlink::nft::FilterSocket;
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::debug;

use crate::owner::Owner;

/// Addresses that are released within this time are handled together. The shortest cool-down is 10 s.
const BATCH: Duration = Duration::from_secs(2);

/// Released addresses whose tracked connections are not deleted yet.
#[derive(Debug, Default)]
pub struct ReleasedAddresses {
    addresses: Mutex<Addresses>,
    added: Notify,
    deleted: Notify,
}

#[derive(Debug, Default)]
struct Addresses {
    /// The next walk deletes their connections.
    waiting: BTreeSet<IpAddr>,
    /// The current walk deletes their connections.
    in_progress: BTreeSet<IpAddr>,
}

impl ReleasedAddresses {
    /// Adds addresses that no pod uses any more.
    pub fn add(&self, released: &[IpAddr]) {
        if !released.is_empty() {
            self.lock().waiting.extend(released);
            self.added.notify_one();
        }
    }

    /// Removes addresses that were given out again, before a pod uses them: only the attachment that had an address gets
    /// it before the cool-down ends, and its connections may go on. Waits if a walk for them has begun.
    pub async fn reuse(&self, addresses: &[IpAddr]) {
        loop {
            let deleted = self.deleted.notified();
            {
                let mut released = self.lock();
                released.waiting.retain(|address| !addresses.contains(address));
                if !addresses.iter().any(|address| released.in_progress.contains(address)) {
                    return;
                }
            }
            deleted.await;
        }
    }

    /// Waits for addresses, and moves all to the current walk.
    async fn begin(&self) -> BTreeSet<IpAddr> {
        loop {
            self.added.notified().await;
            sleep(BATCH).await;
            let mut addresses = self.lock();
            if !addresses.waiting.is_empty() {
                addresses.in_progress = std::mem::take(&mut addresses.waiting);
                return addresses.in_progress.clone();
            }
        }
    }

    fn end(&self) {
        self.lock().in_progress.clear();
        self.deleted.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Addresses> {
        // Each change of the sets is complete: a panic elsewhere leaves them valid.
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernel's table of tracked connections.
pub trait Connections {
    /// Deletes the connections of the addresses. Returns their number.
    fn delete(&self, addresses: BTreeSet<IpAddr>) -> impl Future<Output = Result<usize, Error>>;
}

impl Connections for Owner<FilterSocket> {
    async fn delete(&self, addresses: BTreeSet<IpAddr>) -> Result<usize, Error> {
        self.run(move |socket| match socket.connections()? {
            0 => Ok(0),
            _ => socket.forget_connections(&addresses),
        })
        .await
    }
}

/// Deletes the connections of all addresses that are added.
#[derive(Debug)]
pub struct Task<C = Owner<FilterSocket>> {
    /// The addresses.
    pub released: Arc<ReleasedAddresses>,
    /// The kernel's table.
    pub connections: C,
}

impl<C: Connections> Task<C> {
    /// Runs for ever.
    pub async fn run(self) {
        loop {
            let addresses = self.released.begin().await;
            match self.connections.delete(addresses).await {
                Ok(deleted) => debug!(deleted, "deleted the tracked connections of released addresses"),
                Err(error) => debug!(%error, "cannot delete the tracked connections of released addresses"),
            }
            self.released.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
    use tokio::time::timeout;

    use super::*;

    /// A table whose walks end when the test allows it.
    struct Fake {
        walks: UnboundedSender<BTreeSet<IpAddr>>,
        may_end: Arc<Notify>,
    }

    impl Connections for Fake {
        async fn delete(&self, addresses: BTreeSet<IpAddr>) -> Result<usize, Error> {
            let _ = self.walks.send(addresses);
            self.may_end.notified().await;
            Ok(0)
        }
    }

    fn start() -> (Arc<ReleasedAddresses>, UnboundedReceiver<BTreeSet<IpAddr>>, Arc<Notify>) {
        let (walks, begun) = mpsc::unbounded_channel();
        let (released, may_end) = (Arc::<ReleasedAddresses>::default(), Arc::<Notify>::default());
        let connections = Fake { walks, may_end: Arc::clone(&may_end) };
        tokio::spawn(Task { released: Arc::clone(&released), connections }.run());
        (released, begun, may_end)
    }

    fn addresses<const N: usize>(these: [&str; N]) -> Vec<IpAddr> {
        these.map(|address| address.parse().unwrap()).into()
    }

    fn set<const N: usize>(these: [&str; N]) -> BTreeSet<IpAddr> {
        addresses(these).into_iter().collect()
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_released_within_two_seconds_need_one_walk() {
        let (released, mut walks, may_end) = start();
        released.add(&addresses(["10.0.0.1"]));
        sleep(BATCH / 2).await;
        released.add(&addresses(["10.0.0.2", "fd00::2"]));
        assert_eq!(walks.recv().await.unwrap(), set(["10.0.0.1", "10.0.0.2", "fd00::2"]));
        released.add(&addresses(["10.0.0.3"]));
        may_end.notify_one();
        assert_eq!(walks.recv().await.unwrap(), set(["10.0.0.3"]), "it was released during the walk");
        may_end.notify_one();
        assert!(timeout(10 * BATCH, walks.recv()).await.is_err(), "nothing was released since");
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_is_given_out_again_keeps_its_connections() {
        let (released, mut walks, _) = start();
        released.add(&addresses(["10.0.0.1", "10.0.0.2"]));
        released.reuse(&addresses(["10.0.0.1"])).await;
        assert_eq!(walks.recv().await.unwrap(), set(["10.0.0.2"]));
        // The walk for the other address does not delay it.
        released.reuse(&addresses(["10.0.0.1"])).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_given_out_again_only_after_a_walk_that_has_begun() {
        let (released, mut walks, may_end) = start();
        released.add(&addresses(["10.0.0.1"]));
        walks.recv().await.unwrap();
        let again = addresses(["10.0.0.1"]);
        let mut reuse = Box::pin(released.reuse(&again));
        assert!(timeout(BATCH, &mut reuse).await.is_err(), "the walk would delete its new connections");
        may_end.notify_one();
        reuse.await;
    }
}
