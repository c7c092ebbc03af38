//! The node's view of the cluster: the decoded records of the datastore, and the refused ones.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::net::IpAddr;
use std::sync::Arc;

use crate::Revision;
use crate::ids::Incarnation;
use crate::key::Key;
use crate::needed::{self, RequiredRange};
use crate::pool::{InvalidPool, PoolState, Purpose};
use crate::record::{
    BlockRecord, ClusterRecord, FenceRecord, InspectionRecord, LeaderRecord, NodeRecord, PoolRecord, Record,
    ReservationRecord, decode, encode,
};
use crate::store::position::Interruption;
use crate::store::{Contents, Entry, KeyChange, Update};
use crate::{Block, Pool};
use polder_api::{Family, NodeName, PoolName};

mod reason;

pub use self::reason::{NotUsable, PoolDoubt, RecordRefusal, RefusedRecord};

/// A record as of the revision that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    /// The record. Shared, because a view is copied at every change.
    pub record: Arc<T>,
    /// The revision.
    pub revision: Revision,
}

/// The source of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ViewSource {
    /// None yet: nothing is known, not even that a record is missing.
    #[default]
    Nowhere,
    /// The snapshot of an earlier agent. It may be old: nothing may be deleted because of it.
    Snapshot,
    /// The datastore.
    Store,
}

/// The records of the cluster.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The source.
    pub source: ViewSource,
    /// The revision of the datastore that the view shows.
    pub revision: Revision,
    /// Why the datastore is unreachable, while it is.
    pub lost: Option<Interruption>,
    /// The settings.
    pub cluster: Option<Versioned<ClusterRecord>>,
    /// The pools that this node can use.
    pub pools: BTreeMap<PoolName, Versioned<Pool>>,
    /// The pools that it cannot use: pods cannot have their addresses, or the node would lose addresses that it
    /// needs.
    unusable: BTreeMap<PoolName, Versioned<Pool>>,
    /// The keys in `refused` whose reason is that the pool is unusable, and not a decode error.
    unusable_keys: BTreeSet<String>,
    /// The pools in use with addresses that pods should not have: by key, with the reason.
    pub doubtful: BTreeMap<String, PoolDoubt>,
    /// The underlay addresses of this node.
    pub own_addresses: Vec<IpAddr>,
    /// The addresses that this node must reach outside the pod network.
    pub needed: Vec<RequiredRange>,
    /// The nodes.
    pub nodes: BTreeMap<NodeName, Versioned<NodeRecord>>,
    /// The claims.
    pub blocks: BTreeMap<Block, Versioned<BlockRecord>>,
    /// The fences of removed nodes.
    pub fences: BTreeMap<Incarnation, Versioned<FenceRecord>>,
    /// The reservations of addresses for workloads.
    pub reservations: BTreeMap<IpAddr, Versioned<ReservationRecord>>,
    /// The request for a check on all nodes.
    pub inspection: Option<Versioned<InspectionRecord>>,
    /// The agent that compares the nodes with Kubernetes.
    pub leader: Option<Versioned<LeaderRecord>>,
    /// The keys of refused records, with the reason. If an earlier record could be decoded, it stays in force.
    pub refused: BTreeMap<String, RecordRefusal>,
    /// The number of times that the datastore seems to have lost records: the settings, which are never deleted, are
    /// missing; nodes, claims or reservations known before are missing or older; or the revision is lower.
    pub losses: u64,
    /// The last known settings, for a datastore that has lost them.
    pub remembered: Option<Settings>,
    /// The pools that were known before the datastore was last read completely, and are missing since.
    pub lost_pools: BTreeMap<PoolName, Arc<Pool>>,
}

/// The settings and pools of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The settings.
    pub cluster: Arc<ClusterRecord>,
    /// The pools.
    pub pools: Vec<Arc<Pool>>,
}

impl View {
    /// A view of a snapshot.
    pub fn from_snapshot(contents: Contents) -> Self {
        let mut view = Self { source: ViewSource::Snapshot, revision: contents.revision, ..Self::default() };
        view.take_all(contents.entries);
        view.settle_pools();
        view
    }

    /// The records in force, for a snapshot.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        let cluster = self.cluster.iter().map(|known| entry(&Key::Cluster, known, encode));
        let pool = |known: &Versioned<Pool>| {
            entry(&Key::Pool(known.record.name.clone()), known, |pool| encode(&PoolRecord::from(pool)))
        };
        let node = |(name, known): (&NodeName, _)| entry(&Key::Node(name.clone()), known, encode);
        let block = |(block, known): (&Block, _)| entry(&Key::Block(*block), known, encode);
        let fence = |(incarnation, known): (&Incarnation, &Versioned<FenceRecord>)| {
            entry(&Key::Fence(known.record.node.clone(), incarnation.clone()), known, encode)
        };
        let reservation = |(address, known): (&IpAddr, _)| entry(&Key::Reservation(*address), known, encode);
        let inspection = self.inspection.iter().map(|known| entry(&Key::Inspection, known, encode));
        let leader = self.leader.iter().map(|known| entry(&Key::Leader, known, encode));
        cluster
            .chain(self.every_pool().map(pool))
            .chain(self.nodes.iter().map(node))
            .chain(self.blocks.iter().map(block))
            .chain(self.fences.iter().map(fence))
            .chain(self.reservations.iter().map(reservation))
            .chain(inspection)
            .chain(leader)
    }

    /// Applies an update.
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Loaded(contents) => self.load(contents),
            Update::Changed { revision, changes } => {
                self.revision = revision;
                self.lost = None;
                let mut unsettled = false;
                for change in changes {
                    unsettled |= self.concerns_pools(&change);
                    self.change(change);
                }
                if unsettled {
                    self.settle_pools();
                }
            }
            Update::Lost { reason } => self.lost = Some(reason),
            Update::Back { revision } => {
                self.revision = self.revision.max(revision);
                self.lost = None;
            }
        }
    }

    fn load(&mut self, contents: Contents) {
        let before = std::mem::take(self);
        self.source = ViewSource::Store;
        self.revision = contents.revision;
        self.own_addresses.clone_from(&before.own_addresses);
        self.needed.clone_from(&before.needed);
        self.take_all(contents.entries);
        let unreadable: Vec<String> = self.refused.keys().cloned().collect();
        unreadable.iter().for_each(|key| self.keep(key, &before));
        self.settle_pools();
        let lost = before.nodes.keys().any(|name| !self.nodes.contains_key(name))
            || before.blocks.keys().any(|block| !self.blocks.contains_key(block))
            || before.reservations.iter().any(|(address, known)| {
                let now = self.reservations.get(address);
                now.is_none_or(|now| now.record.generation < known.record.generation)
            })
            || self.revision < before.revision && before.source == ViewSource::Store
            || before.cluster.is_some() && self.cluster.is_none();
        self.losses = before.losses + u64::from(lost);
        let known = before.pools.iter().map(|(name, known)| (name.clone(), Arc::clone(&known.record)));
        self.lost_pools = before.lost_pools.clone().into_iter().chain(known).collect();
        self.lost_pools.retain(|name, _| !self.pools.contains_key(name) && !self.unusable.contains_key(name));
        if self.cluster.is_none() {
            self.remembered = before.settings();
        }
    }

    /// Keeps the earlier record of a key whose current record cannot be decoded.
    fn keep(&mut self, key: &str, before: &Self) {
        fn kept<K: Ord + Clone, T: Clone>(now: &mut BTreeMap<K, T>, before: &BTreeMap<K, T>, key: &K) {
            if let (false, Some(record)) = (now.contains_key(key), before.get(key)) {
                now.insert(key.clone(), record.clone());
            }
        }
        match key.parse() {
            Ok(Key::Cluster) if self.cluster.is_none() => self.cluster.clone_from(&before.cluster),
            Ok(Key::Pool(name)) => kept(&mut self.pools, &before.pools, &name),
            Ok(Key::Node(name)) => kept(&mut self.nodes, &before.nodes, &name),
            Ok(Key::Block(block)) => kept(&mut self.blocks, &before.blocks, &block),
            Ok(Key::Fence(_, incarnation)) => kept(&mut self.fences, &before.fences, &incarnation),
            Ok(Key::Reservation(address)) => kept(&mut self.reservations, &before.reservations, &address),
            _ => {}
        }
    }

    /// The current settings, or the last known ones.
    pub fn settings(&self) -> Option<Settings> {
        let Some(cluster) = &self.cluster else { return self.remembered.clone() };
        Some(Settings {
            cluster: Arc::clone(&cluster.record),
            pools: self.every_pool().map(|pool| Arc::clone(&pool.record)).collect(),
        })
    }

    /// The refused records.
    pub fn refused_records(&self) -> impl Iterator<Item = RefusedRecord> {
        let record = |(key, reason): (&String, &RecordRefusal)| RefusedRecord {
            key: key.clone(),
            reason: reason.clone(),
        };
        self.refused.iter().map(record)
    }

    /// All pools, including those that this node cannot use.
    pub fn every_pool(&self) -> impl Iterator<Item = &Versioned<Pool>> {
        self.pools.values().chain(self.unusable.values())
    }

    /// The pool with that name, including one that this node cannot use.
    pub fn any_pool(&self, name: &PoolName) -> Option<&Versioned<Pool>> {
        self.pools.get(name).or_else(|| self.unusable.get(name))
    }

    fn take_all(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.change(KeyChange { key: entry.key.clone(), entry: Some(entry) });
        }
    }

    fn change(&mut self, KeyChange { key, entry }: KeyChange) {
        let Some(entry) = entry else {
            self.losses += u64::from(self.cluster.is_some() && key == Key::Cluster.to_string());
            return self.forget(&key);
        };
        let revision = entry.revision;
        let record = decode(&key, &entry.value);
        if record.is_ok() {
            self.forget(&key);
        }
        match record {
            Ok(Record::Cluster(record)) => self.cluster = Some(known(record, revision)),
            Ok(Record::Pool(pool)) => {
                self.lost_pools.remove(&pool.name);
                self.pools.insert(pool.name.clone(), known(pool, revision));
            }
            Ok(Record::Node(name, record)) => drop(self.nodes.insert(name, known(record, revision))),
            Ok(Record::Block(block, record)) => drop(self.blocks.insert(block, known(record, revision))),
            Ok(Record::Fence(incarnation, record)) => {
                drop(self.fences.insert(incarnation, known(record, revision)));
            }
            Ok(Record::Reservation(address, record)) => {
                drop(self.reservations.insert(address, known(record, revision)));
            }
            Ok(Record::Inspection(record)) => self.inspection = Some(known(record, revision)),
            Ok(Record::Leader(record)) => self.leader = Some(known(record, revision)),
            Err(reason) => {
                self.unusable_keys.remove(&key);
                self.refused.insert(key, reason.into());
            }
        }
    }

    /// Sets the node's own addresses and the addresses that it must reach.
    pub fn set_addresses_in_use(&mut self, own: Vec<IpAddr>, needed: Vec<RequiredRange>) {
        self.own_addresses = own;
        self.needed = needed;
        self.settle_pools();
    }

    /// Whether the change may make a pool usable or unusable. Called before the change is applied.
    fn concerns_pools(&self, change: &KeyChange) -> bool {
        let is_contested = !self.unusable.is_empty() || !self.doubtful.is_empty();
        match change.key.parse() {
            Ok(Key::Pool(_)) => true,
            Ok(Key::Block(_) | Key::Reservation(_)) => is_contested,
            Ok(Key::Node(name)) => {
                let record = change.entry.as_ref().map(|entry| decode(&change.key, &entry.value));
                let inside =
                    |address: &IpAddr| self.every_pool().any(|pool| pool.record.cidr().has(*address));
                let now = match &record {
                    Some(Ok(Record::Node(_, record))) => record.underlay.iter().any(inside),
                    _ => false,
                };
                let before =
                    self.nodes.get(&name).is_some_and(|node| node.record.underlay.iter().any(inside));
                now || before
            }
            _ => false,
        }
    }

    /// Sorts the pools into usable, doubtful and unusable ones.
    fn settle_pools(&mut self) {
        for key in std::mem::take(&mut self.unusable_keys) {
            self.refused.remove(&key);
        }
        self.doubtful.clear();
        let pools = std::mem::take(&mut self.pools).into_values();
        let pools: Vec<_> = pools.chain(std::mem::take(&mut self.unusable).into_values()).collect();
        for pool in pools {
            let name = pool.record.name.clone();
            let key = Key::Pool(name.clone()).to_string();
            match self.use_of(&pool.record) {
                PoolUse::Full => drop(self.pools.insert(name, pool)),
                PoolUse::Doubtful(reason) => {
                    self.doubtful.insert(key, reason);
                    self.pools.insert(name, pool);
                }
                PoolUse::None(reason) => {
                    // If a newer record of the pool cannot be decoded, the decode error is reported first.
                    if let btree_map::Entry::Vacant(vacant) = self.refused.entry(key.clone()) {
                        vacant.insert(reason.into());
                        self.unusable_keys.insert(key);
                    }
                    self.unusable.insert(name, pool);
                }
            }
        }
    }

    /// Whether this node can use the pool. A pool in use stays in use if possible.
    fn use_of(&self, pool: &Pool) -> PoolUse {
        let (name, cidr) = (&pool.name, pool.cidr());
        if let Some(address) = self.own_addresses.iter().find(|address| cidr.has(**address)) {
            return PoolUse::None(NotUsable::OwnAddress { pool: name.clone(), cidr, address: *address });
        }
        let in_use = || {
            let reserved = |address: &IpAddr| pool.purpose == Purpose::Reservations && cidr.has(*address);
            self.blocks.values().any(|claim| claim.record.pool == *name)
                || self.reservations.keys().any(reserved)
        };
        let pool_name = name.clone();
        if let Err(error) = pool.check_use() {
            let first = cidr.first();
            let never = first.is_multicast() || first.is_loopback() || first.is_unspecified();
            return if in_use() && !never {
                PoolUse::Doubtful(PoolDoubt::Unfit { pool: pool_name, error })
            } else {
                PoolUse::None(match error {
                    InvalidPool::Special { special, .. } => NotUsable::Special { pool: pool_name, special },
                    error => NotUsable::Unfit { pool: pool_name, error },
                })
            };
        }
        if let Some(needed) = needed::overlapping(&self.needed, cidr) {
            return if in_use() {
                PoolUse::Doubtful(PoolDoubt::Needed(needed.clone()))
            } else {
                PoolUse::None(NotUsable::Needed { pool: pool_name, needed: needed.clone() })
            };
        }
        let mut nodes = self.nodes.iter();
        let inside = nodes.find_map(|(node, known)| {
            Some((node, known.record.underlay.iter().find(|address| cidr.has(**address))?))
        });
        match inside {
            // The record of that node is refused instead: an underlay address must not be in the pod network.
            Some(_) if in_use() => PoolUse::Full,
            Some((node, address)) => {
                PoolUse::None(NotUsable::Underlay { pool: pool_name, address: *address, node: node.clone() })
            }
            None => PoolUse::Full,
        }
    }

    fn forget(&mut self, key: &str) {
        self.refused.remove(key);
        match key.parse() {
            Ok(Key::Cluster) => {
                self.remembered = self.settings();
                self.cluster = None;
            }
            Ok(Key::Pool(name)) => {
                self.pools.remove(&name);
                self.unusable.remove(&name);
                self.unusable_keys.remove(key);
                self.doubtful.remove(key);
            }
            Ok(Key::Node(name)) => drop(self.nodes.remove(&name)),
            Ok(Key::Block(block)) => drop(self.blocks.remove(&block)),
            Ok(Key::Fence(_, incarnation)) => drop(self.fences.remove(&incarnation)),
            Ok(Key::Reservation(address)) => drop(self.reservations.remove(&address)),
            Ok(Key::Inspection) => self.inspection = None,
            Ok(Key::Leader) => self.leader = None,
            Ok(Key::Address(..) | Key::Lease(_) | Key::Answer(_)) | Err(_) => {}
        }
    }

    /// The families in which every pod gets an address: those of the active pools. If no pool is active, those of all
    /// pools that are not retired, because pods without addresses are useless.
    pub fn families(&self) -> BTreeSet<Family> {
        let of = |is_wanted: fn(PoolState) -> bool| -> BTreeSet<Family> {
            let pools = self.pools.values().map(|pool| &pool.record);
            let wanted = pools.filter(|pool| pool.purpose == Purpose::Blocks && is_wanted(pool.state));
            wanted.map(|pool| pool.family()).collect()
        };
        let active = of(|state| state == PoolState::Active);
        if active.is_empty() { of(|state| state != PoolState::Retired) } else { active }
    }
}

/// Whether a node can use a pool.
enum PoolUse {
    /// Yes.
    Full,
    /// Yes, despite the problem.
    Doubtful(PoolDoubt),
    /// No, with the reason.
    None(NotUsable),
}

fn entry<T>(key: &Key, known: &Versioned<T>, encode: impl Fn(&T) -> Vec<u8>) -> Entry {
    Entry { key: key.to_string(), revision: known.revision, value: encode(&known.record) }
}

fn known<T>(record: T, revision: Revision) -> Versioned<T> {
    Versioned { record: Arc::new(record), revision }
}

#[cfg(test)]
mod tests;
