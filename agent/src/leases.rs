//! Which agents are alive: read from the datastore periodically. Leases are not watched, because thousands of them are
//! renewed all the time.

pub mod poll;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polder_api::NodeName;
use polder_ipam::key::{Key, Range};
use polder_ipam::publication;
use polder_ipam::store::StoreError;
use polder_store::Store;
use tokio::time::Instant;

/// How long a lease must be missing before an agent counts as dead. An agent renews it within seconds after its start,
/// or when the datastore is reachable again.
const MISSING_BEFORE_DEAD: Duration = Duration::from_secs(15);

/// Maximum number of leases that are read one by one instead of the whole list.
const MAX_SINGLE_READS: usize = 8;

/// Maximum number of nodes that are reported one by one.
const MAX_REPORTED: usize = 10;

/// The nodes whose agents hold their leases.
pub async fn with_lease(store: &Store) -> Result<BTreeSet<NodeName>, StoreError> {
    Ok(publication::living_nodes(&store.range(&Key::all_leases()).await?))
}

/// Those of the given nodes whose agents hold their leases. A few are read one by one.
pub async fn with_lease_among(store: &Store, names: &[NodeName]) -> Result<BTreeSet<NodeName>, StoreError> {
    if names.len() > MAX_SINGLE_READS {
        return with_lease(store).await;
    }
    let mut with_lease = BTreeSet::new();
    for name in names {
        let key = Key::Lease(name.clone()).to_string();
        if !store.range(&Range::single(key)).await?.entries.is_empty() {
            with_lease.insert(name.clone());
        }
    }
    Ok(with_lease)
}

/// The lease state of the other nodes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leases {
    /// Time of the last read; `None` while the datastore is unreachable.
    last_read: Option<Instant>,
    /// The nodes without a lease, with the time when the lease was first seen missing.
    missing: BTreeMap<NodeName, Instant>,
    /// The nodes that counted as dead at the last read, and have had no lease since then.
    dead: BTreeSet<NodeName>,
}

impl Leases {
    /// Applies a read of the datastore: `others` are all other nodes, `with_lease` those with a lease.
    fn apply(&mut self, others: &BTreeSet<NodeName>, with_lease: &BTreeSet<NodeName>, now: Instant) {
        self.last_read = Some(now);
        let missing = others.difference(with_lease);
        self.missing =
            missing.map(|name| (name.clone(), self.missing.get(name).copied().unwrap_or(now))).collect();
        self.dead.retain(|name| self.missing.contains_key(name));
        let dead: Vec<_> = self.not_alive().map(|(name, _)| name.clone()).collect();
        self.dead.extend(dead);
    }

    /// The state while the datastore is unreachable.
    #[must_use]
    fn while_unreachable(&self) -> Self {
        Self { dead: self.dead.clone(), ..Self::default() }
    }

    /// The nodes whose agents are treated as dead, also while the datastore is unreachable: dependent decisions must
    /// not flap when the datastore is unreachable.
    pub fn dead(&self) -> &BTreeSet<NodeName> {
        &self.dead
    }

    /// Whether it is known that the node's agent is dead, or that it is alive.
    pub fn is_decided_for(&self, name: &NodeName) -> bool {
        self.dead.contains(name) || self.are_known() && !self.missing.contains_key(name)
    }

    /// Whether the leases are known now.
    pub fn are_known(&self) -> bool {
        self.last_read.is_some()
    }

    /// The state of these nodes only: some may have been removed since the leases were read.
    #[must_use]
    pub fn among(&self, is_member: impl Fn(&NodeName) -> bool) -> Self {
        let missing = self.missing.iter().filter(|(name, _)| is_member(name));
        Self { missing: missing.map(|(name, since)| (name.clone(), *since)).collect(), ..self.clone() }
    }

    /// The nodes whose lease has been missing for 15 s (`MISSING_BEFORE_DEAD`), with the time when it was first seen
    /// missing.
    pub fn not_alive(&self) -> impl Iterator<Item = (&NodeName, Instant)> {
        let is_dead = |since: Instant| self.last_read.is_some_and(|read| read - since >= MISSING_BEFORE_DEAD);
        self.missing.iter().map(|(name, since)| (name, *since)).filter(move |(_, since)| is_dead(*since))
    }

    /// Time of the next read; `pause` is the usual interval.
    fn next(&self, pause: Duration, now: Instant) -> Instant {
        let decision =
            self.missing.values().map(|since| *since + MISSING_BEFORE_DEAD).filter(|at| *at > now).min();
        decision.map_or(now + pause, |at| at.min(now + pause))
    }

    /// The problems to report.
    pub fn problems(&self, now: Instant) -> Vec<String> {
        let not_alive: Vec<_> = self.not_alive().collect();
        let mut problems: Vec<String> = not_alive
            .iter()
            .take(MAX_REPORTED)
            .map(|(name, since)| {
                format!(
                    "node {name}: its agent is not alive (lease not renewed for at least {} s). Running pods there \
                     keep their network; new pods get none, and the node receives no changes. Check polder-agent on \
                     {name}; if the machine is permanently gone, run `polderctl node remove {name} --dead`",
                    (now - *since).as_secs()
                )
            })
            .collect();
        if let Some(more) = not_alive.len().checked_sub(MAX_REPORTED).filter(|more| *more > 0) {
            problems
                .push(format!("the agents of {more} more nodes are not alive: see `polderctl node list`"));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<NodeName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn not_alive(leases: &Leases) -> Vec<&str> {
        leases.not_alive().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn a_briefly_missing_lease_is_not_reported() {
        let (start, all) = (Instant::now(), names(&["n2", "n3"]));
        let mut leases = Leases::default();
        assert!(!leases.are_known());
        leases.apply(&all, &names(&["n2"]), start);
        assert_eq!((leases.are_known(), not_alive(&leases)), (true, vec![]));
        assert_eq!(
            leases.next(MISSING_BEFORE_DEAD * 4, start),
            start + MISSING_BEFORE_DEAD,
            "the next read is when the missing lease can count"
        );
        leases.apply(&all, &all, start + MISSING_BEFORE_DEAD / 2);
        leases.apply(&all, &names(&["n2"]), start + MISSING_BEFORE_DEAD);
        assert_eq!(not_alive(&leases), Vec::<&str>::new(), "it was there in between");
        assert_eq!(
            leases.next(MISSING_BEFORE_DEAD / 3, start + MISSING_BEFORE_DEAD),
            start + MISSING_BEFORE_DEAD + MISSING_BEFORE_DEAD / 3
        );
    }

    #[test]
    fn a_dead_agent_is_reported_with_a_remedy_until_it_returns_or_is_removed() {
        let (start, all) = (Instant::now(), names(&["n2", "n3"]));
        let mut leases = Leases::default();
        leases.apply(&all, &names(&["n2"]), start);
        leases.apply(&all, &names(&["n2"]), start + MISSING_BEFORE_DEAD);
        assert_eq!(not_alive(&leases), ["n3"]);
        let problems = leases.problems(start + MISSING_BEFORE_DEAD * 2);
        assert_eq!(problems.len(), 1);
        for expected in ["node n3", "at least 30 s", "polderctl node remove n3 --dead"] {
            assert!(problems[0].contains(expected), "{problems:?}");
        }
        let mut back = leases.clone();
        back.apply(&all, &all, start + MISSING_BEFORE_DEAD * 2);
        assert_eq!(back.problems(start + MISSING_BEFORE_DEAD * 2), Vec::<String>::new());
        leases.apply(&names(&["n2"]), &names(&["n2"]), start + MISSING_BEFORE_DEAD * 2);
        assert_eq!(leases.problems(start + MISSING_BEFORE_DEAD * 2), Vec::<String>::new());
    }

    #[test]
    fn a_dead_node_stays_dead_without_the_datastore_until_its_lease_is_read() {
        let (start, all) = (Instant::now(), names(&["n2", "n3"]));
        let n3 = "n3".parse().unwrap();
        let mut leases = Leases::default();
        assert!(!leases.is_decided_for(&n3));
        leases.apply(&all, &names(&["n2"]), start);
        assert!(leases.dead().is_empty() && !leases.is_decided_for(&n3));
        leases.apply(&all, &names(&["n2"]), start + MISSING_BEFORE_DEAD);
        assert_eq!(*leases.dead(), names(&["n3"]));
        leases = leases.while_unreachable();
        assert!(!leases.are_known() && leases.is_decided_for(&n3));
        leases.apply(&all, &names(&["n2"]), start + MISSING_BEFORE_DEAD * 2);
        assert_eq!((leases.dead(), not_alive(&leases)), (&names(&["n3"]), vec![]));
        leases.apply(&all, &all, start + MISSING_BEFORE_DEAD * 3);
        assert!(leases.dead().is_empty() && leases.is_decided_for(&n3));
    }

    #[test]
    fn of_many_dead_agents_ten_are_reported_and_the_rest_counted() {
        let start = Instant::now();
        let all: BTreeSet<NodeName> =
            (0..MAX_REPORTED + 2).map(|number| format!("n{number}").parse().unwrap()).collect();
        let mut leases = Leases::default();
        leases.apply(&all, &BTreeSet::new(), start);
        leases.apply(&all, &BTreeSet::new(), start + MISSING_BEFORE_DEAD);
        let problems = leases.problems(start + MISSING_BEFORE_DEAD);
        assert_eq!(problems.len(), MAX_REPORTED + 1);
        assert!(problems[MAX_REPORTED].contains("2 more nodes"), "{problems:?}");
    }
}
