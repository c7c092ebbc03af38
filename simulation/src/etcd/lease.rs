//! Leases: keys that are deleted together when nobody renews the lease.

use std::collections::{BTreeMap, BTreeSet};

use super::Error;

/// The number of a lease, not 0.
pub type LeaseId = i64;

/// A lease that has not expired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Granted TTL in seconds.
    pub seconds: u64,
    /// Remaining TTL in seconds.
    pub left: u64,
    /// The keys attached to the lease.
    pub keys: BTreeSet<String>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Leases(BTreeMap<LeaseId, Lease>);

impl Leases {
    pub(super) fn get(&self, id: LeaseId) -> Option<&Lease> {
        self.0.get(&id)
    }

    pub(super) fn grant(&mut self, id: LeaseId, seconds: u64) -> Result<(), Error> {
        if self.0.contains_key(&id) {
            return Err(Error::LeaseExists(id));
        }
        self.0.insert(id, Lease { seconds, left: seconds, keys: BTreeSet::new() });
        Ok(())
    }

    pub(super) fn keep_alive(&mut self, id: LeaseId) -> Option<u64> {
        let lease = self.0.get_mut(&id)?;
        lease.left = lease.seconds;
        Some(lease.seconds)
    }

    /// Attaches the key to this lease, which must exist, and detaches it from any other.
    pub(super) fn attach(&mut self, key: &str, id: Option<LeaseId>) {
        for lease in self.0.values_mut() {
            lease.keys.remove(key);
        }
        if let Some(lease) = id.and_then(|id| self.0.get_mut(&id)) {
            lease.keys.insert(key.to_owned());
        }
    }

    pub(super) fn remove(&mut self, id: LeaseId) -> Option<BTreeSet<String>> {
        self.0.remove(&id).map(|lease| lease.keys)
    }

    /// Advances time; returns the expired leases, the earliest first. They are kept until they are removed.
    pub(super) fn advance(&mut self, seconds: u64) -> Vec<LeaseId> {
        let mut ended: Vec<_> = self
            .0
            .iter()
            .filter(|(_, lease)| lease.left <= seconds)
            .map(|(id, lease)| (lease.left, *id))
            .collect();
        ended.sort_unstable();
        self.0.values_mut().for_each(|lease| lease.left = lease.left.saturating_sub(seconds));
        ended.into_iter().map(|(_, id)| id).collect()
    }

    pub(super) fn renew(&mut self) {
        self.0.values_mut().for_each(|lease| lease.left = lease.seconds);
    }
}
