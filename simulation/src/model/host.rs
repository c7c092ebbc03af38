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
use polder_ipam::bootstrap::Unsurveyed;
use polder_ipam::cause::HostError;
use polder_ipam::change::Change;
use polder_ipam::claim::NoClaim;
use polder_ipam::key::{Key, Range};
use polder_ipam::ledger::memory::Memory;
use polder_ipam::ledger::{AttachmentEntry, LedgerError};
use polder_ipam::membership::{NoPresence, Presence, Step};
use polder_ipam::node::NodeIpam;
use polder_ipam::pool::BlockRequest;
use polder_ipam::readiness;
use polder_ipam::record::Alive;
use polder_ipam::registration::{Holdings, Registration};
use polder_ipam::release::NotReleased;
use polder_ipam::reservation::Denied;
use polder_ipam::store::{Contents, Outcome, StoreError};
use polder_ipam::tasks::{
    Host, LastAdd, NotHandedOver, OwnNode, PodHost, Records, RegistrarHost, RegistrarState, Requests,
    ReservationRequest, teardown,
};
use polder_ipam::view::View;

use super::cluster::Broken;
use super::flaw::Flaw;
use super::machine::{Container, Machine, Who};
use super::play::Play;
use super::tally::Happening;
use super::task::{Answer, Job, Part, Sent, Wait};

/// The MTU of all pods, in bytes.
const MTU: u32 = 1450;

/// The environment of a task while it runs.
pub(super) struct Scene<'a> {
    play: &'a Play<'a>,
    who: Who,
    job: Arc<Job>,
    /// Whether this part of the task runs for the first time.
    is_new: bool,
    tick: u8,
    answer: Option<Answer>,
    left: Left,
}

/// The effects of a task when it stops.
pub(super) struct Left {
    /// The machine after this part.
    pub(super) machine: Arc<Machine>,
    /// The generated name, if any.
    pub(super) fresh: Option<String>,
    /// The condition that the task waits for.
    pub(super) wait: Option<Wait>,
    /// The addresses of removed interfaces.
    pub(super) unplugged: Vec<IpAddr>,
    /// A violation, if any.
    pub(super) broken: Option<Broken>,
}

impl Left {
    fn new(machine: &Arc<Machine>) -> Self {
        let machine = Arc::clone(machine);
        Self { machine, fresh: None, wait: None, unplugged: Vec::new(), broken: None }
    }
}

impl<'a> Scene<'a> {
    /// The environment of a task on that machine.
    pub(super) fn new(play: &'a Play<'a>, who: Who, job: Arc<Job>) -> Rc<RefCell<Self>> {
        let left = Left::new(&play.cluster.machines[who]);
        Rc::new(RefCell::new(Self { play, who, job, is_new: false, tick: 0, answer: None, left }))
    }

    /// Starts a part of the task.
    pub(super) fn enter(&mut self, part: &Part, is_new: bool) {
        self.is_new = is_new;
        self.tick = part.tick;
        self.answer = part.told.as_ref().map(|(_, answer)| answer.clone());
        self.left = Left { fresh: part.fresh.clone(), ..Left::new(&part.machine) };
    }

    /// Takes the effects so far.
    pub(super) fn leave(&mut self) -> Left {
        let nothing = Left::new(&self.play.cluster.machines[self.who]);
        std::mem::replace(&mut self.left, nothing)
    }

    fn machine(&mut self) -> &mut Machine {
        Arc::make_mut(&mut self.left.machine)
    }

    fn count(&self, happening: Happening) {
        if self.is_new {
            self.play.count(happening);
        }
    }

    /// A unique name: an incarnation if the registrar decides on a step, otherwise a claim nonce.
    fn fresh(&mut self) -> String {
        if matches!(*self.job, Job::Decide) {
            return self.left.machine.next_incarnation();
        }
        let (play, who) = (self.play, self.who);
        self.left.fresh.get_or_insert_with(|| play.cluster.nonce(who)).clone()
    }
}

/// Handle of a task to its environment.
#[derive(Clone)]
pub(super) struct ModelHost<'a>(pub(super) Rc<RefCell<Scene<'a>>>);

impl ModelHost<'_> {
    fn with<T>(&self, action: impl FnOnce(&mut Scene<'_>) -> T) -> T {
        action(&mut self.0.borrow_mut())
    }

    fn read<T>(&self, read: impl FnOnce(&Machine) -> T) -> T {
        read(&self.0.borrow().left.machine)
    }

    /// The identity of the node.
    pub(super) fn me(&self) -> OwnNode {
        self.with(|scene| scene.play.space.me(&scene.left.machine))
    }

    /// The state that the registrar keeps between steps.
    pub(super) fn registrar_state(&self, me: &OwnNode) -> RegistrarState {
        self.read(|machine| machine.agent.state.clone()).unwrap_or_else(|| RegistrarState::new(me))
    }

    /// Stores the registrar's state.
    pub(super) fn keep(&self, state: RegistrarState) {
        self.with(|scene| scene.machine().agent.state = Some(state));
    }

    /// Answers the ADD that waits for the registrar. Returns false if none waits for this answer.
    pub(super) fn answer(&self, answer: Answer) -> bool {
        if let Answer::Address(Err(NotHandedOver::Denied(Denied::Held { .. }))) = answer {
            self.with(|scene| scene.count(Happening::Denied));
        }
        self.with(|scene| scene.machine().agent.answer(answer))
    }

    async fn wait(&self, wait: Wait) -> Answer {
        self.with(|scene| {
            scene.left.wait = Some(wait);
            scene.answer = None;
        });
        std::future::poll_fn(|_| self.with(|scene| scene.answer.take().map_or(Poll::Pending, Poll::Ready)))
            .await
    }

    fn plugged(&self, attachment: &Attachment) -> Option<Container> {
        self.read(|machine| {
            let container = machine.container(attachment)?;
            machine.plugged.contains_key(&container).then_some(container)
        })
    }
}

impl Records for ModelHost<'_> {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        let sent = self.with(|scene| Sent {
            by: scene.left.machine.identity().map(|identity| identity.incarnation),
            change: Arc::new(change.clone()),
            txn: Arc::new(scene.play.space.transaction(change)),
        });
        match self.wait(Wait::Commit(sent)).await {
            Answer::Committed(outcome) => outcome,
            other => unreachable!("{other:?}"),
        }
    }

    /// The model has no published addresses, and no liveness records under another machine's name.
    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        if matches!(range.start.parse(), Ok(Key::Alive(_))) || range.start.contains("/addresses/") {
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
        self.with(|scene| scene.left.machine.now(scene.tick))
    }

    fn view(&self) -> Arc<View> {
        self.with(|scene| scene.play.space.bend(&scene.left.machine.agent.watcher.view, &scene.job))
    }

    fn registration(&self) -> Registration {
        self.read(|machine| machine.agent.registration.clone())
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Memory>, Moment) -> T + Send + 'static,
    ) -> T {
        let now = self.now();
        self.with(|scene| match scene.play.space.bend_ledger(&scene.left.machine, &scene.job) {
            Some(mut bent) => job(&mut bent, now),
            None => job(scene.machine().ipam(), now),
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

    async fn caught_up(&self, revision: Revision) -> Result<(), StoreError> {
        if self.read(|machine| machine.agent.watcher.shows(revision)) {
            return Ok(());
        }
        match self.wait(Wait::CaughtUp(revision)).await {
            Answer::CaughtUp(seen) => seen,
            other => unreachable!("{other:?}"),
        }
    }

    fn presence(&self, _: &View) -> Result<Presence, NoPresence> {
        let last = self.with(|scene| u8::try_from(scene.who).expect("there are few machines") + 1);
        Ok(Presence {
            underlay: vec![IpAddr::from([192, 0, 2, last])],
            vtep_mac: Mac([2, 0, 0, 0, 0, last]),
            mtu: MTU,
            version: "0".to_owned(),
        })
    }

    fn surroundings(&self, _: &View) -> Result<(), Unsurveyed> {
        Ok(())
    }

    fn adopted(&self) -> Option<Alive> {
        self.read(|machine| machine.agent.adopted.clone())
    }

    fn register(&self, registration: Registration) {
        self.with(|scene| scene.machine().agent.registration = registration);
    }

    fn publish_holdings(&self, _: Holdings) {}

    async fn cut_off(&self, attachment: &Attachment) -> Result<(), NotReleased> {
        teardown::cut_off(self, attachment).await
    }

    /// A plugin creates the interface in the same step in which it receives its answer.
    fn is_wired_from_before(&self, _: &Attachment) -> bool {
        false
    }

    fn is_any_wired_from_before(&self) -> bool {
        false
    }

    async fn remove_gateways(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn observe(&self, step: &Step, _: u64, _: bool) {
        self.with(|scene| match step {
            Step::Conflict(_) => scene.count(Happening::Conflict),
            Step::Own(_) => scene.count(Happening::TakenOver),
            Step::Disown(_) => scene.count(Happening::GivenBack),
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
        self.0.with(|scene| scene.machine().agent.locked.remove(&self.1));
    }
}

impl<'a> PodHost for ModelHost<'a> {
    type Lock = Lock<'a>;

    fn try_lock(&self, attachment: &Attachment) -> Option<Lock<'a>> {
        self.with(|scene| scene.machine().agent.locked.insert(attachment.clone()))
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

    async fn delete_interface(&self, attachment: &Attachment) -> Result<(), HostError> {
        let Some(container) = self.plugged(attachment) else { return Ok(()) };
        if self.with(|scene| scene.play.space.flaw) == Some(Flaw::FreesFirst) {
            let _ = self.free(attachment, LastAdd::Ended).await;
        }
        self.wait(Wait::Interface(attachment.clone())).await;
        self.with(|scene| {
            let addresses = scene.machine().plugged.remove(&container).unwrap_or_default();
            scene.left.unplugged.extend(addresses);
        });
        Ok(())
    }

    async fn forget(&self, _: &AttachmentEntry) {}

    async fn free(&self, attachment: &Attachment, add: LastAdd) -> Result<(), LedgerError> {
        self.wait(Wait::Free(attachment.clone())).await;
        let now = self.now();
        self.with(|scene| {
            let before = scene.left.machine.others(attachment);
            let freed = add.release(scene.machine().ipam(), attachment, now);
            if scene.left.machine.others(attachment) != before {
                scene.left.broken = Some(Broken::FreedAnothers);
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
                holdings: &Holdings {
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
