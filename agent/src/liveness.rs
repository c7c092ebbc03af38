//! Whether the agent's threads make progress, for `/livez` and for systemd's watchdog.

use std::time::Duration;

use polder_netlink::nft::FilterSocket;
use polder_store::NodeIpam;

use crate::kernel::Kernel;
use crate::owner::Owner;

/// Time without a finished job after which a thread of the agent counts as stuck. The longest job is a pass over kernel
/// state, which takes a second with 5,000 peers.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The threads that the agent depends on.
#[derive(Debug, Clone)]
pub struct Threads {
    /// The thread of the ledger.
    pub ledger: Owner<NodeIpam>,
    /// The thread of the passes.
    pub kernel: Owner<Kernel>,
    /// The thread of kernel operations on single pods.
    pub pods: Owner<Kernel>,
    /// The thread of the packet filter, for single pods.
    pub filter: Owner<FilterSocket>,
}

impl Threads {
    /// A text for each stuck thread. Empty if all make progress. Faults of the datastore or of peers do not count,
    /// because a restart of the agent would not help.
    pub async fn stuck_threads(&self) -> Vec<String> {
        let (ledger, kernel, pods, filter) = tokio::join!(
            self.ledger.works(TIMEOUT),
            self.kernel.works(TIMEOUT),
            self.pods.works(TIMEOUT),
            self.filter.works(TIMEOUT)
        );
        let parts = [("ledger", ledger), ("kernel", kernel), ("pods", pods), ("filter", filter)];
        let still = parts.into_iter().filter(|(_, works)| !works);
        let words = |(name, _)| {
            format!("agent thread {name} has made no progress for {} s: restart the agent", TIMEOUT.as_secs())
        };
        still.map(words).collect()
    }
}
