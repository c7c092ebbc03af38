//! The fake node as the environment of the pod tasks.

use super::*;
use crate::capacity::NoPool;
use crate::claim::Exhausted;

/// The lock of one attachment, released when it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    locked: Locked,
    attachment: Attachment,
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.locked.borrow_mut().remove(&self.attachment);
    }
}

impl Requests for Fake {
    async fn claim(&self, _: BlockRequest) -> Result<(), NoClaim> {
        let answer = self.with(|state| state.claims.pop_front()).unwrap_or_else(|| Err(none()));
        if answer.is_ok() {
            let registrar = Registrar::new(self, Box::leak(Box::new(me())));
            registrar.claim(BlockRequest::Any(Family::V4, None)).await?;
        }
        answer
    }

    fn claim_ahead(&self, wanted: BlockRequest) {
        self.with(|state| state.ahead.push(wanted));
    }

    async fn reserve(
        &self,
        wanted: ReservationRequest,
        owner: String,
        attachment: &Attachment,
    ) -> Result<IpAddr, NotHandedOver> {
        let me = me();
        Registrar::new(self, &me).hand_over(&wanted, &owner, attachment).await
    }
}

impl PodHost for Fake {
    type Lock = Lock;
    type Permission = ();

    fn try_lock(&self, attachment: &Attachment) -> Option<Lock> {
        if self.is_wired_by_earlier_process(attachment) {
            return None;
        }
        let is_new = self.locked.borrow_mut().insert(attachment.clone());
        is_new.then(|| Lock { locked: Rc::clone(&self.locked), attachment: attachment.clone() })
    }

    async fn lock(&self, attachment: &Attachment, max_wait: Duration) -> Option<Lock> {
        let lock = self.try_lock(attachment);
        if lock.is_none() {
            self.pass(max_wait);
        }
        lock
    }

    fn is_locked(&self, attachment: &Attachment) -> bool {
        self.locked.borrow().contains(attachment)
    }

    async fn gone(&self, held: Vec<AttachmentEntry>) -> Result<BTreeSet<Attachment>, HostError> {
        let all = held.into_iter().map(|held| held.attachment);
        Ok(self.with(|state| all.filter(|attachment| !state.interfaces.contains(attachment)).collect()))
    }

    async fn admit(&self, _: &AttachmentEntry) -> Result<(), HostError> {
        Ok(())
    }

    async fn delete_interface(
        &self,
        attachment: &Attachment,
        _: Option<&AttachmentEntry>,
    ) -> Result<(), HostError> {
        self.with(|state| {
            if state.fault == Some(NodeFault::InterfacesStay) {
                return Err(HostError::new("the kernel says no"));
            }
            state.interfaces.remove(attachment);
            Ok(())
        })
    }

    async fn forget(&self, _: &AttachmentEntry) {}

    async fn free(&self, attachment: &Attachment, add: LastAdd) -> Result<(), LedgerError> {
        self.with(|state| {
            if state.fault == Some(NodeFault::DiskIsFull) {
                return Err(LedgerError::new("the disk is full"));
            }
            assert!(!state.interfaces.contains(attachment), "the interface of {attachment} exists");
            Ok(())
        })?;
        crate::tasks::pods::free(self, attachment, add).await
    }

    fn tombstones(&self) -> Vec<Attachment> {
        self.with(|state| state.tombstones.iter().cloned().collect())
    }

    fn has_tombstone(&self, attachment: &Attachment) -> bool {
        self.with(|state| state.tombstones.contains(attachment))
    }

    fn remove_tombstone(&self, attachment: &Attachment) {
        self.with(|state| state.tombstones.remove(attachment));
    }

    fn obstacles(&self) -> Vec<String> {
        self.with(|state| state.obstacles.clone())
    }

    fn families(&self) -> &[Family] {
        &Family::BOTH
    }

    fn mtu(&self) -> Option<u32> {
        Some(1450)
    }

    async fn sleep(&self, time: Duration) {
        let ends = self.with(|state| {
            let ends = state.sleeps > 0;
            state.sleeps -= usize::from(ends);
            ends
        });
        if !ends {
            std::future::pending::<()>().await;
        }
        self.pass(time);
    }

    fn attachments_changed(&self) {
        self.with(|state| state.has_change_notice = true);
    }

    fn addresses_freed(&self) {}
}

/// The error that no block is available.
fn none() -> NoClaim {
    let wanted = BlockRequest::Any(Family::V4, None);
    Exhausted::NoPool(NoPool { wanted, closed: Vec::new() }).into()
}
