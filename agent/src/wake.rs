//! Wakes tasks: by other tasks, or together at fixed times.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Interval of checks for changes that cause no notification.
const TICK: Duration = Duration::from_millis(600);

/// The time of the next tick. Checks in different tasks are made at the same ticks, because most of the processor time
/// of an idle agent is spent to wake up.
pub fn next_tick() -> Instant {
    static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
    let (first, now) = (*FIRST, Instant::now());
    let count = now.saturating_duration_since(first).as_nanos() / TICK.as_nanos() + 1;
    first + TICK * u32::try_from(count).unwrap_or(u32::MAX)
}

/// Wakes the task that waits on the [`WakeReceiver`] of the same pair.
#[derive(Debug, Clone)]
pub struct WakeSender(Arc<Notify>);

/// Waits for a [`WakeSender`].
#[derive(Debug)]
pub struct WakeReceiver(Arc<Notify>);

/// Creates a sender and its receiver.
pub fn wake_channel() -> (WakeSender, WakeReceiver) {
    let notify = Arc::new(Notify::new());
    (WakeSender(Arc::clone(&notify)), WakeReceiver(notify))
}

impl WakeSender {
    /// Wakes the receiving task. If it does not wait now, its next wait ends at once. Several calls before that count
    /// as one.
    pub fn wake(&self) {
        self.0.notify_one();
    }
}

impl WakeReceiver {
    /// Waits until a sender wakes it. Cancel-safe: a call that was not received ends the next wait.
    pub async fn woken(&self) {
        self.0.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tasks_wait_for_the_same_ticks() {
        let tick = next_tick();
        tokio::time::sleep((tick - Instant::now()) / 2).await;
        assert_eq!(next_tick(), tick);
        tokio::time::sleep_until(tick).await;
        assert_eq!(next_tick(), tick + TICK);
    }

    #[test]
    fn calls_without_a_waiting_task_end_the_next_wait_once() {
        let (sender, receiver) = wake_channel();
        sender.wake();
        sender.clone().wake();
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(receiver.woken()).poll(&mut context).is_ready());
        assert!(pin!(receiver.woken()).poll(&mut context).is_pending());
    }
}
