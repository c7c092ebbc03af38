//! Runs the production tasks, each until it waits for something outside.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use polder_ipam::tasks::{self, Added, Caller, Registrar, orphan_collector, teardown};

use super::OWNER;
use super::host::{ModelHost, TaskRun};
use super::machine::MachineIndex;
use super::task::{Answer, Job, Part, Stopped, TaskResult, Wait};
use super::transition::Transition;
use crate::agent::GRACE;

impl Transition<'_> {
    /// Starts a task on a machine. It ends immediately, or stops at a wait.
    pub(super) fn begin_task(&mut self, index: MachineIndex, job: Job) -> Result<TaskResult, Stopped> {
        self.run(index, Arc::new(job), Vec::new(), None)
    }

    /// Continues a task with the answer that it waited for.
    pub(super) fn resume(
        &mut self,
        index: MachineIndex,
        stopped: Stopped,
        answer: Answer,
    ) -> Result<TaskResult, Stopped> {
        let Stopped { job, parts, wait } = stopped;
        self.run(index, job, parts, Some((wait, answer)))
    }

    fn run(
        &mut self,
        index: MachineIndex,
        job: Arc<Job>,
        mut parts: Vec<Part>,
        resumed_with: Option<(Wait, Answer)>,
    ) -> Result<TaskResult, Stopped> {
        let machine = Arc::clone(&self.cluster.machines[index]);
        let now = Part { resumed_with, machine, tick: self.cluster.tick, fresh: None };
        let task_run = TaskRun::new(self, index, Arc::clone(&job));
        let (polled, effects) = {
            let mut future = pin!(run_job(ModelHost(Rc::clone(&task_run)), Arc::clone(&job)));
            let mut poll = |part: &Part, is_new| {
                task_run.borrow_mut().start_part(part, is_new);
                future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            };
            for part in &parts {
                assert!(poll(part, false).is_pending(), "a task is deterministic");
            }
            let polled = poll(&now, true);
            // Effects of dropping the future do not count.
            (polled, task_run.borrow_mut().take_effects())
        };
        drop(task_run);
        self.cluster.machines[index] = effects.machine;
        self.cluster.in_cool_down.extend(effects.unplugged);
        effects.violation.into_iter().for_each(|violation| self.cluster.record_violation(violation));
        match polled {
            Poll::Ready(ended) => Ok(ended),
            Poll::Pending => {
                parts.push(Part { fresh: effects.fresh, ..now });
                Err(Stopped { job, parts, wait: effects.wait.expect("a stopped task has a wait condition") })
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
async fn run_job(host: ModelHost<'_>, job: Arc<Job>) -> TaskResult {
    let me = host.me();
    let registrar = || Registrar::with(&host, &me, host.registrar_state(&me));
    match &*job {
        Job::Decide => {
            let mut registrar = registrar();
            let decided = registrar.decide().await;
            host.keep(registrar.into_state());
            TaskResult::Decided(decided)
        }
        Job::CarryOut(decided) => {
            let mut registrar = registrar();
            let _ = registrar.carry_out(decided.clone()).await;
            host.keep(registrar.into_state());
            TaskResult::Done
        }
        Job::Serve { wanted, for_add } => {
            let served = registrar().serve(wanted.clone(), *for_add).await;
            if *for_add {
                host.answer(Answer::Block(served));
            }
            TaskResult::Done
        }
        Job::HandOver(wanted, attachment) => {
            let answer = |result| host.answer(Answer::Address(result));
            registrar().serve_reservation(wanted, OWNER, attachment, answer).await;
            TaskResult::Done
        }
        Job::Add(request) => match tasks::add(&host, &me, request.clone(), &Patient).await {
            Ok(Added { held, .. }) => TaskResult::Added(held.attachment, held.addresses),
            Err(_) => TaskResult::Refused,
        },
        Job::Del(attachment) => {
            let _ = teardown::del(&host, attachment).await;
            TaskResult::Done
        }
        Job::Sweep(leaving) => {
            orphan_collector::run(&host, leaving.clone(), GRACE).await;
            TaskResult::Done
        }
    }
}
