//! The outcome of a change that is sent to the datastore: applied, refused, or unknown. If it is unknown, the
//! datastore is read for the record that the change writes.
//!
//! No I/O: the caller reads the datastore. Callers are the tasks ([`attempt`](crate::tasks)) and the complete model.

use polder_api::rule;

use crate::Revision;
use crate::change::Change;
use crate::key::Range;
use crate::store::{Contents, Entry, Outcome, StoreError};
use crate::transaction::trace;

/// A change that was sent to the datastore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    trace: Option<Entry>,
}

/// The outcome, as the datastore's answer shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptAnswer {
    /// The change was applied at this revision.
    Made(Revision),
    /// A record that the change depends on has changed: nothing was applied.
    Refused,
    /// The change may have been applied: the datastore must be read.
    InDoubt(UnknownOutcome),
    /// The change was not applied; or it is unknown whether it was, and no record would show it.
    Failed(StoreError),
}

/// A change that may or may not have been applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownOutcome {
    trace: Entry,
    error: StoreError,
}

/// The outcome, as a read of the datastore shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadResult {
    /// The change was applied.
    Made,
    /// The record is missing or different. Not final if the datastore did not answer: the change may still be
    /// applied.
    NotMade(StoreError),
}

impl Attempt {
    /// An attempt at this change.
    pub fn new(change: &Change) -> Self {
        Self { trace: trace(change) }
    }

    /// Evaluates the datastore's answer.
    pub fn answered(self, answer: Result<Outcome, StoreError>) -> AttemptAnswer {
        match (answer, self.trace) {
            (Ok(Outcome::Applied { revision }), _) => AttemptAnswer::Made(revision),
            (Ok(Outcome::Refused), _) => AttemptAnswer::Refused,
            (Err(error), Some(trace)) if error.needs_reread() => {
                AttemptAnswer::InDoubt(UnknownOutcome { trace, error })
            }
            (Err(error), _) => AttemptAnswer::Failed(error),
        }
    }
}

rule! {
    /// Whether the record exists with the value that the change writes.
    fn has(contents: &Contents, trace: &Entry) -> bool {
        contents.entries.iter().any(|entry| entry.key == trace.key && entry.value == trace.value)
    }
    ClaimIsPresumed => true
}

impl UnknownOutcome {
    /// The record that the change writes.
    pub fn trace(&self) -> &Entry {
        &self.trace
    }

    /// The key range to read.
    pub fn range(&self) -> Range {
        Range::single(self.trace.key.clone())
    }

    /// Evaluates the contents of [`UnknownOutcome::range`].
    pub fn found(self, contents: &Contents) -> ReadResult {
        if has(contents, &self.trace) {
            return ReadResult::Made;
        }
        ReadResult::NotMade(self.error)
    }

    /// The error of the change, for when the datastore cannot be read.
    pub fn unread(self) -> StoreError {
        self.error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Claim, Member};
    use crate::pool::{Pool, PoolState};
    use crate::store::refusal::{RefusalCause, StoreRefusal};

    fn change() -> Change {
        let record = serde_json::from_str(r#"{"node":"n1","incarnation":"i","pool":"main","nonce":"x"}"#);
        let pool = Pool::new("main".parse().unwrap(), "10.0.0.0/24".parse().unwrap(), 29, PoolState::Active);
        Change::ClaimBlock(Claim {
            block: pool.unwrap().block(1),
            record: record.unwrap(),
            by: Member { node: "n1".parse().unwrap(), revision: Revision::new(7) },
            pool: "10.0.0.0/24".parse().unwrap(),
            pool_revision: Revision::new(3),
        })
    }

    fn no_answer() -> StoreError {
        StoreError::NoAnswer { store: "a test".to_owned(), reason: "none".to_owned() }
    }

    fn doubt(error: StoreError) -> UnknownOutcome {
        match Attempt::new(&change()).answered(Err(error)) {
            AttemptAnswer::InDoubt(doubt) => doubt,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_answer_of_the_datastore_is_final() {
        let answered = |outcome| Attempt::new(&change()).answered(Ok(outcome));
        assert_eq!(
            answered(Outcome::Applied { revision: Revision::new(9) }),
            AttemptAnswer::Made(Revision::new(9))
        );
        assert_eq!(answered(Outcome::Refused), AttemptAnswer::Refused);
    }

    #[test]
    fn without_an_answer_the_written_record_decides() {
        let doubt = doubt(no_answer());
        let contents = |entries| Contents { revision: Revision::new(9), entries };
        assert_eq!(doubt.clone().found(&contents(vec![doubt.trace().clone()])), ReadResult::Made);
        let other = Entry { value: b"{}".to_vec(), ..doubt.trace().clone() };
        assert_eq!(doubt.clone().found(&contents(vec![other])), ReadResult::NotMade(no_answer()));
        assert_eq!(doubt.clone().found(&contents(Vec::new())), ReadResult::NotMade(no_answer()));
    }

    #[test]
    fn only_a_refusal_that_may_have_been_applied_is_in_doubt() {
        let refused = |cause| StoreError::Refused {
            store: "a test".to_owned(),
            refusal: StoreRefusal::new(cause, String::new()),
        };
        drop(doubt(refused(RefusalCause::NoSpace)));
        let answered = Attempt::new(&change()).answered(Err(refused(RefusalCause::Permission)));
        assert_eq!(answered, AttemptAnswer::Failed(refused(RefusalCause::Permission)));
    }

    #[test]
    fn a_change_without_a_record_of_its_own_fails_without_an_answer() {
        let change = Change::EndInspection { revision: Revision::new(1) };
        assert_eq!(Attempt::new(&change).answered(Err(no_answer())), AttemptAnswer::Failed(no_answer()));
    }
}
