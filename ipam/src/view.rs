//! The cluster as this node sees it: the store's records, decoded, and those that were refused.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::Revision;
use crate::ids::Incarnation;
use crate::key::Key;
use crate::needed::{self, Needed};
use crate::pool::{InvalidPool, PoolState, Purpose};
use crate::record::{
    BlockRecord, ClusterRecord, FenceRecord, InspectionRecord, NodeRecord, Record, ReservationRecord, decode,
};
use crate::store::{Contents, Entry, KeyChange, Update};
use crate::{Block, Pool};
use polder_api::{Family, NodeName, PoolName};

/// A record as of the revision that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known<T> {
    /// What it says. Shared, because a view is copied at every change.
    pub record: Arc<T>,
    /// The revision.
    pub revision: Revision,
}

/// Where the view comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// Nowhere yet: nothing is known, not even that there is nothing.
    #[default]
    Nowhere,
    /// From what an earlier agent wrote down. It may be old: nothing may be deleted on its word.
    Snapshot,
    /// From the store.
    Store,
}

/// The records of the cluster.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Where it comes from.
    pub source: Source,
    /// The revision of the store that it shows.
    pub revision: Revision,
    /// Why nothing is heard from the store, while that is so.
    pub lost: Option<String>,
    /// The settings.
    pub cluster: Option<Known<ClusterRecord>>,
    /// The pools that can be used here.
    pub pools: BTreeMap<PoolName, Known<Pool>>,
    /// The pools that cannot: pods cannot have such addresses, or the node would lose addresses that it needs.
    unusable: BTreeMap<PoolName, Known<Pool>>,
    /// Their keys among the refused ones.
    unusable_keys: BTreeSet<String>,
    /// The pools that are used here although some of their addresses should not be pods': by key, with the reason.
    pub doubtful: BTreeMap<String, String>,
    /// The addresses of this node on the underlay.
    pub own: Vec<IpAddr>,
    /// What this node has to reach past the pods' network.
    pub needed: Vec<Needed>,
    /// The nodes.
    pub nodes: BTreeMap<NodeName, Known<NodeRecord>>,
    /// The claims.
    pub blocks: BTreeMap<Block, Known<BlockRecord>>,
    /// The nodes that were removed.
    pub fences: BTreeMap<Incarnation, Known<FenceRecord>>,
    /// The addresses that belong to workloads by name.
    pub reservations: BTreeMap<IpAddr, Known<ReservationRecord>>,
    /// The wish that every node looks at itself.
    pub inspection: Option<Known<InspectionRecord>>,
    /// The keys whose records were refused, with the reason. Where an earlier record could be read, it stays in force.
    pub refused: BTreeMap<String, String>,
    /// How often the store seems to have lost records: it lost the settings, which nobody deletes, or came back without
    /// nodes, claims or reservations that were known before, or as it was earlier.
    pub losses: u64,
    /// The last settings that were known: for a store that has lost them.
    pub remembered: Option<Settings>,
    /// The pools that the store had before it lost records, and has not any more.
    pub lost_pools: BTreeMap<PoolName, Arc<Pool>>,
}

/// What makes a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The settings.
    pub cluster: Arc<ClusterRecord>,
    /// The pools.
    pub pools: Vec<Arc<Pool>>,
}

impl View {
    /// A view of what was written down earlier.
    pub fn from_snapshot(contents: Contents) -> Self {
        let mut view = Self { source: Source::Snapshot, revision: contents.revision, ..Self::default() };
        view.take_all(contents.entries);
        view.settle_pools();
        view
    }

    /// Takes in an update.
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
        self.source = Source::Store;
        self.revision = contents.revision;
        self.own.clone_from(&before.own);
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
            || self.revision < before.revision && before.source == Source::Store
            || before.cluster.is_some() && self.cluster.is_none();
        self.losses = before.losses + u64::from(lost);
        let known = before.pools.iter().map(|(name, known)| (name.clone(), Arc::clone(&known.record)));
        self.lost_pools = before.lost_pools.clone().into_iter().chain(known).collect();
        self.lost_pools.retain(|name, _| !self.pools.contains_key(name) && !self.unusable.contains_key(name));
        if self.cluster.is_none() {
            self.remembered = before.settings();
        }
    }

    /// Goes on with what the record of that key said before it could not be read any more.
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

    /// The settings as they are, or as they were last known.
    pub fn settings(&self) -> Option<Settings> {
        let Some(cluster) = &self.cluster else { return self.remembered.clone() };
        Some(Settings {
            cluster: Arc::clone(&cluster.record),
            pools: self.every_pool().map(|pool| Arc::clone(&pool.record)).collect(),
        })
    }

    /// All pools, also those that cannot be used here.
    pub fn every_pool(&self) -> impl Iterator<Item = &Known<Pool>> {
        self.pools.values().chain(self.unusable.values())
    }

    /// The pool of that name, also one that cannot be used here.
    pub fn any_pool(&self, name: &PoolName) -> Option<&Known<Pool>> {
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
            Err(refused) => drop(self.refused.insert(key, refused.reason)),
        }
    }

    /// Takes in which addresses the node itself has, and what it has to reach.
    pub fn set_surroundings(&mut self, own: Vec<IpAddr>, needed: Vec<Needed>) {
        self.own = own;
        self.needed = needed;
        self.settle_pools();
    }

    /// Whether the change may make a pool usable, or another one unusable. Called before the change is made.
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

    /// Decides which pools can be used here.
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
                Use::Full => drop(self.pools.insert(name, pool)),
                Use::Doubtful(reason) => {
                    self.doubtful.insert(key, reason);
                    self.pools.insert(name, pool);
                }
                Use::None(reason) => {
                    self.refused.insert(key.clone(), reason);
                    self.unusable_keys.insert(key);
                    self.unusable.insert(name, pool);
                }
            }
        }
    }

    /// Whether the pool can be used here. One that nodes have blocks of stays in use as far as it can.
    fn use_of(&self, pool: &Pool) -> Use {
        let (name, cidr) = (&pool.name, pool.cidr());
        if let Some(address) = self.own.iter().find(|address| cidr.has(**address)) {
            return Use::None(format!(
                "{cidr} contains this node's own address {address}: node and pod ranges must not overlap. \
                 Remove it with polderctl pool remove {name}"
            ));
        }
        let in_use = || {
            let reserved = |address: &IpAddr| pool.purpose == Purpose::Reservations && cidr.has(*address);
            self.blocks.values().any(|claim| claim.record.pool == *name)
                || self.reservations.keys().any(reserved)
        };
        let otherwise = format!(
            "this node uses no address of it. Remove it with polderctl pool remove {name}, and add another \
             range"
        );
        if let Err(error) = pool.check_use() {
            let first = cidr.first();
            let never = first.is_multicast() || first.is_loopback() || first.is_unspecified();
            return if in_use() && !never {
                Use::Doubtful(format!("{error}. It is in use: drain it with polderctl pool drain {name}"))
            } else {
                let reason = match error {
                    InvalidPool::Special { special, .. } => format!("pods cannot use addresses of {special}"),
                    other => other.to_string(),
                };
                Use::None(format!("{reason}: {otherwise}"))
            };
        }
        if let Some(needed) = needed::overlapping(&self.needed, cidr) {
            return if in_use() {
                Use::Doubtful(format!(
                    "it overlaps {needed}: addresses there are not routed to pods on this node. Give one of the two \
                     another range"
                ))
            } else {
                Use::None(format!("it overlaps {needed}: {otherwise}"))
            };
        }
        let mut nodes = self.nodes.iter();
        let inside = nodes.find_map(|(node, known)| {
            Some((node, known.record.underlay.iter().find(|address| cidr.has(**address))?))
        });
        match inside {
            // Its record is refused: an address of the pods' network is no node's.
            Some(_) if in_use() => Use::Full,
            Some((node, address)) => {
                Use::None(format!("it contains {address}, the underlay address of node {node}: {otherwise}"))
            }
            None => Use::Full,
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
            Ok(Key::Address(..) | Key::Alive(_) | Key::Answer(_)) | Err(_) => {}
        }
    }

    /// The families of which every pod gets an address: those of the active pools. Where all pools are drained, nobody wants pods
    /// without addresses: then those of all pools that are in use.
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

/// Whether a pool can be used on a node.
enum Use {
    /// It can.
    Full,
    /// It is used, although there is something wrong with it.
    Doubtful(String),
    /// It cannot, and why.
    None(String),
}

fn known<T>(record: T, revision: Revision) -> Known<T> {
    Known { record: Arc::new(record), revision }
}

#[cfg(test)]
mod tests;
