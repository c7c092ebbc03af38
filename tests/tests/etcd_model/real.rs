//! A client of a real etcd, with the types of the model.

use std::time::Duration;

use etcd_client::{
    Client, CompactionOptions, Compare, CompareOp, DeleteOptions, Error, EventType, GetOptions,
    LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, TxnOp, WatchOptions, WatchStream,
};
use polder_ipam::Revision;
use polder_ipam::key::Range;
use polder_ipam::store::{Outcome, StoreError};
use polder_simulation::etcd::{
    Condition, Deletions, Event, KeyValue, LeaseId, Operation, Operator, Property, WatchMessage,
};
use polder_store::Store;
use polder_store::etcd::Etcd;
use polder_store::etcd::config::EtcdConfig;

use super::super::{Answer, LEASE};
use super::chance::Step;

/// Timeout of a step and of a watch message: longer than any operation of etcd takes.
const TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) struct Real {
    client: Client,
    /// Polder's own client of the same etcd.
    store: Store,
}

/// An open watch of the real etcd.
pub(crate) struct Stream(WatchStream);

impl Real {
    pub(crate) async fn connect(endpoint: &str) -> Self {
        let client = Client::connect([endpoint], None).await.unwrap();
        let config = EtcdConfig { endpoints: vec![endpoint.to_owned()], ..EtcdConfig::default() };
        Self { client, store: Store::Etcd(Etcd::new(&config).await.unwrap()) }
    }

    /// How watches of this etcd version treat the deletions of a compacted revision.
    pub(crate) async fn deletions(&mut self) -> Deletions {
        let version = self.client.status().await.unwrap().version().to_owned();
        let numbers: Vec<u32> = version.split('.').map(|number| number.parse().unwrap()).collect();
        let kept = match numbers[..2] {
            [3, 4] => numbers[2] >= 34,
            [3, 5] => numbers[2] >= 16,
            _ => true,
        };
        if kept { Deletions::Kept } else { Deletions::Forgotten }
    }

    /// Applies the step. An error is etcd's own text.
    pub(crate) async fn carry_out(&mut self, step: &Step) -> Result<Answer, String> {
        let doing = self.carry_out_at_length(step);
        tokio::time::timeout(TIMEOUT, doing).await.map_err(|_| "no answer".to_owned())?
    }

    async fn carry_out_at_length(&mut self, step: &Step) -> Result<Answer, String> {
        Ok(match step {
            Step::Commit(txn) => Answer::Outcome(self.store.transact(txn).await.map_err(unwrapped)?),
            Step::Transact(when, then) => Answer::Outcome(self.transact(when, then).await?),
            Step::Read(range, revision) => Answer::Keys(self.range_at(range, *revision).await?.1),
            Step::Compact(revision) => {
                // Waits until the compaction is complete: a watch must not report events that etcd is about to delete.
                let options = CompactionOptions::new().with_physical();
                self.client.compact(*revision, Some(options)).await.map_err(text)?;
                Answer::Done
            }
            Step::Grant(id) => {
                self.grant(*id, LEASE.into()).await?;
                Answer::Done
            }
            Step::Revoke(id) => {
                self.client.lease_revoke(*id).await.map_err(text)?;
                Answer::Done
            }
            Step::KeepAlive(id) => Answer::Kept(self.keep_alive(*id).await?),
            Step::Lease(id) => Answer::Lease(self.lease(*id).await?),
            Step::Watch(_) => Answer::Done,
        })
    }

    pub(crate) async fn grant(&mut self, id: LeaseId, seconds: i64) -> Result<(), String> {
        let options = LeaseGrantOptions::new().with_id(id);
        self.client.lease_grant(seconds, Some(options)).await.map(drop).map_err(text)
    }

    async fn keep_alive(&mut self, id: LeaseId) -> Result<Option<u64>, String> {
        match self.client.lease_keep_alive(id).await {
            Ok((mut keeper, mut answers)) => {
                keeper.keep_alive().await.map_err(text)?;
                let answer = answers.message().await.map_err(text)?.ok_or("the stream has ended")?;
                Ok(u64::try_from(answer.ttl()).ok().filter(|seconds| *seconds > 0))
            }
            // The client returns this for a lease that etcd does not know.
            Err(Error::LeaseKeepAliveError(_)) => Ok(None),
            Err(error) => Err(text(error)),
        }
    }

    async fn lease(&mut self, id: LeaseId) -> Result<Option<(u64, Vec<String>)>, String> {
        let options = LeaseTimeToLiveOptions::new().with_keys();
        let answer = self.client.lease_time_to_live(id, Some(options)).await.map_err(text)?;
        if answer.ttl() < 0 {
            return Ok(None);
        }
        let mut keys: Vec<_> = answer.keys().iter().map(|key| string(key)).collect();
        keys.sort_unstable();
        Ok(Some((u64::try_from(answer.granted_ttl()).unwrap(), keys)))
    }

    /// The revision of the store, and the keys of the range as of that revision.
    pub(crate) async fn range_at(
        &mut self,
        range: &Range,
        revision: i64,
    ) -> Result<(i64, Vec<KeyValue>), String> {
        let options = GetOptions::new().with_range(range.end.as_str()).with_revision(revision);
        let answer = self.client.get(range.start.as_str(), Some(options)).await.map_err(text)?;
        Ok((answer.header().unwrap().revision(), answer.kvs().iter().map(key_value).collect()))
    }

    async fn transact(&mut self, when: &[Condition], then: &[Operation]) -> Result<Outcome, String> {
        let txn = etcd_client::Txn::new()
            .when(when.iter().map(compare).collect::<Vec<_>>())
            .and_then(then.iter().map(operation).collect::<Vec<_>>());
        let answer = self.client.txn(txn).await.map_err(text)?;
        let revision = answer.header().unwrap().revision();
        Ok(if answer.succeeded() {
            Outcome::Applied { revision: Revision::new(revision) }
        } else {
            Outcome::Refused
        })
    }

    pub(crate) async fn watch(&mut self, range: &Range, from: i64) -> Result<Stream, String> {
        let options = WatchOptions::new().with_range(range.end.as_str()).with_start_revision(from);
        Ok(Stream(self.client.watch(range.start.as_str(), Some(options)).await.map_err(text)?))
    }
}

impl Stream {
    /// Reads messages until they contain `expected` events, or until another kind of message, and returns it.
    pub(crate) async fn receive(&mut self, expected: usize) -> Result<WatchMessage, String> {
        let mut received = Vec::new();
        loop {
            let message = tokio::time::timeout(TIMEOUT, self.0.message()).await;
            let message = message.map_err(|_| format!("silence after {received:?}"))?;
            let message = message.map_err(text)?.ok_or("the stream has ended")?;
            let revision = message.header().unwrap().revision();
            if message.created() {
                return Ok(WatchMessage::Opened { revision });
            }
            if message.compact_revision() != 0 {
                return Ok(WatchMessage::Compacted { revision: message.compact_revision() });
            }
            received.extend(message.events().iter().map(event));
            if received.len() >= expected {
                return Ok(WatchMessage::Events { revision, events: received });
            }
        }
    }
}

/// The error text of etcd, or of the client.
fn text(error: Error) -> String {
    match error {
        Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    }
}

/// The error text of etcd, extracted from the error of Polder's client.
fn unwrapped(error: StoreError) -> String {
    if let StoreError::Refused { refusal, .. } = error {
        return refusal.message;
    }
    let error = error.to_string();
    let from = error.find("etcdserver:").unwrap_or(0);
    let text = &error[from..];
    text.split(['"', ',']).next().unwrap_or(text).to_owned()
}

fn string(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn key_value(pair: &etcd_client::KeyValue) -> KeyValue {
    KeyValue {
        key: string(pair.key()),
        value: pair.value().to_vec(),
        create_revision: pair.create_revision(),
        mod_revision: pair.mod_revision(),
        version: pair.version(),
        lease: pair.lease(),
    }
}

fn event(event: &etcd_client::Event) -> Event {
    let pair = event.kv().unwrap();
    let put = (event.event_type() == EventType::Put).then(|| key_value(pair));
    Event { revision: pair.mod_revision(), key: string(pair.key()), put }
}

fn compare(condition: &Condition) -> Compare {
    let operator = match condition.operator {
        Operator::Equal => CompareOp::Equal,
        Operator::NotEqual => CompareOp::NotEqual,
        Operator::Greater => CompareOp::Greater,
        Operator::Less => CompareOp::Less,
    };
    let key = condition.range.start.as_str();
    let compare = match &condition.property {
        Property::Version(version) => Compare::version(key, operator, *version),
        Property::CreateRevision(revision) => Compare::create_revision(key, operator, *revision),
        Property::ModRevision(revision) => Compare::mod_revision(key, operator, *revision),
        Property::Lease(lease) => Compare::lease(key, operator, *lease),
        Property::Value(value) => Compare::value(key, operator, value.as_slice()),
    };
    compare.with_range(condition.range.end.as_str())
}

fn operation(operation: &Operation) -> TxnOp {
    match operation {
        Operation::Put { key, value, lease } => {
            let options = PutOptions::new().with_lease(lease.unwrap_or_default());
            TxnOp::put(key.as_str(), value.as_slice(), Some(options))
        }
        Operation::Delete(range) => {
            let options = DeleteOptions::new().with_range(range.end.as_str());
            TxnOp::delete(range.start.as_str(), Some(options))
        }
    }
}
