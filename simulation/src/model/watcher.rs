//! What a machine knows of the store: a view, and the changes that have not reached it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use polder_ipam::Revision;
use polder_ipam::key::Key;
use polder_ipam::store::{Contents, Entry, Update};
use polder_ipam::view::{Source, View};

use crate::etcd;

/// A view, and what it is behind by.
#[derive(Debug, Clone, Default)]
pub struct Watcher {
    /// What is known.
    pub view: Arc<View>,
    /// The entries that it was made from.
    pub entries: Arc<BTreeMap<String, Entry>>,
    /// What it does not know yet.
    pub behind: Behind,
}

/// What a view does not know yet.
#[derive(Debug, Clone, Default)]
pub enum Behind {
    /// Anything: it has to be read.
    #[default]
    Unread,
    /// These changes, each of one revision.
    Changes(VecDeque<Arc<Update>>),
}

impl Watcher {
    /// What an agent begins with that finds what the last one wrote down.
    pub fn from_snapshot(last: &Self) -> Self {
        if last.view.source == Source::Nowhere {
            return Self::default();
        }
        let entries = last.entries.values().cloned().collect();
        let view = View::from_snapshot(Contents { revision: last.view.revision, entries });
        Self { view: Arc::new(view), entries: Arc::clone(&last.entries), behind: Behind::Unread }
    }

    /// Has something under way to it from now on.
    pub fn push(&mut self, update: &Arc<Update>) {
        if let Behind::Changes(changes) = &mut self.behind {
            changes.push_back(Arc::clone(update));
        }
    }

    /// Whether nothing is under way to it.
    pub fn is_current(&self) -> bool {
        matches!(&self.behind, Behind::Changes(changes) if changes.is_empty())
    }

    /// Whether a value that is known, or under way, has something in it.
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

    /// Whether it shows what was written at that revision.
    pub fn shows(&self, revision: Revision) -> bool {
        self.view.source == Source::Store && self.view.revision >= revision
    }

    /// Takes in the next thing that there is to know.
    pub fn hear(&mut self, etcd: &etcd::Model) {
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
