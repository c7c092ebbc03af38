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
    is_restoring: bool,
    answers: Vec<(AnswerRecord, Revision)>,
}

impl Fake {
    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.0.lock().unwrap())
    }
}

impl SelfExamination for Fake {
    async fn examine(&self, is_restoring: bool) -> Result<OwnReport, NotExamined> {
        self.with(|state| {
            (state.looks, state.is_restoring) = (state.looks + 1, is_restoring);
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
        let (node_state, asked) = (fixture.node_state(), node.clone());
        let running = Box::pin(async move { answer_all(&node_state, &asked).await });
        Self { fixture, node, running }
    }

    async fn pass(&mut self, time: Duration) {
        assert!(timeout(time, &mut self.running).await.is_err(), "the task ended");
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
        self.pass(answer_timeout(repairs) + MIN_DEVIATION_TIME).await;
        let (record, asked) = self.node.with(|state| state.answers.pop())?;
        assert_eq!(
            (record.id.to_string().as_str(), asked.number(), record.attachments, record.interfaces),
            ("x", 8, 2, 1)
        );
        assert_eq!(self.node.with(|state| state.answers.len()), 0, "one answer is enough");
        Some(record.deviations.into_iter().map(|found| (found.what, found.repaired)).collect())
    }
}

#[tokio::test(start_paused = true)]
async fn a_healthy_node_answers_each_check_once_after_one_inspection() {
    let mut harness = Harness::new();
    assert_eq!(harness.answer(RepairMode::None).await, Some(Vec::new()));
    assert_eq!(harness.node.with(|state| (state.looks, state.is_restoring)), (1, false));
    harness.ask("y", RepairMode::None);
    harness.pass(Duration::ZERO).await;
    assert_eq!(harness.node.with(|state| state.answers.len()), 1);
}

#[tokio::test(start_paused = true)]
async fn only_lasting_deviations_are_reported_and_they_are_not_repaired_unasked() {
    let mut harness = Harness::new();
    harness.node.with(|state| (state.wrong, state.looks_left) = (vec![("a pod comes", false)], Some(2)));
    assert_eq!(harness.answer(RepairMode::None).await, Some(Vec::new()));

    let mut harness = Harness::new();
    harness.node.with(|state| state.wrong = vec![("a leak", true)]);
    assert_eq!(harness.answer(RepairMode::None).await, Some(vec![("a leak".to_owned(), false)]));
}

#[tokio::test(start_paused = true)]
async fn safe_deviations_are_repaired_and_others_are_listed_first() {
    let mut harness = Harness::new();
    harness.node.with(|state| state.wrong = vec![("a leak", true), ("a lost record", false)]);
    let said = harness.answer(RepairMode::Safe).await.unwrap();
    assert_eq!(said, [("a lost record".to_owned(), false), ("a leak".to_owned(), true)]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_inspect_itself_retries_until_the_request_expires() {
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
async fn requests_from_before_the_start_or_for_another_machine_are_not_answered() {
    let mut early = Harness::new();
    early.ask("x", RepairMode::None);
    early.pass(MIN_DEVIATION_TIME).await;
    assert_eq!(early.node.with(|state| state.looks), 0, "nobody waits for it");

    let mut other = Harness::new();
    other.fixture.allocations.send_replace(Arc::default());
    assert_eq!(other.answer(RepairMode::None).await, None);
}

#[tokio::test(start_paused = true)]
async fn after_a_loss_of_records_the_inspection_knows_that_they_are_being_restored() {
    let mut harness = Harness::new();
    harness.pass(Duration::ZERO).await;
    harness.fixture.view.send_modify(|view| Arc::make_mut(view).losses += 1);
    harness.answer(RepairMode::None).await;
    assert!(harness.node.with(|state| state.is_restoring));
}
