//! The environment of the production tasks on a machine of the model.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use polder_api::{Attachment, Family, Mac};
use polder_ipam::Moment;
use polder_ipam::Revision;
use polder_ipam::bootstrap::AddressesUnknown;
use polder_ipam::cause::HostError;
use polder_ipam::change::Change;
use polder_ipam::claim::NoClaim;
use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{AttachmentEntry, LedgerError};
use polder_ipam::membership::{NoPresence, NodeObjectState, NodePresence, Step};
use polder_ipam::node::NodeIpam;
use polder_ipam::pool::{BlockRequest, Labels};
use polder_ipam::readiness;
use polder_ipam::record::LeaseRecord;
use polder_ipam::registration::{Allocations, Registration};
use polder_ipam::release::NotReleased;
use polder_ipam::reservation::HandOverDenied;
use polder_ipam::store::{Contents, Outcome, StoreError};
use polder_ipam::tasks::{
    Host, LastAdd, NotHandedOver, OwnNode, PodHost, RecordStore, RegistrarHost, RegistrarState, Requests,
    ReservationRequest, teardown,
};
use polder_ipam::view::View;

use super::cluster::Violation;
use super::flaw::Flaw;
use super::machine::{Container, Machine, MachineIndex};
use super::tally::Occurrence;
use super::task::{Answer, Job, Part, Sent, Wait};
use super::transition::Transition;

/// The MTU of all pods, in bytes.
const MTU: u32 = 1450;

/// The environment of a task while it runs.
pub(super) struct TaskRun<'a> {
    transition: &'a Transition<'a>,
    index: MachineIndex,
    job: Arc<Job>,
    /// Whether this part of the task runs for the first time.
    is_new: bool,
    tick: u8,
    answer: Option<Answer>,
    effects: Effects,
}

/// The effects of a task when it stops.
pub(super) struct Effects {
    /// The machine after this part.
    pub(super) machine: Arc<Machine>,
    /// The generated name, if any.
    pub(super) fresh: Option<String>,
    /// The condition that the task waits for.
    pub(super) wait: Option<Wait>,
    /// The addresses of removed interfaces.
    pub(super) unplugged: Vec<IpAddr>,
    /// A violation, if any.
    pub(super) violation: Option<Violation>,
}

impl Effects {
    fn new(machine: &Arc<Machine>) -> Self {
        let machine = Arc::clone(machine);
        Self { machine, fresh: None, wait: None, unplugged: Vec::new(), violation: None }
    }
}

impl<'a> TaskRun<'a> {
    /// The environment of a task on that machine.
    pub(super) fn new(
        transition: &'a Transition<'a>,
        index: MachineIndex,
        job: Arc<Job>,
    ) -> Rc<RefCell<Self>> {
        let effects = Effects::new(&transition.cluster.machines[index]);
        Rc::new(RefCell::new(Self { transition, index, job, is_new: false, tick: 0, answer: None, effects }))
    }

    /// Starts a part of the task.
    pub(super) fn start_part(&mut self, part: &Part, is_new: bool) {
        self.is_new = is_new;
        self.tick = part.tick;
        self.answer = part.resumed_with.as_ref().map(|(_, answer)| answer.clone());
        self.effects = Effects { fresh: part.fresh.clone(), ..Effects::new(&part.machine) };
    }

    /// Takes the effects so far.
    pub(super) fn take_effects(&mut self) -> Effects {
        let nothing = Effects::new(&self.transition.cluster.machines[self.index]);
        std::mem::replace(&mut self.effects, nothing)
    }

    fn machine(&mut self) -> &mut Machine {
        Arc::make_mut(&mut self.effects.machine)
    }

    fn count(&self, occurrence: Occurrence) {
        if self.is_new {
            self.transition.count(occurrence);
        }
    }

    /// A unique name: an incarnation if the registrar decides on a step, otherwise a claim nonce.
    fn fresh(&mut self) -> String {
        if matches!(*self.job, Job::Decide) {
            return self.effects.machine.next_incarnation();
        }
        let (transition, index) = (self.transition, self.index);
        self.effects.fresh.get_or_insert_with(|| transition.cluster.nonce(index)).clone()
    }
}

/// Handle of a task to its environment.
#[derive(Clone)]
pub(super) struct ModelHost<'a>(pub(super) Rc<RefCell<TaskRun<'a>>>);

impl ModelHost<'_> {
    fn with<T>(&self, action: impl FnOnce(&mut TaskRun<'_>) -> T) -> T {
        action(&mut self.0.borrow_mut())
    }

    fn read<T>(&self, read: impl FnOnce(&Machine) -> T) -> T {
        read(&self.0.borrow().effects.machine)
    }

    /// The identity of the node.
    pub(super) fn me(&self) -> OwnNode {
        self.with(|task_run| task_run.transition.space.me(&task_run.effects.machine))
    }

    /// The state that the registrar keeps between steps.
    pub(super) fn registrar_state(&self, me: &OwnNode) -> RegistrarState {
        self.read(|machine| machine.agent.state.clone()).unwrap_or_else(|| RegistrarState::new(me))
    }

    /// Stores the registrar's state.
    pub(super) fn keep(&self, state: RegistrarState) {
        self.with(|task_run| task_run.machine().agent.state = Some(state));
    }

    /// Answers the ADD that waits for the registrar. Returns false if none waits for this answer.
    pub(super) fn answer(&self, answer: Answer) -> bool {
        if let Answer::Address(Err(NotHandedOver::Denied(HandOverDenied::Held { .. }))) = answer {
            self.with(|task_run| task_run.count(Occurrence::Denied));
        }
        self.with(|task_run| task_run.machine().agent.answer(answer))
    }

    async fn wait(&self, wait: Wait) -> Answer {
        self.with(|task_run| {
            task_run.effects.wait = Some(wait);
            task_run.answer = None;
        });
        std::future::poll_fn(|_| {
            self.with(|task_run| task_run.answer.take().map_or(Poll::Pending, Poll::Ready))
        })
        .await
    }

    fn plugged(&self, attachment: &Attachment) -> Option<Container> {
        self.read(|machine| {
            let container = machine.container(attachment)?;
            machine.plugged.contains_key(&container).then_some(container)
        })
    }
}

impl RecordStore for ModelHost<'_> {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        let sent = self.with(|task_run| Sent {
            by: task_run.effects.machine.identity().map(|identity| identity.incarnation),
            change: Arc::new(change.clone()),
            txn: Arc::new(task_run.transition.space.transaction(change)),
        });
        match self.wait(Wait::Commit(sent)).await {
            Answer::Committed(outcome) => outcome,
            other => unreachable!("{other:?}"),
        }
    }

    /// The model has no published addresses, and no liveness records under another machine's name.
    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        if matches!(range.start.parse(), Ok(Key::Lease(_))) || range.start.contains("/addresses/") {
            return Ok(Contents { revision: Revision::ABSENT, entries: Vec::new() });
        }
        match self.wait(Wait::Read(range.clone())).await {
            Answer::Contents(contents) => contents,
            other => unreachable!("{other:?}"),
        }
    }
}

impl Host for ModelHost<'_> {
    type Ledger = Memory;

    fn now(&self) -> Moment {
        self.with(|task_run| task_run.effects.machine.now(task_run.tick))
    }

    fn view(&self) -> Arc<View> {
        self.with(|task_run| {
            let view = &task_run.effects.machine.agent.watcher.view;
            task_run.transition.space.apply_flaw_to_view(view, &task_run.job)
        })
    }

    fn labels(&self) -> Labels {
        Labels::new()
    }

    fn registration(&self) -> Registration {
        self.read(|machine| machine.agent.registration.clone())
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Memory>, Moment) -> T + Send + 'static,
    ) -> T {
        let now = self.now();
        self.with(|task_run| {
            let space = task_run.transition.space;
            match space.apply_flaw_to_ledger(&task_run.effects.machine, &task_run.job) {
                Some(mut modified) => job(&mut modified, now),
                None => job(task_run.machine().ipam(), now),
            }
        })
    }
}

impl RegistrarHost for ModelHost<'_> {
    fn fresh_name(&self) -> Result<String, HostError> {
        Ok(self.0.borrow_mut().fresh())
    }

    async fn changed(&self, view: &Arc<View>, _: Duration) {
        self.wait(Wait::Changed(view.revision)).await;
    }

    async fn wait_for_revision(&self, revision: Revision) -> Result<(), StoreError> {
        if self.read(|machine| machine.agent.watcher.shows(revision)) {
            return Ok(());
        }
        match self.wait(Wait::CaughtUp(revision)).await {
            Answer::CaughtUp(seen) => seen,
            other => unreachable!("{other:?}"),
        }
    }

    fn presence(&self, _: &View) -> Result<NodePresence, NoPresence> {
        let last = self.with(|task_run| u8::try_from(task_run.index).expect("there are few machines") + 1);
        Ok(NodePresence {
            underlay: vec![IpAddr::from([192, 0, 2, last])],
            vtep_mac: Mac([2, 0, 0, 0, 0, last]),
            mtu: MTU,
            version: "0".to_owned(),
            node_object: NodeObjectState::NotUsed,
        })
    }

    fn check_addresses_in_use(&self, _: &View) -> Result<(), AddressesUnknown> {
        Ok(())
    }

    fn adopted(&self) -> Option<LeaseRecord> {
        self.read(|machine| machine.agent.adopted.clone())
    }

    fn register(&self, registration: Registration) {
        self.with(|task_run| task_run.machine().agent.registration = registration);
    }

    fn publish_allocations(&self, _: Allocations) {}

    async fn cut_off(&self, attachment: &Attachment) -> Result<(), NotReleased> {
        teardown::cut_off(self, attachment).await
    }

    /// A plugin creates the interface in the same step in which it receives its answer.
    fn is_wired_by_earlier_process(&self, _: &Attachment) -> bool {
        false
    }

    fn is_any_wired_by_earlier_process(&self) -> bool {
        false
    }

    async fn remove_gateways(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn observe(&self, step: &Step, _: u64, _: bool) {
        self.with(|task_run| match step {
            Step::Conflict(_) => task_run.count(Occurrence::Conflict),
            Step::Own(_) => task_run.count(Occurrence::BlockTakenOver),
            Step::Disown(_) => task_run.count(Occurrence::BlockReleased),
            _ => {}
        });
    }
}

impl Requests for ModelHost<'_> {
    async fn claim(&self, wanted: BlockRequest) -> Result<(), NoClaim> {
        match self.wait(Wait::Block(wanted)).await {
            Answer::Block(claimed) => claimed,
            other => unreachable!("{other:?}"),
        }
    }

    /// [`super::Action::AllocationRequest`] chooses when to claim ahead.
    fn claim_ahead(&self, _: BlockRequest) {}

    async fn reserve(
        &self,
        wanted: ReservationRequest,
        _: String,
        _: &Attachment,
    ) -> Result<IpAddr, NotHandedOver> {
        match self.wait(Wait::Address(wanted)).await {
            Answer::Address(address) => address,
            other => unreachable!("{other:?}"),
        }
    }
}

/// Lock on an attachment; released on drop.
pub(super) struct Lock<'a>(ModelHost<'a>, Attachment);

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        self.0.with(|task_run| task_run.machine().agent.locked.remove(&self.1));
    }
}

impl<'a> PodHost for ModelHost<'a> {
    type Lock = Lock<'a>;
    type Permission = ();

    fn try_lock(&self, attachment: &Attachment) -> Option<Lock<'a>> {
        self.with(|task_run| task_run.machine().agent.locked.insert(attachment.clone()))
            .then(|| Lock(self.clone(), attachment.clone()))
    }

    /// A caller that waits has already used up its timeout.
    async fn lock(&self, attachment: &Attachment, _: Duration) -> Option<Lock<'a>> {
        self.try_lock(attachment)
    }

    fn is_locked(&self, attachment: &Attachment) -> bool {
        self.read(|machine| machine.agent.locked.contains(attachment))
    }

    async fn gone(&self, held: Vec<AttachmentEntry>) -> Result<BTreeSet<Attachment>, HostError> {
        let gone = held.into_iter().map(|held| held.attachment);
        Ok(gone.filter(|attachment| self.plugged(attachment).is_none()).collect())
    }

    async fn admit(&self, _: &AttachmentEntry) -> Result<(), HostError> {
        Ok(())
    }

    async fn delete_interface(
        &self,
        attachment: &Attachment,
        _: Option<&AttachmentEntry>,
    ) -> Result<(), HostError> {
        let Some(container) = self.plugged(attachment) else { return Ok(()) };
        if self.with(|task_run| task_run.transition.space.flaw) == Some(Flaw::FreesFirst) {
            let _ = self.free(attachment, LastAdd::Ended).await;
        }
        self.wait(Wait::Interface(attachment.clone())).await;
        self.with(|task_run| {
            let addresses = task_run.machine().plugged.remove(&container).unwrap_or_default();
            task_run.effects.unplugged.extend(addresses);
        });
        Ok(())
    }

    async fn forget(&self, _: &AttachmentEntry) {}

    async fn free(&self, attachment: &Attachment, add: LastAdd) -> Result<(), LedgerError> {
        self.wait(Wait::Free(attachment.clone())).await;
        let now = self.now();
        self.with(|task_run| {
            let before = task_run.effects.machine.others(attachment);
            let freed = add.release(task_run.machine().ipam(), attachment, now);
            if task_run.effects.machine.others(attachment) != before {
                task_run.effects.violation = Some(Violation::ReleasedOthers);
            }
            freed
        })
    }

    fn tombstones(&self) -> Vec<Attachment> {
        Vec::new()
    }

    fn has_tombstone(&self, _: &Attachment) -> bool {
        false
    }

    fn remove_tombstone(&self, _: &Attachment) {}

    fn obstacles(&self) -> Vec<String> {
        self.read(|machine| {
            let gateways = machine.ipam.gateways();
            readiness::obstacles(&readiness::ReadinessInputs {
                view: &machine.agent.watcher.view,
                registration: &machine.agent.registration,
                allocations: &Allocations {
                    identity: machine.identity(),
                    blocks: machine.ipam.blocks().to_vec(),
                    gateways: gateways.to_vec(),
                },
                underlay: Ok(()),
                gateways,
                mtu: MTU,
                failures: &[],
            })
        })
    }

    fn families(&self) -> &[Family] {
        &[Family::V4]
    }

    fn mtu(&self) -> Option<u32> {
        Some(MTU)
    }

    async fn sleep(&self, _: Duration) {
        self.wait(Wait::Time).await;
    }

    fn attachments_changed(&self) {}

    fn addresses_freed(&self) {}
}
