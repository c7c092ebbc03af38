//! The tasks on a node that is plain data: its store answers at once, or as a test says.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use polder_api::{Backend, Family, Mac};

use super::registrar::CAUTION;
use super::*;
use crate::allocator::Rest;
use crate::claim::{NoClaim, next_block};
use crate::ids::{Incarnation, Nonce};
use crate::key::Key;
use crate::ledger::Kind;
use crate::ledger::memory::Memory;
use crate::node::{Source as From, Wish};
use crate::pool::{Block, BlockRequest, Pool, PoolState, Purpose};
use crate::record::{
    AttachMode, BlockRecord, FenceRecord, Masquerade, NodeRecord, PodsGone, PoolRecord, VxlanSettings, encode,
};
use crate::reservation::Denied;
use crate::store::{Compare, Entry, Update, Write};

/// What becomes of a transaction.
enum Fate {
    /// It is carried out, and the answer is lost.
    Unanswered,
    /// It is lost.
    Lost,
    /// Somebody puts this record first.
    Late(Key, Vec<u8>),
}

type Event = Box<dyn FnOnce(&mut State)>;

struct State {
    clock: u64,
    names: u64,
    revision: i64,
    entries: BTreeMap<String, Entry>,
    view: Arc<View>,
    ipam: NodeIpam<Memory>,
    registration: Registration,
    holdings: Holdings,
    detached: Vec<Attachment>,
    has_gateways: bool,
    is_read_only: bool,
    /// What the node said when it last wrote to the store.
    said_meanwhile: Registration,
    fates: VecDeque<Fate>,
    /// Happens while the ledger is asked.
    meanwhile: Option<Event>,
}

impl State {
    fn put(&mut self, key: &str, value: Vec<u8>) {
        self.entries.insert(key.to_owned(), Entry { key: key.to_owned(), value, revision: self.revision });
    }

    fn holds(&self, compare: &Compare) -> bool {
        let inside = |range: &Range, after: i64| {
            !self.entries.values().any(|entry| range.has(&entry.key) && entry.revision > after)
        };
        match compare {
            Compare::Empty(range) => inside(range, 0),
            Compare::NothingNewer { range, revision } => inside(range, *revision),
            Compare::Unchanged { key, revision } => {
                self.entries.get(key).map_or(0, |entry| entry.revision) == *revision
            }
        }
    }

    fn commit(&mut self, txn: &Txn) -> Outcome {
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            return Outcome::Refused;
        }
        self.revision += 1;
        for write in &txn.writes {
            match write {
                Write::Put { key, value } => self.put(key, value.clone()),
                Write::Delete { key } => drop(self.entries.remove(key)),
            }
        }
        Outcome::Applied { revision: self.revision }
    }

    fn load(&mut self) {
        let entries = self.entries.values().filter(|entry| Key::followed().has(&entry.key)).cloned();
        let contents = Contents { revision: self.revision, entries: entries.collect() };
        Arc::make_mut(&mut self.view).apply(Update::Loaded(contents));
    }
}

#[derive(Clone)]
struct Fake(Rc<RefCell<State>>);

impl Fake {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.0.borrow_mut())
    }

    fn records<T>(&self, read: impl Fn(&Key, &[u8]) -> Option<T>) -> Vec<T> {
        let entry = |entry: &Entry| read(&entry.key.parse().unwrap(), &entry.value);
        self.with(|state| state.entries.values().filter_map(entry).collect())
    }

    fn blocks_of(&self, node: &str) -> usize {
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

impl Host for Fake {
    type Ledger = Memory;

    fn now(&self) -> Moment {
        self.with(|state| Moment::from_millis(state.clock))
    }

    fn fresh_name(&self) -> Result<String, String> {
        self.with(|state| {
            state.names += 1;
            Ok(format!("x{}", state.names))
        })
    }

    fn view(&self) -> Arc<View> {
        self.with(|state| Arc::clone(&state.view))
    }

    async fn changed(&self, _: &Arc<View>, _: Duration) {
        self.with(State::load);
    }

    async fn caught_up(&self, _: i64) -> Result<(), StoreError> {
        self.with(State::load);
        Ok(())
    }

    async fn commit(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        self.with(|state| state.said_meanwhile = state.registration.clone());
        self.with(|state| match state.fates.pop_front() {
            None => Ok(state.commit(txn)),
            Some(Fate::Lost) => Err(no_answer()),
            Some(Fate::Unanswered) => {
                let _ = state.commit(txn);
                Err(no_answer())
            }
            Some(Fate::Late(key, value)) => {
                state.revision += 1;
                state.put(&key.to_string(), value);
                Ok(state.commit(txn))
            }
        })
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        self.with(|state| {
            let entries = state.entries.values().filter(|entry| range.has(&entry.key)).cloned();
            Ok(Contents { revision: state.revision, entries: entries.collect() })
        })
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

    fn presence(&self, _: &View) -> Result<Presence, String> {
        Ok(Presence {
            underlay: vec!["192.0.2.1".parse().unwrap()],
            vtep_mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            version: "0".to_owned(),
        })
    }

    fn surroundings(&self, _: &View) -> Result<(), String> {
        Ok(())
    }

    fn adopted(&self) -> Option<Alive> {
        None
    }

    fn registration(&self) -> Registration {
        self.with(|state| state.registration.clone())
    }

    fn register(&self, registration: Registration) {
        self.with(|state| state.registration = registration);
    }

    fn announce(&self, holdings: Holdings) {
        self.with(|state| state.holdings = holdings);
    }

    async fn detach(&self, attachment: &Attachment) -> Result<(), String> {
        self.with(|state| {
            state.ipam.release(attachment, Moment::from_millis(state.clock)).unwrap();
            state.detached.push(attachment.clone());
        });
        Ok(())
    }

    async fn remove_gateways(&self) -> Result<(), String> {
        self.with(|state| {
            if state.is_read_only {
                return Err("nothing is changed".to_owned());
            }
            state.has_gateways = false;
            Ok(())
        })
    }
}

/// The result of something that has nothing to wait for.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("it waits"),
    }
}

fn pool() -> Pool {
    pool_of("main", "10.0.0.0/26", 28)
}

fn pool_of(name: &str, cidr: &str, block_length: u8) -> Pool {
    Pool::new(name.parse().unwrap(), cidr.parse().unwrap(), block_length, PoolState::Active).unwrap()
}

fn me() -> Me {
    Me {
        name: "n1".parse().unwrap(),
        machine_id: "m1".to_owned(),
        boot_id: "b1".to_owned(),
        proof: Proof::default(),
        labels: Labels::new(),
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

/// A node that has read an empty store, and its registrar.
fn node() -> (Fake, Registrar<Fake>) {
    let (ipam, _) = NodeIpam::with(Memory::default(), "b1", me().cooldown).unwrap();
    let fake = Fake(Rc::new(RefCell::new(State {
        clock: 10_000_000,
        names: 0,
        revision: 1,
        entries: BTreeMap::new(),
        view: Arc::default(),
        ipam,
        registration: Registration::default(),
        holdings: Holdings::default(),
        detached: Vec::new(),
        has_gateways: true,
        is_read_only: false,
        said_meanwhile: Registration::default(),
        fates: VecDeque::new(),
        meanwhile: None,
    })));
    fake.with(State::load);
    (fake.clone(), Registrar::new(fake, Arc::new(me())))
}

fn registered() -> (Fake, Registrar<Fake>) {
    let (fake, mut registrar) = node();
    at_once(registrar.look());
    assert_eq!(fake.registration(), Registration::Registered);
    (fake, registrar)
}

fn attachment(container: &str) -> Attachment {
    Attachment {
        network: "polder".parse().unwrap(),
        container: container.parse().unwrap(),
        interface: "eth0".parse().unwrap(),
    }
}

#[test]
fn a_node_in_an_empty_store_makes_the_settings_claims_a_block_and_registers_with_its_gateway() {
    let (fake, _) = registered();
    assert_eq!(fake.blocks_of("n1"), 1);
    let gateways: Vec<_> = fake.records(|key, value| match key {
        Key::Node(_) => Some(serde_json::from_slice::<NodeRecord>(value).unwrap().gateways),
        _ => None,
    });
    assert_eq!(gateways, [fake.with(|state| state.holdings.gateways.clone())]);
    assert_eq!(gateways[0].len(), 1);
    assert!(fake.view().cluster.is_some() && fake.view().pools.len() == 1);
}

#[test]
fn a_node_that_waited_for_the_records_must_not_serve_although_they_came_meanwhile() {
    let (fake, mut registrar) = node();
    fake.with(|state| {
        state.view = Arc::default();
        state.meanwhile = Some(Box::new(State::load));
    });
    at_once(registrar.look());
    assert!(matches!(fake.registration(), Registration::Unproven(_)), "{:?}", fake.registration());
    at_once(registrar.look());
    assert_eq!(fake.registration(), Registration::Registered);
}

#[test]
fn a_claim_whose_answer_is_lost_is_found_and_not_made_again() {
    let (fake, registrar) = registered();
    fake.with(|state| state.fates.push_back(Fate::Unanswered));
    let before = fake.with(|state| state.ipam.blocks().len());
    at_once(registrar.claim(any())).unwrap();
    assert_eq!(fake.blocks_of("n1"), before + 1);
    assert_eq!(fake.with(|state| state.ipam.blocks().len()), before + 1);
}

/// The block that the node claims next.
fn next(fake: &Fake) -> Block {
    let owned = fake.with(|state| state.ipam.blocks().iter().map(|owned| owned.block).collect());
    next_block(&fake.view(), &me().name, &Labels::new(), &any(), &owned).unwrap().1
}

fn any() -> BlockRequest {
    BlockRequest::Any(Family::V4, None)
}

#[test]
fn a_claim_that_came_to_nothing_is_tried_again_with_another_block() {
    let (fake, registrar) = registered();
    fake.with(|state| state.fates.push_back(Fate::Lost));
    at_once(registrar.claim(any())).unwrap();
    assert_eq!(fake.blocks_of("n1"), 2);
}

#[test]
fn a_block_that_another_node_claims_meanwhile_stays_that_nodes() {
    let (fake, registrar) = registered();
    let key = Key::Block(next(&fake));
    fake.with(|state| state.fates.push_back(Fate::Late(key, other_claim())));
    at_once(registrar.claim(any())).unwrap();
    assert_eq!((fake.blocks_of("n1"), fake.blocks_of("n2")), (2, 1));
}

#[test]
fn nothing_is_claimed_or_handed_over_by_a_view_that_tells_of_a_loss_before_a_round_has_noticed_it() {
    let (fake, mut registrar) = registered();
    fake.with(|state| Arc::make_mut(&mut state.view).losses += 1);
    let refused = at_once(registrar.claim(any())).unwrap_err();
    assert!(matches!(refused, NoClaim::Unavailable(_)), "{refused}");
    let wanted = Workload::Address("10.9.0.1".parse().unwrap());
    let refused = at_once(registrar.hand_over(&wanted, "d/web", &attachment("c1"))).unwrap_err();
    assert!(matches!(&refused, Unreserved::TryAgain(why) if why.contains("lost records")), "{refused}");
    at_once(registrar.look());
    fake.with(|state| state.clock += 1000 * CAUTION.as_secs() - 1);
    assert!(at_once(registrar.claim(any())).is_err(), "owners are putting them back");
    fake.with(|state| state.clock += 1);
    at_once(registrar.claim(any())).unwrap();
}

#[test]
fn a_reserved_address_is_expected_until_it_is_given_up_and_one_whose_answer_is_lost_is_found() {
    let (fake, registrar) = registered();
    let mut reserved = pool_of("reserved", "10.9.0.0/28", 28);
    reserved.purpose = Purpose::Reservations;
    fake.with(|state| {
        state.revision += 1;
        state.put(&Key::Pool(reserved.name.clone()).to_string(), encode(&PoolRecord::from(&reserved)));
        state.load();
    });
    let wanted = Workload::Pool(reserved.name);
    let hand_over = |name: &str| at_once(registrar.hand_over(&wanted, name, &attachment("c1")));
    let expected =
        || fake.with(|state| state.ipam.own(Moment::from_millis(state.clock)).unwrap().expected.len());
    fake.with(|state| state.fates.push_back(Fate::Lost));
    assert!(matches!(hand_over("d/web"), Err(Unreserved::TryAgain(_))));
    assert_eq!(expected(), 0);
    fake.with(|state| state.fates.push_back(Fate::Unanswered));
    let address = hand_over("d/web").unwrap();
    assert_eq!(expected(), 1);
    fake.with(State::load);
    let other = Workload::Address(address);
    let refused = at_once(registrar.hand_over(&other, "d/db", &attachment("c2"))).unwrap_err();
    assert!(matches!(refused, Unreserved::Denied(Denied::Foreign { .. })), "{refused}");
}

#[test]
fn a_removed_node_is_cut_off_takes_its_addresses_away_and_serves_no_more() {
    let (fake, mut registrar) = registered();
    let pod = attachment("c1");
    fake.with(|state| {
        let wish = Wish {
            attachment: pod.clone(),
            kind: Kind::Pod,
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
        };
        state.ipam.allocate(wish, Rest::Full, Moment::from_millis(state.clock)).unwrap();
        let identity = state.ipam.identity().unwrap().unwrap();
        let node = Key::Node(me().name).to_string();
        state.entries.remove(&node);
        let Me { name, machine_id, boot_id, .. } = me();
        let fence = FenceRecord { node: name.clone(), machine_id, boot_id, pods: PodsGone::Unknown };
        state.revision += 1;
        state.put(&Key::Fence(name, identity.incarnation).to_string(), encode(&fence));
        state.load();
    });
    at_once(registrar.look());
    assert!(matches!(fake.registration(), Registration::Removed(_)), "{:?}", fake.registration());
    fake.with(|state| {
        assert_eq!(state.detached, [pod]);
        assert!(!state.has_gateways && state.ipam.blocks().is_empty());
    });
    // An error while it confirms that lets it not serve again.
    fake.with(|state| state.fates.extend([Fate::Lost, Fate::Lost]));
    at_once(registrar.look());
    assert!(fake.registration().forbids().is_some(), "{:?}", fake.registration());
    // An agent that starts then says so, although the kernel cannot be changed.
    fake.with(|state| (state.registration, state.is_read_only) = (Registration::default(), true));
    at_once(Registrar::new(fake.clone(), Arc::new(me())).look());
    assert!(matches!(fake.registration(), Registration::Removed(_)), "{:?}", fake.registration());
}

#[test]
fn a_node_that_is_proven_to_be_itself_serves_while_the_store_takes_no_writes() {
    let (fake, _) = registered();
    fake.with(|state| {
        state.registration = Registration::default();
        let node = Key::Node(me().name).to_string();
        let mut record: NodeRecord = serde_json::from_slice(&state.entries[&node].value).unwrap();
        record.mtu = 1400;
        state.revision += 1;
        state.put(&node, encode(&record));
        state.load();
        state.fates.push_back(Fate::Lost);
    });
    at_once(Registrar::new(fake.clone(), Arc::new(me())).look());
    assert!(matches!(fake.registration(), Registration::Waiting(_)), "{:?}", fake.registration());
    // While the store was asked, too, which can take long.
    assert_eq!(fake.with(|state| state.said_meanwhile.forbids().map(str::to_owned)), None);
}

fn other_claim() -> Vec<u8> {
    encode(&BlockRecord {
        node: "n2".parse().unwrap(),
        incarnation: Incarnation("other".to_owned()),
        pool: pool().name,
        nonce: Nonce("other".to_owned()),
    })
}
