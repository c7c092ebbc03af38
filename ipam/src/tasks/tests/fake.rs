//! A node that is plain data. Its datastore answers at once, or as a test specifies.

mod operator;
mod pods;
mod publisher;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use polder_api::{Backend, Family, Mac};

use super::*;
use crate::Revision;
use crate::allocator::CoolDown;
use crate::change::Change;
use crate::claim::NoClaim;
use crate::key::{Key, Range};
use crate::ledger::memory::Memory;
use crate::ledger::{AttachmentEntry, AttachmentKind, LedgerError};
use crate::node::{AllocationRequest, AllocationSource as From};
use crate::pool::{BlockRequest, Pool, PoolState};
use crate::record::{AttachMode, BlockRecord, FenceRecord, Masquerade, PodsGone, VxlanSettings, encode};
use crate::store::refusal::{RefusalCause, StoreRefusal};
use crate::store::{Compare, Contents, Entry, Outcome, Txn, Update, Write};
use crate::transaction::transaction;

pub(super) use self::pods::Lock;

/// The outcome of a transaction.
pub(super) enum Fate {
    /// It is carried out.
    Carried,
    /// It is never answered.
    Hangs,
    /// It is carried out, but the answer is lost.
    Unanswered,
    /// It is lost: not carried out, and not answered.
    Lost,
    /// This record is written first.
    Late(Key, Vec<u8>),
    /// It is carried out, this event happens, and the answer is lost.
    UnansweredAnd(Event),
    /// This event happens first.
    After(Event),
    /// It is refused for that reason.
    Refused(RefusalCause),
    /// It is carried out, but answered with a refusal for that reason.
    MadeAndRefused(RefusalCause),
}

/// A failure on the node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeFault {
    /// No interface can be deleted.
    InterfacesStay,
    /// No address can be freed.
    DiskIsFull,
    /// The datastore cannot be read.
    Unreadable,
}

pub(super) type Event = Box<dyn FnOnce(&mut State)>;

pub(super) struct State {
    pub(super) clock: u64,
    pub(super) names: u64,
    pub(super) revision: Revision,
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) view: Arc<View>,
    pub(super) ipam: NodeIpam<Memory>,
    pub(super) labels: Labels,
    pub(super) registration: Registration,
    pub(super) allocations: Allocations,
    pub(super) has_gateways: bool,
    pub(super) is_read_only: bool,
    /// The registration state at the last write to the datastore.
    pub(super) registration_during_change: Registration,
    pub(super) fates: VecDeque<Fate>,
    /// Happens during the next access to the ledger.
    pub(super) meanwhile: Option<Event>,
    /// Happens when the node's gateway addresses are deleted.
    pub(super) without_gateways: Option<Event>,
    /// The pods' interfaces.
    pub(super) interfaces: BTreeSet<Attachment>,
    /// The active failure.
    pub(super) fault: Option<NodeFault>,
    pub(super) tombstones: BTreeSet<Attachment>,
    pub(super) wired_by_earlier_process: BTreeSet<Attachment>,
    /// The reasons why the node is not ready.
    pub(super) obstacles: Vec<String>,
    /// How many more sleeps of a task end.
    pub(super) sleeps: usize,
    /// The answers to requests for blocks. When they are used up, the answer is that no block is available.
    pub(super) claims: VecDeque<Result<(), NoClaim>>,
    /// The requests for blocks for later.
    pub(super) ahead: Vec<BlockRequest>,
    /// Whether an attachment was added or released since the publisher last checked.
    pub(super) has_change_notice: bool,
    /// The revisions of the node's record with which its lease records were written.
    pub(super) lease_writes: Vec<Revision>,
}

impl State {
    pub(super) fn put(&mut self, key: &str, value: Vec<u8>) {
        self.entries.insert(key.to_owned(), Entry { key: key.to_owned(), value, revision: self.revision });
    }

    /// Allocates an address to a pod with that container ID.
    pub(super) fn allocate(&mut self, container: &str) {
        let request = AllocationRequest {
            attachment: attachment(container),
            kind: AttachmentKind::Pod,
            source: From::Blocks {
                families: vec![Family::V4],
                pool: None,
                requested: Vec::new(),
                reserved: Vec::new(),
            },
            mac: None,
            mtu: 1450,
            netns: String::new(),
            pod: None,
            ports: Vec::new(),
        };
        self.ipam.allocate(request, CoolDown::Full, Moment::from_millis(self.clock)).unwrap();
    }

    /// Removes the node from the cluster.
    pub(super) fn remove_node(&mut self) {
        let identity = self.ipam.identity().unwrap().unwrap();
        let OwnNode { name, machine_id, boot_id, .. } = me();
        self.entries.remove(&Key::Node(name.clone()).to_string());
        let fence = FenceRecord {
            node: name.clone(),
            machine_id,
            boot_id,
            pods: PodsGone::Unknown,
            kubernetes_uid: None,
        };
        self.revision = self.revision.next();
        self.put(&Key::Fence(name, identity.incarnation).to_string(), encode(&fence));
        self.load();
    }

    fn holds(&self, compare: &Compare) -> bool {
        let inside = |range: &Range, after: Revision| {
            !self.entries.values().any(|entry| range.has(&entry.key) && entry.revision > after)
        };
        match compare {
            Compare::Empty(range) => inside(range, Revision::ABSENT),
            Compare::NothingNewer { range, revision } => inside(range, *revision),
            Compare::Unchanged { key, revision } => {
                self.entries.get(key).map_or(Revision::ABSENT, |entry| entry.revision) == *revision
            }
        }
    }

    fn commit(&mut self, txn: &Txn) -> Outcome {
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            return Outcome::Refused;
        }
        self.revision = self.revision.next();
        for write in &txn.writes {
            match write {
                Write::Put { key, value } => self.put(key, value.clone()),
                Write::Delete { key } => drop(self.entries.remove(key)),
            }
        }
        Outcome::Applied { revision: self.revision }
    }

    pub(super) fn load(&mut self) {
        let entries = self.entries.values().filter(|entry| Key::followed().has(&entry.key)).cloned();
        let contents = Contents { revision: self.revision, entries: entries.collect() };
        Arc::make_mut(&mut self.view).apply(Update::Loaded(contents));
    }
}

/// A node whose parts are plain data.
#[derive(Clone)]
pub(super) struct Fake {
    state: Rc<RefCell<State>>,
    locked: Locked,
}

type Locked = Rc<RefCell<BTreeSet<Attachment>>>;

impl Fake {
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.borrow_mut())
    }

    /// Advances the clock.
    pub(super) fn pass(&self, time: Duration) {
        self.with(|state| state.clock += u64::try_from(time.as_millis()).unwrap());
    }

    /// Whether the removed node has confirmed that its pods are gone.
    pub(super) fn is_confirmed(&self) -> bool {
        let is_confirmed = |key: &Key, value: &[u8]| match key {
            Key::Fence(..) => Some(serde_json::from_slice::<FenceRecord>(value).unwrap().pods),
            _ => None,
        };
        self.records(is_confirmed).contains(&PodsGone::Confirmed)
    }

    pub(super) fn records<T>(&self, read: impl Fn(&Key, &[u8]) -> Option<T>) -> Vec<T> {
        let entry = |entry: &Entry| read(&entry.key.parse().unwrap(), &entry.value);
        self.with(|state| state.entries.values().filter_map(entry).collect())
    }

    pub(super) fn blocks_of(&self, node: &str) -> usize {
        let is_of = |key: &Key, value: &[u8]| match key {
            Key::Block(_) => {
                let record: BlockRecord = serde_json::from_slice(value).unwrap();
                (record.node.as_str() == node).then_some(())
            }
            _ => None,
        };
        self.records(is_of).len()
    }
}

fn no_answer() -> StoreError {
    StoreError::NoAnswer { store: "a fake".to_owned(), reason: "a test says so".to_owned() }
}

fn refused(cause: RefusalCause) -> StoreError {
    let refusal = StoreRefusal::new(cause, "a test says so".to_owned());
    StoreError::Refused { store: "a fake".to_owned(), refusal }
}

impl RecordStore for Fake {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        let fate = self.with(|state| {
            state.registration_during_change = state.registration.clone();
            state.fates.pop_front()
        });
        if matches!(fate, Some(Fate::Hangs)) {
            return std::future::pending().await;
        }
        self.with(|state| match fate {
            None | Some(Fate::Carried | Fate::Hangs) => Ok(state.commit(&transaction(change))),
            Some(Fate::Lost) => Err(no_answer()),
            Some(Fate::Unanswered) => {
                let _ = state.commit(&transaction(change));
                Err(no_answer())
            }
            Some(Fate::UnansweredAnd(event)) => {
                let _ = state.commit(&transaction(change));
                event(state);
                Err(no_answer())
            }
            Some(Fate::After(event)) => {
                event(state);
                Ok(state.commit(&transaction(change)))
            }
            Some(Fate::Refused(cause)) => Err(refused(cause)),
            Some(Fate::MadeAndRefused(cause)) => {
                let _ = state.commit(&transaction(change));
                Err(refused(cause))
            }
            Some(Fate::Late(key, value)) => {
                state.revision = state.revision.next();
                state.put(&key.to_string(), value);
                Ok(state.commit(&transaction(change)))
            }
        })
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        self.with(|state| {
            if state.fault == Some(NodeFault::Unreadable) {
                return Err(no_answer());
            }
            let entries = state.entries.values().filter(|entry| range.has(&entry.key)).cloned();
            Ok(Contents { revision: state.revision, entries: entries.collect() })
        })
    }
}

impl Host for Fake {
    type Ledger = Memory;

    /// Small, so that tests with few records need several changes.
    fn most_records(&self) -> usize {
        2
    }

    fn now(&self) -> Moment {
        self.with(|state| Moment::from_millis(state.clock))
    }

    fn view(&self) -> Arc<View> {
        self.with(|state| Arc::clone(&state.view))
    }

    fn labels(&self) -> Labels {
        self.with(|state| state.labels.clone())
    }

    fn registration(&self) -> Registration {
        self.with(|state| state.registration.clone())
    }

    async fn ledger<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut NodeIpam<Memory>, Moment) -> T + Send + 'static,
    ) -> T {
        self.with(|state| {
            if let Some(meanwhile) = state.meanwhile.take() {
                meanwhile(state);
            }
            job(&mut state.ipam, Moment::from_millis(state.clock))
        })
    }
}

impl RegistrarHost for Fake {
    fn fresh_name(&self) -> Result<String, HostError> {
        self.with(|state| {
            state.names += 1;
            Ok(format!("x{}", state.names))
        })
    }

    async fn changed(&self, _: &Arc<View>, _: Duration) {
        self.with(State::load);
    }

    async fn wait_for_revision(&self, _: Revision) -> Result<(), StoreError> {
        self.with(State::load);
        Ok(())
    }

    fn presence(&self, _: &View) -> Result<NodePresence, NoPresence> {
        Ok(NodePresence {
            underlay: vec!["192.0.2.1".parse().unwrap()],
            vtep_mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            version: "0".to_owned(),
            node_object: crate::membership::NodeObjectState::NotUsed,
        })
    }

    fn check_addresses_in_use(&self, _: &View) -> Result<(), AddressesUnknown> {
        Ok(())
    }

    fn adopted(&self) -> Option<LeaseRecord> {
        None
    }

    fn register(&self, registration: Registration) {
        self.with(|state| state.registration = registration);
    }

    fn publish_allocations(&self, allocations: Allocations) {
        self.with(|state| state.allocations = allocations);
    }

    async fn cut_off(&self, attachment: &Attachment) -> Result<(), NotReleased> {
        teardown::cut_off(self, attachment).await
    }

    fn is_wired_by_earlier_process(&self, attachment: &Attachment) -> bool {
        self.with(|state| state.wired_by_earlier_process.contains(attachment))
    }

    fn is_any_wired_by_earlier_process(&self) -> bool {
        self.with(|state| !state.wired_by_earlier_process.is_empty())
    }

    async fn remove_gateways(&self) -> Result<(), HostError> {
        self.with(|state| {
            if state.is_read_only {
                return Err(HostError::new("nothing is changed"));
            }
            state.has_gateways = false;
            if let Some(event) = state.without_gateways.take() {
                event(state);
            }
            Ok(())
        })
    }
}

/// The result of a future that must not wait.
pub(super) fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("it waits"),
    }
}

/// Polls a task without an end until it waits.
pub(super) fn until_it_waits(future: impl Future<Output = ()>) {
    let polled = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending(), "the task ended");
}

pub(super) fn pool() -> Pool {
    pool_of("main", "10.0.0.0/26", 28)
}

pub(super) fn pool_of(name: &str, cidr: &str, block_length: u8) -> Pool {
    Pool::new(name.parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active).unwrap()
}

pub(super) fn me() -> OwnNode {
    OwnNode {
        name: "n1".parse().unwrap(),
        machine_id: MachineId::new("m1"),
        boot_id: BootId::new("b1"),
        proof: Proof::default(),
        bootstrap: Some(Bootstrap {
            pools: vec![pool()],
            backend: Backend::Auto,
            attach: AttachMode::Bridge,
            vxlan: VxlanSettings::default(),
            masquerade: Masquerade::default(),
        }),
        cooldown: Duration::from_secs(60),
    }
}

pub(super) fn attachment(container: &str) -> Attachment {
    Attachment {
        network: "polder".parse().unwrap(),
        container: container.parse().unwrap(),
        interface: "eth0".parse().unwrap(),
    }
}

/// A node that has read an empty datastore, and its registrar.
pub(super) fn node() -> (Fake, Registrar<'static, Fake>) {
    let (ipam, _) = NodeIpam::with(Memory::default(), &BootId::new("b1"), me().cooldown).unwrap();
    let state = State {
        clock: 10_000_000,
        names: 0,
        revision: Revision::new(1),
        entries: BTreeMap::new(),
        view: Arc::default(),
        ipam,
        labels: Labels::new(),
        registration: Registration::default(),
        allocations: Allocations::default(),
        has_gateways: true,
        is_read_only: false,
        registration_during_change: Registration::default(),
        fates: VecDeque::new(),
        meanwhile: None,
        without_gateways: None,
        interfaces: BTreeSet::new(),
        fault: None,
        tombstones: BTreeSet::new(),
        wired_by_earlier_process: BTreeSet::new(),
        obstacles: Vec::new(),
        sleeps: 0,
        claims: VecDeque::new(),
        ahead: Vec::new(),
        has_change_notice: false,
        lease_writes: Vec::new(),
    };
    let fake = Fake { state: Rc::new(RefCell::new(state)), locked: Rc::default() };
    fake.with(State::load);
    (fake.clone(), Registrar::new(Box::leak(Box::new(fake)), Box::leak(Box::new(me()))))
}

pub(super) fn registered() -> (Fake, Registrar<'static, Fake>) {
    let (fake, mut registrar) = node();
    at_once(registrar.run_once());
    assert_eq!(fake.registration(), Registration::Registered);
    (fake, registrar)
}
