//! Tells the store who has which address: for people and tools, behind the ADD, never for safety.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use polder_ipam::key::Key;
use polder_ipam::record::{AddressRecord, Alive, Life, encode};
use polder_ipam::store::{Compare, LARGEST_TXN, Outcome, StoreError, Txn, Write};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;

use crate::agent::Agent;
use crate::board::Holdings;
use crate::machine::Machine;
use polder_ipam::view::{Source, View};

/// What happens within this time goes together.
const BATCH: Duration = Duration::from_millis(100);

/// Before another attempt.
const RETRY: Duration = Duration::from_secs(5);

/// A node whose agent has not been heard for this long is not alive. Nothing is ever freed for that.
pub const ALIVE_SECONDS: i64 = 10;

/// Runs for ever. Keeps the lease of a living node, too. Begins anew whenever the node's own record was written, or
/// the store has lost records: these may be among them, or be there again.
pub async fn run(agent: Arc<Agent>) {
    let mut records =
        Records { view: agent.board.view.subscribe(), holdings: agent.board.holdings.subscribe() };
    loop {
        let (revision, losses) = records.wait_for(&agent, |revision, _| revision != 0).await;
        let alive = Key::Alive(agent.config.node.clone());
        let Machine { machine_id, boot_id } = agent.machine.clone();
        let sign = encode(&Alive { boot_id, machine_id });
        let hold = agent.store.hold(&alive, sign, ALIVE_SECONDS, unchanged(&agent, revision));
        let work = async { tokio::join!(hold, publish(&agent, revision)) };
        tokio::select! {
            _ = work => {}
            // Cancel-safe: what was begun is read back by the next round.
            _ = records.wait_for(&agent, |now, lost| now != revision || lost != losses) => {}
        }
    }
}

/// What the node's own record and whose it is are read from: either may be known before the other.
struct Records {
    view: watch::Receiver<Arc<View>>,
    holdings: watch::Receiver<Arc<Holdings>>,
}

impl Records {
    /// Waits until the revision of the node's own record, and how often the store has lost records, are such.
    async fn wait_for(&mut self, agent: &Agent, are: impl Fn(i64, u64) -> bool) -> (i64, u64) {
        loop {
            let view = Arc::clone(&self.view.borrow_and_update());
            self.holdings.mark_unchanged();
            let now = (own_revision(agent, &view), view.losses);
            if are(now.0, now.1) {
                return now;
            }
            // The agent, which has their senders, outlives this.
            tokio::select! {
                _ = self.view.changed() => {}
                _ = self.holdings.changed() => {}
            }
        }
    }
}

/// The revision of the node's own record in the store; 0 if it is not there, or not this node's. One of another boot
/// or machine is not: a clone has the ledger of its original, and must not seem to be the one that lives before it has
/// asked; and an original in whose place another machine came is not the node any more.
pub(crate) fn own_revision(agent: &Agent, view: &View) -> i64 {
    let identity = agent.board.holdings().identity.clone();
    let own = view
        .nodes
        .get(&agent.config.node)
        .filter(|own| identity.is_some_and(|identity| identity.incarnation == own.record.incarnation))
        .filter(|own| Life::from(&*own.record) == agent.machine.life());
    own.filter(|_| view.source == Source::Store).map_or(0, |own| own.revision)
}

/// Publishes as the node whose record was written at that revision.
async fn publish(agent: &Agent, revision: i64) {
    // What the store has; `None` before it was read, and after a doubt.
    let mut published: Option<BTreeMap<String, Vec<u8>>> = None;
    loop {
        match synchronize(agent, revision, published.take()).await {
            Ok(now) => {
                published = Some(now);
                agent.attachments_changed.notified().await;
                sleep(BATCH).await;
            }
            Err(error) => {
                debug!(%error, "addresses are not published");
                sleep(RETRY).await;
            }
        }
    }
}

/// A node that was removed or replaced meanwhile must not write any more.
fn unchanged(agent: &Agent, revision: i64) -> Compare {
    Compare::Unchanged { key: Key::Node(agent.config.node.clone()).to_string(), revision }
}

/// Why the store does not say what the ledger says.
#[derive(Debug, thiserror::Error)]
enum NotPublished {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the node's record has changed")]
    Replaced,
}

/// Makes the store say what the ledger says. Returns what it says now.
async fn synchronize(
    agent: &Agent,
    revision: i64,
    published: Option<BTreeMap<String, Vec<u8>>>,
) -> Result<BTreeMap<String, Vec<u8>>, NotPublished> {
    let node = &agent.config.node;
    let published = match published {
        Some(published) => published,
        None => {
            let contents = agent.store.range(&Key::addresses_of(node)).await?;
            contents.entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
        }
    };
    let wanted = wanted(agent).await;
    let puts = wanted.iter().filter(|(key, value)| published.get(*key) != Some(value));
    let puts = puts.map(|(key, value)| Write::Put { key: key.clone(), value: value.clone() });
    let deletes = published.keys().filter(|key| !wanted.contains_key(*key));
    let deletes = deletes.map(|key| Write::Delete { key: key.clone() });
    let writes: Vec<Write> = deletes.chain(puts).collect();
    for chunk in writes.chunks(LARGEST_TXN) {
        let txn = Txn { compares: vec![unchanged(agent, revision)], writes: chunk.to_vec() };
        if agent.store.commit(&txn).await? == Outcome::Refused {
            return Err(NotPublished::Replaced);
        }
    }
    Ok(wanted)
}

async fn wanted(agent: &Agent) -> BTreeMap<String, Vec<u8>> {
    let attachments = agent.ipam.run(|ipam| ipam.attachments().cloned().collect::<Vec<_>>()).await;
    let mut records = BTreeMap::new();
    for held in attachments {
        let value = encode(&AddressRecord { attachment: held.attachment, pod: held.pod });
        for address in held.addresses {
            let key = Key::Address(agent.config.node.clone(), address);
            records.insert(key.to_string(), value.clone());
        }
    }
    records
}
