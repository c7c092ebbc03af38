//! Whether the agent still does its work, for `/livez` and for systemd's watchdog.

use std::time::Duration;

use polder_store::NodeIpam;

use crate::kernel::Kernel;
use crate::owner::Owner;

/// How long a thread of the agent may finish nothing before it is taken to stand still. The longest job is a pass over the kernel's
/// state, which with 5,000 peers takes a second.
const PATIENCE: Duration = Duration::from_secs(3);

/// The threads that the agent cannot do without.
#[derive(Debug, Clone)]
pub struct Threads {
    /// The ledger's.
    pub ledger: Owner<NodeIpam>,
    /// That of passes over the kernel.
    pub kernel: Owner<Kernel>,
    /// That of what single pods need of the kernel.
    pub pods: Owner<Kernel>,
}

impl Threads {
    /// Those that stand still, in words. Empty if all do their work. It is no matter of the store or of peers: a restart of the
    /// agent would not help there.
    pub async fn standstills(&self) -> Vec<String> {
        let (ledger, kernel, pods) =
            tokio::join!(self.ledger.works(PATIENCE), self.kernel.works(PATIENCE), self.pods.works(PATIENCE));
        let parts = [("ledger", ledger), ("kernel", kernel), ("pods", pods)];
        let still = parts.into_iter().filter(|(_, works)| !works);
        let words = |(name, _)| {
            format!(
                "the agent's thread {name} has finished nothing for {} s: restart the agent",
                PATIENCE.as_secs()
            )
        };
        still.map(words).collect()
    }
}
