//! Compares the model of etcd that the simulations use with a real etcd: both must give the same answer to every
//! request.
//!
//! The operations are random. A failure prints the seed; set `POLDER_SEED` to repeat the same operations.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod etcd_model {
    pub(crate) mod chance;
    pub(crate) mod real;
}

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use etcd_model::chance::{Chance, Step};
use etcd_model::real::{Real, Stream};
use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::{Contents, Outcome};
use polder_simulation::Model;
use polder_simulation::etcd::{Deletions, KeyValue, LeaseId, Operation, Watch, WatchMessage};
use polder_tests::Node;
use polder_tests::etcd::Etcd;

/// Number of operations that are compared.
const STEPS: usize = 3000;

/// Maximum number of open watches.
const WATCHES: usize = 20;

/// Number of last steps that a failure prints.
const SHOWN: usize = 40;

/// Duration of a lease in seconds: longer than the test.
const LEASE: u32 = 3600;

/// The answer to a step.
#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Outcome(Outcome),
    Keys(Vec<KeyValue>),
    /// Granted duration in seconds, and the keys; `None` if the lease does not exist.
    Lease(Option<(u64, Vec<String>)>),
    Kept(Option<u64>),
    Done,
}

/// A real etcd and the model, with the same contents.
struct Pair {
    real: Real,
    model: Model,
    watches: VecDeque<(Watch, Stream, Range)>,
    events: usize,
}

#[test]
fn the_model_gives_the_same_replies_as_a_real_etcd() {
    let seed = match std::env::var("POLDER_SEED") {
        Ok(seed) => seed.parse().expect("POLDER_SEED is a number"),
        Err(_) => SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into(),
    };
    in_a_new_etcd(async |mut pair| {
        let (started, mut chance, mut done) = (Instant::now(), Chance::new(seed), Vec::new());
        for _ in 0..STEPS {
            done.push(chance.step(&pair.model));
            let step = done.last().unwrap();
            if let Err(difference) = pair.carry_out_when_even(step).await {
                let last: Vec<_> = done.iter().skip(done.len().saturating_sub(SHOWN)).collect();
                panic!("{difference}\nthe last of {} steps, POLDER_SEED={seed}:\n{last:#?}", done.len());
            }
        }
        // A surplus event is detected with the next event.
        pair.write_to_every_watch().await.unwrap();
        println!("{STEPS} steps and {} events of watches in {:?}", pair.events, started.elapsed());
    });
}

/// Runs `job` with a new, empty etcd and a model.
fn in_a_new_etcd(job: impl AsyncFnOnce(Pair) + Send) {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = tempfile::Builder::new().prefix("polder-lab-").tempdir_in(parent).unwrap();
    let node = Node::boot("etcd", folder.path());
    let etcd = Etcd::start(vec![(node, Ipv4Addr::LOCALHOST.into())], None);
    let endpoint = etcd.endpoints().remove(0);
    etcd.nodes().next().unwrap().within(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut real = Real::connect(&endpoint).await;
            let model = Model::with(real.deletions().await);
            job(Pair { real, model, watches: VecDeque::new(), events: 0 }).await;
        });
    });
}

impl Pair {
    /// Applies a step to both when the progress of etcd's watches does not affect the result.
    ///
    /// etcd reads the past events of a watch ten times a second (`syncWatchersLoop`,
    /// `server/storage/mvcc/watchable_store.go`). An earlier compaction ends the watch, even if no event was due; the
    /// model has already read the past events.
    async fn carry_out_when_even(&mut self, step: &Step) -> Result<(), String> {
        if matches!(step, Step::Compact(_)) {
            self.write_to_every_watch().await?;
        }
        self.carry_out(step).await
    }

    /// Writes a key of each watch. A watch that reports this event has read its past events.
    async fn write_to_every_watch(&mut self) -> Result<(), String> {
        let keys: Vec<_> = self.watches.iter().map(|(_, _, range)| range.start.clone()).collect();
        for key in keys {
            let put = Operation::Put { key, value: Vec::new(), lease: None };
            self.carry_out(&Step::Transact(Vec::new(), vec![put])).await?;
        }
        Ok(())
    }

    /// Applies a step to both, and compares the results.
    async fn carry_out(&mut self, step: &Step) -> Result<(), String> {
        if let Step::Watch(asked) = step {
            for (range, from) in asked {
                self.watch(range, *from).await?;
            }
        } else {
            let (real, model) = (self.real.carry_out(step).await, carry_out(&mut self.model, step));
            same(&format!("{step:?}"), real, model)?;
        }
        let everything = Range { start: "\u{1}".to_owned(), end: "~".to_owned() };
        let (revision, keys) = self.real.range_at(&everything, 0).await?;
        same("the revision", revision, self.model.revision().number())?;
        let entries = keys.iter().map(KeyValue::entry).collect();
        same(
            "what Polder reads",
            Contents { revision: Revision::new(revision), entries },
            self.model.range(&everything),
        )?;
        same("what is there", keys, self.model.range_at(&everything, Revision::ABSENT).unwrap())?;
        self.listen().await
    }

    async fn watch(&mut self, range: &Range, from: i64) -> Result<(), String> {
        let mut watch = self.model.watch(range.clone(), Revision::new(from));
        let mut stream = self.real.watch(range, from).await?;
        same("the opening of a watch", stream.receive(0).await?, watch.send(&self.model).unwrap())?;
        self.watches.push_back((watch, stream, range.clone()));
        if self.watches.len() > WATCHES {
            self.watches.pop_front();
        }
        Ok(())
    }

    /// Compares the messages of all watches that are due now.
    async fn listen(&mut self) -> Result<(), String> {
        let mut open = VecDeque::new();
        for (mut watch, mut stream, range) in self.watches.drain(..) {
            let message = watch.send(&self.model);
            if let Some(message) = &message {
                let expected =
                    if let WatchMessage::Events { events, .. } = message { events.len() } else { 0 };
                let what = || format!("a watch of {range:?}");
                let received = stream
                    .receive(expected)
                    .await
                    .map_err(|error| format!("{}: {error}: {message:?}", what()))?;
                same(&what(), received, message.clone())?;
                self.events += expected;
            }
            if !message.is_some_and(|message| message.is_last()) {
                open.push_back((watch, stream, range));
            }
        }
        self.watches = open;
        Ok(())
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, real: T, model: T) -> Result<(), String> {
    if real == model {
        Ok(())
    } else {
        Err(format!("{what}:\netcd says {real:#?}\nthe model says {model:#?}"))
    }
}

/// Applies a step to the model.
fn carry_out(model: &mut Model, step: &Step) -> Result<Answer, String> {
    let answer = match step {
        Step::Commit(txn) => model.commit(txn).map(Answer::Outcome),
        Step::Transact(when, then) => model.transact(when, then).map(Answer::Outcome),
        Step::Read(range, revision) => model.range_at(range, Revision::new(*revision)).map(Answer::Keys),
        Step::Compact(revision) => model.compact(Revision::new(*revision)).map(|()| Answer::Done),
        Step::Grant(id) => model.grant(*id, LEASE.into()).map(|()| Answer::Done),
        Step::Revoke(id) => model.revoke(*id).map(|()| Answer::Done),
        Step::KeepAlive(id) => Ok(Answer::Kept(model.keep_alive(*id))),
        Step::Lease(id) => Ok(lease(model, *id)),
        Step::Watch(_) => Ok(Answer::Done),
    };
    answer.map_err(|error| error.to_string())
}

fn lease(model: &Model, id: LeaseId) -> Answer {
    let lease = model.lease(id);
    Answer::Lease(lease.map(|lease| (lease.seconds, lease.keys.iter().cloned().collect())))
}

#[test]
fn a_deletion_at_a_compacted_revision_is_reported_depending_on_the_etcd_version() {
    in_a_new_etcd(async |mut pair| {
        let put = |key: &str| Operation::Put { key: key.to_owned(), value: Vec::new(), lease: None };
        let all = Range { start: "a".to_owned(), end: "z".to_owned() };
        for step in [
            Step::Transact(vec![], vec![put("a"), put("b")]),
            Step::Transact(vec![], vec![Operation::Delete(Range::single("a".to_owned())), put("c")]),
            Step::Compact(3),
            Step::Watch(vec![(all, 3)]),
            Step::Transact(vec![], vec![put("d")]),
        ] {
            pair.carry_out(&step).await.unwrap();
        }
        // The events of c and d, and of a if etcd still reports its deletion.
        let forgotten = pair.real.deletions().await == Deletions::Forgotten;
        assert_eq!(pair.events, if forgotten { 2 } else { 3 });
    });
}

/// Longest time until a lease of two seconds expires.
const END_OF_A_LEASE: Duration = Duration::from_secs(15);

#[test]
fn an_expired_lease_deletes_its_keys_at_one_revision() {
    in_a_new_etcd(async |mut pair| {
        pair.real.grant(7, 2).await.unwrap();
        pair.model.grant(7, 2).unwrap();
        let leased = |key: &str| Operation::Put { key: key.to_owned(), value: Vec::new(), lease: Some(7) };
        let all = Range { start: "a".to_owned(), end: "z".to_owned() };
        pair.carry_out(&Step::Watch(vec![(all, 0)])).await.unwrap();
        pair.carry_out(&Step::Transact(vec![], vec![leased("b"), leased("a")])).await.unwrap();
        assert_eq!(pair.model.advance(2), [7]);
        // The watch waits until the lease has expired.
        tokio::time::timeout(END_OF_A_LEASE, pair.listen()).await.unwrap().unwrap();
        pair.carry_out(&Step::Lease(7)).await.unwrap();
    });
}
