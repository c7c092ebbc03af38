//! Watches the cluster's records, and saves a snapshot for an agent that starts while the datastore is unreachable.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use polder_ipam::Revision;
use polder_ipam::key::Key;
use polder_ipam::prefix;
use polder_ipam::store::{Contents, Entry, Update};
use polder_ipam::view::View;
use polder_store::Store;
use serde::{Deserialize, Serialize, Serializer};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{info, warn};

use crate::node_state::Chosen;

/// The file in `state_dir` with the snapshot of the records.
pub const SNAPSHOT: &str = "cluster.json";

/// Temporary file of the snapshot until it is complete.
pub const SNAPSHOT_BEFORE: &str = "cluster.new";

/// Time that a starting agent waits for the datastore before it uses the snapshot.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

/// Changes are published together if they arrive within this time, multiplied by the number of nodes and blocks that
/// are known: for each publication, the view is copied and all tasks that follow it wake up. 10,000 records: 20 ms.
const BATCH_PER_RECORD: Duration = Duration::from_micros(2);

/// Pause between a change and the snapshot, so that a burst is written once.
const WRITE_DELAY: Duration = Duration::from_secs(2);

/// The inputs of the watcher, and the value that it publishes.
#[derive(Debug)]
pub struct Task {
    /// The datastore with the cluster's records.
    pub store: Store,
    /// The folder for the snapshot.
    pub state_dir: PathBuf,
    /// The node's underlay addresses and the ranges that it needs, for the validation of records.
    pub underlay: watch::Receiver<Chosen>,
    /// The cluster's records.
    pub view: watch::Sender<Arc<View>>,
}

impl Task {
    /// Follows for ever.
    pub async fn run(mut self) {
        let file = self.state_dir.join(SNAPSHOT);
        let mut updates = self.store.follow(Key::followed());
        // The snapshot of an earlier agent, until newer records are loaded.
        let mut earlier = Some(read(&file));
        let fall_back = Instant::now() + STORE_TIMEOUT;
        let mut write_at: Option<Instant> = None;
        loop {
            tokio::select! {
                // Cancel-safe: a message stays in the channel until it is received.
                update = updates.recv() => {
                    let Some(first) = update else { return };
                    let batch = self.batch(first, &mut updates).await;
                    for update in &batch {
                        match update {
                            Update::Loaded(contents) => {
                                info!(revision = contents.revision.number(), "records loaded");
                                if let Some(Ok(earlier)) = earlier.take() {
                                    self.take(earlier);
                                }
                            }
                            Update::Lost { reason } if self.view.borrow().lost.is_none() => {
                                warn!(reason = reason.to_string(), "datastore unreachable");
                            }
                            Update::Back { .. } => info!("datastore reachable again"),
                            _ => {}
                        }
                        if matches!(update, Update::Loaded(_) | Update::Changed { .. }) {
                            write_at.get_or_insert(Instant::now() + WRITE_DELAY);
                        }
                    }
                    self.view.send_modify(|view| {
                        let view = Arc::make_mut(view);
                        batch.into_iter().for_each(|update| view.apply(update));
                    });
                }
                _ = self.underlay.changed() => {
                    let underlay = self.underlay.borrow().clone();
                    let own = underlay.as_ref().map(|underlay| underlay.addresses()).unwrap_or_default();
                    let before = self.view.borrow().own_addresses.clone();
                    if before.iter().any(|address| !own.contains(address))
                        && let Err(error) = self.store.reconnect().await
                    {
                        warn!(%error, "cannot reconnect to the datastore");
                    }
                    let needed = underlay.map(|underlay| underlay.needed.clone()).unwrap_or_default();
                    self.view.send_if_modified(|view| {
                        let changed = view.own_addresses != own || view.needed != needed;
                        if changed {
                            Arc::make_mut(view).set_addresses_in_use(own, needed);
                        }
                        changed
                    });
                }
                () = sleep_until(fall_back), if earlier.is_some() => match earlier.take() {
                    Some(Ok(earlier)) => {
                        info!(revision = earlier.revision.number(), "datastore unreachable: using the saved snapshot");
                        self.take(earlier);
                    }
                    Some(Err(reason)) => info!(%reason, "no usable snapshot: waiting for the datastore"),
                    None => {}
                },
                () = sleep_until(write_at.unwrap_or(fall_back)), if write_at.is_some() => {
                    write_at = None;
                    let view = Arc::clone(&self.view.borrow());
                    if let Err(error) = write(&file, &view) {
                        warn!(file = %file.display(), %error, "cannot save the snapshot of the records");
                    }
                }
            }
        }
    }

    /// The first update with those that follow it soon, up to one that is not a change of records. Short in a small
    /// cluster.
    async fn batch(&self, first: Update, updates: &mut mpsc::Receiver<Update>) -> Vec<Update> {
        let records = {
            let view = self.view.borrow();
            u32::try_from(view.nodes.len() + view.blocks.len()).unwrap_or(u32::MAX)
        };
        let until = Instant::now() + BATCH_PER_RECORD * records;
        let mut batch = vec![first];
        while let Some(Update::Changed { .. }) = batch.last() {
            // Cancel-safe. The caller receives the end of the channel again.
            let Ok(Some(update)) = timeout_at(until, updates.recv()).await else { break };
            batch.push(update);
        }
        batch
    }

    /// Publishes the snapshot of an earlier agent.
    fn take(&self, earlier: Contents) {
        self.view.send_modify(|view| {
            let mut earlier = View::from_snapshot(earlier);
            earlier.lost.clone_from(&view.lost);
            earlier.set_addresses_in_use(view.own_addresses.clone(), view.needed.clone());
            *view = Arc::new(earlier);
        });
    }
}

/// A saved snapshot. Its records are validated again when it is used.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    revision: Revision,
    entries: BTreeMap<String, (Revision, String)>,
}

/// The snapshot of a view, encoded record by record while it is written. A copy of all records in memory would need a
/// tenth of the memory of a large cluster.
#[derive(Serialize)]
struct SnapshotOf<'a> {
    revision: Revision,
    #[serde(serialize_with = "serialize_entries")]
    entries: &'a View,
}

fn serialize_entries<S: Serializer>(view: &View, to: S) -> Result<S::Ok, S::Error> {
    let text =
        |entry: Entry| (entry.key, (entry.revision, String::from_utf8_lossy(&entry.value).into_owned()));
    to.collect_map(view.entries().map(text))
}

fn write(path: &Path, view: &View) -> io::Result<()> {
    let temporary = path.with_file_name(SNAPSHOT_BEFORE);
    let mut file = BufWriter::new(fs::File::create(&temporary)?);
    serde_json::to_writer(&mut file, &SnapshotOf { revision: view.revision, entries: view })?;
    file.into_inner()?.sync_data()?;
    fs::rename(&temporary, path)
}

/// The snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
enum NoSnapshot {
    /// The saved snapshot does not exist, as on a new node, or cannot be read.
    ///
    /// Remedy: none, the agent waits for the datastore and then saves a snapshot. Check the path if the file exists.
    #[error("{}: {error}", file.display())]
    Unread {
        /// The file.
        file: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// The saved snapshot is damaged, or from a release with another format.
    ///
    /// Remedy: none, the agent waits for the datastore and then replaces the snapshot.
    #[error("{}: {error}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The error.
        error: serde_json::Error,
    },
    /// The saved snapshot has keys with another prefix: `etcd.prefix` was changed, or the state directory belongs to
    /// another cluster.
    ///
    /// Remedy: correct `etcd.prefix` or `state_dir`. If both are correct: none, the agent replaces the snapshot.
    #[error("{}: {key} belongs to another cluster: this cluster's etcd.prefix is {prefix}", file.display())]
    OtherCluster {
        /// The file.
        file: PathBuf,
        /// The first key with another prefix.
        key: String,
        /// The configured prefix.
        prefix: &'static str,
    },
}

fn read(path: &Path) -> Result<Contents, NoSnapshot> {
    let file = || path.to_owned();
    let text = fs::read(path).map_err(|error| NoSnapshot::Unread { file: file(), error })?;
    let records: Snapshot =
        serde_json::from_slice(&text).map_err(|error| NoSnapshot::Unreadable { file: file(), error })?;
    if let Some(key) = records.entries.keys().find(|key| !key.starts_with(prefix::in_use())) {
        let (key, prefix) = (key.clone(), prefix::in_use());
        return Err(NoSnapshot::OtherCluster { file: file(), key, prefix });
    }
    let entry =
        |(key, (revision, value)): (String, (Revision, String))| Entry { key, revision, value: value.into() };
    Ok(Contents { revision: records.revision, entries: records.entries.into_iter().map(entry).collect() })
}

#[cfg(test)]
mod tests {
    use polder_api::PerFamily;
    use polder_ipam::store::KeyChange;
    use polder_ipam::view::ViewSource;
    use polder_netlink::IfIndex;
    use polder_store::Embedded;
    use tokio::time::timeout;

    use super::*;
    use crate::underlay::{NotChosen, Underlay, Uplink};

    /// A record of each kind that agents watch, in the order of a snapshot.
    const RECORDS: [(&str, &str); 8] = [
        ("/polder/v1/blocks/4-0a000000-26", r#"{"node":"n","incarnation":"i","pool":"p","nonce":"x"}"#),
        (
            "/polder/v1/cluster",
            r#"{"id":"c","backend":"auto","attach":"bridge","vxlan":{"vni":1,"port":8472},"masquerade":{"enabled":true,"except":[]}}"#,
        ),
        ("/polder/v1/fences/m/j", r#"{"node":"m","machine_id":"m","boot_id":"b","pods":"unknown"}"#),
        ("/polder/v1/inspection", r#"{"id":"x","repairs":"safe"}"#),
        ("/polder/v1/leader", r#"{"node":"n","boot_id":"b"}"#),
        (
            "/polder/v1/nodes/n",
            r#"{"incarnation":"i","machine_id":"m","boot_id":"b","underlay":["10.1.0.1"],"gateways":["10.0.0.1"],"vtep_mac":"02:00:00:00:00:01","mtu":1450,"version":"0.1.0"}"#,
        ),
        ("/polder/v1/pools/p", r#"{"cidr":"10.0.0.0/16","block_length":26,"state":"active"}"#),
        ("/polder/v1/reservations/10.1.0.5", r#"{"owner":"default/db-0","generation":3}"#),
    ];

    fn entry(key: &str, value: &str, revision: i64) -> Entry {
        Entry { key: key.to_owned(), value: value.into(), revision: Revision::new(revision) }
    }

    #[test]
    fn a_snapshot_contains_the_records_in_force() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cluster.json");
        let entries: Vec<Entry> =
            RECORDS.iter().zip(1..).map(|((key, value), revision)| entry(key, value, revision)).collect();
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision: Revision::new(9), entries: entries.clone() }));
        let unreadable = [entry("/polder/v1/nodes/n", "{}", 10), entry("/polder/v1/nodes/o", "{}", 10)];
        let changes = unreadable.map(|entry| KeyChange { key: entry.key.clone(), entry: Some(entry) }).into();
        view.apply(Update::Changed { revision: Revision::new(10), changes });
        write(&file, &view).unwrap();
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(read(&file).unwrap(), Contents { revision: Revision::new(10), entries }, "{text}");
    }

    #[test]
    fn a_snapshot_of_another_cluster_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cluster.json");
        fs::write(&file, r#"{"revision":5,"entries":{"/other/cluster":[3,"{}"]}}"#).unwrap();
        let said = read(&file).unwrap_err().to_string();
        assert!(said.contains("/other/cluster") && said.contains("etcd.prefix is /polder/v1/"), "{said}");
    }

    #[test]
    fn a_truncated_snapshot_is_refused_with_its_file_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cluster.json");
        fs::write(&file, "{\"revision\":5").unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("cluster.json"));
    }

    #[tokio::test(start_paused = true)]
    async fn changes_of_many_records_are_published_together_until_the_datastore_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::Embedded(Embedded::open(&folder.path().join("store")).unwrap());
        let (view, _receiver) = watch::channel(Arc::<View>::default());
        let underlay = watch::channel(Err(NotChosen::NotYet)).1;
        let task = Task { store, state_dir: folder.path().to_owned(), underlay, view };
        let (sender, mut updates) = mpsc::channel(9);
        let changed = |number| Update::Changed { revision: Revision::new(number), changes: Vec::new() };
        for update in [changed(2), Update::Back { revision: Revision::new(2) }, changed(3)] {
            sender.send(update).await.unwrap();
        }
        let batch = task.batch(changed(1), &mut updates).await;
        assert!(matches!(batch[..], [Update::Changed { .. }, Update::Changed { .. }, Update::Back { .. }]));
        let begin = Instant::now();
        assert_eq!(task.batch(changed(3), &mut updates).await.len(), 2);
        assert!(begin.elapsed() <= Duration::from_millis(1), "a small cluster waits for nothing");
    }

    #[tokio::test]
    async fn the_view_has_the_records_of_the_datastore_and_the_nodes_own_addresses() {
        let max_wait = Duration::from_secs(30);
        let folder = tempfile::tempdir().unwrap();
        let store = Store::Embedded(Embedded::open(&folder.path().join("store")).unwrap());
        let (engine, underlay) = watch::channel(Err(NotChosen::NotYet));
        let (view, mut receiver) = watch::channel(Arc::<View>::default());
        let task = Task { store, state_dir: folder.path().to_owned(), underlay, view };
        let running = tokio::spawn(task.run());
        drop(
            timeout(max_wait, receiver.wait_for(|view| view.source == ViewSource::Store))
                .await
                .unwrap()
                .unwrap(),
        );
        let uplink = Uplink {
            address: "10.0.0.1".parse().unwrap(),
            index: IfIndex::new(2),
            interface: "eth0".to_owned(),
            mtu: 1500,
            chosen_by: String::new(),
        };
        let own = vec![uplink.address];
        let chosen = Underlay { uplinks: PerFamily::new(Some(uplink), None), ..Underlay::default() };
        drop(engine.send_replace(Ok(Arc::new(chosen))));
        drop(timeout(max_wait, receiver.wait_for(|view| view.own_addresses == own)).await.unwrap().unwrap());
        running.abort();
    }
}
