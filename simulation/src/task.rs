//! Tasks that go on when they are told to: each effect of each is a step of its own, and any of them can be the last.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use polder_api::Attachment;

use crate::world::{Agent, World};

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
    Revision(i64, u64),
    /// That the kernel has other addresses of the node than its ledger, or interfaces that it does not name, or the moment.
    Gateways(u64),
    /// That there is news for the agent's registrar, or the moment.
    News(u64),
    /// The flag; or that the agent it was asked of is gone.
    Flag(Rc<Cell<bool>>, u64),
}

/// Where a task says what it waits for.
pub type Waiting = Rc<RefCell<Wait>>;

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
        let machine = &world.machines[self.machine];
        let agent = machine.agent.as_ref();
        let over = |until: u64| machine.clock >= until;
        match &*self.wait.borrow() {
            Wait::Turn => true,
            Wait::Until(until) => over(*until),
            Wait::Reply(request) => world.is_answered(*request),
            Wait::Free(attachment, until) => {
                over(*until) || agent.is_some_and(|agent| !agent.in_flight.borrow().contains(attachment))
            }
            Wait::Revision(revision, until) => {
                over(*until) || agent.is_some_and(|agent| agent.view.revision >= *revision)
            }
            Wait::Gateways(until) => {
                let differ = |agent: &Agent| {
                    let has_others = agent.ipam.gateways() != machine.kernel.gateways;
                    !agent.is_forbidden() && (has_others || machine.has_overtaken())
                };
                over(*until) || agent.is_some_and(differ)
            }
            Wait::News(until) => over(*until) || agent.is_some_and(|agent| agent.news),
            Wait::Flag(flag, epoch) => flag.get() || machine.epoch_running() != Some(*epoch),
        }
    }
}

/// Ends a step, and waits.
pub struct Pause {
    waiting: Waiting,
    wanted: Option<Wait>,
}

impl Pause {
    /// Waits for that.
    pub fn new(waiting: &Waiting, wanted: Wait) -> Self {
        Self { waiting: Rc::clone(waiting), wanted: Some(wanted) }
    }
}

impl Future for Pause {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        match self.wanted.take() {
            Some(wanted) => {
                *self.waiting.borrow_mut() = wanted;
                Poll::Pending
            }
            // Nobody polls it before it is ready.
            None => Poll::Ready(()),
        }
    }
}
