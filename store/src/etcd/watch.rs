//! Follows a range of etcd: first all entries, then every change, also after interruptions.
//!
//! The client's watch ends with its stream and does not report missed changes. So this module remembers the revision of
//! the last change and resumes the watch there, if necessary at another member. If that is impossible (the history was
//! compacted, or the datastore was replaced or restored to an earlier state), it reads all entries again.

use std::convert::Infallible;
use std::time::Duration;

use etcd_client::{EventType, WatchOptions, WatchResponse};
use polder_ipam::Revision;
use polder_ipam::cause::SharedError;
use polder_ipam::key::Range;
use polder_ipam::store::position::{Interruption, Position, VERIFY_EVERY, WatchEvent};
use polder_ipam::store::{Contents, KeyChange, StoreError, Update};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::{Etcd, entry};
use crate::reason::WatchEnded;

/// Time without a message after which a progress report is requested.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Time without a message after which the stream is closed.
const STALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Timeout of a read at a member whose stream was silent.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Shortest and longest pause between attempts. The pause doubles, so that a cluster of agents does not overload a
/// datastore that recovers.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// The receiver was dropped.
struct ReceiverGone;

/// Reason for the end of a stream.
enum WatchResult {
    Unwanted,
    Interrupted(Interruption),
}

impl From<ReceiverGone> for WatchResult {
    fn from(_: ReceiverGone) -> Self {
        Self::Unwanted
    }
}

impl From<Interruption> for WatchResult {
    fn from(interruption: Interruption) -> Self {
        Self::Interrupted(interruption)
    }
}

impl From<StoreError> for WatchResult {
    fn from(error: StoreError) -> Self {
        Interruption::from(error).into()
    }
}

impl From<WatchEnded> for WatchResult {
    fn from(reason: WatchEnded) -> Self {
        Interruption::Ended(SharedError::new(reason)).into()
    }
}

struct Watcher {
    etcd: Etcd,
    range: Range,
    updates: mpsc::Sender<Update>,
    position: Position,
}

/// Follows the range until the receiver is dropped.
pub(super) async fn follow(etcd: Etcd, range: Range, updates: mpsc::Sender<Update>) {
    let mut watcher = Watcher { etcd, range, updates, position: Position::default() };
    let mut pause = RETRY.0;
    loop {
        let started = Instant::now();
        let Err(WatchResult::Interrupted(interruption)) = watcher.run().await else { return };
        let lost = watcher.position.lose(interruption);
        if watcher.send(lost).await.is_err() {
            return;
        }
        // A stream that lasted longer than `STALL_TIMEOUT` resets the pause.
        pause = if started.elapsed() > STALL_TIMEOUT { RETRY.0 } else { (pause * 2).min(RETRY.1) };
        tokio::time::sleep(pause).await;
    }
}

impl Watcher {
    /// Reads all entries, or to resume only the last changed one; then follows one stream to its end.
    async fn run(&mut self) -> Result<Infallible, WatchResult> {
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
        let mut stream = match timeout_at(Instant::now() + STALL_TIMEOUT, opening).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.etcd.failed(&member, &error).into()),
            Err(_) => {
                self.etcd.leave(&member);
                return Err(WatchEnded::NotOpened { seconds: STALL_TIMEOUT.as_secs() }.into());
            }
        };
        let (mut last_event, mut verified) = (Instant::now(), Instant::now());
        loop {
            if verified.elapsed() > VERIFY_EVERY {
                self.verify().await?;
                verified = Instant::now();
            }
            let event = tokio::select! {
                // Cancel-safe: a message stays in the stream until it is read.
                event = timeout_at(Instant::now() + PROGRESS_EVERY, stream.message()) => event,
                _ = reconnections.changed() => return Err(WatchEnded::AddressRemoved.into()),
            };
            match event {
                Ok(Ok(Some(response))) => {
                    last_event = Instant::now();
                    if let Some(update) = self.position.receive(decode(&response))? {
                        self.send(update).await?;
                    }
                }
                Ok(Ok(None)) => {
                    self.etcd.leave(&member);
                    return Err(WatchEnded::Closed.into());
                }
                Ok(Err(error)) => return Err(self.etcd.failed(&member, &error).into()),
                Err(_) if last_event.elapsed() < STALL_TIMEOUT => {
                    // The answer shows only that the stream is alive: etcd before 3.4.25 may send it ahead of events
                    // that it seems to confirm.
                    let _ = stream.request_progress().await;
                }
                Err(_) => {
                    self.etcd.leave(&member);
                    let mut client = member.client.clone();
                    let read = client.get(self.range.start.as_str(), None);
                    let seconds = STALL_TIMEOUT.as_secs();
                    let reason = match timeout_at(Instant::now() + PROBE_TIMEOUT, read).await {
                        Ok(Ok(_)) => WatchEnded::Stalled { seconds },
                        _ => WatchEnded::Silent { seconds },
                    };
                    return Err(reason.into());
                }
            }
        }
    }

    /// Reads all entries again if changes were missed. The watch continues.
    async fn verify(&mut self) -> Result<(), WatchResult> {
        let keys = self.etcd.count(&self.range, self.position.known()).await?;
        if !self.position.has_missed(keys) {
            return Ok(());
        }
        warn!(keys, "the watch missed changes (the number of records differs): reading all records");
        let (_, loaded) = self.position.load(self.etcd.range(&self.range).await?);
        Ok(self.send(loaded).await?)
    }

    async fn send(&self, update: Update) -> Result<(), ReceiverGone> {
        self.updates.send(update).await.map_err(|_| ReceiverGone)
    }
}

fn decode(response: &WatchResponse) -> WatchEvent {
    let revision = super::revision(response.header());
    if response.compact_revision() != 0 {
        return WatchEvent::Compacted { revision: Revision::new(response.compact_revision()) };
    }
    if response.canceled() {
        return WatchEvent::Cancelled { reason: response.cancel_reason().to_owned() };
    }
    if response.created() {
        return WatchEvent::Opened { revision };
    }
    WatchEvent::Changes { revision, changes: response.events().iter().filter_map(change).collect() }
}

/// Converts an event to a change and its revision.
fn change(event: &etcd_client::Event) -> Option<(Revision, KeyChange)> {
    let pair = event.kv()?;
    let key = pair.key_str().ok()?.to_owned();
    let entry = match event.event_type() {
        EventType::Put => Some(entry(pair.clone())?),
        EventType::Delete => None,
    };
    Some((Revision::new(pair.mod_revision()), KeyChange { key, entry }))
}
