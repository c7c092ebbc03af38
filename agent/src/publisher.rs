//! The publisher's task ([`polder_ipam::tasks::publisher`]) on a node: what it rests on, and who wakes it.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use polder_ipam::publication::Basis;
use polder_ipam::tasks::publisher::{PublisherHost, run};
use polder_store::Store;

use crate::bell::Wake;
use crate::node::Node;

/// What is published, and who wakes the publisher.
#[derive(Debug)]
pub struct Task {
    /// The node.
    pub node: Arc<Node>,
    /// Rings when an attachment came or went.
    pub wake: Wake,
}

impl Task {
    /// Runs for ever. Keeps the lease of a living node, too.
    pub async fn run(self) {
        // What it asks etcd makes it large.
        Box::pin(run(&self, self.node.board.membership.me())).await;
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
        self.node.board.basis()
    }

    async fn changed(&self, basis: Basis) {
        let board = &self.node.board;
        let (mut view, mut holdings) = (board.records.changes(), board.membership.changes());
        while board.basis() == basis {
            // Cancel-safe, both: what is not taken is seen the next time. Whoever has their senders ends only with the agent.
            tokio::select! {
                _ = view.changed() => {}
                _ = holdings.changed() => {}
            }
        }
    }

    async fn rung(&self) {
        self.wake.rung().await;
    }

    async fn pause(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}
