//! Whether the agent still does its work, for `/livez` and for systemd's watchdog.

use std::time::Duration;

use crate::agent::Agent;

/// How long a thread of the agent may finish nothing before it is taken to stand still. The longest job is a pass over the kernel's
/// state, which with 5,000 peers takes a second.
const PATIENCE: Duration = Duration::from_secs(3);

/// The threads that the agent cannot do without and that stand still, in words. Empty if all do their work. It is no matter of
/// the store or of peers: a restart of the agent would not help there.
pub async fn standstills(agent: &Agent) -> Vec<String> {
    let (ledger, kernel, pods) =
        tokio::join!(agent.ipam.works(PATIENCE), agent.kernel.works(PATIENCE), agent.pods.works(PATIENCE));
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
