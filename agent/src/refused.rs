//! Refused writes to the datastore, with their consequences and remedies: for `status` and metrics.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use polder_api::status::RefusedWrites;
use polder_ipam::store::refusal::RefusalCause;
use polder_store::Store;
use polder_store::writes::{Refusing, Topic};

/// The writes that the datastore refuses now, as JSON.
pub fn status(store: &Store) -> Vec<RefusedWrites> {
    let status = |refusing: Refusing| RefusedWrites {
        reason: refusing.refusal.message,
        since: refusing.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
        count: refusing.count,
    };
    store.writes().refusing().into_iter().map(status).collect()
}

/// The writes that the datastore refuses now, as problem texts.
pub fn problems(store: &Store) -> Vec<String> {
    let (name, now) = (store.name(), SystemTime::now());
    store.writes().refusing().iter().map(|refusing| problem(&name, refusing, now)).collect()
}

/// Whether the datastore refuses all writes of all nodes.
pub fn is_of_all(store: &Store) -> bool {
    store.writes().refusing().iter().any(|refusing| !refusing.refusal.cause.is_partial())
}

fn problem(store: &str, refusing: &Refusing, now: SystemTime) -> String {
    let lasts = duration(now.duration_since(refusing.since).unwrap_or_default());
    let (what, topics) = if refusing.refusal.cause.is_partial() {
        ("writes of this node", refusing.topics.clone())
    } else {
        // Writes that were not tried yet would be refused, too.
        ("all writes", BTreeSet::from([Topic::Blocks, Topic::Addresses, Topic::Alive, Topic::Settings]))
    };
    let consequences: Vec<_> = topics.into_iter().map(consequence).collect();
    let remedy = refusing.refusal.remedy();
    let goes_on = match refusing.refusal.cause {
        RefusalCause::Disk => "running pods are not affected",
        _ => "running pods are not affected, and new pods get addresses from the blocks that this node has",
    };
    format!(
        "{store} has refused {what} for {lasts}: {}: {}; {goes_on}. Remedy: {remedy}",
        refusing.refusal.message,
        consequences.join(", ")
    )
}

/// The consequence while records of that kind cannot be written.
fn consequence(topic: Topic) -> &'static str {
    match topic {
        Topic::Blocks => "no new block can be claimed",
        Topic::Addresses => "addresses of new pods are not published (missing in `polderctl ipam show`)",
        Topic::Alive => "an agent that starts gets no lease (ALIVE no in `polderctl node list`)",
        Topic::Nodes => "changes of this node's record are not written",
        Topic::Settings => "pools and settings cannot be changed",
        Topic::Reservations => "reserved addresses are not handed over",
        Topic::Fences => "nodes cannot be removed, and removals are not confirmed",
        Topic::Checks => "`polderctl ipam check` does not work",
        Topic::Other => "other records are not written",
    }
}

fn duration(lasts: Duration) -> String {
    let seconds = lasts.as_secs();
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) => format!("{seconds} s"),
        (0, minutes) => format!("{minutes} min"),
        (hours, minutes) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use polder_ipam::store::refusal::StoreRefusal;

    use super::*;

    fn text(cause: RefusalCause, words: &str, topics: &[Topic], seconds: u64) -> String {
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let refusal = StoreRefusal::new(cause, words.to_owned());
        let refusing = Refusing { refusal, topics: topics.iter().copied().collect(), since, count: 3 };
        problem("etcd at http://10.0.0.1:2379", &refusing, since + Duration::from_secs(seconds))
    }

    #[test]
    fn an_etcd_without_space_refuses_all_writes_in_the_reported_problem() {
        let text =
            text(RefusalCause::NoSpace, "etcdserver: mvcc: database space exceeded", &[Topic::Alive], 7_261);
        for part in [
            "etcd at http://10.0.0.1:2379 has refused all writes for 2 h 1 min: etcdserver: mvcc: database space \
             exceeded:",
            "no new block",
            "not published",
            "no lease",
            "etcdctl alarm disarm",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_missing_permission_is_reported_for_the_refused_writes_only() {
        let text = text(RefusalCause::Permission, "etcdserver: permission denied", &[Topic::Blocks], 59);
        for part in ["refused writes of this node for 59 s", "no new block", "grant-permission"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("published"), "{text}");
    }
}
