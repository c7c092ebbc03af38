//! A machine's copy of the store: its view, and the changes that have not arrived yet.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use polder_ipam::Revision;
use polder_ipam::key::Key;
use polder_ipam::store::{Contents, Entry, Update};
use polder_ipam::view::{View, ViewSource};

use crate::etcd;

/// A view, and the changes that it lacks.
#[derive(Debug, Clone, Default)]
pub struct Watcher {
    /// The current view.
    pub view: Arc<View>,
    /// The entries from which the view was built.
    pub entries: Arc<BTreeMap<String, Entry>>,
    /// The changes that it lacks.
    pub behind: Behind,
}

/// The changes that a view lacks.
#[derive(Debug, Clone, Default)]
pub enum Behind {
    /// Everything: a full read is necessary.
    #[default]
    Unread,
    /// These changes, one revision each.
    Changes(VecDeque<Arc<Update>>),
}

impl Watcher {
    /// The state of a new agent that loads the snapshot of the previous one.
    pub fn from_snapshot(last: &Self) -> Self {
        if last.view.source == ViewSource::Nowhere {
            return Self::default();
        }
        let entries = last.entries.values().cloned().collect();
        let view = View::from_snapshot(Contents { revision: last.view.revision, entries });
        Self { view: Arc::new(view), entries: Arc::clone(&last.entries), behind: Behind::Unread }
    }

    /// Queues an update, unless a full read is pending.
    pub fn push(&mut self, update: &Arc<Update>) {
        if let Behind::Changes(changes) = &mut self.behind {
            changes.push_back(Arc::clone(update));
        }
    }

    /// Whether no update is pending.
    pub fn is_current(&self) -> bool {
        matches!(&self.behind, Behind::Changes(changes) if changes.is_empty())
    }

    /// Whether a known or pending value matches.
    pub fn mentions(&self, is_in: &impl Fn(&[u8]) -> bool) -> bool {
        let in_update = |update: &Arc<Update>| match &**update {
            Update::Changed { changes, .. } => {
                changes.iter().filter_map(|change| change.entry.as_ref()).any(|entry| is_in(&entry.value))
            }
            _ => false,
        };
        self.entries.values().any(|entry| is_in(&entry.value))
            || matches!(&self.behind, Behind::Changes(changes) if changes.iter().any(in_update))
    }

    /// Whether the view includes that revision.
    pub fn shows(&self, revision: Revision) -> bool {
        self.view.source == ViewSource::Store && self.view.revision >= revision
    }

    /// Applies the next pending update.
    pub fn receive(&mut self, etcd: &etcd::Model) {
        let update = match &mut self.behind {
            Behind::Unread => {
                self.behind = Behind::Changes(VecDeque::new());
                Arc::new(Update::Loaded(etcd.range(&Key::followed())))
            }
            Behind::Changes(changes) => match changes.pop_front() {
                Some(update) => update,
                None => return,
            },
        };
        let entries = Arc::make_mut(&mut self.entries);
        match &*update {
            Update::Loaded(contents) => {
                *entries = contents.entries.iter().map(|entry| (entry.key.clone(), entry.clone())).collect();
            }
            Update::Changed { changes, .. } => {
                for change in changes {
                    match &change.entry {
                        Some(entry) => drop(entries.insert(change.key.clone(), entry.clone())),
                        None => drop(entries.remove(&change.key)),
                    }
                }
            }
            Update::Lost { .. } | Update::Back { .. } => {}
        }
        Arc::make_mut(&mut self.view).apply((*update).clone());
    }
}
