//! A watch: the server side of a stream of changes in a range.

use polder_ipam::key::Range;

use super::{Event, Model};

/// A watch. It is separate from the model, and sends on request.
///
/// A watch that is never polled corresponds to a watcher with which etcd has not caught up: compaction ends it.
#[derive(Debug, Clone)]
pub struct Watch {
    range: Range,
    /// The first revision not sent yet.
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

/// A message of the server in a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchMessage {
    /// The watch is open.
    Opened {
        /// The revision of the store.
        revision: i64,
    },
    /// All events since the last message, in order.
    Events {
        /// The revision of the store.
        revision: i64,
        /// The events.
        events: Vec<Event>,
    },
    /// The last message: the next revision to send has been compacted.
    Compacted {
        /// The compacted revision.
        revision: i64,
    },
    /// The stream has ended.
    Closed,
}

impl WatchMessage {
    /// Whether this is the last message.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Compacted { .. } | Self::Closed)
    }
}

impl Watch {
    pub(super) fn new(model: &Model, range: Range, from: i64) -> Self {
        let next = if from == 0 { model.history.revision() + 1 } else { from };
        Self { range, next, starts: model.starts, state: State::New }
    }

    /// The next message, if any.
    pub fn send(&mut self, model: &Model) -> Option<WatchMessage> {
        if self.state == State::Closed || self.starts != model.starts {
            self.state = State::Closed;
            return Some(WatchMessage::Closed);
        }
        let revision = model.history.revision();
        if self.state == State::New {
            self.state = State::Open;
            return Some(WatchMessage::Opened { revision });
        }
        let compacted = model.history.compacted();
        if self.next < compacted && self.next <= revision {
            self.state = State::Closed;
            return Some(WatchMessage::Compacted { revision: compacted });
        }
        let events: Vec<Event> = model.history.events(&self.range, self.next).cloned().collect();
        self.next = self.next.max(revision + 1);
        (!events.is_empty()).then_some(WatchMessage::Events { revision, events })
    }

    /// Rewinds by that many revisions, as far as they are retained, so that they are sent again.
    pub fn repeat(&mut self, model: &Model, revisions: i64) {
        // A watch behind the compacted revision does not move.
        self.next = (self.next - revisions).max(model.history.compacted()).max(1).min(self.next);
    }
}
