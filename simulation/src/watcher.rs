//! A follower of a range of the model: decides as the watcher of a real etcd does, and advances on request.

use std::collections::VecDeque;

use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::Update;
use polder_ipam::store::position::{Heard, Interruption, Position};

use crate::etcd::{Event, Model, Said, Watch};

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
    under_way: VecDeque<Said>,
}

/// The connection to etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Whole,
    /// No message arrives, but the connection has not failed yet.
    Slow,
    Cut,
}

impl Watcher {
    /// A follower without data.
    pub fn new(range: Range) -> Self {
        Self { range, position: Position::default(), stream: None, link: Link::Whole }
    }

    /// Advances, and returns the updates: one connection attempt if there is no stream, else everything that has
    /// arrived.
    pub fn poll(&mut self, etcd: &Model) -> Vec<Update> {
        match self.link {
            Link::Cut => vec![self.lose(Interruption::Broken("etcd cannot be reached".to_owned()))],
            Link::Slow => {
                self.send(etcd);
                Vec::new()
            }
            Link::Whole if self.stream.is_none() => {
                let (watch, said) = self.connect(etcd);
                self.stream = watch.map(|watch| Stream { watch, under_way: VecDeque::new() });
                said.into_iter().collect()
            }
            Link::Whole => {
                self.send(etcd);
                self.receive()
            }
        }
    }

    /// Checks for missed changes. If there are any, reads everything again; the watch continues.
    pub fn verify(&mut self, etcd: &Model) -> Option<Update> {
        if self.link != Link::Whole || self.stream.is_none() {
            return None;
        }
        let known = etcd.range_at(&self.range, self.position.known()).map(|keys| keys.len());
        let keys = known.unwrap_or_else(|_| etcd.range(&self.range).entries.len());
        self.position.has_missed(keys).then(|| self.position.load(etcd.range(&self.range)).1)
    }

    /// Lets etcd send its pending messages, without delivery. Messages in flight are safe from compaction.
    pub fn send(&mut self, etcd: &Model) {
        let Some(stream) = &mut self.stream else { return };
        while !stream.under_way.back().is_some_and(Said::is_last) {
            let Some(said) = stream.watch.send(etcd) else { return };
            stream.under_way.push_back(said);
        }
    }

    /// Ends the stream. Messages in flight are lost.
    pub fn disconnect(&mut self) {
        if let Some(stream) = &mut self.stream {
            stream.under_way = VecDeque::from([Said::Closed]);
        }
    }

    /// Ends the stream, and prevents a new one until the link is restored.
    pub fn cut(&mut self) {
        self.stream = None;
        self.link = Link::Cut;
    }

    /// Stops delivery until the link is restored; then everything arrives.
    pub fn delay(&mut self) {
        if self.link == Link::Whole {
            self.link = Link::Slow;
        }
    }

    /// Ends a delay or a cut.
    pub fn restore(&mut self) {
        self.link = Link::Whole;
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
        while let Some(said) = self.stream.as_mut().and_then(|stream| stream.under_way.pop_front()) {
            match decode(said).and_then(|heard| self.position.receive(heard)) {
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

fn decode(said: Said) -> Result<Heard, Interruption> {
    Ok(match said {
        Said::Opened { revision } => Heard::Opened { revision: Revision::new(revision) },
        Said::Events { revision, events } => Heard::Changes {
            revision: Revision::new(revision),
            changes: events.iter().map(Event::change).collect(),
        },
        Said::Compacted { revision } => Heard::Compacted { revision: Revision::new(revision) },
        Said::Closed => return Err(Interruption::Broken("the watch was closed".to_owned())),
    })
}

#[cfg(test)]
mod tests;
