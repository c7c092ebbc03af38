//! Tasks that go on when they are told to: each effect of each is a step of its own, and any of them can be the last.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use polder_api::Attachment;
use polder_ipam::Revision;
use polder_ipam::publication::Basis;

use crate::world::{Agent, Shared, World};

/// What a task waits for.
#[derive(Debug, Clone)]
pub enum Wait {
    /// Nothing but its turn.
    Turn,
    /// The moment, on its machine's clock, in milliseconds.
    Until(u64),
    /// The answer of the store to that request.
    Reply(u64),
    /// That nobody else works on the attachment, or the moment.
    Free(Attachment, u64),
    /// That the agent's view shows the revision, or the moment.
    Revision(Revision, u64),
    /// That the kernel has other addresses of the node than its ledger, or interfaces that it does not name, or the moment.
    Gateways(u64),
    /// That there is news for the agent's registrar, or the moment.
    News(u64),
    /// That what the node may say in the store rests on something else.
    Basis(Basis),
    /// That an attachment came or went since the publisher has looked.
    Unpublished,
    /// The flag; or that the agent it was asked of is gone.
    Flag(Rc<Cell<bool>>, u64),
}

/// Where a task says what it waits for: for any of these, each with its number. For nothing before it has begun.
pub type Waiting = Rc<RefCell<Vec<(u64, Wait)>>>;

/// Something that goes on step by step.
pub struct Task {
    /// On which machine.
    pub machine: usize,
    /// Whose it is: it ends with that life.
    pub life: Life,
    /// What it is, for people.
    pub name: String,
    /// When it goes on at the latest, if it can, in milliseconds of nobody's clock. An agent's task can take for ever.
    pub deadline: u64,
    /// Whether it hangs until then, whatever it could do.
    pub hangs: bool,
    /// Whether it has ever hung: it does so once.
    pub has_hung: bool,
    /// What it waits for.
    pub wait: Waiting,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

/// What a task ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// The agent that was started as that.
    Agent(u64),
    /// The boot of the machine. It is a plugin, with a number of its own.
    Plugin(u64),
}

impl Task {
    /// A task that has not begun.
    pub fn new(
        machine: usize,
        life: Life,
        name: String,
        deadline: u64,
        wait: Waiting,
        future: impl Future<Output = ()> + 'static,
    ) -> Self {
        Self { machine, life, name, deadline, hangs: false, has_hung: false, wait, future: Box::pin(future) }
    }

    /// Goes on up to its next effect. True if that was its end.
    pub fn go_on(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        self.future.as_mut().poll(&mut context) == Poll::Ready(())
    }

    /// Whether it is a plugin.
    pub fn is_plugin(&self) -> bool {
        matches!(self.life, Life::Plugin(_))
    }

    /// Whether it could go on.
    pub fn is_ready(&self, world: &World) -> bool {
        let waits = self.wait.borrow();
        waits.is_empty() || waits.iter().any(|(_, wait)| wait.is_over(world, self.machine))
    }
}

impl Wait {
    /// Whether that is so, on that machine.
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
            Self::News(until) => over(*until) || agent.is_some_and(|agent| agent.news),
            Self::Basis(basis) => machine.basis().is_some_and(|now| now != *basis),
            Self::Unpublished => agent.is_some_and(|agent| agent.is_unpublished),
            Self::Flag(flag, epoch) => flag.get() || machine.epoch_running() != Some(*epoch),
        }
    }
}

/// Ends a step, and waits.
pub struct Pause<'a> {
    world: &'a Shared,
    machine: usize,
    waiting: &'a Waiting,
    wanted: Wait,
    /// The number of what is waited for, once that has begun.
    number: Option<u64>,
}

impl<'a> Pause<'a> {
    /// Waits for that, on that machine.
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
        // A task that waits for several things at once is asked for all of them.
        if self.wanted.is_over(&self.world.borrow(), self.machine) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.waiting.borrow_mut().retain(|(number, _)| Some(*number) != self.number);
    }
}
