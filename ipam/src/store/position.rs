//! How far a follower of a range has come, and what it makes of what a watch says.
//!
//! A watch begins with the last revision that is known, and what it says of that is not heard again. To begin behind
//! it would be wrong: if history was compacted at the first revision that is not known, etcd up to 3.4.33 and 3.5.15
//! opens the watch and says nothing of what was deleted at that revision. So it refuses, and everything is read.
//!
//! This decides, and asks nobody: what asks is the follower of a real etcd, or that of a simulated one.

use std::collections::BTreeSet;
use std::time::Duration;

use polder_api::rule;

use super::{Contents, Entry, KeyChange, Update};
use crate::Revision;
use crate::key::Range;

/// How far a follower has come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Position {
    /// Revision up to which everything is known; `None` before the first load.
    known: Option<Revision>,
    /// The entry that changed last, if that was no deletion. A store that has it has what was known.
    witness: Option<Entry>,
    /// The keys that are there.
    keys: BTreeSet<String>,
    /// Whether the last word was that nothing is heard.
    lost: bool,
}

/// What a watch says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// It is open.
    Opened {
        /// The revision of the store.
        revision: Revision,
    },
    /// These keys changed. None at all is a sign of life.
    Changes {
        /// The revision of the store.
        revision: Revision,
        /// What changed, in order, and the revision of each.
        changes: Vec<(Revision, KeyChange)>,
    },
    /// It is closed, because changes that it should tell of are before this revision and forgotten.
    Compacted {
        /// The revision.
        revision: Revision,
    },
    /// It is closed for this reason.
    Cancelled {
        /// The reason.
        reason: String,
    },
}

/// How often it is looked whether something was missed ([`Position::has_missed`]).
pub const VERIFY_EVERY: Duration = Duration::from_secs(180);

/// Why following has to be interrupted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interruption {
    /// It goes on behind what is known.
    Broken(String),
    /// It begins anew.
    Gap(String),
}

rule! {
    /// Whether a watch has not told of everything: there are more keys, or fewer, than it told of.
    fn differ(told: usize, there: usize) -> bool {
        told != there
    }
    WatchIsBelieved => false
}

rule! {
    /// Whether the store is what it was, and what has changed since is all that is new.
    fn is_witnessed(witness: Option<&Entry>, found: Option<&Entry>) -> bool {
        witness.is_some() && witness == found
    }
    WitnessIsIgnored => true
}

impl Position {
    /// Whether everything was read once, and following can go on from there.
    fn is_loaded(&self) -> bool {
        self.known.is_some()
    }

    /// Up to which revision everything is known.
    pub fn known(&self) -> Revision {
        self.known.unwrap_or_default()
    }

    /// Whether something was missed, given how many keys there are. etcd does not send again what was deleted at the very
    /// revision up to which it forgets, to a watch that it has not caught up with, and what it does not forget is no
    /// deletion: so the number tells. A wrong yes costs one load.
    pub fn has_missed(&self, keys: usize) -> bool {
        self.is_loaded() && differ(self.keys.len(), keys)
    }

    /// What to read before a watch is opened, for [`Self::begin`]: the whole range; or where following can go on, the key of the
    /// witness, if there is one.
    pub fn to_read(&self, range: &Range) -> Option<Range> {
        if !self.is_loaded() {
            return Some(range.clone());
        }
        self.witness.as_ref().map(|entry| Range::single(entry.key.clone()))
    }

    /// Takes in what is there. The revision to watch from, and what there is to say.
    pub fn begin(&mut self, there: Contents) -> Result<(Revision, Option<Update>), Interruption> {
        if self.is_loaded() {
            return Ok((self.resume(there.entries.first())?, None));
        }
        let (from, loaded) = self.load(there);
        Ok((from, Some(loaded)))
    }

    /// The revision to watch from, given what now stands behind the key of the witness. A store that was emptied, or
    /// set back to an earlier state, may have gone on to any revision by now; one that has the last change as it was
    /// has all before it, too. A wrong no costs one load.
    fn resume(&self, found: Option<&Entry>) -> Result<Revision, Interruption> {
        match self.known {
            Some(known) if is_witnessed(self.witness.as_ref(), found) => Ok(known),
            _ => {
                Err(Interruption::Gap("the datastore was emptied or restored to an earlier state".to_owned()))
            }
        }
    }

    /// Begins anew with all entries. The revision to watch from, and what there is to say.
    pub fn load(&mut self, contents: Contents) -> (Revision, Update) {
        self.witness = contents.entries.iter().max_by_key(|entry| entry.revision).cloned();
        self.known = Some(contents.revision);
        self.keys = contents.entries.iter().map(|entry| entry.key.clone()).collect();
        self.lost = false;
        (contents.revision, Update::Loaded(contents))
    }

    /// Takes in what a watch says; what is known already is left out. Returns what there is to say about it, which
    /// may be nothing.
    pub fn hear(&mut self, heard: Heard) -> Result<Option<Update>, Interruption> {
        let known = self.known();
        let changes = match heard {
            Heard::Compacted { revision } => {
                return Err(Interruption::Gap(format!("history before {revision} was compacted")));
            }
            Heard::Cancelled { reason } => {
                return Err(Interruption::Broken(format!("the watch was cancelled: {reason}")));
            }
            Heard::Opened { revision } if revision < known => {
                let gap = format!("the datastore is at revision {revision} but was at {known}");
                return Err(Interruption::Gap(gap));
            }
            // An event is never older than what is known: this is a late answer to a request for progress.
            Heard::Changes { revision, .. } if revision < known => return Ok(None),
            Heard::Opened { .. } => Vec::new(),
            Heard::Changes { changes, .. } => changes,
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

    /// Notes that nothing is heard any more, and says so.
    pub fn lose(&mut self, interruption: Interruption) -> Update {
        self.lost = true;
        let reason = match interruption {
            Interruption::Broken(reason) => reason,
            Interruption::Gap(reason) => {
                self.known = None;
                reason
            }
        };
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
    fn following_goes_on_where_the_last_change_is_as_it_was() {
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
            .hear(Heard::Changes {
                revision: Revision::new(9),
                changes: vec![put("c", Revision::new(8)), put("a", Revision::new(9))],
            })
            .unwrap();
        assert_eq!(position.resume(Some(&entry("a", Revision::new(9)))), Ok(Revision::new(9)));
    }

    #[test]
    fn a_deletion_leaves_no_witness_and_following_begins_anew() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(3))]);
        position
            .hear(Heard::Changes {
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
    fn what_is_known_already_is_not_heard_again() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(7))]);
        let again = vec![deleted("b", Revision::new(6)), put("a", Revision::new(7))];
        assert_eq!(
            position.hear(Heard::Changes { revision: Revision::new(8), changes: again.clone() }),
            Ok(None)
        );
        let changes = [again, vec![put("c", Revision::new(8))]].concat();
        let new = vec![put("c", Revision::new(8)).1];
        let update = position.hear(Heard::Changes { revision: Revision::new(8), changes });
        assert_eq!(update, Ok(Some(Update::Changed { revision: Revision::new(8), changes: new })));
        assert_eq!(position.resume(Some(&entry("c", Revision::new(8)))), Ok(Revision::new(8)));
    }

    #[test]
    fn a_store_that_is_behind_what_is_known_is_another_one() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(3))]);
        assert!(matches!(
            position.hear(Heard::Opened { revision: Revision::new(6) }),
            Err(Interruption::Gap(_))
        ));
        assert_eq!(position.hear(Heard::Changes { revision: Revision::new(6), changes: vec![] }), Ok(None));
    }

    #[test]
    fn a_deletion_that_was_not_heard_of_is_noticed_by_the_number_of_keys() {
        let mut position =
            loaded(Revision::new(7), vec![entry("a", Revision::new(3)), entry("b", Revision::new(7))]);
        let changes =
            vec![put("a", Revision::new(8)), put("c", Revision::new(8)), deleted("b", Revision::new(9))];
        position.hear(Heard::Changes { revision: Revision::new(9), changes }).unwrap();
        assert!(!position.has_missed(2), "a and c");
        assert!(position.has_missed(1));
        assert!(!Position::default().has_missed(1), "nothing was read yet");
    }

    #[test]
    fn only_a_gap_makes_what_is_known_void() {
        let mut position = loaded(Revision::new(7), vec![entry("a", Revision::new(3))]);
        let cancelled = position.hear(Heard::Cancelled { reason: "why".to_owned() }).unwrap_err();
        position.lose(cancelled);
        assert_eq!(
            position.hear(Heard::Opened { revision: Revision::new(9) }),
            Ok(Some(Update::Back { revision: Revision::new(7) }))
        );
        assert_eq!(
            position.hear(Heard::Opened { revision: Revision::new(9) }),
            Ok(None),
            "that was said already"
        );
        let compacted = position.hear(Heard::Compacted { revision: Revision::new(9) }).unwrap_err();
        position.lose(compacted);
        assert!(!position.is_loaded());
    }
}
