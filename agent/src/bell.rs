//! Wakes a task: any number of tasks may ring, one waits.

use std::sync::Arc;

use tokio::sync::Notify;

/// Wakes the task that waits on the [`Wake`] of the same pair.
#[derive(Debug, Clone)]
pub struct Bell(Arc<Notify>);

/// Waits for a [`Bell`].
#[derive(Debug)]
pub struct Wake(Arc<Notify>);

/// Creates a bell and its waiting end.
pub fn bell() -> (Bell, Wake) {
    let notify = Arc::new(Notify::new());
    (Bell(Arc::clone(&notify)), Wake(notify))
}

impl Bell {
    /// Rings. If no task waits now, the next wait ends at once. Several rings before it count as one.
    pub fn ring(&self) {
        self.0.notify_one();
    }
}

impl Wake {
    /// Waits until it rings. Cancel-safe: a ring that was not received ends the next wait.
    pub async fn rung(&self) {
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
    fn rings_without_a_waiting_task_wake_the_next_wait_once() {
        let (bell, wake) = bell();
        bell.ring();
        bell.clone().ring();
        let mut context = Context::from_waker(Waker::noop());
        assert!(pin!(wake.rung()).poll(&mut context).is_ready());
        assert!(pin!(wake.rung()).poll(&mut context).is_pending());
    }
}
