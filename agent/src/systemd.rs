//! Notifications to systemd (`sd_notify(3)`), if the agent is a service of `Type=notify`.

use std::env;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use crate::liveness::Threads;
use crate::readiness::Readiness;
use crate::wake::next_tick;

/// Maximum length of the text for `systemctl status`, in characters.
const LONGEST_STATUS: usize = 1000;

/// Watchdog notifications per watchdog timeout.
const TIMES: u32 = 3;

/// Interval of the thread check without a watchdog.
const WITHOUT_WATCHDOG: Duration = Duration::from_secs(10);

/// State of the task that notifies systemd.
#[derive(Debug)]
pub struct Task {
    /// The agent's threads.
    pub threads: Threads,
    /// Whether the node is ready.
    pub readiness: Readiness,
}

impl Task {
    /// Never returns. Notifies systemd once that the agent has started, the watchdog while the agent's threads make
    /// progress, and `systemctl status` at each change of the node's state.
    ///
    /// The agent has started when it answers the plugin, even if the node is not ready yet: a node that waits for etcd
    /// has started. Otherwise systemd would stop the agent, and the kubelet, which is ordered after it, would never
    /// start an etcd that is a static pod.
    pub async fn run(self) {
        if env::var_os("NOTIFY_SOCKET").is_none() {
            return std::future::pending().await;
        }
        report(&self, sd_notify::watchdog_enabled().map_or(WITHOUT_WATCHDOG, |time| time / TIMES)).await;
    }
}

/// An agent that reports to systemd.
trait WatchdogState {
    /// A text for each stuck thread of the agent.
    fn stuck_threads(&self) -> impl Future<Output = Vec<String>>;

    /// Why the node is not ready. Empty if it is.
    fn reasons(&self) -> Vec<String>;

    /// Sends a message to systemd. Returns whether that succeeded.
    fn notify(&self, message: String) -> impl Future<Output = bool>;
}

impl WatchdogState for Task {
    async fn stuck_threads(&self) -> Vec<String> {
        self.threads.stuck_threads().await
    }

    fn reasons(&self) -> Vec<String> {
        self.readiness.reasons()
    }

    async fn notify(&self, message: String) -> bool {
        notify(message).await
    }
}

/// Reports for ever; `interval` is the interval of the watchdog notifications.
async fn report<R: WatchdogState>(agent: &R, interval: Duration) {
    let (mut started, mut last_status) = (false, String::new());
    let mut due = Instant::now();
    loop {
        let mut stuck_threads = Vec::new();
        if due <= Instant::now() {
            stuck_threads = agent.stuck_threads().await;
            if stuck_threads.is_empty() {
                let sign = if started { "" } else { "READY=1\n" };
                if agent.notify(format!("{sign}{}", NotifyState::Watchdog)).await {
                    due = Instant::now() + interval;
                    started = true;
                }
            }
        }
        let status =
            if stuck_threads.is_empty() { describe(&agent.reasons()) } else { stuck_threads.join("; ") };
        // In a separate message: systemd drops the whole message if it is too long.
        if status != last_status && agent.notify(status_line(&status)).await {
            last_status = status;
        }
        sleep_until(next_tick().min(Instant::now() + interval)).await;
    }
}

/// The node's state in one line.
fn describe(reasons: &[String]) -> String {
    if reasons.is_empty() { "ready".to_owned() } else { format!("not ready: {}", reasons.join("; ")) }
}

/// The text for `systemctl status`: one line. systemd drops a message of more than 4096 bytes.
fn status_line(text: &str) -> String {
    let line: String = text.replace('\n', " ").chars().take(LONGEST_STATUS).collect();
    NotifyState::Status(&line).to_string()
}

/// Sends a message. Returns whether that succeeded. The sender blocks until systemd reads the message.
async fn notify(message: String) -> bool {
    let sent = spawn_blocking(move || sd_notify::notify(&[NotifyState::Custom(&message)])).await;
    if let Ok(Err(error)) = &sent {
        warn!(%error, "cannot notify systemd");
    }
    matches!(sent, Ok(Ok(())))
}

/// Notifies systemd that the agent is stopping.
pub async fn stopping() {
    let status = status_line("stopping: the kernel state is kept");
    notify(format!("{}\n{status}", NotifyState::Stopping)).await;
}

/// Reports why the agent ends.
pub fn failed(why: &str) {
    // If this fails, the reason is in the log.
    let _ = sd_notify::notify(&[NotifyState::Custom(&status_line(why))]);
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::time::timeout;

    use super::*;

    /// An agent with the state that the test sets.
    #[derive(Debug, Default)]
    struct Fake(Mutex<State>);

    #[derive(Debug, Default)]
    struct State {
        stuck_threads: Vec<String>,
        reasons: Vec<String>,
        /// Whether messages to systemd fail.
        sending_fails: bool,
        messages: Vec<String>,
    }

    impl Fake {
        fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
            action(&mut self.0.lock().unwrap())
        }

        /// The messages sent within that time.
        async fn messages_within(
            &self,
            running: &mut (impl Future<Output = ()> + Unpin),
            time: Duration,
        ) -> String {
            self.with(|state| state.messages.clear());
            assert!(timeout(time, running).await.is_err(), "the task ended");
            self.with(|state| state.messages.join(" | "))
        }
    }

    impl WatchdogState for Fake {
        async fn stuck_threads(&self) -> Vec<String> {
            self.with(|state| state.stuck_threads.clone())
        }

        fn reasons(&self) -> Vec<String> {
            self.with(|state| state.reasons.clone())
        }

        async fn notify(&self, message: String) -> bool {
            self.with(|state| {
                if !state.sending_fails {
                    state.messages.push(message.trim_end().replace('\n', " "));
                }
                !state.sending_fails
            })
        }
    }

    const INTERVAL: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn an_agent_reports_its_start_before_readiness_and_notifies_the_watchdog_at_each_interval() {
        let agent = Fake::default();
        agent.with(|state| state.reasons.push("no etcd".to_owned()));
        let mut running = Box::pin(report(&agent, INTERVAL));
        let messages = agent.messages_within(&mut running, INTERVAL / 2).await;
        assert_eq!(messages, "READY=1 WATCHDOG=1 | STATUS=not ready: no etcd");
        agent.with(|state| state.reasons.clear());
        assert_eq!(agent.messages_within(&mut running, INTERVAL / 4).await, "STATUS=ready");
        assert_eq!(agent.messages_within(&mut running, INTERVAL).await, "WATCHDOG=1");
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_not_notified_while_the_agent_is_blocked() {
        let agent = Fake::default();
        let mut running = Box::pin(report(&agent, INTERVAL));
        agent.messages_within(&mut running, INTERVAL / 2).await;
        agent.with(|state| state.stuck_threads.push("the ledger does not respond".to_owned()));
        let messages = agent.messages_within(&mut running, INTERVAL * 3).await;
        assert_eq!(messages, "STATUS=the ledger does not respond");
        agent.with(|state| state.stuck_threads.clear());
        let messages = agent.messages_within(&mut running, INTERVAL / 2).await;
        assert_eq!(messages, "WATCHDOG=1 | STATUS=ready");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_notification_of_systemd_is_repeated() {
        let agent = Fake::default();
        agent.with(|state| state.sending_fails = true);
        let mut running = Box::pin(report(&agent, INTERVAL));
        assert_eq!(agent.messages_within(&mut running, INTERVAL * 2).await, "");
        agent.with(|state| state.sending_fails = false);
        assert_eq!(
            agent.messages_within(&mut running, INTERVAL / 2).await,
            "READY=1 WATCHDOG=1 | STATUS=ready"
        );
    }
}
