//! The task that reads from the datastore which agents are alive.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use polder_api::NodeName;
use polder_ipam::view::{View, ViewSource};
use polder_store::Store;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::{Leases, MISSING_BEFORE_DEAD, with_lease};
use crate::node_state::Records;

/// Longest time between two reads in a cluster of normal size.
const LONGEST: Duration = Duration::from_secs(60);

/// Added for each node: in a large cluster, all agents together read about 20 lists of all leases per second.
const FOR_EACH: Duration = Duration::from_millis(50);

/// The inputs of the task, and the value that it publishes.
#[derive(Debug)]
pub struct Task {
    /// This node, whose own lease is not checked.
    pub node: NodeName,
    /// Configured time between two periodic passes (`resync_seconds`).
    pub resync: Duration,
    /// The datastore with the leases.
    pub store: Store,
    /// The cluster's records, for the list of nodes.
    pub records: Records,
    /// The nodes whose agents are not alive.
    pub leases: watch::Sender<Arc<Leases>>,
}

impl Task {
    /// Runs for ever.
    pub async fn run(self) {
        let mut view = self.records.changes();
        // Spreads the reads of agents that were started together.
        let mut next = Instant::now() + self.resync.min(LONGEST).mul_f64(fraction(&self.node));
        let mut was_current = false;
        loop {
            if !is_current(&view.borrow_and_update()) {
                if was_current {
                    next = self.forget();
                }
                if view.wait_for(|view| is_current(view)).await.is_err() {
                    return;
                }
            }
            was_current = true;
            // Both are cancel-safe: a wait receives nothing. The datastore can also become unreachable during a read.
            tokio::select! {
                () = sleep_until(next) => {}
                lost = view.wait_for(|view| !is_current(view)) => match lost {
                    Ok(_) => {
                        (next, was_current) = (self.forget(), false);
                        continue;
                    }
                    Err(_) => return,
                },
            }
            let now = Instant::now();
            let known = Arc::clone(&self.leases.borrow());
            let leases = self.poll_once(&known).await;
            log(&known, &leases);
            next = leases.next(self.pause(), now);
            drop(self.leases.send_replace(Arc::new(leases)));
        }
    }

    /// Resets the state and returns the time of the next read: leases may be missing only because the datastore was
    /// unreachable.
    fn forget(&self) -> Instant {
        self.leases.send_modify(|leases| *leases = Arc::new(leases.while_unreachable()));
        Instant::now() + MISSING_BEFORE_DEAD
    }

    /// Reads the leases, if there are other nodes.
    async fn poll_once(&self, known: &Leases) -> Leases {
        let me = &self.node;
        let others: BTreeSet<NodeName> =
            self.records.view().nodes.keys().filter(|name| *name != me).cloned().collect();
        let answer = if others.is_empty() { Ok(BTreeSet::new()) } else { with_lease(&self.store).await };
        // Without an answer the state is unknown, also that of leases that were missing before.
        let Ok(with_lease) = answer else { return known.while_unreachable() };
        let mut leases = known.clone();
        leases.apply(&others, &with_lease, Instant::now());
        leases
    }

    /// The time between two reads: `resync`, or longer in a large cluster.
    fn pause(&self) -> Duration {
        let nodes = u32::try_from(self.records.view().nodes.len()).unwrap_or(u32::MAX);
        let pause = self.resync.min(LONGEST).max(FOR_EACH.saturating_mul(nodes));
        pause.mul_f64(0.9 + 0.2 * fraction(&self.node))
    }
}

/// Whether the records are current: read from the datastore, which is reachable.
fn is_current(view: &View) -> bool {
    view.source == ViewSource::Store && view.lost.is_none()
}

/// A number from 0 to 1 that is different on each node.
fn fraction(node: &NodeName) -> f64 {
    // FNV-1a.
    let hash = node
        .as_str()
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    f64::from(hash) / f64::from(u32::MAX)
}

fn log(before: &Leases, now: &Leases) {
    let names = |leases: &Leases| leases.not_alive().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>();
    let (before, after) = (names(before), names(now));
    after.difference(&before).for_each(|node| warn!(%node, "the node's agent is not alive"));
    if now.are_known() {
        before
            .difference(&after)
            .for_each(|node| info!(%node, "the node's agent is alive again, or the node was removed"));
    }
}

#[cfg(test)]
mod tests {
    use polder_ipam::key::Key;
    use polder_ipam::store::{StoreError, Txn, Write};
    use polder_store::Embedded;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn while_the_datastore_is_unreachable_leases_are_unknown() {
        let max_wait = Duration::from_secs(30);
        let folder = tempfile::tempdir().unwrap();
        let store = Store::Embedded(Embedded::open(&folder.path().join("store")).unwrap());
        let mut current = View::default();
        current.source = ViewSource::Store;
        let (watcher, view) = watch::channel(Arc::new(current));
        let (leases, mut receiver) = watch::channel(Arc::<Leases>::default());
        let (node, resync) = ("n1".parse().unwrap(), Duration::from_millis(1));
        let task = Task { node, resync, store, records: Records::new(view), leases };
        let running = tokio::spawn(task.run());
        drop(timeout(max_wait, receiver.wait_for(|leases| leases.are_known())).await.unwrap().unwrap());
        let no_answer = StoreError::NoAnswer { store: "etcd".to_owned(), reason: "no reply".to_owned() };
        watcher.send_modify(|view| Arc::make_mut(view).lost = Some(no_answer.into()));
        drop(timeout(max_wait, receiver.wait_for(|leases| !leases.are_known())).await.unwrap().unwrap());
        running.abort();
    }

    /// The record key of that node's lease.
    fn lease(node: &str) -> String {
        Key::Lease(node.parse().unwrap()).to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_without_a_lease_is_reported_until_it_has_one() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::Embedded(Embedded::open(&folder.path().join("store")).unwrap());
        let mut current = crate::fixture::view();
        let other = current.nodes.values().next().unwrap().clone();
        for name in ["n2", "n3"] {
            current.nodes.insert(name.parse().unwrap(), other.clone());
        }
        let write = async |write| {
            store.transact(&Txn { writes: vec![write], ..Txn::default() }).await.unwrap();
        };
        write(Write::Put { key: lease("n2"), value: b"{}".to_vec() }).await;
        let (_follower, view) = watch::channel(Arc::new(current));
        let (leases, receiver) = watch::channel(Arc::<Leases>::default());
        let (node, resync) = ("n1".parse().unwrap(), Duration::from_secs(30));
        let task = Task { node, resync, store: store.clone(), records: Records::new(view), leases };
        let mut running = Box::pin(task.run());
        let mut go_on = async |time: Duration| {
            assert!(timeout(time, &mut running).await.is_err(), "the task ended");
            receiver.borrow().not_alive().map(|(name, _)| name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(go_on(resync * 2 + MISSING_BEFORE_DEAD).await, ["n3"], "this node itself is not reported");
        write(Write::Delete { key: lease("n2") }).await;
        assert_eq!(go_on(resync * 2).await, ["n2", "n3"]);
        for node in ["n2", "n3"] {
            write(Write::Put { key: lease(node), value: b"{}".to_vec() }).await;
        }
        assert_eq!(go_on(resync * 2).await, Vec::<String>::new());
    }
}
