//! Tells the store who has which address: for people and tools, behind the ADD, never for safety.

use std::sync::Arc;
use std::time::Duration;

use polder_ipam::change::Member;
use polder_ipam::publication::{self, Published};
use polder_ipam::registration::Holdings;
use polder_ipam::tasks::publisher::{ALIVE_SECONDS, synchronize};
use polder_ipam::view::View;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;

use crate::bell::Wake;
use crate::node::Node;

/// What happens within this time goes together.
const BATCH: Duration = Duration::from_millis(100);

/// Before another attempt.
const RETRY: Duration = Duration::from_secs(5);

/// What is published, and who wakes the publisher.
#[derive(Debug)]
pub struct Task {
    /// The node.
    pub node: Arc<Node>,
    /// Rings when an attachment came or went.
    pub wake: Wake,
}

impl Task {
    /// Runs for ever. Keeps the lease of a living node, too. Begins anew whenever the node's own record was written, or
    /// the store has lost records: these may be among them, or be there again.
    pub async fn run(self) {
        let Self { node, wake } = self;
        let mut records =
            Records { view: node.board.records.changes(), holdings: node.board.membership.changes() };
        loop {
            let (revision, losses) = records.wait_for(&node, |revision, _| revision != 0).await;
            let life = node.board.membership.me().life();
            let sign = publication::sign_of_life(&node.config.node, life, revision);
            let hold = node.store.hold(&sign, ALIVE_SECONDS);
            let work = async { tokio::join!(hold, publish(&node, &wake, revision)) };
            tokio::select! {
                _ = work => {}
                // Cancel-safe: what was begun is read back by the next round.
                _ = records.wait_for(&node, |now, lost| now != revision || lost != losses) => {}
            }
        }
    }
}

/// What the node's own record and whose it is are read from: either may be known before the other.
struct Records {
    view: watch::Receiver<Arc<View>>,
    holdings: watch::Receiver<Arc<Holdings>>,
}

impl Records {
    /// Waits until the revision of the node's own record, and how often the store has lost records, are such.
    async fn wait_for(&mut self, node: &Node, are: impl Fn(i64, u64) -> bool) -> (i64, u64) {
        loop {
            let view = Arc::clone(&self.view.borrow_and_update());
            self.holdings.mark_unchanged();
            let now = (node.board.membership.own_revision(&view), view.losses);
            if are(now.0, now.1) {
                return now;
            }
            // Whoever has their senders ends only with the agent.
            tokio::select! {
                _ = self.view.changed() => {}
                _ = self.holdings.changed() => {}
            }
        }
    }
}

/// Publishes as the node whose record was written at that revision.
async fn publish(node: &Node, wake: &Wake, revision: i64) {
    // What the store has; `None` before it was read, and after a doubt.
    let mut published: Option<Published> = None;
    let by = Member { node: node.config.node.clone(), revision };
    loop {
        match synchronize(node, &by, published.take()).await {
            Ok(now) => {
                published = Some(now);
                wake.rung().await;
                sleep(BATCH).await;
            }
            Err(error) => {
                debug!(%error, "addresses are not published");
                sleep(RETRY).await;
            }
        }
    }
}
