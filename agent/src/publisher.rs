//! The publisher's task ([`polder_ipam::tasks::publisher`]) on a node: its basis and its wake-up sources.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use polder_ipam::publication::Basis;
use polder_ipam::tasks::publisher::{PublisherHost, run};
use polder_store::Store;

use crate::node::Node;
use crate::wake::WakeReceiver;

/// The publisher's node and wake-up source.
#[derive(Debug)]
pub struct Task {
    /// The node.
    pub node: Arc<Node>,
    /// Wakes the task when an attachment was added or removed.
    pub wake: WakeReceiver,
}

impl Task {
    /// Runs for ever. Also renews the node's lease.
    pub async fn run(self) {
        // Boxed because its etcd requests make the future large.
        Box::pin(run(&self, self.node.node_state.membership.me())).await;
    }
}

impl Deref for Task {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl PublisherHost for Task {
    type Leases = Store;

    fn leases(&self) -> &Store {
        &self.node.store
    }

    fn basis(&self) -> Basis {
        self.node.node_state.basis()
    }

    async fn changed(&self, basis: Basis) {
        let node_state = &self.node.node_state;
        let (mut view, mut membership_changes) =
            (node_state.records.changes(), node_state.membership.changes());
        while node_state.basis() == basis {
            // Both are cancel-safe: a change that is not received now is received in the next iteration. The senders
            // exist as long as the agent.
            tokio::select! {
                _ = view.changed() => {}
                _ = membership_changes.changed() => {}
            }
        }
    }

    async fn attachment_signal(&self) {
        self.wake.woken().await;
    }

    async fn pause(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}
