//! Who is working on which attachment: one at a time.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use polder_api::Attachment;
use tokio::sync::Notify;

/// The attachments that somebody is working on: a plugin that wires, or who takes one away.
#[derive(Debug, Default)]
pub struct InFlight {
    attachments: Mutex<BTreeSet<Attachment>>,
    ended: Notify,
}

/// Holds an attachment, so that nobody else works on it, until it is dropped.
#[derive(Debug)]
pub struct Wired {
    in_flight: Arc<InFlight>,
    attachment: Attachment,
}

impl InFlight {
    /// Holds the attachment; `None` if somebody else does.
    pub fn hold(self: &Arc<Self>, attachment: &Attachment) -> Option<Wired> {
        let new = self.lock().insert(attachment.clone());
        new.then(|| Wired { in_flight: Arc::clone(self), attachment: attachment.clone() })
    }

    /// Whether somebody holds it.
    pub fn has(&self, attachment: &Attachment) -> bool {
        self.lock().contains(attachment)
    }

    /// All that somebody holds.
    pub fn all(&self) -> BTreeSet<Attachment> {
        self.lock().clone()
    }

    /// Holds the attachment as soon as nobody else does.
    pub async fn take(self: &Arc<Self>, attachment: &Attachment) -> Wired {
        loop {
            let ended = self.ended.notified();
            if let Some(wired) = self.hold(attachment) {
                return wired;
            }
            ended.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<Attachment>> {
        // A set of names is whole, whoever panicked.
        self.attachments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wired {
    /// What is held.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }
}

impl Drop for Wired {
    fn drop(&mut self) {
        self.in_flight.lock().remove(&self.attachment);
        self.in_flight.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_attachment_is_held_by_one_at_a_time_and_who_waits_has_it_next() {
        let in_flight = Arc::<InFlight>::default();
        let [first, second] = ["net/c1/eth0", "net/c2/eth0"].map(|name| name.parse::<Attachment>().unwrap());
        let held = in_flight.hold(&first).unwrap();
        assert!(in_flight.hold(&first).is_none());
        let other = in_flight.hold(&second).unwrap();
        assert_eq!(in_flight.all(), [first.clone(), second.clone()].into());
        let mut waiting = Box::pin(in_flight.take(&first));
        assert!(timeout(Duration::from_secs(1), &mut waiting).await.is_err());
        drop(other);
        assert!(timeout(Duration::from_secs(1), &mut waiting).await.is_err(), "that was another one");
        drop(held);
        let taken = timeout(Duration::from_secs(1), waiting).await.unwrap();
        assert_eq!(taken.attachment(), &first);
        assert!(in_flight.has(&first) && !in_flight.has(&second));
    }
}
