//! The outcomes of writes: failures are counted, and repeated refusals are remembered until a write succeeds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use polder_ipam::prefix;
use polder_ipam::store::refusal::{RefusalCause, StoreRefusal};
use polder_ipam::store::{StoreError, Txn, Write};
use tracing::{info, warn};

/// A refusal is forgotten after this time: a writer retries much more often.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(90);

/// The topic of a key: its first part after the [`prefix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// The claims of blocks.
    Blocks,
    /// The addresses of pods.
    Addresses,
    /// The leases of living nodes.
    Alive,
    /// The records of nodes.
    Nodes,
    /// Pools and the settings of the cluster.
    Settings,
    /// Reserved addresses.
    Reservations,
    /// Removals of nodes.
    Fences,
    /// Checks of the cluster, and the answers to them.
    Checks,
    /// All other keys.
    Other,
}

impl Topic {
    fn of(key: &str) -> Self {
        let first = key.strip_prefix(prefix::in_use()).and_then(|rest| rest.split('/').next());
        match first.unwrap_or_default() {
            "blocks" => Self::Blocks,
            "addresses" => Self::Addresses,
            "alive" => Self::Alive,
            "nodes" => Self::Nodes,
            "cluster" | "pools" => Self::Settings,
            "reservations" => Self::Reservations,
            "fences" => Self::Fences,
            "inspection" | "answers" => Self::Checks,
            _ => Self::Other,
        }
    }
}

/// The topics and the kind of a write, for the account of refusals.
#[derive(Debug, Clone, Default)]
pub(crate) struct Written {
    topics: BTreeSet<Topic>,
    /// Whether it contains a put: etcd without space refuses puts, but not deletions.
    puts: bool,
}

impl Written {
    /// The grant of a lease, under which the record of an alive node is then put.
    pub(crate) fn lease_record() -> Self {
        Self { topics: BTreeSet::from([Topic::Alive]), puts: true }
    }
}

impl From<&Txn> for Written {
    fn from(txn: &Txn) -> Self {
        let key = |write: &Write| match write {
            Write::Put { key, .. } | Write::Delete { key } => Topic::of(key),
        };
        Self {
            topics: txn.writes.iter().map(key).collect(),
            puts: txn.writes.iter().any(|write| matches!(write, Write::Put { .. })),
        }
    }
}

/// Writes that the datastore refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusing {
    /// The cause, and the message of the datastore.
    pub refusal: StoreRefusal,
    /// The topics of the refused writes.
    pub topics: BTreeSet<Topic>,
    /// Time of the first refusal.
    pub since: SystemTime,
    /// Number of refused writes since then.
    pub count: u64,
}

/// Numbers of failed writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Failures {
    /// Writes without effect: refused, or not sent.
    pub refused: u64,
    /// Writes with an unknown outcome.
    pub unknown: u64,
}

/// The outcomes of this process's writes. Clones share their state.
#[derive(Debug, Clone, Default)]
pub struct Writes(Arc<Mutex<Account>>);

impl Writes {
    /// The numbers of failed writes.
    pub fn failures(&self) -> Failures {
        self.lock().failures
    }

    /// The writes that the datastore currently refuses.
    pub fn refusing(&self) -> Vec<Refusing> {
        self.lock().refusing(Instant::now())
    }

    /// Notes that the datastore answered a request: it applied it, or a compare did not hold.
    pub(crate) fn taken(&self, written: &Written) {
        if self.lock().take(written) {
            info!("the datastore accepts writes again");
        }
    }

    /// Notes a failed request.
    pub(crate) fn failed(&self, written: &Written, error: &StoreError) {
        let now = (Instant::now(), SystemTime::now());
        let StoreError::Refused { store, refusal } = error else {
            let failures = &mut self.lock().failures;
            // A request that was not sent had no effect.
            let count = if error.is_unknown() { &mut failures.unknown } else { &mut failures.refused };
            return *count += 1;
        };
        if self.lock().refuse(written, refusal, now) {
            warn!(store, "writes are refused: {refusal}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Account> {
        // A panic cannot leave the state half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Account {
    failures: Failures,
    refused: BTreeMap<RefusalCause, Refusals>,
}

#[derive(Debug)]
struct Refusals {
    message: String,
    topics: BTreeMap<Topic, Instant>,
    since: SystemTime,
    last: Instant,
    count: u64,
}

impl Refusals {
    /// Whether to report it. A cause that may be temporary must be refused more than once.
    fn is_continuing(&self, cause: RefusalCause) -> bool {
        cause.is_lasting() || self.count > 1
    }
}

impl Account {
    /// Returns true if a refusal was reported and none remains.
    fn take(&mut self, written: &Written) -> bool {
        let reported = self.refused.iter().any(|(cause, known)| known.is_continuing(*cause));
        self.refused.retain(|cause, known| {
            if *cause == RefusalCause::NoSpace {
                return !written.puts;
            }
            known.topics.retain(|topic, _| !written.topics.contains(topic));
            cause.is_partial() && !known.topics.is_empty()
        });
        reported && self.refused.is_empty()
    }

    /// Returns true if this refusal must be reported now.
    fn refuse(&mut self, written: &Written, refusal: &StoreRefusal, now: (Instant, SystemTime)) -> bool {
        self.failures.refused += 1;
        self.forget(now.0);
        let cause = refusal.cause;
        let known = self.refused.entry(cause).or_insert_with(|| Refusals {
            message: String::new(),
            topics: BTreeMap::new(),
            since: now.1,
            last: now.0,
            count: 0,
        });
        let reported = known.count > 0 && known.is_continuing(cause);
        known.message.clone_from(&refusal.message);
        known.topics.extend(written.topics.iter().map(|topic| (*topic, now.0)));
        known.last = now.0;
        known.count += 1;
        !reported && known.is_continuing(cause)
    }

    fn refusing(&mut self, now: Instant) -> Vec<Refusing> {
        self.forget(now);
        let continuing = self.refused.iter().filter(|(cause, known)| known.is_continuing(**cause));
        let refusing = continuing.map(|(cause, known)| Refusing {
            refusal: StoreRefusal::new(*cause, known.message.clone()),
            topics: known.topics.keys().copied().collect(),
            since: known.since,
            count: known.count,
        });
        refusing.collect()
    }

    fn forget(&mut self, now: Instant) {
        let is_new = |then: Instant| now.saturating_duration_since(then) < FORGOTTEN_AFTER;
        self.refused.retain(|_, known| {
            known.topics.retain(|_, last| is_new(*last));
            is_new(known.last)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(cause: RefusalCause) -> StoreRefusal {
        StoreRefusal::new(cause, "etcdserver: no".to_owned())
    }

    fn put(key: &str) -> Written {
        let topic = Topic::of(&format!("{}{key}", prefix::in_use()));
        Written { topics: BTreeSet::from([topic]), puts: true }
    }

    fn delete(key: &str) -> Written {
        Written { puts: false, ..put(key) }
    }

    fn at(seconds: u64) -> (Instant, SystemTime) {
        // All times are relative to the first call.
        static BEGINNING: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        let beginning = *BEGINNING.get_or_init(Instant::now);
        let since_1970 = Duration::from_secs(1_000 + seconds);
        (beginning + Duration::from_secs(seconds), SystemTime::UNIX_EPOCH + since_1970)
    }

    #[test]
    fn a_refusal_is_reported_once_and_ends_with_the_next_put() {
        let mut account = Account::default();
        assert!(account.refuse(&put("addresses/n1/10.0.0.1"), &refusal(RefusalCause::NoSpace), at(0)));
        assert!(!account.refuse(&put("alive/n1"), &refusal(RefusalCause::NoSpace), at(5)));
        let found = account.refusing(at(6).0);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].since, found[0].count), (at(0).1, 2));
        assert_eq!(found[0].topics, BTreeSet::from([Topic::Addresses, Topic::Alive]));
        assert!(!account.take(&delete("addresses/n1/10.0.0.1")), "etcd without space deletes");
        assert!(account.take(&put("nodes/n1")));
        assert_eq!(account.refusing(at(7).0), []);
        assert_eq!(account.failures.refused, 2);
    }

    #[test]
    fn a_missing_permission_ends_only_with_a_write_of_the_same_topic() {
        let mut account = Account::default();
        assert!(account.refuse(&put("blocks/4-0a000000-26"), &refusal(RefusalCause::Permission), at(0)));
        account.refuse(&put("addresses/n1/10.0.0.1"), &refusal(RefusalCause::Permission), at(0));
        assert!(!account.take(&put("addresses/n1/10.0.0.1")));
        assert_eq!(account.refusing(at(1).0)[0].topics, BTreeSet::from([Topic::Blocks]));
        assert!(account.take(&delete("blocks/4-0a000000-26")));
    }

    #[test]
    fn a_temporary_refusal_is_reported_only_if_it_continues() {
        let mut account = Account::default();
        assert!(!account.refuse(&put("alive/n1"), &refusal(RefusalCause::StaleAuth), at(0)));
        assert_eq!(account.refusing(at(1).0), []);
        assert!(!account.take(&put("alive/n1")), "nothing was reported");
        assert!(!account.refuse(&put("alive/n1"), &refusal(RefusalCause::StaleAuth), at(2)));
        assert!(account.refuse(&put("alive/n1"), &refusal(RefusalCause::StaleAuth), at(3)));
        assert_eq!(account.refusing(at(4).0).len(), 1);
    }

    #[test]
    fn a_refused_write_that_is_not_repeated_is_forgotten() {
        let mut account = Account::default();
        account.refuse(&put("pools/a"), &refusal(RefusalCause::Permission), at(0));
        assert_eq!(account.refusing(at(89).0).len(), 1);
        assert_eq!(account.refusing(at(90).0), []);
        assert!(
            account.refuse(&put("pools/a"), &refusal(RefusalCause::Permission), at(91)),
            "it is news again"
        );
    }
}
