//! A watch: the server's end of a stream that tells what changes in a range.

use polder_ipam::key::Range;

use super::{Event, Model};

/// A watch. It stands beside the model, and sends when it is asked to.
///
/// One that is never asked while others are is a watcher that etcd has not caught up with: compaction ends it.
#[derive(Debug, Clone)]
pub struct Watch {
    range: Range,
    /// The first revision that was not sent.
    next: i64,
    starts: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Open,
    Closed,
}

/// What the server says in a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// The watch is open.
    Opened {
        /// The revision of the store.
        revision: i64,
    },
    /// All that has happened since, in order.
    Events {
        /// The revision of the store.
        revision: i64,
        /// What happened.
        events: Vec<Event>,
    },
    /// Nothing will be said any more: what comes next is before this revision and forgotten.
    Compacted {
        /// The revision.
        revision: i64,
    },
    /// The stream has ended.
    Closed,
}

impl Said {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Compacted { .. } | Self::Closed)
    }
}

impl Watch {
    pub(super) fn new(model: &Model, range: Range, from: i64) -> Self {
        let next = if from == 0 { model.history.revision() + 1 } else { from };
        Self { range, next, starts: model.starts, state: State::New }
    }

    /// What there is to say now, if there is something.
    pub fn send(&mut self, model: &Model) -> Option<Said> {
        if self.state == State::Closed || self.starts != model.starts {
            self.state = State::Closed;
            return Some(Said::Closed);
        }
        let revision = model.history.revision();
        if self.state == State::New {
            self.state = State::Open;
            return Some(Said::Opened { revision });
        }
        let compacted = model.history.compacted();
        if self.next < compacted && self.next <= revision {
            self.state = State::Closed;
            return Some(Said::Compacted { revision: compacted });
        }
        let events: Vec<Event> = model.history.events(&self.range, self.next).cloned().collect();
        self.next = self.next.max(revision + 1);
        (!events.is_empty()).then_some(Said::Events { revision, events })
    }

    /// Goes back by that many revisions, so that they are sent again, as far as they are not forgotten.
    pub fn repeat(&mut self, model: &Model, revisions: i64) {
        // One that is behind what is forgotten stays where it is.
        self.next = (self.next - revisions).max(model.history.compacted()).max(1).min(self.next);
    }
}
