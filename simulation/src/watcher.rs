//! A follower of a range of the model: decides as the watcher of a real etcd does, and advances on request.

use std::collections::VecDeque;

use polder_ipam::Revision;
use polder_ipam::cause::SharedError;
use polder_ipam::key::Range;
use polder_ipam::store::Update;
use polder_ipam::store::position::{Interruption, Position, WatchEvent};

use crate::etcd::{Event, Model, Watch, WatchMessage};

/// A follower of a range. Its updates are those of `polder_store::Store::follow`.
#[derive(Debug, Clone)]
pub struct Watcher {
    range: Range,
    position: Position,
    stream: Option<Stream>,
    link: Link,
}

/// A watch, and its messages in flight.
#[derive(Debug, Clone)]
struct Stream {
    watch: Watch,
    in_flight: VecDeque<WatchMessage>,
}

/// The connection to etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    /// No message arrives, but the connection has not failed yet.
    Delayed,
    Down,
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
enum WatchEnded {
    /// The connection is cut.
    #[error("etcd cannot be reached")]
    Unreachable,
    /// etcd closed the stream.
    #[error("the watch was closed")]
    Closed,
}

impl From<WatchEnded> for Interruption {
    fn from(reason: WatchEnded) -> Self {
        Self::Ended(SharedError::new(reason))
    }
}

impl Watcher {
    /// A follower without data.
    pub fn new(range: Range) -> Self {
        Self { range, position: Position::default(), stream: None, link: Link::Up }
    }

    /// Advances, and returns the updates: one connection attempt if there is no stream, else everything that has
    /// arrived.
    pub fn poll(&mut self, etcd: &Model) -> Vec<Update> {
        match self.link {
            Link::Down => vec![self.lose(WatchEnded::Unreachable.into())],
            Link::Delayed => {
                self.send(etcd);
                Vec::new()
            }
            Link::Up if self.stream.is_none() => {
                let (watch, update) = self.connect(etcd);
                self.stream = watch.map(|watch| Stream { watch, in_flight: VecDeque::new() });
                update.into_iter().collect()
            }
            Link::Up => {
                self.send(etcd);
                self.receive()
            }
        }
    }

    /// Checks for missed changes. If there are any, reads everything again; the watch continues.
    pub fn verify(&mut self, etcd: &Model) -> Option<Update> {
        if self.link != Link::Up || self.stream.is_none() {
            return None;
        }
        let known = etcd.range_at(&self.range, self.position.known()).map(|keys| keys.len());
        let keys = known.unwrap_or_else(|_| etcd.range(&self.range).entries.len());
        self.position.has_missed(keys).then(|| self.position.load(etcd.range(&self.range)).1)
    }

    /// Lets etcd send its pending messages, without delivery. Messages in flight are safe from compaction.
    pub fn send(&mut self, etcd: &Model) {
        let Some(stream) = &mut self.stream else { return };
        while !stream.in_flight.back().is_some_and(WatchMessage::is_last) {
            let Some(message) = stream.watch.send(etcd) else { return };
            stream.in_flight.push_back(message);
        }
    }

    /// Ends the stream. Messages in flight are lost.
    pub fn disconnect(&mut self) {
        if let Some(stream) = &mut self.stream {
            stream.in_flight = VecDeque::from([WatchMessage::Closed]);
        }
    }

    /// Ends the stream, and prevents a new one until the link is restored.
    pub fn cut(&mut self) {
        self.stream = None;
        self.link = Link::Down;
    }

    /// Stops delivery until the link is restored; then everything arrives.
    pub fn delay(&mut self) {
        if self.link == Link::Up {
            self.link = Link::Delayed;
        }
    }

    /// Ends a delay or a cut.
    pub fn restore(&mut self) {
        self.link = Link::Up;
    }

    /// Lets etcd send the last revisions again, as far as they are retained.
    pub fn repeat(&mut self, etcd: &Model, revisions: i64) {
        if let Some(stream) = &mut self.stream {
            stream.watch.repeat(etcd, revisions);
        }
    }

    /// The followed range.
    pub fn range(&self) -> &Range {
        &self.range
    }

    fn connect(&mut self, etcd: &Model) -> (Option<Watch>, Option<Update>) {
        let there = self.position.to_read(&self.range).map(|range| etcd.range(&range)).unwrap_or_default();
        match self.position.begin(there) {
            Ok((from, loaded)) => (Some(etcd.watch(self.range.clone(), from)), loaded),
            Err(interruption) => (None, Some(self.position.lose(interruption))),
        }
    }

    fn receive(&mut self) -> Vec<Update> {
        let mut updates = Vec::new();
        while let Some(message) = self.stream.as_mut().and_then(|stream| stream.in_flight.pop_front()) {
            match decode(message).and_then(|event| self.position.receive(event)) {
                Ok(update) => updates.extend(update),
                Err(interruption) => updates.push(self.lose(interruption)),
            }
        }
        updates
    }

    fn lose(&mut self, interruption: Interruption) -> Update {
        self.stream = None;
        self.position.lose(interruption)
    }
}

fn decode(message: WatchMessage) -> Result<WatchEvent, Interruption> {
    Ok(match message {
        WatchMessage::Opened { revision } => WatchEvent::Opened { revision: Revision::new(revision) },
        WatchMessage::Events { revision, events } => WatchEvent::Changes {
            revision: Revision::new(revision),
            changes: events.iter().map(Event::change).collect(),
        },
        WatchMessage::Compacted { revision } => WatchEvent::Compacted { revision: Revision::new(revision) },
        WatchMessage::Closed => return Err(WatchEnded::Closed.into()),
    })
}

#[cfg(test)]
mod tests;
