//! The datastore of a node without etcd: the same records and transactions, in a SQLite file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use polder_ipam::Revision;
use polder_ipam::key::{Key, Range};
use polder_ipam::store::refusal::{RefusalCause, StoreRefusal};
use polder_ipam::store::{Compare, Contents, Entry, KeyChange, Outcome, StoreError, Txn, Update, Write};
use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, TransactionBehavior, params};
use tokio::sync::{broadcast, mpsc};

use crate::sqlite::{LayoutStep, OpenError, open_database};
use crate::writes::{Writes, Written};

/// Maximum number of changes that a watcher may be behind; then it reads everything again.
const CHANGES_KEPT: usize = 256;

const LAYOUTS: &[LayoutStep] = &[LayoutStep::Remakes(
    "
CREATE TABLE store (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) STRICT;
CREATE TABLE store_revision (revision INTEGER NOT NULL) STRICT;
INSERT INTO store_revision VALUES (1);
",
)];

const UPSERT: &str = "INSERT OR REPLACE INTO store (key, value, revision) VALUES (?1, ?2, ?3)";

/// A datastore in a file, for one process.
#[derive(Debug, Clone)]
pub struct Embedded {
    path: PathBuf,
    database: Arc<Mutex<Connection>>,
    changes: broadcast::Sender<(Revision, Vec<KeyChange>)>,
    writes: Writes,
}

impl Embedded {
    /// Opens the file, or creates it. Deletes the records of alive nodes: they may be out of date.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let database = open_database(path, LAYOUTS)?;
        let alive = Key::all_leases();
        database
            .execute("DELETE FROM store WHERE key >= ?1 AND key < ?2", params![alive.start, alive.end])
            .map_err(|source| OpenError::Unusable { path: path.to_owned(), source })?;
        let changes = broadcast::Sender::new(CHANGES_KEPT);
        let database = Arc::new(Mutex::new(database));
        Ok(Self { path: path.to_owned(), database, changes, writes: Writes::default() })
    }

    /// Adds entries of another datastore, with their revisions. For a copy of a datastore.
    pub fn fill(&self, copied: &Contents) -> Result<(), StoreError> {
        self.with(|database| {
            let transaction = database.transaction()?;
            for entry in &copied.entries {
                transaction.execute(UPSERT, params![entry.key, entry.value, entry.revision.number()])?;
            }
            let latest = "UPDATE store_revision SET revision = max(revision, ?1)";
            transaction.execute(latest, params![copied.revision.number()])?;
            transaction.commit()
        })
    }

    pub(crate) fn name(&self) -> String {
        format!("embedded store {}", self.path.display())
    }

    pub(crate) fn writes(&self) -> &Writes {
        &self.writes
    }

    pub(crate) fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        self.with(|database| {
            let snapshot = database.transaction()?;
            let mut select = snapshot.prepare_cached(
                "SELECT key, value, revision FROM store WHERE key >= ?1 AND key < ?2 ORDER BY key",
            )?;
            let entries = select.query_map(params![range.start, range.end], |row| {
                Ok(Entry { key: row.get(0)?, value: row.get(1)?, revision: Revision::new(row.get(2)?) })
            })?;
            Ok(Contents { revision: revision(&snapshot)?, entries: entries.collect::<Result<_, _>>()? })
        })
    }

    pub(crate) fn commit(&self, txn: &Txn) -> Result<Outcome, StoreError> {
        let applied = self.with(|database| {
            let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for compare in &txn.compares {
                if !holds(&transaction, compare)? {
                    return Ok(None);
                }
            }
            let revision = revision(&transaction)?.next();
            let mut changes = Vec::new();
            for write in &txn.writes {
                changes.extend(apply(&transaction, write, revision)?);
            }
            transaction.execute("UPDATE store_revision SET revision = ?1", params![revision.number()])?;
            transaction.commit()?;
            // Send under the lock, so that followers get the changes in order. Without followers, `send` fails: ignore
            // that.
            let _ = self.changes.send((revision, changes));
            Ok(Some(revision))
        });
        let written = Written::from(txn);
        match &applied {
            Ok(_) => self.writes.taken(&written),
            Err(error) => self.writes.failed(&written, error),
        }
        Ok(applied?.map_or(Outcome::Refused, |revision| Outcome::Applied { revision }))
    }

    pub(crate) async fn follow(self, range: Range, updates: mpsc::Sender<Update>) {
        let mut changes = self.changes.subscribe();
        let mut known = None;
        loop {
            let update = match known {
                None => match self.range(&range) {
                    Ok(contents) => {
                        known = Some(contents.revision);
                        Update::Loaded(contents)
                    }
                    Err(error) => Update::Lost { reason: error.into() },
                },
                Some(revision) => match changes.recv().await {
                    // The contents that were read include the changes since the subscription.
                    Ok((at, _)) if at <= revision => continue,
                    Ok((at, mut changes)) => {
                        known = Some(at);
                        changes.retain(|change| range.has(&change.key));
                        Update::Changed { revision: at, changes }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {
                        known = None;
                        continue;
                    }
                    // Cannot occur: `self` holds a sender.
                    Err(broadcast::error::RecvError::Closed) => return,
                },
            };
            if updates.send(update).await.is_err() {
                return;
            }
            if known.is_none() {
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }

    fn with<T>(
        &self,
        job: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error>,
    ) -> Result<T, StoreError> {
        // A panic cannot leave a transaction half done: SQLite rolls it back.
        let mut database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        job(&mut database).map_err(|error| {
            let (store, message) = (self.name(), error.to_string());
            if is_refusal(&error) {
                StoreError::Refused { store, refusal: StoreRefusal::new(RefusalCause::Disk, message) }
            } else {
                StoreError::NoAnswer { store, reason: message }
            }
        })
    }
}

/// Whether nothing was written: SQLite detects these errors before the commit, and rolls back.
fn is_refusal(error: &rusqlite::Error) -> bool {
    let codes =
        [ErrorCode::DiskFull, ErrorCode::ReadOnly, ErrorCode::PermissionDenied, ErrorCode::CannotOpen];
    error.sqlite_error_code().is_some_and(|code| codes.contains(&code))
}

fn revision(transaction: &Transaction<'_>) -> Result<Revision, rusqlite::Error> {
    transaction.query_one("SELECT revision FROM store_revision", [], |row| row.get(0).map(Revision::new))
}

fn holds(transaction: &Transaction<'_>, compare: &Compare) -> Result<bool, rusqlite::Error> {
    match compare {
        Compare::Empty(range) => transaction.query_one(
            "SELECT NOT EXISTS (SELECT * FROM store WHERE key >= ?1 AND key < ?2)",
            params![range.start, range.end],
            |row| row.get(0),
        ),
        Compare::Unchanged { key, revision } => {
            let select = "SELECT revision FROM store WHERE key = ?1";
            let found: Option<i64> =
                transaction.query_row(select, params![key], |row| row.get(0)).optional()?;
            Ok(found.map_or(Revision::ABSENT, Revision::new) == *revision)
        }
        Compare::NothingNewer { range, revision } => transaction.query_one(
            "SELECT NOT EXISTS (SELECT * FROM store WHERE key >= ?1 AND key < ?2 AND revision > ?3)",
            params![range.start, range.end, revision.number()],
            |row| row.get(0),
        ),
    }
}

fn apply(
    transaction: &Transaction<'_>,
    write: &Write,
    revision: Revision,
) -> Result<Option<KeyChange>, rusqlite::Error> {
    match write {
        Write::Put { key, value } => {
            transaction.execute(UPSERT, params![key, value, revision.number()])?;
            let entry = Entry { key: key.clone(), value: value.clone(), revision };
            Ok(Some(KeyChange { key: key.clone(), entry: Some(entry) }))
        }
        Write::Delete { key } => {
            let deleted = transaction.execute("DELETE FROM store WHERE key = ?1", params![key])?;
            Ok((deleted > 0).then(|| KeyChange { key: key.clone(), entry: None }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> Write {
        Write::Put { key: key.to_owned(), value: value.into() }
    }

    fn unchanged(key: &str, revision: Revision) -> Compare {
        Compare::Unchanged { key: key.to_owned(), revision }
    }

    fn store() -> (tempfile::TempDir, Embedded) {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(&folder.path().join("store.db")).unwrap();
        (folder, store)
    }

    #[test]
    fn a_transaction_is_applied_completely_or_not_at_all() {
        let (_folder, store) = store();
        let both = Txn {
            compares: vec![unchanged("a", Revision::ABSENT)],
            writes: vec![put("a", "1"), put("b", "1")],
        };
        assert_eq!(store.commit(&both).unwrap(), Outcome::Applied { revision: Revision::new(2) });
        assert_eq!(store.commit(&both).unwrap(), Outcome::Refused);
        let range = Range { start: "a".into(), end: "c".into() };
        let empty = Txn { compares: vec![Compare::Empty(range.clone())], writes: vec![put("c", "1")] };
        assert_eq!(store.commit(&empty).unwrap(), Outcome::Refused);
        let later = Txn {
            compares: vec![unchanged("a", Revision::new(2))],
            writes: vec![Write::Delete { key: "a".into() }],
        };
        assert_eq!(store.commit(&later).unwrap(), Outcome::Applied { revision: Revision::new(3) });
        let contents = store.range(&range).unwrap();
        assert_eq!(contents.revision, Revision::new(3));
        assert_eq!(
            contents.entries,
            [Entry { key: "b".into(), value: "1".into(), revision: Revision::new(2) }]
        );
    }

    #[test]
    fn a_transaction_can_require_that_a_range_is_unchanged() {
        let (_folder, store) = store();
        let range = Range { start: "b".into(), end: "c".into() };
        let attempt = |revision, writes| {
            let compares =
                vec![Compare::NothingNewer { range: range.clone(), revision: Revision::new(revision) }];
            store.commit(&Txn { compares, writes }).unwrap()
        };
        // The range is empty. The keys outside it do not matter.
        assert_eq!(
            attempt(0, vec![put("a", "1"), put("c", "1")]),
            Outcome::Applied { revision: Revision::new(2) }
        );
        assert_eq!(
            attempt(0, vec![put("b1", "1"), put("b2", "1")]),
            Outcome::Applied { revision: Revision::new(3) }
        );
        assert_eq!(attempt(2, vec![put("b1", "2")]), Outcome::Refused);
        assert_eq!(attempt(3, vec![put("b1", "2")]), Outcome::Applied { revision: Revision::new(4) });
        assert_eq!(attempt(3, vec![]), Outcome::Refused, "one key of two is newer");
        let gone = vec![Write::Delete { key: "b1".into() }];
        assert_eq!(attempt(4, gone), Outcome::Applied { revision: Revision::new(5) });
        assert_eq!(
            attempt(3, vec![put("b2", "2")]),
            Outcome::Applied { revision: Revision::new(6) },
            "a deletion is not seen"
        );
    }

    #[tokio::test]
    async fn a_watch_gets_all_records_once_and_then_every_change() {
        let (_folder, store) = store();
        store.commit(&Txn { writes: vec![put("b1", "1"), put("z", "1")], ..Txn::default() }).unwrap();
        let (sender, mut updates) = mpsc::channel(8);
        tokio::spawn(store.clone().follow(Range::prefix("b".into()), sender));
        let Some(Update::Loaded(contents)) = updates.recv().await else { panic!("not loaded") };
        assert_eq!(contents.entries.len(), 1);
        store.commit(&Txn { writes: vec![put("z", "2")], ..Txn::default() }).unwrap();
        store.commit(&Txn { writes: vec![Write::Delete { key: "b1".into() }], ..Txn::default() }).unwrap();
        assert_eq!(
            updates.recv().await,
            Some(Update::Changed { revision: Revision::new(3), changes: vec![] })
        );
        let gone = vec![KeyChange { key: "b1".to_owned(), entry: None }];
        assert_eq!(updates.recv().await, Some(Update::Changed { revision: Revision::new(4), changes: gone }));
    }

    #[test]
    fn stored_records_survive_a_restart() {
        let (folder, store) = store();
        store.commit(&Txn { writes: vec![put("a", "1")], ..Txn::default() }).unwrap();
        drop(store);
        let store = Embedded::open(&folder.path().join("store.db")).unwrap();
        assert_eq!(store.range(&Range::prefix("a".into())).unwrap().revision, Revision::new(2));
    }
}
