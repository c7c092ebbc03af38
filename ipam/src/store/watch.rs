//! Following a range of etcd: everything once, then every change, whatever happens on the way.
//!
//! The client's watch ends with its stream, and says nothing of what was missed. Here the revision of the last
//! change is remembered and the watch goes on behind it, at another member if need be. Where that cannot be done
//! (the history is compacted away, the store is another one or was set back in time) everything is read again.

use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::etcd::{Etcd, entry, explain};
use super::{Change, Contents, Entry, Range, StoreError, Update};

/// A silent stream is asked for a sign of life this often ...
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// ... and given up when it has said nothing for this long.
const SILENCE: Duration = Duration::from_secs(15);

/// Between attempts: at first at once, then slower, so that a whole cluster of agents does not hammer a store that
/// comes back.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// The receiver is gone: nobody wants to know any more.
struct Unwanted;

/// Why a stream ended.
enum Ended {
    Unwanted,
    /// Go on behind the last revision.
    Broken(String),
    /// Begin anew.
    Gap(String),
}

impl From<Unwanted> for Ended {
    fn from(_: Unwanted) -> Self {
        Self::Unwanted
    }
}

struct Follower {
    etcd: Etcd,
    range: Range,
    updates: mpsc::Sender<Update>,
    /// Revision up to which everything is known; `None` before the first load.
    known: Option<i64>,
    /// The entry that changed last, if that was no deletion. A store that has it has what was known.
    witness: Option<Entry>,
    /// Whether the last word was that nothing is heard.
    lost: bool,
}

/// Follows until nobody listens any more.
pub(super) async fn follow(etcd: Etcd, range: Range, updates: mpsc::Sender<Update>) {
    let mut follower = Follower { etcd, range, updates, known: None, witness: None, lost: false };
    let mut pause = RETRY.0;
    loop {
        let started = Instant::now();
        let reason = match follower.run().await {
            Ended::Unwanted => return,
            Ended::Broken(reason) => reason,
            Ended::Gap(reason) => {
                follower.known = None;
                reason
            }
        };
        if follower.lose(reason).await.is_err() {
            return;
        }
        // A stream that lived is a new beginning.
        pause = if started.elapsed() > SILENCE { RETRY.0 } else { (pause * 2).min(RETRY.1) };
        tokio::time::sleep(pause).await;
    }
}

impl Follower {
    /// Loads if need be, then follows one stream to its end.
    async fn run(&mut self) -> Ended {
        let known = match self.known {
            Some(revision) => match self.is_the_same_store().await {
                Ok(true) => revision,
                Ok(false) => return Ended::Gap("the store is not what it was".to_owned()),
                Err(error) => return Ended::Broken(error.to_string()),
            },
            None => match self.etcd.range(&self.range).await {
                Ok(contents) => match self.load(contents).await {
                    Ok(revision) => revision,
                    Err(Unwanted) => return Ended::Unwanted,
                },
                Err(error) => return Ended::Broken(error.to_string()),
            },
        };
        let (member, mut client) = self.etcd.member();
        let options = WatchOptions::new().with_range(self.range.end.as_str()).with_start_revision(known + 1);
        let start = self.range.start.clone();
        let opening = client.watch(start, Some(options));
        let mut stream = match timeout_at(Instant::now() + SILENCE, opening).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                self.etcd.leave(member);
                return Ended::Broken(explain(&error));
            }
            Err(_) => {
                self.etcd.leave(member);
                return Ended::Broken(format!("no watch within {} s", SILENCE.as_secs()));
            }
        };
        let mut heard = Instant::now();
        loop {
            match timeout_at(Instant::now() + PROGRESS_EVERY, stream.message()).await {
                Ok(Ok(Some(response))) => {
                    heard = Instant::now();
                    if let Err(ended) = self.take(response).await {
                        return ended;
                    }
                }
                Ok(Ok(None)) => {
                    self.etcd.leave(member);
                    return Ended::Broken("the watch was closed".to_owned());
                }
                Ok(Err(error)) => {
                    self.etcd.leave(member);
                    return Ended::Broken(explain(&error));
                }
                Err(_) if heard.elapsed() < SILENCE => {
                    // The answer counts as a sign of life and no more: etcd before 3.4.25 may send it ahead of events
                    // that it seems to confirm.
                    let _ = stream.request_progress().await;
                }
                Err(_) => {
                    self.etcd.leave(member);
                    return Ended::Broken(format!("silent for {} s", SILENCE.as_secs()));
                }
            }
        }
    }

    /// Whether the store still has what was known of it. A store that was emptied, or set back to an earlier state,
    /// may have gone on to any revision by now; one that has the last change as it was has all before it, too. A
    /// wrong no costs one load.
    async fn is_the_same_store(&self) -> Result<bool, StoreError> {
        let Some(witness) = &self.witness else { return Ok(false) };
        let found = self.etcd.range(&Range::single(witness.key.clone())).await?;
        Ok(found.entries.first() == Some(witness))
    }

    async fn load(&mut self, contents: Contents) -> Result<i64, Unwanted> {
        let revision = contents.revision;
        self.witness = contents.entries.iter().max_by_key(|entry| entry.revision).cloned();
        self.send(Update::Loaded(contents)).await?;
        self.known = Some(revision);
        self.lost = false;
        Ok(revision)
    }

    async fn take(&mut self, response: WatchResponse) -> Result<(), Ended> {
        let known = self.known.unwrap_or_default();
        let current = response.header().map_or(0, etcd_client::ResponseHeader::revision);
        if response.compact_revision() != 0 {
            return Err(Ended::Gap(format!("history before {} is gone", response.compact_revision())));
        }
        if response.canceled() {
            return Err(Ended::Broken(format!("the watch was cancelled: {}", response.cancel_reason())));
        }
        if current < known && !response.created() {
            // An event is never older than what is known: this is a late answer to a request for progress.
            return Ok(());
        }
        if current < known {
            return Err(Ended::Gap(format!("the store is at revision {current} and was at {known}")));
        }
        let changes: Vec<_> = response.events().iter().filter_map(change).collect();
        let update = match changes.iter().map(|(revision, _)| *revision).max() {
            Some(revision) => {
                self.known = Some(revision);
                let changes: Vec<Change> = changes.into_iter().map(|(_, change)| change).collect();
                self.witness = changes.last().and_then(|change| change.entry.clone());
                Update::Changed { revision, changes }
            }
            None if self.lost => Update::Back { revision: known },
            None => return Ok(()),
        };
        self.lost = false;
        Ok(self.send(update).await?)
    }

    async fn lose(&mut self, reason: String) -> Result<(), Unwanted> {
        self.lost = true;
        self.send(Update::Lost { reason }).await
    }

    async fn send(&self, update: Update) -> Result<(), Unwanted> {
        self.updates.send(update).await.map_err(|_| Unwanted)
    }
}

/// The change, with the revision that made it.
fn change(event: &etcd_client::Event) -> Option<(i64, Change)> {
    let pair = event.kv()?;
    let key = pair.key_str().ok()?.to_owned();
    let entry = match event.event_type() {
        EventType::Put => Some(entry(pair.clone())?),
        EventType::Delete => None,
    };
    Some((pair.mod_revision(), Change { key, entry }))
}
