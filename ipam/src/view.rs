//! The cluster as this node sees it: the store's records, decoded, and those that were refused.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::key::Key;
use crate::pool::{PoolState, Purpose};
use crate::record::{
    BlockRecord, ClusterRecord, FenceRecord, Incarnation, InspectionRecord, NodeRecord, Record,
    ReservationRecord, decode,
};
use crate::store::{Change, Contents, Entry, Update};
use crate::{Block, Pool};
use polder_api::{Family, NodeName, PoolName};

/// A record as of the revision that last changed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known<T> {
    /// What it says. Shared, because a view is copied at every change.
    pub record: Arc<T>,
    /// The revision.
    pub revision: i64,
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
    pub revision: i64,
    /// Why nothing is heard from the store, while that is so.
    pub lost: Option<String>,
    /// The settings.
    pub cluster: Option<Known<ClusterRecord>>,
    /// The pools that can be used here.
    pub pools: BTreeMap<PoolName, Known<Pool>>,
    /// The pools that cannot, because addresses of this node itself are inside: it would lose them to its pods.
    swallowing: BTreeMap<PoolName, Known<Pool>>,
    /// The addresses of this node on the underlay.
    pub own: Vec<IpAddr>,
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
        view
    }

    /// Takes in an update.
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Loaded(contents) => self.load(contents),
            Update::Changed { revision, changes } => {
                self.revision = revision;
                self.lost = None;
                changes.into_iter().for_each(|change| self.change(change));
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
        self.take_all(contents.entries);
        let unreadable: Vec<String> = self.refused.keys().cloned().collect();
        unreadable.iter().for_each(|key| self.keep(key, &before));
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
        self.lost_pools
            .retain(|name, _| !self.pools.contains_key(name) && !self.swallowing.contains_key(name));
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
            Ok(Key::Pool(name)) if !self.swallowing.contains_key(&name) => {
                kept(&mut self.pools, &before.pools, &name);
            }
            Ok(Key::Node(name)) => kept(&mut self.nodes, &before.nodes, &name),
            Ok(Key::Block(block)) => kept(&mut self.blocks, &before.blocks, &block),
            Ok(Key::Fence(incarnation)) => kept(&mut self.fences, &before.fences, &incarnation),
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
        self.pools.values().chain(self.swallowing.values())
    }

    fn take_all(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.change(Change { key: entry.key.clone(), entry: Some(entry) });
        }
    }

    fn change(&mut self, Change { key, entry }: Change) {
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
            Ok(Record::Pool(pool)) => self.take_pool(known(pool, revision)),
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

    /// Takes in which addresses the node itself has.
    pub fn set_own(&mut self, own: Vec<IpAddr>) {
        self.own = own;
        let pools = std::mem::take(&mut self.pools).into_values();
        let swallowing = std::mem::take(&mut self.swallowing).into_values();
        pools.chain(swallowing).for_each(|pool| self.take_pool(pool));
    }

    fn take_pool(&mut self, pool: Known<Pool>) {
        let (name, cidr) = (pool.record.name.clone(), pool.record.cidr());
        self.lost_pools.remove(&name);
        let key = Key::Pool(name.clone()).to_string();
        match self.own.iter().find(|address| cidr.has(**address)) {
            Some(address) => {
                let reason = format!(
                    "{cidr} has this node's own address {address} inside: nodes and pods need ranges of their own"
                );
                self.refused.insert(key, reason);
                self.swallowing.insert(name, pool);
            }
            None => {
                self.refused.remove(&key);
                self.pools.insert(name, pool);
            }
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
                self.swallowing.remove(&name);
            }
            Ok(Key::Node(name)) => drop(self.nodes.remove(&name)),
            Ok(Key::Block(block)) => drop(self.blocks.remove(&block)),
            Ok(Key::Fence(incarnation)) => drop(self.fences.remove(&incarnation)),
            Ok(Key::Reservation(address)) => drop(self.reservations.remove(&address)),
            Ok(Key::Inspection) => self.inspection = None,
            Ok(Key::Address(..) | Key::Alive(_) | Key::Answer(_)) | Err(_) => {}
        }
    }

    /// The families of which every pod gets an address: those of the pools that are in use.
    pub fn families(&self) -> BTreeSet<Family> {
        let in_use = |pool: &&Known<Pool>| {
            pool.record.state != PoolState::Retired && pool.record.purpose == Purpose::Blocks
        };
        self.pools.values().filter(in_use).map(|pool| pool.record.family()).collect()
    }
}

fn known<T>(record: T, revision: i64) -> Known<T> {
    Known { record: Arc::new(record), revision }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, revision: i64) -> Entry {
        Entry { key: format!("/polder/v1/{key}"), value: value.into(), revision }
    }

    fn changed(revision: i64, key: &str, value: Option<&str>) -> Update {
        let entry = value.map(|value| entry(key, value, revision));
        Update::Changed { revision, changes: vec![Change { key: format!("/polder/v1/{key}"), entry }] }
    }

    const POOL: &str = r#"{"cidr":"10.0.0.0/16","block_length":26,"state":"active"}"#;

    fn loaded() -> View {
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision: 7, entries: vec![entry("pools/p", POOL, 5)] }));
        view
    }

    #[test]
    fn a_record_that_becomes_unreadable_is_named_and_what_it_said_before_stays_in_force() {
        let mut view = loaded();
        view.apply(changed(8, "pools/p", Some("{}")));
        assert!(view.refused["/polder/v1/pools/p"].contains("missing field"));
        assert_eq!(view.pools.len(), 1);
        let entries = vec![entry("pools/p", "{}", 8)];
        view.apply(Update::Loaded(Contents { revision: 8, entries }));
        assert_eq!((view.pools.len(), view.refused.len()), (1, 1), "after another load, too");
        view.apply(changed(9, "pools/p", Some(POOL)));
        assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
        view.apply(changed(10, "pools/p", None));
        assert!(view.pools.is_empty());
    }

    #[test]
    fn the_settings_of_a_cluster_that_is_gone_from_the_store_are_remembered() {
        const CLUSTER: &str = r#"{"id":"c","backend":"auto","attach":"bridge","vxlan":{"vni":1,"port":8472},
            "masquerade":{"enabled":true,"except":[]}}"#;
        let mut view = loaded();
        view.apply(changed(8, "cluster", Some(CLUSTER)));
        let settings = view.settings().unwrap();
        assert_eq!((settings.cluster.id.to_string().as_str(), settings.pools.len()), ("c", 1));
        let empty = || Update::Loaded(Contents { revision: 1, entries: Vec::new() });
        view.apply(empty());
        view.apply(empty());
        assert_eq!((view.cluster.is_none(), view.settings()), (true, Some(settings)));
    }

    #[test]
    fn what_is_lost_without_anybodys_deleting_it_is_counted() {
        const CLAIM: &str = r#"{"node":"n","incarnation":"i","pool":"p","nonce":"x"}"#;
        let mut view = loaded();
        view.apply(changed(8, "blocks/4-0a000000-26", Some(CLAIM)));
        assert_eq!((view.blocks.len(), view.losses), (1, 0), "{:?}", view.refused);
        let empty = || Update::Loaded(Contents { revision: 9, entries: Vec::new() });
        view.apply(empty());
        assert_eq!(view.losses, 1);
        view.apply(empty());
        view.apply(changed(10, "blocks/4-0a000000-26", Some(CLAIM)));
        view.apply(changed(11, "blocks/4-0a000000-26", None));
        assert_eq!(view.losses, 1, "a claim that is deleted is not lost");
    }

    #[test]
    fn a_store_that_comes_back_as_it_was_earlier_has_lost_what_came_later() {
        let reservation = |generation: u64| format!(r#"{{"owner":"d/a","generation":{generation}}}"#);
        let load = |revision, generation| {
            let reservation = entry("reservations/10.9.0.1", &reservation(generation), revision);
            Update::Loaded(Contents { revision, entries: vec![entry("pools/p", POOL, 5), reservation] })
        };
        let mut view = loaded();
        view.apply(load(8, 2));
        assert_eq!(view.losses, 0);
        view.apply(load(9, 1));
        assert_eq!(view.losses, 1, "an earlier hand-over");
        view.apply(load(8, 1));
        assert_eq!(view.losses, 2, "an earlier revision");
    }

    #[test]
    fn a_new_load_replaces_everything() {
        let mut view = loaded();
        view.apply(changed(8, "strange", Some("{}")));
        view.apply(Update::Loaded(Contents { revision: 3, entries: Vec::new() }));
        assert_eq!((view.pools.len(), view.refused.len(), view.revision), (0, 0, 3));
    }

    #[test]
    fn what_is_known_stays_known_while_the_store_is_away() {
        let mut view = loaded();
        view.apply(Update::Lost { reason: "gone".into() });
        assert_eq!((view.pools.len(), view.lost.as_deref()), (1, Some("gone")));
        view.apply(Update::Back { revision: 7 });
        assert_eq!(view.lost, None);
    }

    #[test]
    fn pods_get_an_address_of_each_family_that_has_a_pool_in_use() {
        let mut view = loaded();
        assert_eq!(view.families(), [Family::V4].into());
        view.apply(changed(
            8,
            "pools/six",
            Some(r#"{"cidr":"fd00::/64","block_length":122,"state":"draining"}"#),
        ));
        assert_eq!(view.families(), [Family::V4, Family::V6].into());
        view.apply(changed(
            9,
            "pools/six",
            Some(r#"{"cidr":"fd00::/64","block_length":122,"state":"retired"}"#),
        ));
        assert_eq!(view.families(), [Family::V4].into());
    }

    #[test]
    fn a_pool_around_the_nodes_own_address_is_refused_as_long_as_that_is_so() {
        let mut view = loaded();
        view.set_own(vec!["10.0.9.9".parse().unwrap()]);
        assert!(view.pools.is_empty());
        assert!(view.refused["/polder/v1/pools/p"].contains("this node's own address 10.0.9.9"));
        view.apply(changed(8, "pools/p", Some(POOL)));
        assert!(view.pools.is_empty(), "a new revision makes it no better");
        view.set_own(vec!["10.1.9.9".parse().unwrap()]);
        assert_eq!((view.pools.len(), view.refused.len()), (1, 0));
    }
}
