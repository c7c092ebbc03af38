//! Answers to checks, from a node whose deviations the test sets.

use std::pin::Pin;
use std::sync::Mutex;

use polder_ipam::Revision;
use polder_ipam::invariants::{Deviation, Invariant};
use tokio::time::timeout;

use super::*;
use crate::fixture::Fixture;

/// A node with its answers.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Text of each deviation, and whether the node can repair it.
    wrong: Vec<(&'static str, bool)>,
    /// Number of examinations for which they last.
    looks_left: Option<usize>,
    is_unreadable: bool,
    looks: usize,
    putting_back: bool,
    answers: Vec<(AnswerRecord, Revision)>,
}

impl Fake {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.0.lock().unwrap())
    }
}

impl SelfExamination for Fake {
    async fn examine(&self, putting_back: bool) -> Result<OwnReport, NotExamined> {
        self.with(|state| {
            (state.looks, state.putting_back) = (state.looks + 1, putting_back);
            if state.is_unreadable {
                let (store, reason) = ("etcd".to_owned(), "none".to_owned());
                return Err(NotExamined::Store(StoreError::NoAnswer { store, reason }));
            }
            if let Some(left) = &mut state.looks_left {
                match left.checked_sub(1) {
                    Some(fewer) => *left = fewer,
                    None => state.wrong.clear(),
                }
            }
            let findings = state.wrong.iter().map(|(what, can_mend)| Finding {
                deviation: Deviation {
                    invariant: Invariant::NoLeak,
                    what: (*what).to_owned(),
                    remedy: String::new(),
                    node: None,
                    repair: None,
                },
                repair: can_mend.then_some(OwnRepair::Reconcile),
            });
            Ok(OwnReport { findings: findings.collect(), attachments: 2, interfaces: 1 })
        })
    }

    async fn carry_out(&self, repair: OwnRepair) {
        assert_eq!(repair, OwnRepair::Reconcile);
        self.with(|state| state.wrong.retain(|(_, can_mend)| !can_mend));
    }

    async fn answer(&self, record: AnswerRecord, asked: Revision) -> Result<Outcome, StoreError> {
        self.with(|state| state.answers.push((record, asked)));
        Ok(Outcome::Applied { revision: Revision::new(9) })
    }
}

/// A node that receives check requests.
struct Harness {
    fixture: Arc<Fixture>,
    node: Fake,
    running: Pin<Box<dyn Future<Output = ()>>>,
}

/// The deviations in an answer, and whether each was repaired.
type Said = Vec<(String, bool)>;

impl Harness {
    fn new() -> Self {
        let (fixture, node) = (Arc::new(Fixture::new()), Fake::default());
        let (board, asked) = (fixture.board(), node.clone());
        let running = Box::pin(async move { answer_all(&board, &asked).await });
        Self { fixture, node, running }
    }

    async fn pass(&mut self, time: Duration) {
        assert!(timeout(time, &mut self.running).await.is_err(), "it has ended");
    }

    fn ask(&self, id: &str, repairs: RepairMode) {
        let record = Arc::new(InspectionRecord { id: Nonce::new(id), repairs });
        self.fixture.view.send_modify(|view| {
            Arc::make_mut(view).inspection = Some(Versioned { record, revision: Revision::new(8) });
        });
    }

    /// Requests a check from the running node, and returns its answer.
    async fn answer(&mut self, repairs: RepairMode) -> Option<Said> {
        self.pass(Duration::ZERO).await;
        self.ask("x", repairs);
        self.pass(patience(repairs) + CERTAIN).await;
        let (record, asked) = self.node.with(|state| state.answers.pop())?;
        assert_eq!(
            (record.id.as_str(), asked.number(), record.attachments, record.interfaces),
            ("x", 8, 2, 1)
        );
        assert_eq!(self.node.with(|state| state.answers.len()), 0, "one answer is enough");
        Some(record.deviations.into_iter().map(|found| (found.what, found.repaired)).collect())
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_where_all_is_well_answers_at_once_and_each_check_once() {
    let mut harness = Harness::new();
    assert_eq!(harness.answer(RepairMode::None).await, Some(Vec::new()));
    assert_eq!(harness.node.with(|state| (state.looks, state.putting_back)), (1, false));
    harness.ask("y", RepairMode::None);
    harness.pass(Duration::ZERO).await;
    assert_eq!(harness.node.with(|state| state.answers.len()), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_for_a_moment_is_not_wrong_and_what_stays_so_is_named_and_not_put_right_unasked() {
    let mut harness = Harness::new();
    harness.node.with(|state| (state.wrong, state.looks_left) = (vec![("a pod comes", false)], Some(2)));
    assert_eq!(harness.answer(RepairMode::None).await, Some(Vec::new()));

    let mut harness = Harness::new();
    harness.node.with(|state| state.wrong = vec![("a leak", true)]);
    assert_eq!(harness.answer(RepairMode::None).await, Some(vec![("a leak".to_owned(), false)]));
}

#[tokio::test(start_paused = true)]
async fn what_is_to_be_put_right_is_and_what_cannot_be_is_named_first() {
    let mut harness = Harness::new();
    harness.node.with(|state| state.wrong = vec![("a leak", true), ("a lost record", false)]);
    let said = harness.answer(RepairMode::Safe).await.unwrap();
    assert_eq!(said, [("a lost record".to_owned(), false), ("a leak".to_owned(), true)]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_look_at_itself_tries_as_long_as_somebody_waits_and_does_not_answer_then() {
    let mut harness = Harness::new();
    harness.node.with(|state| state.is_unreadable = true);
    assert_eq!(harness.answer(RepairMode::None).await, None);
    assert!(harness.node.with(|state| state.looks) > 10);
    harness.node.with(|state| state.is_unreadable = false);
    harness.ask("y", RepairMode::None);
    harness.pass(Duration::ZERO).await;
    assert_eq!(harness.node.with(|state| state.answers.len()), 1, "the next check is answered");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_answered_that_was_asked_before_or_of_another_machine_of_the_name() {
    let mut early = Harness::new();
    early.ask("x", RepairMode::None);
    early.pass(CERTAIN).await;
    assert_eq!(early.node.with(|state| state.looks), 0, "nobody waits for it");

    let mut other = Harness::new();
    other.fixture.holdings.send_replace(Arc::default());
    assert_eq!(other.answer(RepairMode::None).await, None);
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_in_a_store_that_has_just_lost_records_is_excused() {
    let mut harness = Harness::new();
    harness.pass(Duration::ZERO).await;
    harness.fixture.view.send_modify(|view| Arc::make_mut(view).losses += 1);
    harness.answer(RepairMode::None).await;
    assert!(harness.node.with(|state| state.putting_back));
}
