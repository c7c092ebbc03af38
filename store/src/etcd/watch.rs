//! Following a range of etcd: everything once, then every change, whatever happens on the way.
//!
//! The client's watch ends with its stream, and says nothing of what was missed. Here the revision of the last
//! change is remembered and the watch goes on from there, at another member if need be. Where that cannot be done
//! (the history is compacted away, the store is another one or was set back in time) everything is read again.

use std::convert::Infallible;
use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse};
use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::position::{Heard, Interruption, Position, VERIFY_EVERY};
use polder_ipam::store::{Contents, KeyChange, StoreError, Update};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::{Etcd, NOT_THROUGH_PROXIES, entry};

/// A silent stream is asked for a sign of life this often ...
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// ... and given up when it has said nothing for this long.
const SILENCE: Duration = Duration::from_secs(15);

/// How long a member whose stream was silent has to show that it is there all the same.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);

/// Between attempts: at first at once, then slower, so that a whole cluster of agents does not hammer a store that
/// comes back.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// The receiver is gone: nobody wants to know any more.
struct Unwanted;

/// Why a stream ended.
enum Ended {
    Unwanted,
    Interrupted(Interruption),
}

impl From<Unwanted> for Ended {
    fn from(_: Unwanted) -> Self {
        Self::Unwanted
    }
}

impl From<Interruption> for Ended {
    fn from(interruption: Interruption) -> Self {
        Self::Interrupted(interruption)
    }
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        broken(error.to_string())
    }
}

fn broken(reason: String) -> Ended {
    Interruption::Broken(reason).into()
}

struct Follower {
    etcd: Etcd,
    range: Range,
    updates: mpsc::Sender<Update>,
    position: Position,
}

/// Follows until nobody listens any more.
pub(super) async fn follow(etcd: Etcd, range: Range, updates: mpsc::Sender<Update>) {
    let mut follower = Follower { etcd, range, updates, position: Position::default() };
    let mut pause = RETRY.0;
    loop {
        let started = Instant::now();
        let Err(Ended::Interrupted(interruption)) = follower.run().await else { return };
        let lost = follower.position.lose(interruption);
        if follower.send(lost).await.is_err() {
            return;
        }
        // A stream that lived is a new beginning.
        pause = if started.elapsed() > SILENCE { RETRY.0 } else { (pause * 2).min(RETRY.1) };
        tokio::time::sleep(pause).await;
    }
}

impl Follower {
    /// Loads if need be, then follows one stream to its end.
    async fn run(&mut self) -> Result<Infallible, Ended> {
        let there = match self.position.to_read(&self.range) {
            Some(range) => self.etcd.range(&range).await?,
            None => Contents::default(),
        };
        let (from, loaded) = self.position.begin(there)?;
        if let Some(loaded) = loaded {
            self.send(loaded).await?;
        }
        let mut reconnections = self.etcd.reconnections();
        let member = self.etcd.member().await?;
        let mut client = member.client.clone();
        let options =
            WatchOptions::new().with_range(self.range.end.as_str()).with_start_revision(from.number());
        let start = self.range.start.clone();
        let opening = client.watch(start, Some(options));
        let mut stream = match timeout_at(Instant::now() + SILENCE, opening).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.etcd.failed(&member, &error).into()),
            Err(_) => {
                self.etcd.leave(&member);
                return Err(broken(format!("watch not opened within {} s", SILENCE.as_secs())));
            }
        };
        let (mut heard, mut verified) = (Instant::now(), Instant::now());
        loop {
            if verified.elapsed() > VERIFY_EVERY {
                self.verify().await?;
                verified = Instant::now();
            }
            let said = tokio::select! {
                // Cancel-safe: a message stays in the stream until it is taken.
                said = timeout_at(Instant::now() + PROGRESS_EVERY, stream.message()) => said,
                _ = reconnections.changed() => return Err(broken("an address of this node was removed".to_owned())),
            };
            match said {
                Ok(Ok(Some(response))) => {
                    heard = Instant::now();
                    if let Some(update) = self.position.hear(hear(&response))? {
                        self.send(update).await?;
                    }
                }
                Ok(Ok(None)) => {
                    self.etcd.leave(&member);
                    return Err(broken("the watch was closed".to_owned()));
                }
                Ok(Err(error)) => return Err(self.etcd.failed(&member, &error).into()),
                Err(_) if heard.elapsed() < SILENCE => {
                    // The answer counts as a sign of life and no more: etcd before 3.4.25 may send it ahead of events
                    // that it seems to confirm.
                    let _ = stream.request_progress().await;
                }
                Err(_) => {
                    self.etcd.leave(&member);
                    let mut client = member.client.clone();
                    let read = client.get(self.range.start.as_str(), None);
                    let hint = match timeout_at(Instant::now() + PROBE_PATIENCE, read).await {
                        Ok(Ok(_)) => {
                            format!(
                                ", but reads are answered; if this is an etcd grpc-proxy: \
                                 {NOT_THROUGH_PROXIES}"
                            )
                        }
                        _ => String::new(),
                    };
                    return Err(broken(format!("no watch messages for {} s{hint}", SILENCE.as_secs())));
                }
            }
        }
    }

    /// Reads everything again where something was missed. The watch goes on.
    async fn verify(&mut self) -> Result<(), Ended> {
        let keys = self.etcd.count(&self.range, self.position.known()).await?;
        if !self.position.has_missed(keys) {
            return Ok(());
        }
        warn!(keys, "the watch missed changes (the number of records differs): reading all records");
        let (_, loaded) = self.position.load(self.etcd.range(&self.range).await?);
        Ok(self.send(loaded).await?)
    }

    async fn send(&self, update: Update) -> Result<(), Unwanted> {
        self.updates.send(update).await.map_err(|_| Unwanted)
    }
}

fn hear(response: &WatchResponse) -> Heard {
    let revision = super::revision(response.header());
    if response.compact_revision() != 0 {
        return Heard::Compacted { revision: Revision::new(response.compact_revision()) };
    }
    if response.canceled() {
        return Heard::Cancelled { reason: response.cancel_reason().to_owned() };
    }
    if response.created() {
        return Heard::Opened { revision };
    }
    Heard::Changes { revision, changes: response.events().iter().filter_map(change).collect() }
}

/// The change, with the revision that made it.
fn change(event: &etcd_client::Event) -> Option<(Revision, KeyChange)> {
    let pair = event.kv()?;
    let key = pair.key_str().ok()?.to_owned();
    let entry = match event.event_type() {
        EventType::Put => Some(entry(pair.clone())?),
        EventType::Delete => None,
    };
    Some((Revision::new(pair.mod_revision()), KeyChange { key, entry }))
}
