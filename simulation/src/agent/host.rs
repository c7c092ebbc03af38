//! The environment of the tasks of [`polder_ipam::tasks`] on a simulated node: each external effect is a separate
//! step.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Attachment, Family, Mac};
use polder_ipam::Moment;
use polder_ipam::Revision;
use polder_ipam::bootstrap::AddressesUnknown;
use polder_ipam::cause::HostError;
use polder_ipam::change::Change;
use polder_ipam::invariants::history::check_release;
use polder_ipam::key::Range;
use polder_ipam::ledger::{AttachmentEntry, LedgerError};
use polder_ipam::membership::{NoPresence, NodeObjectState, NodePresence, Step};
use polder_ipam::node::NodeIpam;
use polder_ipam::pool::Labels;
use polder_ipam::readiness;
use polder_ipam::record::LeaseRecord;
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::release::NotReleased;
use polder_ipam::store::{Contents, Outcome, StoreError};
use polder_ipam::tasks::operator::{Knowledge, OperatorHost};
use polder_ipam::tasks::{Host, LastAdd, PodHost, RecordStore, RegistrarHost, teardown};
use polder_ipam::view::View;

use super::SimHost;
use crate::disk::Disk;
use crate::in_flight::Lock;
use crate::task::Wait;

/// Counted event: a task timed out while it waited for the end of an ADD.
pub const IMPATIENT: &str = "timed out while waiting for an ADD";

/// The MTU of every pod, in bytes.
pub(super) const MTU: u32 = 1450;

fn brief(step: &Step) -> String {
    match step {
        Step::Commit(change) => change.to_string(),
        Step::Wait(reason) => format!("Wait: {reason}"),
        Step::Conflict(reason) => format!("Conflict: {reason}"),
        Step::Removed(reason) => format!("Removed: {reason}"),
        other => format!("{other:?}"),
    }
}

impl RecordStore for SimHost {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        Self::commit(self, change).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        Self::range(self, range.clone()).await
    }
}

impl Host for SimHost {
    type Ledger = Disk;

    fn now(&self) -> Moment {
        self.with(|world| world.machines[self.machine].now())
    }

    fn view(&self) -> Arc<View> {
        Self::view(self)
    }

    fn labels(&self) -> Labels {
        Labels::new()
    }

    fn registration(&self) -> Registration {
        self.agent(|agent| agent.registration.clone())
    }

    /// Small, so that publishing takes several changes and can end between them.
    fn most_records(&self) -> usize {
        2
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Disk>, Moment) -> T + Send + 'static,
    ) -> T {
        self.turn().await;
        self.ipam(job)
    }
}

impl Knowledge for SimHost {
    fn store_name(&self) -> String {
        "etcd".to_owned()
    }

    fn current_view(&self) -> Arc<View> {
        Self::view(self)
    }

    async fn view_changed_from(&self, known: &Arc<View>, max_wait: Duration) {
        RegistrarHost::changed(self, known, max_wait).await;
    }

    async fn view_at(&self, revision: Revision, max_wait: Duration) -> Option<Arc<View>> {
        self.wait(Wait::Revision(revision, self.clock() + millis(max_wait))).await;
        Some(Self::view(self)).filter(|view| view.revision >= revision)
    }
}

impl OperatorHost for SimHost {
    async fn has_interface(&self, attachment: &Attachment) -> Result<bool, HostError> {
        self.turn().await;
        Ok(self.with(|world| world.machines[self.machine].kernel.interfaces.contains_key(attachment)))
    }
}

impl RegistrarHost for SimHost {
    fn fresh_name(&self) -> Result<String, HostError> {
        Ok(self.unique_name())
    }

    async fn changed(&self, view: &Arc<View>, max_wait: Duration) {
        let millis = u64::try_from(max_wait.as_millis()).unwrap_or(u64::MAX);
        self.wait(Wait::Revision(view.revision.next(), self.clock() + millis)).await;
    }

    async fn wait_for_revision(&self, revision: Revision) -> Result<(), StoreError> {
        Self::wait_for_revision(self, revision).await
    }

    fn presence(&self, _: &View) -> Result<NodePresence, NoPresence> {
        let number = 1 + u8::try_from(self.machine).unwrap_or(0);
        Ok(NodePresence {
            underlay: vec![Ipv4Addr::new(192, 0, 2, number).into()],
            vtep_mac: Mac([2, 0, 0, 0, 0, number]),
            mtu: MTU,
            version: "0".to_owned(),
            node_object: NodeObjectState::NotUsed,
        })
    }

    fn check_addresses_in_use(&self, _: &View) -> Result<(), AddressesUnknown> {
        Ok(())
    }

    fn adopted(&self) -> Option<LeaseRecord> {
        self.agent(|agent| agent.adopted.clone())
    }

    fn register(&self, registration: Registration) {
        self.with(|world| {
            let machine = &mut world.machines[self.machine];
            if matches!(registration, Registration::Removed(_)) {
                // A removed node does not keep its guarantees.
                machine.promised.clear();
            }
            let agent = machine.agent.as_mut().expect("a task of an agent ends with it");
            agent.registration = registration;
        });
    }

    fn publish_allocations(&self, allocations: Allocations) {
        self.agent(|agent| agent.allocations = allocations);
    }

    async fn cut_off(&self, attachment: &Attachment) -> Result<(), NotReleased> {
        let patient = Self { marks_deleted: false, ..self.clone() };
        teardown::cut_off(&patient, attachment).await
    }

    fn is_wired_by_earlier_process(&self, attachment: &Attachment) -> bool {
        self.with(|world| world.machines[self.machine].is_wired_by_earlier_process(attachment))
    }

    fn is_any_wired_by_earlier_process(&self) -> bool {
        self.with(|world| {
            let machine = &world.machines[self.machine];
            let in_creation = machine.kernel.in_creation.borrow();
            in_creation.iter().any(|attachment| machine.is_wired_by_earlier_process(attachment))
        })
    }

    async fn remove_gateways(&self) -> Result<(), HostError> {
        self.turn().await;
        self.with(|world| world.machines[self.machine].kernel.gateways.clear());
        Ok(())
    }

    fn observe(&self, step: &Step, losses: u64, hold_off: bool) {
        self.note(|| format!("steward: {}", brief(step)));
        self.agent(|agent| {
            agent.last_step = brief(step);
            agent.losses = losses;
            agent.hold_off = hold_off;
        });
    }
}

impl PodHost for SimHost {
    type Lock = Lock;
    type Permission = ();

    fn try_lock(&self, attachment: &Attachment) -> Option<Lock> {
        if self.is_wired_by_earlier_process(attachment) {
            return None;
        }
        Lock::new(self.agent(|agent| Rc::clone(&agent.in_flight)), attachment)
    }

    async fn lock(&self, attachment: &Attachment, max_wait: Duration) -> Option<Lock> {
        let until = self.clock() + millis(max_wait);
        loop {
            if let Some(lock) = self.try_lock(attachment) {
                return Some(lock);
            }
            if self.clock() >= until {
                self.with(|world| {
                    if self.marks_deleted {
                        world.machines[self.machine].kernel.deleted_meanwhile.insert(attachment.clone());
                    }
                    world.count(IMPATIENT);
                });
                return None;
            }
            self.wait(Wait::Free(attachment.clone(), until)).await;
        }
    }

    fn is_locked(&self, attachment: &Attachment) -> bool {
        self.with(|world| world.machines[self.machine].is_locked(attachment))
    }

    async fn gone(&self, held: Vec<AttachmentEntry>) -> Result<BTreeSet<Attachment>, HostError> {
        self.turn().await;
        Ok(self.with(|world| {
            let interfaces = &world.machines[self.machine].kernel.interfaces;
            let gone = held.into_iter().map(|held| held.attachment);
            gone.filter(|attachment| !interfaces.contains_key(attachment)).collect()
        }))
    }

    async fn admit(&self, _: &AttachmentEntry) -> Result<(), HostError> {
        self.turn().await;
        Ok(())
    }

    async fn delete_interface(
        &self,
        attachment: &Attachment,
        _: Option<&AttachmentEntry>,
    ) -> Result<(), HostError> {
        self.turn().await;
        self.with(|world| world.machines[self.machine].kernel.interfaces.remove(attachment));
        Ok(())
    }

    async fn forget(&self, _: &AttachmentEntry) {
        self.turn().await;
    }

    async fn free(&self, attachment: &Attachment, add: LastAdd) -> Result<(), LedgerError> {
        self.turn().await;
        let all =
            |ipam: &mut NodeIpam<Disk>, _| -> Vec<AttachmentEntry> { ipam.attachments().cloned().collect() };
        let before = self.ipam(all);
        let freed = self.ipam(|ipam, now| add.release(ipam, attachment, now));
        let after = self.ipam(all);
        self.with(|world| {
            let name = world.machines[self.machine].name.clone();
            world.found.extend(check_release(&name, attachment, &before, &after));
        });
        freed
    }

    fn tombstones(&self) -> Vec<Attachment> {
        self.with(|world| world.machines[self.machine].tombstones.iter().cloned().collect())
    }

    fn has_tombstone(&self, attachment: &Attachment) -> bool {
        self.with(|world| world.machines[self.machine].tombstones.contains(attachment))
    }

    fn remove_tombstone(&self, attachment: &Attachment) {
        self.with(|world| world.machines[self.machine].tombstones.remove(attachment));
    }

    fn obstacles(&self) -> Vec<String> {
        let obstacles = self.with(|world| {
            let machine = &world.machines[self.machine];
            let agent = machine.agent.as_ref().expect("a task of an agent ends with it");
            readiness::obstacles(&readiness::ReadinessInputs {
                view: &agent.view,
                registration: &agent.registration,
                allocations: &agent.allocations,
                underlay: Ok(()),
                gateways: &machine.kernel.gateways,
                mtu: MTU,
                failures: &[],
            })
        });
        if !obstacles.is_empty() {
            self.note(|| format!("not ready: {}", obstacles.join("; ")));
        }
        obstacles
    }

    fn families(&self) -> &[Family] {
        &Family::BOTH
    }

    fn mtu(&self) -> Option<u32> {
        Some(MTU)
    }

    async fn sleep(&self, time: Duration) {
        Self::sleep(self, millis(time)).await;
    }

    fn attachments_changed(&self) {
        self.agent(|agent| agent.is_unpublished = true);
    }

    fn addresses_freed(&self) {
        self.agent(|agent| agent.must_check_records = true);
    }
}

/// A duration in milliseconds of a machine's clock.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
