//! Wakes a task: one task waits, and any number of tasks can wake it. Carries no data.

use std::sync::Arc;

use tokio::sync::Notify;

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
