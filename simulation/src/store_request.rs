//! What is on its way to the store and back.

use polder_ipam::key::Range;
use polder_ipam::store::refusal::Refusal;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn, Write};

/// Something that a node asks of the store.
pub struct Request {
    /// Its number.
    pub id: u64,
    /// Who asks.
    pub machine: usize,
    /// What for.
    pub question: Question,
    /// How far it has come.
    pub state: Progress,
}

/// What is asked.
#[derive(Debug, Clone)]
pub enum Question {
    /// All entries of a range.
    Range(Range),
    /// A transaction.
    Commit(Txn),
}

/// How far a request has come.
#[derive(Debug, Clone)]
pub enum Progress {
    /// It is on its way to the store.
    Sent,
    /// It was given up by who asked, and is still on its way.
    Late,
    /// The answer is on its way back.
    Served(Answer),
    /// The answer is there, or that there will be none.
    Answered(Result<Answer, StoreError>),
}

/// What the store says.
#[derive(Debug, Clone)]
pub enum Answer {
    /// To a range.
    Contents(Contents),
    /// To a transaction.
    Outcome(Outcome),
    /// To a transaction that it refuses.
    Refused(Refusal),
}

/// What a request comes to that is never answered.
pub fn no_answer() -> StoreError {
    StoreError::NoAnswer { store: "etcd".to_owned(), reason: "nothing is heard of it".to_owned() }
}

/// The question, for people.
pub fn brief(question: &Question) -> String {
    match question {
        Question::Range(range) => format!("for {}", range.start),
        Question::Commit(txn) => {
            let writes = txn.writes.iter().map(|write| match write {
                Write::Put { key, value } => {
                    format!("{key}={}", String::from_utf8_lossy(value))
                }
                Write::Delete { key } => format!("-{key}"),
            });
            format!("to write {}", writes.collect::<Vec<_>>().join(" "))
        }
    }
}

/// The answer, for people.
pub fn short(answer: &Answer) -> String {
    match answer {
        Answer::Contents(contents) => format!("{} entries", contents.entries.len()),
        Answer::Outcome(outcome) => format!("{outcome:?}"),
        Answer::Refused(refusal) => refusal.words.clone(),
    }
}
