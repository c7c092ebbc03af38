//! Whether the agent still does its work, for `/livez` and for systemd's watchdog.

use std::time::Duration;

use tokio::time::timeout;

use crate::agent::Agent;

/// How long a thread of the agent may be busy before it is taken to stand still. The longest that one is busy is a pass over the
/// kernel's state, which with 5,000 peers takes a second.
const PATIENCE: Duration = Duration::from_secs(3);

/// The threads that the agent cannot do without and that do not answer, in words. Empty if all do their work. It is no matter of
/// the store or of peers: a restart of the agent would not help there.
pub async fn standstills(agent: &Agent) -> Vec<String> {
    let (ledger, kernel, pods) = tokio::join!(
        timeout(PATIENCE, agent.ipam.run(|_| ())),
        timeout(PATIENCE, agent.kernel.run(|_| ())),
        timeout(PATIENCE, agent.pods.run(|_| ())),
    );
    let parts = [("ledger", ledger), ("kernel", kernel), ("pods", pods)];
    let still = parts.into_iter().filter(|(_, answer)| answer.is_err());
    let words = |(name, _)| {
        format!("the agent's thread {name} has not answered for {} s: restart the agent", PATIENCE.as_secs())
    };
    still.map(words).collect()
}
