//! What systemd is told of the agent (`sd_notify(3)`), where the agent is a service of `Type=notify`. Elsewhere nobody is told.

use std::env;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tracing::warn;

use crate::liveness::Threads;
use crate::readiness::Readiness;

/// Between two looks at whether there is something new to say.
const PAUSE: Duration = Duration::from_millis(500);

/// The longest text for `systemctl status`, in characters.
const LONGEST_STATUS: usize = 1000;

/// How often the watchdog is told within its time.
const TIMES: u32 = 3;

/// How often the threads are looked at where there is no watchdog.
const WITHOUT_WATCHDOG: Duration = Duration::from_secs(10);

/// What it is told by.
#[derive(Debug)]
pub struct Task {
    /// The agent's threads.
    pub threads: Threads,
    /// Whether the node is ready.
    pub readiness: Readiness,
}

impl Task {
    /// Tells for ever: once that the agent has started; the watchdog as long as the agent's threads do their work; and what
    /// `systemctl status` shows, whenever that changes.
    ///
    /// The agent has started when it answers the plugin, with whatever it has to say, and not only when the node is ready: a node that
    /// waits for etcd has started. systemd would end it otherwise, and the kubelet, which is ordered after it, would never run the
    /// etcd that is a static pod.
    pub async fn run(self) {
        if env::var_os("NOTIFY_SOCKET").is_none() {
            return std::future::pending().await;
        }
        let interval = sd_notify::watchdog_enabled().map_or(WITHOUT_WATCHDOG, |time| time / TIMES);
        let (mut started, mut last_status) = (false, String::new());
        let mut due = Instant::now();
        loop {
            let mut standstills = Vec::new();
            if due <= Instant::now() {
                standstills = self.threads.standstills().await;
                if standstills.is_empty() {
                    let sign = if started { "" } else { "READY=1\n" };
                    if tell(format!("{sign}{}", NotifyState::Watchdog)).await {
                        due = Instant::now() + interval;
                        started = true;
                    }
                }
            }
            let status = if standstills.is_empty() {
                words(&self.readiness.reasons())
            } else {
                standstills.join("; ")
            };
            // In a message of its own: systemd drops one that is too long as a whole.
            if status != last_status && tell(status_line(&status)).await {
                last_status = status;
            }
            sleep(PAUSE.min(interval)).await;
        }
    }
}

/// The node's state in one line.
fn words(reasons: &[String]) -> String {
    if reasons.is_empty() { "ready".to_owned() } else { format!("not ready: {}", reasons.join("; ")) }
}

/// What `systemctl status` shows: one line. systemd drops a message of more than 4096 bytes.
fn status_line(text: &str) -> String {
    let line: String = text.replace('\n', " ").chars().take(LONGEST_STATUS).collect();
    NotifyState::Status(&line).to_string()
}

/// Sends a message; whether that succeeded. systemd reads when it has time for it, and the sender waits until then.
async fn tell(message: String) -> bool {
    let told = spawn_blocking(move || sd_notify::notify(&[NotifyState::Custom(&message)])).await;
    if let Ok(Err(error)) = &told {
        warn!(%error, "systemd cannot be told how the agent is");
    }
    matches!(told, Ok(Ok(())))
}

/// Tells that the agent was asked to end.
pub async fn stopping() {
    let status = status_line("told to stop: what is in the kernel stays");
    tell(format!("{}\n{status}", NotifyState::Stopping)).await;
}

/// Tells why the agent ends.
pub fn failed(why: &str) {
    // Who is not told reads it in the log.
    let _ = sd_notify::notify(&[NotifyState::Custom(&status_line(why))]);
}
