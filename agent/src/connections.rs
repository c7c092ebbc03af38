//! Deletes the tracked connections of released addresses, so that the next pod with such an address does not receive
//! packets for the last one.
//!
//! The kernel walks its complete table of connections for that, so one walk serves all addresses that were released
//! within some seconds. It ends long before the cool-down of the addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_api::Attachment;
use polder_netlink::Error;
use polder_netlink::nft::FilterSocket;
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::owner::Owner;

/// Addresses that are released within this time are handled together. The shortest cool-down is 10 s.
const BATCH: Duration = Duration::from_secs(2);

/// Released addresses whose tracked connections are not deleted yet.
#[derive(Debug, Default)]
pub struct ReleasedAddresses {
    addresses: Mutex<Addresses>,
    added: Notify,
    /// An address is needed before its turn.
    needed: Notify,
    deleted: Notify,
}

#[derive(Debug, Default)]
struct Addresses {
    /// The next walk deletes their connections. With the attachment that had the address last, if it is known.
    waiting: BTreeMap<IpAddr, Option<Attachment>>,
    /// The current walk deletes their connections.
    in_progress: BTreeSet<IpAddr>,
}

impl ReleasedAddresses {
    /// Adds addresses that no pod uses any more.
    pub fn add(&self, released: &[IpAddr], last: Option<&Attachment>) {
        if !released.is_empty() {
            let released = released.iter().map(|address| (*address, last.cloned()));
            self.lock().waiting.extend(released);
            self.added.notify_one();
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

    /// Waits for addresses, and moves all to the current walk.
    async fn begin(&self) -> BTreeSet<IpAddr> {
        loop {
            self.added.notified().await;
            tokio::select! {
                () = sleep(BATCH) => {}
                () = self.needed.notified() => {}
            }
            let mut addresses = self.lock();
            if !addresses.waiting.is_empty() {
                addresses.in_progress = std::mem::take(&mut addresses.waiting).into_keys().collect();
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
                // The next pod with such an address may receive packets for the last one until they expire.
                Err(error) => warn!(%error, "cannot delete the tracked connections of released addresses"),
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

    fn attachment(container: &str) -> Attachment {
        format!("net/{container}/eth0").parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_released_within_two_seconds_need_one_walk() {
        let (released, mut walks, may_end) = start();
        released.add(&addresses(["10.0.0.1"]), None);
        sleep(BATCH / 2).await;
        released.add(&addresses(["10.0.0.2", "fd00::2"]), Some(&attachment("c1")));
        assert_eq!(walks.recv().await.unwrap(), set(["10.0.0.1", "10.0.0.2", "fd00::2"]));
        released.add(&addresses(["10.0.0.3"]), None);
        may_end.notify_one();
        assert_eq!(walks.recv().await.unwrap(), set(["10.0.0.3"]), "it was released during the walk");
        may_end.notify_one();
        assert!(timeout(10 * BATCH, walks.recv()).await.is_err(), "nothing was released since");
    }

    #[tokio::test(start_paused = true)]
    async fn an_attachment_that_gets_its_address_again_keeps_its_connections() {
        let (released, mut walks, _) = start();
        let last = attachment("c1");
        released.add(&addresses(["10.0.0.1", "10.0.0.2"]), Some(&last));
        released.reuse(&addresses(["10.0.0.1"]), &last).await;
        assert_eq!(walks.recv().await.unwrap(), set(["10.0.0.2"]));
        // The walk for the other address does not delay it.
        released.reuse(&addresses(["10.0.0.1"]), &last).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_goes_to_another_attachment_only_after_a_walk() {
        let (released, mut walks, may_end) = start();
        for last in [None, Some(attachment("c1"))] {
            released.add(&addresses(["10.0.0.1"]), last.as_ref());
            let (again, other) = (addresses(["10.0.0.1"]), attachment("c2"));
            let mut reuse = Box::pin(released.reuse(&again, &other));
            let begun = tokio::time::Instant::now();
            tokio::select! {
                () = &mut reuse => panic!("it got the connections of the last one"),
                walk = walks.recv() => assert_eq!(walk.unwrap(), set(["10.0.0.1"])),
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
        released.add(&addresses(["10.0.0.1"]), Some(&last));
        walks.recv().await.unwrap();
        let again = addresses(["10.0.0.1"]);
        let mut reuse = Box::pin(released.reuse(&again, &last));
        assert!(timeout(BATCH, &mut reuse).await.is_err(), "the walk would delete its new connections");
        may_end.notify_one();
        reuse.await;
    }
}
