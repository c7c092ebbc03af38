//! Locks on attachments: one task works on an attachment at a time.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_api::{Attachment, IfName, MarkedAdd};
use tokio::sync::Notify;
use tokio::time::timeout;

/// The locked attachments: an ADD, a DEL or another task of this node is in progress for each.
#[derive(Debug, Default)]
pub struct InFlight {
    /// With the names of their interfaces on the host.
    attachments: Mutex<BTreeMap<Attachment, IfName>>,
    ended: Notify,
    /// The ADDs in progress that an earlier agent has answered, by their interface on the host.
    earlier: Mutex<BTreeMap<IfName, MarkedAdd>>,
}

/// Interval of checks whether the ADD of an earlier agent has ended: no event reports that.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The lock on an attachment, until it is dropped.
#[derive(Debug)]
pub struct AttachmentLock {
    in_flight: Arc<InFlight>,
    attachment: Attachment,
}

impl InFlight {
    /// Finds the ADDs in progress that an earlier agent has answered. Call it before this agent answers an ADD.
    pub fn found(socket: &Path) -> io::Result<Self> {
        let earlier = Mutex::new(MarkedAdd::all(socket)?.into_iter().collect());
        Ok(Self { earlier, ..Self::default() })
    }

    /// Locks the attachment; `None` if it is locked.
    pub fn hold(self: &Arc<Self>, attachment: &Attachment) -> Option<AttachmentLock> {
        if self.is_wired_by_earlier_process(attachment) {
            return None;
        }
        let is_new = match self.lock().entry(attachment.clone()) {
            Entry::Vacant(free) => {
                free.insert(attachment.host_interface());
                true
            }
            Entry::Occupied(_) => false,
        };
        is_new.then(|| AttachmentLock { in_flight: Arc::clone(self), attachment: attachment.clone() })
    }

    /// Whether it is locked.
    pub fn has(&self, attachment: &Attachment) -> bool {
        self.lock().contains_key(attachment) || self.is_wired_by_earlier_process(attachment)
    }

    /// All attachments that this agent has locked.
    pub fn all(&self) -> BTreeSet<Attachment> {
        self.lock().keys().cloned().collect()
    }

    /// Whether the attachment with that interface on the host is locked, or in the ADD of an earlier agent.
    pub fn has_interface(&self, name: &IfName) -> bool {
        self.lock().values().any(|locked| locked == name) || self.earlier().contains_key(name)
    }

    /// Locks the attachment as soon as it is free.
    pub async fn take(self: &Arc<Self>, attachment: &Attachment) -> AttachmentLock {
        loop {
            let ended = self.ended.notified();
            if let Some(wired) = self.hold(attachment) {
                return wired;
            }
            if self.is_any_wired_by_earlier_process() {
                let _ = timeout(CHECK_INTERVAL, ended).await;
            } else {
                ended.await;
            }
        }
    }

    /// Whether an ADD of the attachment is in progress that an earlier agent has answered.
    pub fn is_wired_by_earlier_process(&self, attachment: &Attachment) -> bool {
        let earlier = self.earlier();
        // The name is a hash: computed only where it matters.
        !earlier.is_empty() && earlier.contains_key(&attachment.host_interface())
    }

    /// Whether any ADD is in progress that an earlier agent has answered.
    pub fn is_any_wired_by_earlier_process(&self) -> bool {
        !self.earlier().is_empty()
    }

    /// The ADDs of earlier agents that are still in progress.
    fn earlier(&self) -> MutexGuard<'_, BTreeMap<IfName, MarkedAdd>> {
        let mut earlier = self.earlier.lock().unwrap_or_else(PoisonError::into_inner);
        earlier.retain(|_, add| add.is_in_progress());
        earlier
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Attachment, IfName>> {
        // A panic elsewhere leaves the set of names consistent.
        self.attachments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AttachmentLock {
    /// The locked attachment.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }
}

impl Drop for AttachmentLock {
    fn drop(&mut self) {
        self.in_flight.lock().remove(&self.attachment);
        self.in_flight.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use polder_api::AddMark;

    use super::*;

    #[tokio::test]
    async fn an_add_that_an_earlier_agent_answered_blocks_its_attachment_until_it_ends() {
        let attachment: Attachment = "net/c1/eth0".parse().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let mark = AddMark::set(&socket, &attachment).unwrap();
        let in_flight = Arc::new(InFlight::found(&socket).unwrap());
        let other: Attachment = "net/other/eth0".parse().unwrap();
        assert!(
            in_flight.is_any_wired_by_earlier_process() && in_flight.is_wired_by_earlier_process(&attachment)
        );
        assert!(in_flight.has(&attachment) && !in_flight.has(&other) && in_flight.hold(&other).is_some());
        let mut waiting = Box::pin(in_flight.take(&attachment));
        assert!(timeout(CHECK_INTERVAL * 2, &mut waiting).await.is_err());
        drop(mark);
        let held = waiting.await;
        assert!(!in_flight.is_any_wired_by_earlier_process());
        // The mark of an ADD that this agent answers itself.
        let _own = AddMark::set(&socket, &attachment).unwrap();
        drop(held);
        assert!(in_flight.hold(&attachment).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_attachment_has_one_holder_and_the_waiting_task_is_next() {
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
