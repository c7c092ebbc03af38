//! The position of a watch in a range, and the processing of its events.
//!
//! A watch starts at the last known revision; events of that revision are ignored. A start at the next revision would
//! be wrong: if history was compacted exactly there, etcd up to 3.4.33 and 3.5.15 opens the watch but does not report
//! what was deleted at that revision. With a start at the known revision etcd refuses, and everything is read again.
//!
//! This module makes no requests: the watch of a real or of a simulated etcd does.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::rule;

use super::{Contents, Entry, KeyChange, StoreError, Update};
use crate::Revision;
use crate::cause::SharedError;
use crate::key::Range;

/// The position of a watch in a range.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Position {
    /// Revision up to which everything is known; `None` before the first load.
    known: Option<Revision>,
    /// The last changed entry, unless the last change was a deletion. A datastore with this entry has all known
    /// entries.
    witness: Option<Entry>,
    /// The existing keys.
    keys: BTreeSet<String>,
    /// Whether the last update was [`Update::Lost`].
    lost: bool,
}

/// An event of a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// The watch is open.
    Opened {
        /// Revision of the datastore.
        revision: Revision,
    },
    /// Changed keys. An empty list shows that the watch is alive.
    Changes {
        /// Revision of the datastore.
        revision: Revision,
        /// The changes in order, each with its revision.
        changes: Vec<(Revision, KeyChange)>,
    },
    /// The watch was closed: it needs changes before this revision, which were compacted.
    Compacted {
        /// Compaction revision of the datastore.
        revision: Revision,
    },
    /// The watch was cancelled.
    Cancelled {
        /// Message of the datastore.
        reason: String,
    },
}

/// Interval of the checks for missed changes ([`Position::has_missed`]).
pub const VERIFY_EVERY: Duration = Duration::from_secs(180);

/// Why a watch was interrupted. Except after a gap, it can resume at the known revision.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Interruption {
    /// The datastore cancelled the watch, for the reason in the text.
    /// Remedy: none, the watch is opened again; if it persists, correct the reason.
    #[error("the watch was cancelled: {reason}")]
    Cancelled {
        /// Message of the datastore.
        reason: String,
    },
    /// The datastore cannot be read, so the watch cannot begin or go on.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The stream of the watch ended.
    #[error(transparent)]
    Ended(SharedError),
    /// Everything must be read again.
    #[error(transparent)]
    Gap(#[from] Gap),
}

/// Why the known records are no basis for the watch any more.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Gap {
    /// The last known change is missing in the datastore.
    /// Remedy: none, everything is read again; find out who restored or emptied etcd.
    #[error("the datastore was emptied or restored to an earlier state")]
    Restored,
    /// The changes since the known revision are no longer in the history of the datastore.
    /// Remedy: none, everything is read again.
    #[error("history before {0} was compacted")]
    Compacted(Revision),
    /// The revision of the datastore is lower than before.
    /// Remedy: none, everything is read again; find out who restored etcd.
    #[error("the datastore is at revision {revision} but was at {known}")]
    Behind {
        /// Revision of the datastore.
        revision: Revision,
        /// The known revision.
        known: Revision,
    },
}

rule! {
    /// Whether the watch missed changes: the number of known keys (`announced`) differs from that of existing keys
    /// (`there`).
    fn differ(announced: usize, there: usize) -> bool {
        announced != there
    }
    WatchIsBelieved => false
}

rule! {
    /// Whether the datastore still has the witness, so that only later changes are missing.
    fn is_witnessed(witness: Option<&Entry>, found: Option<&Entry>) -> bool {
        witness.is_some() && witness == found
    }
    WitnessIsIgnored => true
}

impl Position {
    /// Whether everything was read once, so that the watch can resume.
    fn is_loaded(&self) -> bool {
        self.known.is_some()
    }

    /// The revision up to which everything is known; 0 before the first read.
    pub fn known(&self) -> Revision {
        self.known.unwrap_or_default()
    }

    /// Whether a change was missed, given the number of existing keys. etcd does not report a deletion at exactly the
    /// compaction revision to a watch that is still catching up. Compaction drops only deletions at that revision, so
    /// the number of keys shows the loss. A false positive costs one full read.
    pub fn has_missed(&self, keys: usize) -> bool {
        self.is_loaded() && differ(self.keys.len(), keys)
    }

    /// The range to read before a watch is opened, for [`Self::begin`]: the whole range; or, to resume, the key of the
    /// witness, if there is one.
    pub fn to_read(&self, range: &Range) -> Option<Range> {
        if !self.is_loaded() {
            return Some(range.clone());
        }
        self.witness.as_ref().map(|entry| Range::single(entry.key.clone()))
    }

    /// Processes the entries that were read. Returns the revision to watch from, and the update, if any.
    pub fn begin(&mut self, there: Contents) -> Result<(Revision, Option<Update>), Interruption> {
        if self.is_loaded() {
            return Ok((self.resume(there.entries.first())?, None));
        }
        let (from, loaded) = self.load(there);
        Ok((from, Some(loaded)))
    }

    /// The revision to watch from, given the current entry at the key of the witness. A datastore that was emptied or
    /// restored to an earlier state may have reached any revision since. If it has the last change unchanged, it has
    /// all earlier ones, too. A false negative costs one full read.
    fn resume(&self, found: Option<&Entry>) -> Result<Revision, Interruption> {
        match self.known {
            Some(known) if is_witnessed(self.witness.as_ref(), found) => Ok(known),
            _ => Err(Gap::Restored.into()),
        }
    }

    /// Starts again with all entries. Returns the revision to watch from, and the update.
    pub fn load(&mut self, contents: Contents) -> (Revision, Update) {
        self.witness = contents.entries.iter().max_by_key(|entry| entry.revision).cloned();
        self.known = Some(contents.revision);
        self.keys = contents.entries.iter().map(|entry| entry.key.clone()).collect();
        self.lost = false;
        (contents.revision, Update::Loaded(contents))
    }

    /// Processes an event of a watch, without changes that are already known. Returns the update, if any.
    pub fn receive(&mut self, heard: WatchEvent) -> Result<Option<Update>, Interruption> {
        let known = self.known();
        let changes = match heard {
            WatchEvent::Compacted { revision } => return Err(Gap::Compacted(revision).into()),
            WatchEvent::Cancelled { reason } => return Err(Interruption::Cancelled { reason }),
            WatchEvent::Opened { revision } if revision < known => {
                return Err(Gap::Behind { revision, known }.into());
            }
            // Events are never older than the known revision: this is a late response to a progress request.
            WatchEvent::Changes { revision, .. } if revision < known => return Ok(None),
            WatchEvent::Opened { .. } => Vec::new(),
            WatchEvent::Changes { changes, .. } => changes,
        };
        let changes: Vec<_> = changes.into_iter().filter(|(revision, _)| *revision > known).collect();
        let update = match changes.iter().map(|(revision, _)| *revision).max() {
            Some(revision) => {
                self.known = Some(revision);
                let changes: Vec<KeyChange> = changes.into_iter().map(|(_, change)| change).collect();
                for change in &changes {
                    match &change.entry {
                        Some(_) => self.keys.insert(change.key.clone()),
                        None => self.keys.remove(&change.key),
                    };
                }
                self.witness = changes.last().and_then(|change| change.entry.clone());
                Update::Changed { revision, changes }
            }
            None if self.lost => Update::Back { revision: known },
            None => return Ok(None),
        };
        self.lost = false;
        Ok(Some(update))
    }

    /// Marks the watch as interrupted and returns the update.
    pub fn lose(&mut self, reason: Interruption) -> Update {
        self.lost = true;
        if matches!(reason, Interruption::Gap(_)) {
            self.known = None;
        }
        Update::Lost { reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, revision: Revision) -> Entry {
        Entry { key: key.to_owned(), value: Vec::new(), revision }
    }

    fn put(key: &str, revision: Revision) -> (Revision, KeyChange) {
        (revision, KeyChange { key: key.to_owned(), entry: Some(entry(key, revision)) })
    }

    fn deleted(key: &str, revision: Revision) -> (Revision, KeyChange) {
        (revision, KeyChange { key: key.to_owned(), entry: None })
    }

    fn loaded(revision: Revision, entries: Vec<Entry>) -> Position {
        let mut position = Position::default();
        position.load(Contents { revision, entries });
        position
    }

    #[test]
    fn a_watch_resumes_if_the_last_change_is_still_there() {
        let mut position = loaded(
            Revision::new(7),
            vec![entry("a", Revision::new(3)), entry("b", Revision::new(5)), entry("c", Revision::new(4))],
        );
        let all = Range::prefix("a".to_owned());
        assert_eq!(Position::default().to_read(&all), Some(all.clone()));
        assert_eq!(position.to_read(&all), Some(Range::single("b".to_owned())));
        assert_eq!(position.resume(Some(&entry("b", Revision::new(5)))), Ok(Revision::new(7)));
        assert!(matches!(position.resume(Some(&entry("b", Revision::new(6)))), Err(Interruption::Gap(_))));
        assert!(matches!(position.resume(None), Err(Interruption::Gap(_))));
        position
            .receive(WatchEvent::Changes {
                revision: Revision::new(9),
                changes: vec![put("c", Revision::new(8)), put("a", Revision::new(9))],
            })
            .unwrap();
        assert_eq!(position.resume(Some(&entry("a", Revision::new(9)))), Ok(Revision::new(9)));
    }

    #[test]
    fn after_a_deletion_a_watch_cannot_resume() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(3))]);
        position
            .receive(WatchEvent::Changes {
                revision: Revision::new(8),
                changes: vec![deleted("a", Revision::new(8))],
            })
            .unwrap();
        assert_eq!(position.to_read(&Range::prefix("a".to_owned())), None);
        assert!(matches!(position.begin(Contents::default()), Err(Interruption::Gap(_))));
        assert!(matches!(position.resume(None), Err(Interruption::Gap(_))));
        assert!(matches!(loaded(Revision::new(7), vec![]).resume(None), Err(Interruption::Gap(_))));
    }

    #[test]
    fn changes_that_are_already_known_are_skipped() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(7))]);
        let again = vec![deleted("b", Revision::new(6)), put("a", Revision::new(7))];
        assert_eq!(
            position.receive(WatchEvent::Changes { revision: Revision::new(8), changes: again.clone() }),
            Ok(None)
        );
        let changes = [again, vec![put("c", Revision::new(8))]].concat();
        let new = vec![put("c", Revision::new(8)).1];
        let update = position.receive(WatchEvent::Changes { revision: Revision::new(8), changes });
        assert_eq!(update, Ok(Some(Update::Changed { revision: Revision::new(8), changes: new })));
        assert_eq!(position.resume(Some(&entry("c", Revision::new(8)))), Ok(Revision::new(8)));
    }

    #[test]
    fn a_watch_at_an_older_revision_is_a_gap() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(3))]);
        assert!(matches!(
            position.receive(WatchEvent::Opened { revision: Revision::new(6) }),
            Err(Interruption::Gap(_))
        ));
        assert_eq!(
            position.receive(WatchEvent::Changes { revision: Revision::new(6), changes: vec![] }),
            Ok(None)
        );
    }

    #[test]
    fn a_missed_deletion_is_detected_by_the_number_of_keys() {
        let mut position =
            loaded(Revision::new(7), vec![entry("a", Revision::new(3)), entry("b", Revision::new(7))]);
        let changes =
            vec![put("a", Revision::new(8)), put("c", Revision::new(8)), deleted("b", Revision::new(9))];
        position.receive(WatchEvent::Changes { revision: Revision::new(9), changes }).unwrap();
        assert!(!position.has_missed(2), "a and c");
        assert!(position.has_missed(1));
        assert!(!Position::default().has_missed(1), "nothing was read yet");
    }

    #[test]
    fn only_a_gap_discards_the_known_position() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(3))]);
        let cancelled = position.receive(WatchEvent::Cancelled { reason: "why".to_owned() }).unwrap_err();
        let lost = position.lose(cancelled);
        let is_cancelled = |reason: &Interruption| reason.to_string() == "the watch was cancelled: why";
        assert!(matches!(&lost, Update::Lost { reason } if is_cancelled(reason)), "{lost:?}");
        assert_eq!(
            position.receive(WatchEvent::Opened { revision: Revision::new(9) }),
            Ok(Some(Update::Back { revision: Revision::new(7) }))
        );
        assert_eq!(
            position.receive(WatchEvent::Opened { revision: Revision::new(9) }),
            Ok(None),
            "that was said already"
        );
        let compacted = position.receive(WatchEvent::Compacted { revision: Revision::new(9) }).unwrap_err();
        let reason = Interruption::Gap(Gap::Compacted(Revision::new(9)));
        assert_eq!(position.lose(compacted), Update::Lost { reason });
        assert!(!position.is_loaded());
    }
}
