//! What is on its way to the store and back.

use polder_ipam::key::Range;
use polder_ipam::store::refusal::Refusal;
use polder_ipam::store::{Contents, Outcome, StoreError, Txn, Write};

use crate::etcd::LeaseId;

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
    /// A lease of so many seconds.
    Grant(u64),
    /// A transaction whose puts vanish with that lease.
    Put(LeaseId, Txn),
    /// That the lease lasts its whole time from now on.
    Renew(LeaseId),
    /// The end of the lease.
    Revoke(LeaseId),
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
    /// To what is asked about a lease: the one that there is now.
    Lease(Option<LeaseId>),
    /// To what it refuses.
    Refused(Refusal),
}

impl Answer {
    /// What it is to who has asked for something else.
    pub fn error(self) -> StoreError {
        match self {
            Self::Refused(refusal) => StoreError::Refused { store: "etcd".to_owned(), refusal },
            Self::Contents(_) | Self::Outcome(_) | Self::Lease(_) => no_answer(),
        }
    }
}

/// What a request comes to that is never answered.
pub fn no_answer() -> StoreError {
    StoreError::NoAnswer { store: "etcd".to_owned(), reason: "nothing is heard of it".to_owned() }
}

/// What is asked, for people.
pub fn brief(question: &Question) -> String {
    match question {
        Question::Range(range) => format!("for {}", range.start),
        Question::Commit(txn) => format!("to write {}", writes(txn)),
        Question::Grant(seconds) => format!("for a lease of {seconds} s"),
        Question::Put(lease, txn) => format!("to write {} under lease {lease}", writes(txn)),
        Question::Renew(lease) => format!("to renew lease {lease}"),
        Question::Revoke(lease) => format!("to revoke lease {lease}"),
    }
}

fn writes(txn: &Txn) -> String {
    let writes = txn.writes.iter().map(|write| match write {
        Write::Put { key, value } => format!("{key}={}", String::from_utf8_lossy(value)),
        Write::Delete { key } => format!("-{key}"),
    });
    writes.collect::<Vec<_>>().join(" ")
}

/// What is answered, for people.
pub fn short(answer: &Answer) -> String {
    match answer {
        Answer::Contents(contents) => format!("{} entries", contents.entries.len()),
        Answer::Outcome(outcome) => format!("{outcome:?}"),
        Answer::Lease(lease) => lease.map_or("no lease".to_owned(), |lease| format!("lease {lease}")),
        Answer::Refused(refusal) => refusal.words.clone(),
    }
}
