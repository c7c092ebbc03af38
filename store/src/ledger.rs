//! The ledger on disk, in SQLite.
//!
//! A committed write survives a crash of the process (WAL, `synchronous=NORMAL`). A power failure may lose the last
//! writes, but it also ends the pods, and attachments are valid for one boot only. A primary key in the database
//! prevents duplicate addresses.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use polder_api::{Attachment, Pod};
use polder_ipam::ids::{BootId, ClusterId, Incarnation, Nonce};
use polder_ipam::ledger::{AttachmentEntry, Ledger, LedgerError, MemberState, NodeIdentity, OwnedBlock};
use polder_ipam::{Block, Moment, node};
use rusqlite::{Connection, Params, Row, Transaction, TransactionBehavior, params};

use self::column::{SpaceSeparated, Text, millis, moment, space_separated};
use crate::sqlite::{LayoutStep, OpenError, open_database};

/// The addresses of this node, with the ledger on disk.
pub type NodeIpam = node::NodeIpam<Sqlite>;

/// Opens the ledger on disk for this boot. Returns the attachments of an earlier boot, which are void.
pub fn open_node(
    path: &Path,
    boot_id: &BootId,
    cool_down: Duration,
) -> Result<(NodeIpam, Vec<AttachmentEntry>), OpenError> {
    Ok(NodeIpam::with(Sqlite::open(path)?, boot_id, cool_down)?)
}

/// The layouts of the tables, each as the step from the previous one: ledgers of all earlier releases can be read.
const LAYOUTS: &[LayoutStep] = &[
    LayoutStep::Remakes(
        "
-- Exactly one row: whose ledger this is.
CREATE TABLE identity (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    node TEXT NOT NULL, incarnation TEXT NOT NULL, cluster TEXT NOT NULL
) STRICT;
-- Exactly one row: the boot to which attachments and moments belong.
CREATE TABLE boot (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL) STRICT;
CREATE TABLE blocks (block TEXT PRIMARY KEY, pool TEXT NOT NULL, nonce TEXT NOT NULL) STRICT;
CREATE TABLE attachments (
    id INTEGER PRIMARY KEY,
    attachment TEXT NOT NULL UNIQUE,
    netns TEXT NOT NULL, mac TEXT NOT NULL, mtu INTEGER NOT NULL,
    pod_namespace TEXT, pod_name TEXT, pod_uid TEXT,
    leaving INTEGER NOT NULL DEFAULT 0
) STRICT;
-- An address is an attachment's, or the node's own (a gateway), or freed at a moment and resting.
CREATE TABLE addresses (
    address TEXT PRIMARY KEY,
    attachment INTEGER REFERENCES attachments (id),
    gateway INTEGER NOT NULL DEFAULT 0,
    freed_ms INTEGER,
    CHECK ((attachment IS NOT NULL) + gateway + (freed_ms IS NOT NULL) = 1)
) STRICT;
CREATE INDEX addresses_of_attachment ON addresses (attachment);
-- What was before we changed it, for the day when everything is put back.
CREATE TABLE sysctls (path TEXT PRIMARY KEY, previous TEXT NOT NULL) STRICT;
",
    ),
    LayoutStep::Adds(
        "
ALTER TABLE attachments ADD COLUMN kind TEXT NOT NULL DEFAULT 'pod';
ALTER TABLE attachments ADD COLUMN since_ms INTEGER NOT NULL DEFAULT 0;
",
    ),
    LayoutStep::Remakes(
        "
-- Whether the node was removed from its cluster.
ALTER TABLE identity ADD COLUMN removed INTEGER NOT NULL DEFAULT 0;
-- Whether the block is being given back.
ALTER TABLE blocks ADD COLUMN leaving INTEGER NOT NULL DEFAULT 0;
-- The gateways that the attachment was made with, where they are not the node's any more; separated by spaces.
ALTER TABLE attachments ADD COLUMN gateways TEXT NOT NULL DEFAULT '';
",
    ),
    LayoutStep::Adds(
        "
-- The host ports that lead to the pod, separated by spaces.
ALTER TABLE attachments ADD COLUMN ports TEXT NOT NULL DEFAULT '';
",
    ),
];

/// The open ledger.
#[derive(Debug)]
pub struct Sqlite {
    database: Connection,
}

impl Sqlite {
    /// Opens the ledger, or creates an empty one.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Ok(Self { database: open_database(path, LAYOUTS)? })
    }

    /// Runs `job` in one transaction: all its changes are made, or none.
    fn change<T>(
        &mut self,
        job: impl FnOnce(&Transaction<'_>) -> Result<T, rusqlite::Error>,
    ) -> Result<T, LedgerError> {
        let change = || {
            let transaction = self.database.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let result = job(&transaction)?;
            transaction.commit()?;
            Ok(result)
        };
        change().map_err(failed)
    }

    /// Executes one statement as a transaction.
    fn execute(&mut self, statement: &str, parameters: impl Params) -> Result<(), LedgerError> {
        execute(&self.database, statement, parameters).map(drop).map_err(failed)
    }

    fn rows<T>(
        &self,
        select: &str,
        read: impl FnMut(&Row<'_>) -> Result<T, rusqlite::Error>,
    ) -> Result<Vec<T>, LedgerError> {
        let rows = || self.database.prepare_cached(select)?.query_map([], read)?.collect::<Result<_, _>>();
        rows().map_err(failed)
    }
}

/// Executes a statement, which is compiled once per connection. Returns the number of changed rows.
fn execute(
    database: &Connection,
    statement: &str,
    parameters: impl Params,
) -> Result<usize, rusqlite::Error> {
    database.prepare_cached(statement)?.execute(parameters)
}

fn failed(error: rusqlite::Error) -> LedgerError {
    LedgerError::new(error)
}

impl Ledger for Sqlite {
    fn identity(&self) -> Result<Option<NodeIdentity>, LedgerError> {
        let found = self.rows("SELECT node, incarnation, cluster, removed FROM identity", |row| {
            let (Text(node), incarnation, cluster) =
                (row.get(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?);
            let member_state = if row.get(3)? { MemberState::Removed } else { MemberState::Member };
            Ok(NodeIdentity {
                node,
                incarnation: Incarnation::new(incarnation),
                cluster: ClusterId::new(cluster),
                member_state,
            })
        })?;
        Ok(found.into_iter().next())
    }

    fn identify(&mut self, identity: &NodeIdentity) -> Result<(), LedgerError> {
        self.execute(
            "INSERT OR REPLACE INTO identity (one, node, incarnation, cluster, removed) VALUES (1, ?1, ?2, ?3, ?4)",
            params![
                identity.node.as_str(),
                identity.incarnation.to_string(),
                identity.cluster.to_string(),
                identity.member_state == MemberState::Removed
            ],
        )
    }

    fn enter_boot(&mut self, id: &BootId) -> Result<Vec<AttachmentEntry>, LedgerError> {
        let known: Option<String> = self.rows("SELECT id FROM boot", |row| row.get(0))?.into_iter().next();
        if known.as_deref() == Some(id.to_string().as_str()) {
            return Ok(Vec::new());
        }
        let (void, blocks) = (self.attachments()?, self.blocks()?);
        self.change(|transaction| {
            execute(
                transaction,
                "INSERT OR REPLACE INTO boot (one, id) VALUES (1, ?1)",
                params![id.to_string()],
            )?;
            for held in &void {
                end(transaction, &held.attachment, &blocks, Moment::BOOT)?;
            }
            // The kernel has its initial values again, which may differ from the saved ones.
            execute(transaction, "DELETE FROM sysctls", [])?;
            execute(
                transaction,
                "UPDATE addresses SET freed_ms = ?1 WHERE freed_ms IS NOT NULL",
                params![millis(Moment::BOOT)],
            )?;
            Ok(())
        })?;
        Ok(void)
    }

    fn blocks(&self) -> Result<Vec<OwnedBlock>, LedgerError> {
        self.rows("SELECT block, pool, nonce, leaving FROM blocks ORDER BY rowid", |row| {
            let (Text(cidr), Text(pool)) = (row.get(0)?, row.get(1)?);
            Ok(OwnedBlock {
                block: Block::new(cidr),
                pool,
                nonce: Nonce::new(row.get::<_, String>(2)?),
                leaving: row.get(3)?,
            })
        })
    }

    fn add_block(&mut self, owned: &OwnedBlock) -> Result<(), LedgerError> {
        self.execute(
            "INSERT OR REPLACE INTO blocks (block, pool, nonce, leaving) VALUES (?1, ?2, ?3, ?4)",
            params![owned.block.to_string(), owned.pool.as_str(), owned.nonce.to_string(), owned.leaving],
        )
    }

    fn cool_down(&mut self, addresses: &[IpAddr], freed: Moment) -> Result<(), LedgerError> {
        self.change(|transaction| {
            for address in addresses {
                execute(
                    transaction,
                    "INSERT INTO addresses (address, freed_ms) VALUES (?1, ?2)
                     ON CONFLICT (address) DO UPDATE SET freed_ms = excluded.freed_ms WHERE freed_ms IS NOT NULL",
                    params![address.to_string(), millis(freed)],
                )?;
            }
            Ok(())
        })
    }

    fn mark_block_leaving(&mut self, block: Block) -> Result<(), LedgerError> {
        let update = "UPDATE blocks SET leaving = 1 WHERE block = ?1";
        self.execute(update, params![block.to_string()])
    }

    fn remove_block(&mut self, block: Block) -> Result<(), LedgerError> {
        self.change(|transaction| {
            let inside = |address: &IpAddr| block.cidr().has(*address);
            let addresses: Vec<IpAddr> = {
                let mut select = transaction.prepare_cached("SELECT address FROM addresses")?;
                let all = select.query_map([], |row| row.get(0).map(Text::value))?;
                all.collect::<Result<Vec<IpAddr>, _>>()?.into_iter().filter(inside).collect()
            };
            for address in addresses {
                end_rest(transaction, address)?;
                let left = "SELECT count(*) FROM addresses WHERE address = ?1";
                if transaction.query_one(left, params![address.to_string()], |row| row.get::<_, i64>(0))? > 0
                {
                    return Err(constraint(format!("{address} of block {block} is in use")));
                }
            }
            execute(transaction, "DELETE FROM blocks WHERE block = ?1", params![block.to_string()])?;
            Ok(())
        })
    }

    fn gateways(&self) -> Result<Vec<IpAddr>, LedgerError> {
        let mut gateways =
            self.rows("SELECT address FROM addresses WHERE gateway = 1", |row| row.get(0).map(Text::value))?;
        gateways.sort();
        Ok(gateways)
    }

    fn add_gateway(&mut self, address: IpAddr) -> Result<(), LedgerError> {
        self.change(|transaction| {
            end_rest(transaction, address)?;
            execute(
                transaction,
                "INSERT INTO addresses (address, gateway) VALUES (?1, 1)",
                params![address.to_string()],
            )?;
            Ok(())
        })
    }

    fn remove_gateway(&mut self, address: IpAddr, freed: Moment) -> Result<(), LedgerError> {
        self.change(|transaction| {
            execute(
                transaction,
                "UPDATE addresses SET gateway = 0, freed_ms = ?2 WHERE address = ?1 AND gateway = 1",
                params![address.to_string(), millis(freed)],
            )?;
            Ok(())
        })
    }

    fn replace_gateway(&mut self, old: IpAddr, new: IpAddr, freed: Moment) -> Result<(), LedgerError> {
        let gateways = space_separated(&self.gateways()?);
        self.change(|transaction| {
            execute(
                transaction,
                "UPDATE attachments SET gateways = ?1 WHERE gateways = ''",
                params![gateways],
            )?;
            execute(
                transaction,
                "UPDATE addresses SET gateway = 0, freed_ms = ?2 WHERE address = ?1 AND gateway = 1",
                params![old.to_string(), millis(freed)],
            )?;
            end_rest(transaction, new)?;
            execute(
                transaction,
                "INSERT INTO addresses (address, gateway) VALUES (?1, 1)",
                params![new.to_string()],
            )?;
            Ok(())
        })
    }

    fn resting(&self) -> Result<Vec<(IpAddr, Moment)>, LedgerError> {
        self.rows("SELECT address, freed_ms FROM addresses WHERE freed_ms IS NOT NULL", |row| {
            Ok((row.get(0).map(Text::value)?, moment(row.get(1)?)))
        })
    }

    fn attachments(&self) -> Result<Vec<AttachmentEntry>, LedgerError> {
        let mut addresses: Vec<(i64, IpAddr)> = self
            .rows("SELECT attachment, address FROM addresses WHERE attachment IS NOT NULL", |row| {
                Ok((row.get(0)?, row.get(1).map(Text::value)?))
            })?;
        addresses.sort();
        let select = "SELECT id, attachment, netns, mac, mtu, pod_namespace, pod_name, pod_uid, leaving,
                      kind, since_ms, gateways, ports FROM attachments";
        self.rows(select, |row| {
            let id: i64 = row.get(0)?;
            let (Text(attachment), Text(mac), Text(kind)) = (row.get(1)?, row.get(3)?, row.get(9)?);
            let first = addresses.partition_point(|(owner, _)| *owner < id);
            let own = addresses[first..].iter().take_while(|(owner, _)| *owner == id);
            let pod: (Option<String>, Option<String>) = (row.get(5)?, row.get(6)?);
            let uid = row.get(7)?;
            Ok(AttachmentEntry {
                attachment,
                kind,
                since: moment(row.get(10)?),
                addresses: own.map(|(_, address)| *address).collect(),
                mac,
                mtu: row.get(4)?,
                netns: row.get(2)?,
                pod: match pod {
                    (Some(namespace), Some(name)) => Some(Pod { namespace, name, uid }),
                    _ => None,
                },
                leaving: row.get(8)?,
                gateways: row.get(11).map(SpaceSeparated::values)?,
                ports: row.get(12).map(SpaceSeparated::values)?,
            })
        })
    }

    fn add_attachment(&mut self, held: &AttachmentEntry) -> Result<(), LedgerError> {
        let pod = held.pod.as_ref();
        self.change(|transaction| {
            execute(
                transaction,
                "INSERT INTO attachments
                 (attachment, netns, mac, mtu, pod_namespace, pod_name, pod_uid, kind, since_ms, gateways, ports)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
                params![
                    held.attachment.to_string(),
                    held.netns,
                    held.mac.to_string(),
                    held.mtu,
                    pod.map(|pod| &pod.namespace),
                    pod.map(|pod| &pod.name),
                    pod.and_then(|pod| pod.uid.as_ref()),
                    held.kind.as_str(),
                    millis(held.since),
                    space_separated(&held.gateways),
                    space_separated(&held.ports),
                ],
            )?;
            let id = transaction.last_insert_rowid();
            for address in &held.addresses {
                end_rest(transaction, *address)?;
                execute(
                    transaction,
                    "INSERT INTO addresses (address, attachment) VALUES (?1, ?2)",
                    params![address.to_string(), id],
                )?;
            }
            Ok(())
        })
    }

    fn mark_leaving(&mut self, attachment: &Attachment) -> Result<(), LedgerError> {
        self.execute(
            "UPDATE attachments SET leaving = 1 WHERE attachment = ?1",
            params![attachment.to_string()],
        )
    }

    fn remove_attachment(&mut self, attachment: &Attachment, freed: Moment) -> Result<(), LedgerError> {
        let blocks = self.blocks()?;
        self.change(|transaction| {
            end(transaction, attachment, &blocks, freed)?;
            Ok(())
        })
    }

    fn clear(&mut self) -> Result<(), LedgerError> {
        self.change(|transaction| {
            let left = "SELECT count(*) FROM attachments";
            if transaction.query_one(left, [], |row| row.get::<_, i64>(0))? > 0 {
                return Err(constraint("attachments exist".to_owned()));
            }
            transaction.execute_batch("DELETE FROM addresses; DELETE FROM blocks;")?;
            Ok(())
        })
    }

    fn keep_sysctl(&mut self, path: &str, previous: &str) -> Result<(), LedgerError> {
        self.execute(
            "INSERT OR IGNORE INTO sysctls (path, previous) VALUES (?1, ?2)",
            params![path, previous],
        )
    }

    fn sysctls(&self) -> Result<Vec<(String, String)>, LedgerError> {
        self.rows("SELECT path, previous FROM sysctls ORDER BY rowid DESC", |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
    }
}

/// Deletes an attachment. Its addresses in `blocks` are in cool-down from `freed`; its other addresses are deleted.
fn end(
    transaction: &Transaction<'_>,
    attachment: &Attachment,
    blocks: &[OwnedBlock],
    freed: Moment,
) -> Result<(), rusqlite::Error> {
    let of_attachment = "attachment = (SELECT id FROM attachments WHERE attachment = ?1)";
    let key = attachment.to_string();
    let mut select =
        transaction.prepare_cached(&format!("SELECT address FROM addresses WHERE {of_attachment}"))?;
    let addresses: Vec<IpAddr> =
        select.query_map(params![key], |row| row.get(0).map(Text::value))?.collect::<Result<_, _>>()?;
    for address in
        addresses.iter().filter(|address| !blocks.iter().any(|own| own.block.cidr().has(**address)))
    {
        execute(transaction, "DELETE FROM addresses WHERE address = ?1", params![address.to_string()])?;
    }
    execute(
        transaction,
        &format!("UPDATE addresses SET attachment = NULL, freed_ms = ?2 WHERE {of_attachment}"),
        params![key, millis(freed)],
    )?;
    execute(transaction, "DELETE FROM attachments WHERE attachment = ?1", params![key])?;
    Ok(())
}

/// Ends the cool-down of an address that is allocated again. Does not change an address in use.
fn end_rest(transaction: &Transaction<'_>, address: IpAddr) -> Result<(), rusqlite::Error> {
    let delete = "DELETE FROM addresses WHERE address = ?1 AND freed_ms IS NOT NULL";
    execute(transaction, delete, params![address.to_string()]).map(|_| ())
}

/// The error of SQLite for a violated constraint of the tables.
fn constraint(what: String) -> rusqlite::Error {
    let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CONSTRAINT);
    rusqlite::Error::SqliteFailure(code, Some(what))
}

#[cfg(test)]
mod agreement;
mod column;
#[cfg(test)]
mod tests;
