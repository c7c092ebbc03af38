//! The node's own durable record of its blocks, attachments and addresses, in SQLite.
//!
//! A committed write survives the death of the process (WAL, `synchronous=NORMAL`). A power cut may take the last
//! ones with it; it takes the pods, too, and every attachment belongs to a boot. That no address is recorded twice
//! is the database's word, not ours: it is a primary key.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use polder_api::{Attachment, Mac, Pod, PoolName};
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ValueRef};
use rusqlite::{Connection, Row, Transaction, TransactionBehavior, params};

use crate::moment::Moment;
use crate::pool::Block;
use crate::record::{ClusterId, Incarnation, Nonce};

/// The layout of the tables. A later release that changes it reads the one before.
const LAYOUT: u32 = 1;

const SCHEMA: &str = "
-- Exactly one row: whose ledger this is.
CREATE TABLE IF NOT EXISTS identity (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    node TEXT NOT NULL, incarnation TEXT NOT NULL, cluster TEXT NOT NULL
) STRICT;
-- Exactly one row: the boot to which attachments and moments belong.
CREATE TABLE IF NOT EXISTS boot (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS blocks (block TEXT PRIMARY KEY, pool TEXT NOT NULL, nonce TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS attachments (
    id INTEGER PRIMARY KEY,
    attachment TEXT NOT NULL UNIQUE,
    netns TEXT NOT NULL, mac TEXT NOT NULL, mtu INTEGER NOT NULL,
    pod_namespace TEXT, pod_name TEXT, pod_uid TEXT,
    leaving INTEGER NOT NULL DEFAULT 0
) STRICT;
-- An address is an attachment's, or the node's own (a gateway), or freed at a moment and resting.
CREATE TABLE IF NOT EXISTS addresses (
    address TEXT PRIMARY KEY,
    attachment INTEGER REFERENCES attachments (id),
    gateway INTEGER NOT NULL DEFAULT 0,
    freed_ms INTEGER,
    CHECK ((attachment IS NOT NULL) + gateway + (freed_ms IS NOT NULL) = 1)
) STRICT;
CREATE INDEX IF NOT EXISTS addresses_of_attachment ON addresses (attachment);
-- What was before we changed it, for the day when everything is put back.
CREATE TABLE IF NOT EXISTS sysctls (path TEXT PRIMARY KEY, previous TEXT NOT NULL) STRICT;
";

/// The ledger cannot be used, or a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file cannot be opened or made.
    #[error("open {}: can the agent write in {}?", path.display(), path.parent().unwrap_or(path).display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: rusqlite::Error,
    },
    /// The file was written by a later release.
    #[error("{} has layout {found}, and this release knows {LAYOUT}: go back to the release that wrote it", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// Its layout.
        found: u32,
    },
    /// A statement failed; nothing of its transaction happened.
    #[error("ledger")]
    Sqlite(#[from] rusqlite::Error),
}

/// Whose ledger it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The name under which the node registered.
    pub node: polder_api::NodeName,
    /// Which of the nodes of that name.
    pub incarnation: Incarnation,
    /// In which cluster.
    pub cluster: ClusterId,
}

/// A block that the node owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedBlock {
    /// The block.
    pub block: Block,
    /// Its pool.
    pub pool: PoolName,
    /// That of the claim.
    pub nonce: Nonce,
}

/// An attachment with its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Which one.
    pub attachment: Attachment,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// The MAC address of the pod's end.
    pub mac: Mac,
    /// The MTU of both ends, in bytes.
    pub mtu: u32,
    /// Path of the network namespace, as the runtime said it.
    pub netns: String,
    /// The pod, where the runtime named it.
    pub pod: Option<Pod>,
    /// Whether it is being taken away: it holds its addresses until its interface is gone.
    pub leaving: bool,
}

/// The open ledger.
#[derive(Debug)]
pub struct Ledger {
    database: Connection,
}

impl Ledger {
    /// Opens the ledger, or makes an empty one.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        Ok(Self { database: open_database(path, SCHEMA)? })
    }

    /// Whose ledger it is, if the node has ever registered.
    pub fn identity(&self) -> Result<Option<Identity>, LedgerError> {
        let found = self.rows("SELECT node, incarnation, cluster FROM identity", |row| {
            let (Text(node), incarnation, cluster) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(Identity { node, incarnation: Incarnation(incarnation), cluster: ClusterId(cluster) })
        })?;
        Ok(found.into_iter().next())
    }

    /// Writes down whose ledger it is.
    pub fn identify(&mut self, identity: &Identity) -> Result<(), LedgerError> {
        self.database.execute(
            "INSERT OR REPLACE INTO identity (one, node, incarnation, cluster) VALUES (1, ?1, ?2, ?3)",
            params![identity.node.as_str(), identity.incarnation.0, identity.cluster.0],
        )?;
        Ok(())
    }

    /// Says which boot it is. After another one every attachment is void, for its interface and its namespace are
    /// gone: its addresses rest as if freed when this boot began. Returns the attachments that became void.
    pub fn enter_boot(&mut self, id: &str) -> Result<Vec<Held>, LedgerError> {
        let known: Option<String> = self.rows("SELECT id FROM boot", |row| row.get(0))?.into_iter().next();
        if known.as_deref() == Some(id) {
            return Ok(Vec::new());
        }
        let void = self.attachments()?;
        let transaction = self.transaction()?;
        transaction.execute("INSERT OR REPLACE INTO boot (one, id) VALUES (1, ?1)", params![id])?;
        transaction.execute(
            "UPDATE addresses SET attachment = NULL, freed_ms = ?1 WHERE gateway = 0",
            params![millis(Moment::BOOT)],
        )?;
        transaction.execute("DELETE FROM attachments", [])?;
        transaction.commit()?;
        Ok(void)
    }

    /// The blocks that the node owns.
    pub fn blocks(&self) -> Result<Vec<OwnedBlock>, LedgerError> {
        self.rows("SELECT block, pool, nonce FROM blocks ORDER BY rowid", |row| {
            let (Text(cidr), Text(pool)) = (row.get(0)?, row.get(1)?);
            Ok(OwnedBlock { block: Block::new(cidr), pool, nonce: Nonce(row.get(2)?) })
        })
    }

    /// Adds a block that the node owns.
    pub fn add_block(&mut self, owned: &OwnedBlock) -> Result<(), LedgerError> {
        self.database.execute(
            "INSERT OR REPLACE INTO blocks (block, pool, nonce) VALUES (?1, ?2, ?3)",
            params![owned.block.to_string(), owned.pool.as_str(), owned.nonce.0],
        )?;
        Ok(())
    }

    /// The node's own addresses, IPv4 first.
    pub fn gateways(&self) -> Result<Vec<IpAddr>, LedgerError> {
        let mut gateways =
            self.rows("SELECT address FROM addresses WHERE gateway = 1", |row| row.get(0).map(Text::value))?;
        gateways.sort();
        Ok(gateways)
    }

    /// Allocates an address to the node itself. An address that rested is used again.
    pub fn add_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError> {
        let transaction = self.transaction()?;
        end_rest(&transaction, address)?;
        transaction.execute(
            "INSERT INTO addresses (address, gateway) VALUES (?1, 1)",
            params![address.to_string()],
        )?;
        Ok(transaction.commit()?)
    }

    /// The addresses that were freed, and when. Those of past boots were freed when this one began.
    pub fn resting(&self) -> Result<Vec<(IpAddr, Moment)>, LedgerError> {
        self.rows("SELECT address, freed_ms FROM addresses WHERE freed_ms IS NOT NULL", |row| {
            Ok((row.get(0).map(Text::value)?, moment(row.get(1)?)))
        })
    }

    /// All attachments.
    pub fn attachments(&self) -> Result<Vec<Held>, LedgerError> {
        let mut addresses: Vec<(i64, IpAddr)> = self
            .rows("SELECT attachment, address FROM addresses WHERE attachment IS NOT NULL", |row| {
                Ok((row.get(0)?, row.get(1).map(Text::value)?))
            })?;
        addresses.sort();
        let select = "SELECT id, attachment, netns, mac, mtu, pod_namespace, pod_name, pod_uid, leaving
                      FROM attachments";
        self.rows(select, |row| {
            let id: i64 = row.get(0)?;
            let (Text(attachment), Text(mac)) = (row.get(1)?, row.get(3)?);
            let first = addresses.partition_point(|(owner, _)| *owner < id);
            let own = addresses[first..].iter().take_while(|(owner, _)| *owner == id);
            let pod: (Option<String>, Option<String>) = (row.get(5)?, row.get(6)?);
            let uid = row.get(7)?;
            Ok(Held {
                attachment,
                addresses: own.map(|(_, address)| *address).collect(),
                mac,
                mtu: row.get(4)?,
                netns: row.get(2)?,
                pod: match pod {
                    (Some(namespace), Some(name)) => Some(Pod { namespace, name, uid }),
                    _ => None,
                },
                leaving: row.get(8)?,
            })
        })
    }

    /// Adds an attachment with its addresses. Fails, and changes nothing, where the attachment is there already or
    /// one of the addresses is in use.
    pub fn add_attachment(&mut self, held: &Held) -> Result<(), LedgerError> {
        let pod = held.pod.as_ref();
        let transaction = self.transaction()?;
        transaction.execute(
            "INSERT INTO attachments (attachment, netns, mac, mtu, pod_namespace, pod_name, pod_uid)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                held.attachment.to_string(),
                held.netns,
                held.mac.to_string(),
                held.mtu,
                pod.map(|pod| &pod.namespace),
                pod.map(|pod| &pod.name),
                pod.and_then(|pod| pod.uid.as_ref()),
            ],
        )?;
        let id = transaction.last_insert_rowid();
        for address in &held.addresses {
            end_rest(&transaction, *address)?;
            transaction.execute(
                "INSERT INTO addresses (address, attachment) VALUES (?1, ?2)",
                params![address.to_string(), id],
            )?;
        }
        Ok(transaction.commit()?)
    }

    /// Notes that the attachment is being taken away.
    pub fn mark_leaving(&mut self, attachment: &Attachment) -> Result<(), LedgerError> {
        self.database.execute(
            "UPDATE attachments SET leaving = 1 WHERE attachment = ?1",
            params![attachment.to_string()],
        )?;
        Ok(())
    }

    /// Removes the attachment; its addresses rest from `freed` on. Succeeds where there is none.
    pub fn remove_attachment(&mut self, attachment: &Attachment, freed: Moment) -> Result<(), LedgerError> {
        let transaction = self.transaction()?;
        let key = attachment.to_string();
        transaction.execute(
            "UPDATE addresses SET attachment = NULL, freed_ms = ?2
             WHERE attachment = (SELECT id FROM attachments WHERE attachment = ?1)",
            params![key, millis(freed)],
        )?;
        transaction.execute("DELETE FROM attachments WHERE attachment = ?1", params![key])?;
        Ok(transaction.commit()?)
    }

    /// Notes what a kernel setting was before it was changed, unless that is noted already.
    pub fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError> {
        self.database.execute(
            "INSERT OR IGNORE INTO sysctls (path, previous) VALUES (?1, ?2)",
            params![path, previous],
        )?;
        Ok(())
    }

    fn transaction(&mut self) -> Result<Transaction<'_>, rusqlite::Error> {
        self.database.transaction_with_behavior(TransactionBehavior::Immediate)
    }

    fn rows<T>(
        &self,
        select: &str,
        read: impl FnMut(&Row<'_>) -> Result<T, rusqlite::Error>,
    ) -> Result<Vec<T>, LedgerError> {
        let mut statement = self.database.prepare_cached(select)?;
        let rows = statement.query_map([], read)?.collect::<Result<_, _>>()?;
        Ok(rows)
    }
}

/// Forgets that an address rested, because it goes out again. One that is in use stays.
fn end_rest(transaction: &Transaction<'_>, address: IpAddr) -> Result<(), rusqlite::Error> {
    let delete = "DELETE FROM addresses WHERE address = ?1 AND freed_ms IS NOT NULL";
    transaction.execute(delete, params![address.to_string()]).map(|_| ())
}

fn millis(moment: Moment) -> i64 {
    i64::try_from(moment.millis()).unwrap_or(i64::MAX)
}

fn moment(millis: i64) -> Moment {
    Moment::from_millis(u64::try_from(millis).unwrap_or_default())
}

/// A column of text that is read as something else.
struct Text<T>(T);

impl<T> Text<T> {
    fn value(self) -> T {
        self.0
    }
}

impl<T: FromStr<Err: std::error::Error + Send + Sync + 'static>> FromSql for Text<T> {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_str()?.parse().map(Text).map_err(|error| FromSqlError::Other(Box::new(error)))
    }
}

/// Opens a SQLite file of ours, and makes the tables that it lacks.
pub(crate) fn open_database(path: &Path, schema: &str) -> Result<Connection, LedgerError> {
    let open = || {
        let database = Connection::open(path)?;
        database.busy_timeout(std::time::Duration::from_secs(5))?;
        database.pragma_update(None, "journal_mode", "WAL")?;
        database.pragma_update(None, "synchronous", "NORMAL")?;
        database.pragma_update(None, "foreign_keys", true)?;
        let found: u32 = database.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if found <= LAYOUT {
            database.execute_batch(schema)?;
            database.pragma_update(None, "user_version", LAYOUT)?;
        }
        Ok((database, found))
    };
    match open() {
        Ok((database, found)) if found <= LAYOUT => Ok(database),
        Ok((_, found)) => Err(LedgerError::Layout { path: path.to_owned(), found }),
        Err(source) => Err(LedgerError::Open { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let folder = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(&folder.path().join("ledger.db")).unwrap();
        ledger.enter_boot("boot-1").unwrap();
        (folder, ledger)
    }

    fn held(container: &str, addresses: &[&str]) -> Held {
        Held {
            attachment: format!("net/{container}/eth0").parse().unwrap(),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            mac: "0a:58:0a:00:00:05".parse().unwrap(),
            mtu: 1450,
            netns: format!("/run/netns/{container}"),
            pod: Some(Pod { namespace: "default".into(), name: container.into(), uid: None }),
            leaving: false,
        }
    }

    #[test]
    fn everything_is_there_after_opening_again() {
        let (folder, mut ledger) = ledger();
        let identity = Identity {
            node: "n1".parse().unwrap(),
            incarnation: Incarnation("i".into()),
            cluster: ClusterId("c".into()),
        };
        let owned = OwnedBlock {
            block: Block::new("10.0.0.0/26".parse().unwrap()),
            pool: "p".parse().unwrap(),
            nonce: Nonce("x".into()),
        };
        let (one, two) = (held("one", &["10.0.0.2", "fd00::2"]), held("two", &["10.0.0.3"]));
        ledger.identify(&identity).unwrap();
        ledger.add_block(&owned).unwrap();
        ledger.add_gateway("10.0.0.1".parse().unwrap()).unwrap();
        ledger.add_attachment(&one).unwrap();
        ledger.add_attachment(&two).unwrap();
        ledger.mark_leaving(&two.attachment).unwrap();
        drop(ledger);

        let ledger = Ledger::open(&folder.path().join("ledger.db")).unwrap();
        assert_eq!(ledger.identity().unwrap(), Some(identity));
        assert_eq!(ledger.blocks().unwrap(), [owned]);
        assert_eq!(ledger.gateways().unwrap(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(ledger.attachments().unwrap(), [one, Held { leaving: true, ..two }]);
    }

    #[test]
    fn the_database_itself_refuses_an_address_that_is_in_use_and_an_attachment_that_is_there() {
        let (_folder, mut ledger) = ledger();
        ledger.add_gateway("10.0.0.1".parse().unwrap()).unwrap();
        ledger.add_attachment(&held("one", &["10.0.0.2"])).unwrap();
        assert!(ledger.add_attachment(&held("two", &["10.0.0.3", "10.0.0.2"])).is_err());
        assert!(ledger.add_attachment(&held("two", &["10.0.0.1"])).is_err());
        assert!(ledger.add_attachment(&held("one", &["10.0.0.4"])).is_err());
        assert!(ledger.add_gateway("10.0.0.2".parse().unwrap()).is_err());
        assert_eq!(ledger.attachments().unwrap(), [held("one", &["10.0.0.2"])], "something was half done");
    }

    #[test]
    fn a_removed_attachment_leaves_its_addresses_resting_until_they_go_out_again() {
        let (_folder, mut ledger) = ledger();
        let one = held("one", &["10.0.0.2", "fd00::2"]);
        ledger.add_attachment(&one).unwrap();
        let freed = Moment::from_millis(5_000);
        ledger.remove_attachment(&one.attachment, freed).unwrap();
        ledger.remove_attachment(&one.attachment, Moment::from_millis(9_000)).unwrap();
        assert_eq!(ledger.attachments().unwrap(), []);
        assert_eq!(
            ledger.resting().unwrap(),
            [("10.0.0.2".parse().unwrap(), freed), ("fd00::2".parse().unwrap(), freed)]
        );
        ledger.add_attachment(&held("two", &["10.0.0.2"])).unwrap();
        assert_eq!(ledger.resting().unwrap(), [("fd00::2".parse().unwrap(), freed)]);
    }

    #[test]
    fn another_boot_voids_all_attachments_and_their_addresses_rest_from_its_beginning() {
        let (_folder, mut ledger) = ledger();
        let one = held("one", &["10.0.0.2"]);
        ledger.add_gateway("10.0.0.1".parse().unwrap()).unwrap();
        ledger.add_attachment(&one).unwrap();
        ledger.add_attachment(&held("two", &["10.0.0.3"])).unwrap();
        ledger.remove_attachment(&held("two", &[]).attachment, Moment::from_millis(99_000_000)).unwrap();
        assert_eq!(ledger.enter_boot("boot-1").unwrap(), [], "the same boot voids nothing");
        assert_eq!(ledger.enter_boot("boot-2").unwrap(), [one]);
        assert_eq!(ledger.attachments().unwrap(), []);
        let resting = ledger.resting().unwrap();
        assert_eq!(resting.len(), 2);
        assert!(resting.iter().all(|(_, freed)| *freed == Moment::BOOT), "{resting:?}");
        assert_eq!(ledger.gateways().unwrap().len(), 1, "the node keeps its own address");
    }

    #[test]
    fn a_ledger_of_a_later_release_is_not_touched() {
        let (folder, ledger) = ledger();
        ledger.database.pragma_update(None, "user_version", LAYOUT + 1).unwrap();
        drop(ledger);
        let error = Ledger::open(&folder.path().join("ledger.db")).unwrap_err().to_string();
        assert!(error.contains("layout 2") && error.contains("ledger.db"), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let error = Ledger::open(Path::new("/proc/nowhere/ledger.db")).unwrap_err().to_string();
        assert!(error.contains("/proc/nowhere/ledger.db"), "{error}");
    }
}
