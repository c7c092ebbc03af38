//! Runs the production tasks, each until it waits for something outside.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use polder_ipam::tasks::{self, Caller, Registrar, orphan_collector, teardown};

use super::OWNER;
use super::host::{ModelHost, Scene};
use super::machine::Who;
use super::play::Play;
use super::task::{Answer, Ended, Job, Part, Stopped, Wait};
use crate::agent::GRACE;

impl Play<'_> {
    /// Starts a task on a machine. It ends immediately, or stops at a wait.
    pub(super) fn begin(&mut self, who: Who, job: Job) -> Result<Ended, Stopped> {
        self.run(who, Arc::new(job), Vec::new(), None)
    }

    /// Continues a task with the answer that it waited for.
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
            let mut future = pin!(work(ModelHost(Rc::clone(&scene)), Arc::clone(&job)));
            let mut poll = |part: &Part, is_new| {
                scene.borrow_mut().enter(part, is_new);
                future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            };
            for part in &parts {
                assert!(poll(part, false).is_pending(), "a task does the same when it is told the same");
            }
            let polled = poll(&now, true);
            // Effects of dropping the future do not count.
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

/// A plugin that waits for its reply without a limit.
struct Patient;

impl Caller for Patient {
    fn is_gone(&self) -> bool {
        false
    }
}

/// Runs the job of a task.
async fn work(hand: ModelHost<'_>, job: Arc<Job>) -> Ended {
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
            orphan_collector::run(&hand, leaving.clone(), GRACE).await;
            Ended::Done
        }
    }
}
