//! Keys and their revisions: current state, compacted state, and the events between them.

use std::collections::BTreeMap;

use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::{Entry, KeyChange};

use super::{Error, LeaseId};

/// A key with all its etcd fields.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that created the key.
    pub create_revision: i64,
    /// The revision of the last change.
    pub mod_revision: i64,
    /// Number of puts since the key was created.
    pub version: i64,
    /// The key's lease; 0 is none.
    pub lease: LeaseId,
}

impl KeyValue {
    /// The entry as Polder reads it.
    pub fn entry(&self) -> Entry {
        Entry { key: self.key.clone(), value: self.value.clone(), revision: Revision::new(self.mod_revision) }
    }
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The revision of the change.
    pub revision: i64,
    /// The key.
    pub key: String,
    /// The new state; `None` if the key was deleted.
    pub put: Option<KeyValue>,
}

impl Event {
    /// The change as Polder receives it.
    pub fn change(&self) -> (Revision, KeyChange) {
        let entry = self.put.as_ref().map(KeyValue::entry);
        (Revision::new(self.revision), KeyChange { key: self.key.clone(), entry })
    }
}

/// Whether a watch that starts at the compacted revision reports the deletions of that revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletions {
    /// It does not, as etcd up to 3.4.33 and 3.5.15.
    Forgotten,
    /// It does, as later etcd versions.
    Kept,
}

type State = BTreeMap<String, KeyValue>;

#[derive(Debug, Clone)]
pub(super) struct History {
    revision: i64,
    compacted: i64,
    deletions: Deletions,
    now: State,
    /// The state at the compacted revision.
    base: State,
    /// All events since, by revision and in order.
    events: BTreeMap<i64, Vec<Event>>,
}

/// One revision in progress. It exists from its first change on.
pub(super) struct Step<'a> {
    history: &'a mut History,
    revision: i64,
}

impl History {
    pub(super) fn new(deletions: Deletions) -> Self {
        let (now, base, events) = Default::default();
        // Revision 0 can be compacted once.
        Self { revision: 1, compacted: -1, deletions, now, base, events }
    }

    pub(super) fn deletions(&self) -> Deletions {
        self.deletions
    }

    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    pub(super) fn compacted(&self) -> i64 {
        self.compacted
    }

    pub(super) fn now(&self, range: &Range) -> impl Iterator<Item = &KeyValue> {
        within(&self.now, range)
    }

    pub(super) fn at(&self, range: &Range, revision: i64) -> Result<Vec<KeyValue>, Error> {
        if revision > self.revision {
            return Err(Error::FutureRevision);
        }
        if revision <= 0 {
            return Ok(self.now(range).cloned().collect());
        }
        if revision < self.compacted {
            return Err(Error::Compacted);
        }
        let mut state = self.base.clone();
        self.replay(&mut state, revision);
        Ok(within(&state, range).cloned().collect())
    }

    /// Applies the events up to that revision to a copy of the base.
    fn replay(&self, state: &mut State, to: i64) {
        let new = self.events.range(..=to).filter(|(revision, _)| **revision > self.compacted);
        for event in new.flat_map(|(_, events)| events) {
            match &event.put {
                Some(put) => drop(state.insert(event.key.clone(), put.clone())),
                None => drop(state.remove(&event.key)),
            }
        }
    }

    /// All retained events in the range from that revision on.
    pub(super) fn events<'a>(&'a self, range: &'a Range, from: i64) -> impl Iterator<Item = &'a Event> {
        self.events.range(from..).flat_map(|(_, events)| events).filter(|event| range.has(&event.key))
    }

    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Error> {
        if revision <= self.compacted {
            return Err(Error::Compacted);
        }
        if revision > self.revision {
            return Err(Error::FutureRevision);
        }
        let mut base = std::mem::take(&mut self.base);
        self.replay(&mut base, revision);
        self.base = base;
        self.compacted = revision;
        self.events = self.events.split_off(&revision);
        if let (Deletions::Forgotten, Some(events)) = (self.deletions, self.events.get_mut(&revision)) {
            events.retain(|event| event.put.is_some());
        }
        Ok(())
    }

    pub(super) fn step(&mut self) -> Step<'_> {
        let revision = self.revision + 1;
        Step { history: self, revision }
    }
}

fn within<'a>(state: &'a State, range: &Range) -> impl Iterator<Item = &'a KeyValue> {
    // A range that ends before it starts has no keys; a map would panic.
    let (start, end) = (range.start.clone(), range.end.clone().max(range.start.clone()));
    state.range(start..end).map(|(_, key)| key)
}

impl Step<'_> {
    pub(super) fn put(&mut self, key: &str, value: &[u8], lease: Option<LeaseId>) {
        let before = self.history.now.get(key);
        let put = KeyValue {
            key: key.to_owned(),
            value: value.to_owned(),
            create_revision: before.map_or(self.revision, |before| before.create_revision),
            mod_revision: self.revision,
            version: before.map_or(0, |before| before.version) + 1,
            lease: lease.unwrap_or_default(),
        };
        self.history.now.insert(key.to_owned(), put.clone());
        self.note(key, Some(put));
    }

    /// Deletes all keys in the range; returns the deleted keys.
    pub(super) fn delete(&mut self, range: &Range) -> Vec<String> {
        let keys: Vec<String> = self.history.now(range).map(|key| key.key.clone()).collect();
        for key in &keys {
            self.history.now.remove(key);
            self.note(key, None);
        }
        keys
    }

    fn note(&mut self, key: &str, put: Option<KeyValue>) {
        let event = Event { revision: self.revision, key: key.to_owned(), put };
        self.history.events.entry(self.revision).or_default().push(event);
        self.history.revision = self.revision;
    }
}
