//! Tasks that ship, each stopped where it waits for the outside.
//!
//! What a future has come to can neither be copied nor compared. So a stopped task is what it began as, and the answers that it has
//! been given since. To go on it is run again from its beginning, and finds in each part what it found the first time.

use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use polder_api::Attachment;
use polder_api::message::AddRequest;
use polder_ipam::change::Change;
use polder_ipam::claim::NoClaim;
use polder_ipam::ids::Incarnation;
use polder_ipam::key::Range;
use polder_ipam::pool::BlockRequest;
use polder_ipam::steward::Step;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn};
use polder_ipam::tasks::{self, Caller, Decided, Registrar, Unreserved, Workload, sweeper, teardown};

use super::OWNER;
use super::host::{Hand, Scene};
use super::machine::{Machine, Who};
use super::play::Play;
use crate::agent::GRACE;

/// What a task is for.
#[derive(Debug, Clone)]
pub enum Job {
    /// The registrar decides on its next step.
    Decide,
    /// It carries the step out.
    CarryOut(Decided),
    /// It gets a block, for an ADD that waits for it or for later.
    Serve {
        /// Which.
        wanted: BlockRequest,
        /// Whether an ADD waits.
        for_add: bool,
    },
    /// It gets a reserved address.
    HandOver(Workload, Attachment),
    /// A pod is added.
    Add(AddRequest),
    /// A pod is taken away.
    Del(Attachment),
    /// An agent has just started, and finishes taking these away.
    Sweep(Vec<Attachment>),
}

/// What came of a task.
#[derive(Debug)]
pub enum Ended {
    /// A step is decided on.
    Decided(Decided),
    /// The registrar has made a step, or answered an ADD; or a pod is gone.
    Done,
    /// A new pod has these addresses.
    Added(Attachment, Vec<IpAddr>),
    /// A pod gets none.
    Refused,
}

/// What a task waits for.
#[derive(Debug, Clone)]
pub enum Wait {
    /// What the store makes of a transaction.
    Commit(Sent),
    /// What the store holds.
    Read(Range),
    /// That the view shows what was written at that revision.
    CaughtUp(i64),
    /// That the view is another one than that of this revision.
    Changed(i64),
    /// A block from the registrar.
    Block(BlockRequest),
    /// A reserved address from the registrar.
    Address(Workload),
    /// Its turn, now that the registrar has answered that.
    Turn(Box<Answer>),
    /// That the interface of a pod goes.
    Interface(Attachment),
    /// That its addresses are freed.
    Free(Attachment),
    /// That time passes.
    Time,
}

/// What a task is told.
#[derive(Debug, Clone)]
pub enum Answer {
    /// What became of a transaction.
    Committed(Result<Outcome, StoreError>),
    /// What the store holds.
    Contents(Result<Contents, StoreError>),
    /// Whether the view shows what was written.
    CaughtUp(Result<(), StoreError>),
    /// What became of a wish for a block.
    Block(Result<(), NoClaim>),
    /// What became of a wish for a reserved address.
    Address(Result<IpAddr, Unreserved>),
    /// Go on.
    GoOn,
}

/// A transaction, and who sent it.
#[derive(Debug, Clone)]
pub struct Sent {
    /// Who.
    pub by: Option<Incarnation>,
    /// What for.
    pub change: Arc<Change>,
    /// What.
    pub txn: Arc<Txn>,
}

/// A task that waits.
#[derive(Debug, Clone)]
pub struct Stopped {
    /// What for.
    pub job: Arc<Job>,
    /// What it has done so far.
    pub parts: Vec<Part>,
    /// What it waits for.
    pub wait: Wait,
}

/// What a task did without waiting.
#[derive(Debug, Clone)]
pub struct Part {
    /// What it had been waiting for, and was told.
    pub told: Option<(Wait, Answer)>,
    /// The machine as it was before.
    pub machine: Arc<Machine>,
    /// When that was.
    pub tick: u8,
    /// The name that it made up.
    pub fresh: Option<String>,
}

impl Job {
    /// Whether it is a change of the records that the steward wants.
    pub fn is_write(&self) -> bool {
        matches!(self, Self::CarryOut(decided) if matches!(decided.step(), Some(Step::Commit(_))))
    }
}

impl Sent {
    /// Whether it is the one that a removed node may still write.
    pub fn confirms(&self) -> bool {
        matches!(*self.change, Change::ConfirmRemoval(_))
    }
}

impl Answer {
    /// Whether a registrar gives an ADD nothing.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Block(Err(_)) | Self::Address(Err(_)))
    }
}

impl Stopped {
    /// The transaction that is under way for it.
    pub fn under_way(&self) -> Option<&Sent> {
        match &self.wait {
            Wait::Commit(sent) => Some(sent),
            _ => None,
        }
    }
}

impl Play<'_> {
    /// Begins a task on a machine. It ends at once, or stops.
    pub(super) fn begin(&mut self, who: Who, job: Job) -> Result<Ended, Stopped> {
        self.run(who, Arc::new(job), Vec::new(), None)
    }

    /// Goes on with a task that was told that.
    pub(super) fn resume(&mut self, who: Who, stopped: Stopped, answer: Answer) -> Result<Ended, Stopped> {
        let Stopped { job, parts, wait } = stopped;
        self.run(who, job, parts, Some((wait, answer)))
    }

    fn run(
        &mut self,
        who: Who,
        job: Arc<Job>,
        mut parts: Vec<Part>,
        told: Option<(Wait, Answer)>,
    ) -> Result<Ended, Stopped> {
        let machine = Arc::clone(&self.cluster.machines[who]);
        let now = Part { told, machine, tick: self.cluster.tick, fresh: None };
        let scene = Scene::new(self, who, Arc::clone(&job));
        let (polled, left) = {
            let mut future = pin!(work(Hand(Rc::clone(&scene)), Arc::clone(&job)));
            let mut poll = |part: &Part, is_new| {
                scene.borrow_mut().enter(part, is_new);
                future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            };
            for part in &parts {
                assert!(poll(part, false).is_pending(), "a task does the same when it is told the same");
            }
            let polled = poll(&now, true);
            // What the future does when it is dropped is none of what has happened.
            (polled, scene.borrow_mut().leave())
        };
        drop(scene);
        self.cluster.machines[who] = left.machine;
        self.cluster.warm.extend(left.unplugged);
        left.broken.into_iter().for_each(|broken| self.cluster.breaks(broken));
        match polled {
            Poll::Ready(ended) => Ok(ended),
            Poll::Pending => {
                parts.push(Part { fresh: left.fresh, ..now });
                Err(Stopped { job, parts, wait: left.wait.expect("whoever stops says what for") })
            }
        }
    }
}

/// A plugin that waits for its answer.
struct Patient;

impl Caller for Patient {
    fn is_gone(&self) -> bool {
        false
    }
}

/// Does what a task is for.
async fn work(hand: Hand<'_>, job: Arc<Job>) -> Ended {
    let me = hand.me();
    let registrar = || Registrar::with(&hand, &me, hand.registrar_state(&me));
    match &*job {
        Job::Decide => {
            let mut registrar = registrar();
            let decided = registrar.decide().await;
            hand.keep(registrar.into_state());
            Ended::Decided(decided)
        }
        Job::CarryOut(decided) => {
            let mut registrar = registrar();
            let _ = registrar.carry_out(decided.clone()).await;
            hand.keep(registrar.into_state());
            Ended::Done
        }
        Job::Serve { wanted, for_add } => {
            let served = registrar().serve(wanted.clone(), *for_add).await;
            if *for_add {
                hand.answer(Answer::Block(served));
            }
            Ended::Done
        }
        Job::HandOver(wanted, attachment) => {
            let answer = |came| hand.answer(Answer::Address(came));
            registrar().serve_reservation(wanted, OWNER, attachment, answer).await;
            Ended::Done
        }
        Job::Add(request) => match tasks::add(&hand, &me, request.clone(), &Patient).await {
            Ok((held, _lock)) => Ended::Added(held.attachment, held.addresses),
            Err(_) => Ended::Refused,
        },
        Job::Del(attachment) => {
            let _ = teardown::del(&hand, attachment).await;
            Ended::Done
        }
        Job::Sweep(leaving) => {
            sweeper::run(&hand, leaving.clone(), GRACE).await;
            Ended::Done
        }
    }
}
