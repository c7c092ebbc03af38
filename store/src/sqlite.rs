//! The layouts of Polder's SQLite files: the steps between them, and the releases that can use a file.
//!
//! `user_version` is the layout of the file. An earlier release can still use the file if later releases only added
//! columns and tables, so a node can be downgraded: the earlier release names the columns that it knows, and the other
//! columns get their defaults.

use std::path::{Path, PathBuf};

use polder_ipam::ledger::LedgerError;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior};

/// Number of compiled statements that a connection keeps: more than the program has. The default is 16.
const STATEMENTS: usize = 64;

/// A file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened, created or upgraded: no permission, no space, or it is not a database.
    #[error(
        "cannot open {}: check that the agent can write in {}",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The error of SQLite.
        #[source]
        source: rusqlite::Error,
    },
    /// The file was written by a later release.
    #[error(
        "{} has layout {found}, but this release supports {known}: go back to the release that wrote it",
        path.display()
    )]
    Layout {
        /// The file.
        path: PathBuf,
        /// The layout of the file.
        found: usize,
        /// The newest layout that this release supports.
        known: usize,
    },
    /// The ledger in the file cannot be read or changed.
    /// Remedy: check the disk of `state_dir`, and that the agent can write there.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// The step from one layout to the next, in SQL.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LayoutStep {
    /// Only adds columns and tables. The previous release leaves them at their defaults and works without them.
    Adds(&'static str),
    /// Changes data that the previous release uses, or adds data that it must not ignore.
    Remakes(&'static str),
}

impl LayoutStep {
    fn sql(self) -> &'static str {
        match self {
            Self::Adds(sql) | Self::Remakes(sql) => sql,
        }
    }
}

/// The earliest layout whose release can use a file of the last layout in `layouts`.
fn readable_from(layouts: &[LayoutStep]) -> usize {
    layouts.iter().rposition(|step| matches!(step, LayoutStep::Remakes(_))).map_or(0, |index| index + 1)
}

/// Opens a SQLite file and upgrades it to the last of these layouts. A file of a later layout is opened unchanged if
/// its table `readable` permits this release.
pub(crate) fn open_database(path: &Path, layouts: &[LayoutStep]) -> Result<Connection, OpenError> {
    match open(path, layouts) {
        Ok((database, found, needed)) if needed <= layouts.len() => {
            if found > layouts.len() {
                let (file, known) = (path.display(), layouts.len());
                tracing::warn!(%file, found, known, "the file was written by a later release");
            }
            Ok(database)
        }
        Ok((_, found, _)) => Err(OpenError::Layout { path: path.to_owned(), found, known: layouts.len() }),
        Err(source) => Err(OpenError::Unusable { path: path.to_owned(), source }),
    }
}

fn number(layout: usize) -> u32 {
    u32::try_from(layout).unwrap_or(u32::MAX)
}

/// Returns the database, its layout before an upgrade, and the earliest layout that can use it (0 unless the file has a
/// later layout).
fn open(path: &Path, layouts: &[LayoutStep]) -> Result<(Connection, usize, usize), rusqlite::Error> {
    let mut database = Connection::open(path)?;
    database.busy_timeout(std::time::Duration::from_secs(5))?;
    database.pragma_update(None, "journal_mode", "WAL")?;
    database.pragma_update(None, "synchronous", "NORMAL")?;
    database.pragma_update(None, "foreign_keys", true)?;
    database.set_prepared_statement_cache_capacity(STATEMENTS);
    let found = database.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0))? as usize;
    if found > layouts.len() {
        let needed = readable_by(&database)?.unwrap_or(found);
        return Ok((database, found, needed));
    }
    let missing = &layouts[found..];
    if !missing.is_empty() {
        let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
        missing.iter().try_for_each(|step| transaction.execute_batch(step.sql()))?;
        transaction.execute_batch(
            "-- Exactly one row: the earliest layout whose release can work with the file.
             CREATE TABLE IF NOT EXISTS readable (one INTEGER PRIMARY KEY CHECK (one = 1), since INTEGER NOT NULL) \
             STRICT;",
        )?;
        transaction.execute(
            "INSERT OR REPLACE INTO readable (one, since) VALUES (1, ?1)",
            [number(readable_from(layouts))],
        )?;
        transaction.pragma_update(None, "user_version", number(layouts.len()))?;
        transaction.commit()?;
    }
    Ok((database, found, 0))
}

/// The earliest layout whose release can use this file; `None` if the file does not contain it.
fn readable_by(database: &Connection) -> Result<Option<usize>, rusqlite::Error> {
    let table = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'readable'";
    if !database.prepare(table)?.exists([])? {
        return Ok(None);
    }
    let since =
        database.query_row("SELECT since FROM readable", [], |row| row.get::<_, u32>(0)).optional()?;
    Ok(since.map(|since| since as usize))
}
