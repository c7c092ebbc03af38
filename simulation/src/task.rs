//! Tasks that advance only when the scheduler polls them: each effect is one step, and a task can end after any step.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use polder_api::Attachment;
use polder_ipam::Revision;
use polder_ipam::publication::Basis;

use crate::world::{Agent, Shared, World};

/// The condition that a task waits for.
#[derive(Debug, Clone)]
pub enum Wait {
    /// Its next turn.
    Turn,
    /// The machine's clock reaches this value, in milliseconds.
    Until(u64),
    /// The reply of the store to this request.
    Reply(u64),
    /// The attachment is unlocked, or the time is reached.
    Free(Attachment, u64),
    /// The agent's view shows the revision, or the time is reached.
    Revision(Revision, u64),
    /// The node's own addresses in the kernel differ from the ledger, an overtaken interface is not in the ledger, or
    /// the time is reached.
    Gateways(u64),
    /// The agent's registrar has news, or the time is reached.
    News(u64),
    /// The basis of the node's records in the store differs from this one.
    Basis(Basis),
    /// An attachment was added or removed since the publisher last checked.
    Unpublished,
    /// The flag is set, or the agent with this epoch does not run any more.
    Flag(Rc<Cell<bool>>, u64),
}

/// The conditions that a task waits for, any of them suffices; each has a number. Empty before the task has begun.
pub type Waiting = Rc<RefCell<Vec<(u64, Wait)>>>;

/// A task that advances step by step.
pub struct Task {
    /// Index of the machine.
    pub machine: usize,
    /// The process that owns the task; the task ends with it.
    pub owner: Owner,
    /// Name for the log.
    pub name: String,
    /// Time by which a ready task must continue, in milliseconds of [`World::now`]. `u64::MAX` (no deadline) for the
    /// task of an agent.
    pub deadline: u64,
    /// Whether the task hangs until the deadline, even if it is ready.
    pub hangs: bool,
    /// Whether the task has hung before: it hangs at most once.
    pub has_hung: bool,
    /// The conditions that the task waits for.
    pub wait: Waiting,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

/// The process with which a task ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The agent with this epoch.
    Agent(u64),
    /// A plugin process, by number. It ends at the latest when the machine reboots.
    Plugin(u64),
}

impl Task {
    /// A task that has not begun.
    pub fn new(
        machine: usize,
        owner: Owner,
        name: String,
        deadline: u64,
        wait: Waiting,
        future: impl Future<Output = ()> + 'static,
    ) -> Self {
        Self { machine, owner, name, deadline, hangs: false, has_hung: false, wait, future: Box::pin(future) }
    }

    /// Advances to the next effect. Returns true if the task has ended.
    pub fn poll(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        self.future.as_mut().poll(&mut context) == Poll::Ready(())
    }

    /// Whether the task is a plugin.
    pub fn is_plugin(&self) -> bool {
        matches!(self.owner, Owner::Plugin(_))
    }

    /// Whether the task can continue.
    pub fn is_ready(&self, world: &World) -> bool {
        let waits = self.wait.borrow();
        waits.is_empty() || waits.iter().any(|(_, wait)| wait.is_over(world, self.machine))
    }
}

impl Wait {
    /// Whether the condition holds on that machine.
    fn is_over(&self, world: &World, machine: usize) -> bool {
        let machine = &world.machines[machine];
        let agent = machine.agent.as_ref();
        let over = |until: u64| machine.clock >= until;
        match self {
            Self::Turn => true,
            Self::Until(until) => over(*until),
            Self::Reply(request) => world.is_answered(*request),
            Self::Free(attachment, until) => {
                over(*until) || agent.is_some() && !machine.is_locked(attachment)
            }
            Self::Revision(revision, until) => {
                over(*until) || agent.is_some_and(|agent| agent.view.revision >= *revision)
            }
            Self::Gateways(until) => {
                let differ = |agent: &Agent| {
                    let has_others = agent.ipam.gateways() != machine.kernel.gateways;
                    !agent.is_forbidden() && (has_others || machine.has_overtaken())
                };
                over(*until) || agent.is_some_and(differ)
            }
            Self::News(until) => over(*until) || agent.is_some_and(|agent| agent.must_check_records),
            Self::Basis(basis) => machine.basis().is_some_and(|now| now != *basis),
            Self::Unpublished => agent.is_some_and(|agent| agent.is_unpublished),
            Self::Flag(flag, epoch) => flag.get() || machine.epoch_running() != Some(*epoch),
        }
    }
}

/// Future that ends the current step and waits.
pub struct Pause<'a> {
    world: &'a Shared,
    machine: usize,
    waiting: &'a Waiting,
    wanted: Wait,
    /// Number of the entry in `waiting`, after the first poll.
    number: Option<u64>,
}

impl<'a> Pause<'a> {
    /// Waits for the condition on that machine.
    pub fn new(world: &'a Shared, machine: usize, waiting: &'a Waiting, wanted: Wait) -> Self {
        Self { world, machine, waiting, wanted, number: None }
    }
}

impl Future for Pause<'_> {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.number.is_none() {
            let mut waits = self.waiting.borrow_mut();
            let number = waits.last().map_or(0, |(number, _)| number + 1);
            waits.push((number, self.wanted.clone()));
            drop(waits);
            self.number = Some(number);
            return Poll::Pending;
        }
        // A task that waits for several conditions at once polls all of them.
        if self.wanted.is_over(&self.world.borrow(), self.machine) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.waiting.borrow_mut().retain(|(number, _)| Some(*number) != self.number);
    }
}
