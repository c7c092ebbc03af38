//! Shortage of addresses: the messages when none is left, and the warnings before.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use polder_api::{Family, NodeName, PerFamily, PoolName};

use crate::Cidr;
use crate::allocator::Counts;
use crate::pool::{BlockRequest, Labels, Pool, PoolState, Purpose, format_labels};
use crate::view::View;

/// The number of named nodes among those with the most blocks.
const MAX_NAMED_OWNERS: usize = 3;

/// The use in percent that leads to a warning.
const LEVELS: [u8; 2] = [80, 95];

/// The number of claimed blocks of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct ClaimedCount {
    /// Claimed by nodes of the cluster.
    pub owned: u64,
    /// Claimed by removed nodes.
    pub resting: u64,
    /// All blocks of the pool, claimed or not.
    pub total: u128,
}

impl ClaimedCount {
    /// Counts the claims of the pool.
    pub fn of(view: &View, pool: &Pool) -> Self {
        let mut claimed = Self { total: pool.last_block().saturating_add(1), ..Self::default() };
        for known in view.blocks.values().filter(|known| known.record.pool == pool.name) {
            let removed = u64::from(view.fences.contains_key(&known.record.incarnation));
            claimed.resting += removed;
            claimed.owned += 1 - removed;
        }
        claimed
    }

    /// The number of unclaimed blocks.
    pub fn free(self) -> u128 {
        self.total.saturating_sub(u128::from(self.owned + self.resting))
    }

    /// The ratio of claimed blocks, from 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "of 2^53 blocks one more or less is none")]
    pub fn ratio(self) -> f64 {
        (self.owned + self.resting) as f64 / self.total.max(1) as f64
    }
}

/// The number of claimed blocks of a pool, by node.
pub fn by_node(view: &View, pool: &PoolName) -> BTreeMap<NodeName, usize> {
    let mut blocks = BTreeMap::new();
    for known in view.blocks.values().filter(|known| known.record.pool == *pool) {
        *blocks.entry(known.record.node.clone()).or_default() += 1;
    }
    blocks
}

/// The nodes with the most blocks of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LargestOwners {
    /// The first few nodes, with the number of blocks of each.
    pub named: Vec<(NodeName, usize)>,
    /// The number of blocks of all other nodes.
    pub others: usize,
}

impl LargestOwners {
    /// The largest owners among these nodes.
    pub fn of(blocks: &BTreeMap<NodeName, usize>) -> Self {
        let mut largest: Vec<_> = blocks.iter().collect();
        largest.sort_by_key(|(name, count)| (Reverse(**count), *name));
        let others = largest.iter().skip(MAX_NAMED_OWNERS).map(|(_, count)| **count).sum();
        let named =
            largest.into_iter().take(MAX_NAMED_OWNERS).map(|(name, count)| (name.clone(), *count)).collect();
        Self { named, others }
    }
}

impl fmt::Display for LargestOwners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named: Vec<_> = self.named.iter().map(|(name, count)| format!("{name}: {count}")).collect();
        f.write_str(&named.join(", "))?;
        if self.others == 0 { Ok(()) } else { write!(f, ", others: {}", self.others) }
    }
}

/// A pool without a free block.
/// Remedy: add a pool with polderctl pool add, or remove nodes that are gone with polderctl node remove.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error(
    "pool {pool} ({cidr}) has no free block (claimed {} of {}{}{}{})",
    u128::from(claimed.owned + claimed.resting), claimed.total, by_owner(owners), of_removed(claimed.resting),
    unusable(claimed.free())
)]
pub struct AllClaimed {
    /// The name of the pool.
    pub pool: PoolName,
    /// The range of the pool.
    pub cidr: Cidr,
    /// The number of blocks, in total and of removed nodes.
    pub claimed: ClaimedCount,
    /// The nodes with the most blocks.
    pub owners: LargestOwners,
}

impl AllClaimed {
    /// The state of that pool.
    pub(crate) fn of(view: &View, pool: &Pool) -> Self {
        let owners = LargestOwners::of(&by_node(view, &pool.name));
        Self { pool: pool.name.clone(), cidr: pool.cidr(), claimed: ClaimedCount::of(view, pool), owners }
    }
}

fn by_owner(owners: &LargestOwners) -> String {
    if owners.named.is_empty() { String::new() } else { format!("; {owners}") }
}

fn of_removed(resting: u64) -> String {
    match resting {
        0 => String::new(),
        resting => format!("; of removed nodes: {resting}, see polderctl node list"),
    }
}

/// Blocks that overlap addresses that the node needs, or that another node has just claimed.
fn unusable(free: u128) -> String {
    match free {
        0 => String::new(),
        free => format!("; not usable on this node: {free}"),
    }
}

/// No pool is open to the node for the requested block; the pools that it cannot use are listed.
/// Remedy: add a pool for this node with polderctl pool add.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("there is no active {}{}", described(wanted), listed(closed))]
pub struct NoPool {
    /// The requested block.
    pub wanted: BlockRequest,
    /// The matching pools that are not open to the node, with the reason.
    pub closed: Vec<(PoolName, Cidr, ClosedReason)>,
}

impl NoPool {
    /// The state for a node with these labels.
    pub(crate) fn of(view: &View, labels: &Labels, wanted: &BlockRequest) -> Self {
        let fits = |pool: &&Pool| match wanted {
            BlockRequest::Any(family, None) => pool.family() == *family,
            BlockRequest::Any(family, Some(name)) => pool.family() == *family && pool.name == *name,
            BlockRequest::This(block) => pool.has_block(*block),
        };
        let pools = view.pools.values().map(|pool| &*pool.record).filter(fits);
        let closed =
            pools.filter_map(|pool| Some((pool.name.clone(), pool.cidr(), ClosedReason::to(labels, pool)?)));
        Self { wanted: wanted.clone(), closed: closed.collect() }
    }
}

fn described(wanted: &BlockRequest) -> String {
    match wanted {
        BlockRequest::Any(family, Some(pool)) => format!("{family} pool {pool} for this node"),
        BlockRequest::Any(family, None) => format!("{family} pool for this node"),
        BlockRequest::This(block) => format!("pool for this node with block {block}"),
    }
}

fn listed(closed: &[(PoolName, Cidr, ClosedReason)]) -> String {
    let all: Vec<_> = closed.iter().map(|(name, cidr, why)| format!("pool {name} ({cidr}) {why}")).collect();
    if all.is_empty() { String::new() } else { format!(": {}", all.join("; ")) }
}

/// Why a node cannot claim a block of a pool: a predicate for the pool in messages.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ClosedReason {
    /// Its addresses are reserved for workloads by name.
    /// Remedy: request an address of the pool by name, or use another pool.
    #[error("is for reservations")]
    Reservations,
    /// It is for nodes with other labels.
    #[error(transparent)]
    Foreign(#[from] LabelMismatch),
    /// It is draining: no block of it is claimed any more.
    /// Remedy: activate the pool again with polderctl pool add, or add another one.
    #[error("is draining")]
    Draining,
    /// It is retired.
    /// Remedy: use another pool.
    #[error("is retired")]
    Retired,
}

impl ClosedReason {
    /// The reason for a node with these labels, if any.
    fn to(labels: &Labels, pool: &Pool) -> Option<Self> {
        if pool.purpose == Purpose::Reservations {
            return Some(Self::Reservations);
        }
        LabelMismatch::to(labels, pool).map(Self::from).or(match pool.state {
            PoolState::Active => None,
            PoolState::Draining => Some(Self::Draining),
            PoolState::Retired => Some(Self::Retired),
        })
    }
}

/// A pool is for nodes with other labels.
/// Remedy: add a pool for the labels of this node with polderctl pool add.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("is for nodes with the labels {}; labels of this node: {}", format_labels(pool), or_none(node))]
pub struct LabelMismatch {
    /// The labels that the pool requires.
    pub pool: Labels,
    /// Those of the node.
    pub node: Labels,
}

impl LabelMismatch {
    /// The difference for a node with these labels, if any.
    pub fn to(labels: &Labels, pool: &Pool) -> Option<Self> {
        (!pool.serves(labels)).then(|| Self { pool: pool.nodes.clone(), node: labels.clone() })
    }
}

fn or_none(labels: &Labels) -> String {
    if labels.is_empty() { "none".to_owned() } else { format_labels(labels) }
}

/// No address of this family is left in the node's blocks of the requested pools.
/// Remedy: see the text that follows; usually, add a pool with polderctl pool add.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "no {family} address of this node is available (total {}: {} used, {} in cool-down, {} excluded, {} free)",
    total(counts), counts.used, counts.resting, counts.excluded, counts.free
)]
pub struct OwnShare {
    /// The family of the missing address.
    pub family: Family,
    /// The use of the node's addresses of that family and those pools.
    pub counts: Counts,
}

fn total(counts: &Counts) -> u64 {
    counts.used + counts.resting + counts.free + counts.excluded
}

/// The message when no address of this family is left in the node's blocks of the requested pools.
pub fn own_share(family: Family, counts: Counts) -> String {
    OwnShare { family, counts }.to_string()
}

/// The remedy when no address is left.
pub const REMEDY: &str = "Add a pool with polderctl pool add, or remove nodes that are permanently gone with polderctl \
                          node remove. While no address is available, the address of a deleted pod is reused after \
                          10 s";

/// A warning before a shortage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapacityWarning {
    /// The level that is reached, in percent.
    pub level: u8,
    /// The pool or the node.
    subject: String,
    /// The counted blocks or addresses, with a verb.
    what: String,
    used: u64,
    total: u128,
}

impl fmt::Display for CapacityWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, subject, what, used, total } = self;
        write!(
            f,
            "{subject}: {used} of {total} {what} (at least {level} %). Add a pool with polderctl pool add before none \
             is left"
        )
    }
}

/// The highest level that this use reaches.
fn level(used: u64, total: u128) -> Option<u8> {
    let percent = |level: &&u8| u128::from(used) * 100 >= total.saturating_mul(u128::from(**level));
    LEVELS.iter().rev().find(percent).copied().filter(|_| total > 0)
}

/// The warnings for a node with these labels: pools with most blocks claimed, and families without a free block in
/// which most of the node's addresses are used. No warning for the blocks of a pool with one block only.
pub fn warnings(view: &View, labels: &Labels, own: &PerFamily<Counts>) -> Vec<CapacityWarning> {
    let open: Vec<_> = view.pools.values().filter(|pool| pool.record.is_open_to(labels)).collect();
    let mut warnings = Vec::new();
    for pool in &open {
        let claimed = ClaimedCount::of(view, &pool.record);
        let used = claimed.owned + claimed.resting;
        if let Some(level) = level(used, claimed.total).filter(|_| claimed.total > 1) {
            let subject = format!("pool {} ({})", pool.record.name, pool.record.cidr());
            let what = "blocks are claimed".to_owned();
            warnings.push(CapacityWarning { level, subject, what, used, total: claimed.total });
        }
    }
    for (family, counts) in own.both() {
        let of_family = open.iter().filter(|pool| pool.record.family() == family);
        let is_left = of_family.map(|pool| ClaimedCount::of(view, &pool.record).free()).any(|free| free > 0);
        let (used, total) = (counts.used, u128::from(counts.used + counts.resting + counts.free));
        if let Some(level) = level(used, total).filter(|_| !is_left) {
            let subject = "this node".to_owned();
            let what = format!("{family} addresses are used, and no block is left to claim");
            warnings.push(CapacityWarning { level, subject, what, used, total });
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Revision;
    use crate::ids::{Incarnation, Nonce};
    use crate::record::{BlockRecord, PoolRecord, encode};
    use crate::store::{Contents, Entry, Update};
    use crate::{Block, key::Key};

    /// A cluster with pool `p`, of which `owners` have claimed the first blocks.
    fn cluster(record: PoolRecord, owners: &[&str]) -> View {
        let name: PoolName = "p".parse().unwrap();
        let pool = Pool::new(name.clone(), record.cidr, record.block_length, record.state).unwrap();
        let entry = |key: Key, value| Entry { key: key.to_string(), value, revision: Revision::new(1) };
        let mut entries = vec![entry(Key::Pool(name.clone()), encode(&record))];
        for (index, owner) in owners.iter().enumerate() {
            let claim = BlockRecord {
                node: owner.parse().unwrap(),
                incarnation: Incarnation::new(*owner),
                pool: name.clone(),
                nonce: Nonce::new("x"),
            };
            entries.push(entry(Key::Block(pool.block(index as u128)), encode(&claim)));
        }
        let mut view = View::default();
        view.apply(Update::Loaded(Contents { revision: Revision::new(9), entries }));
        view
    }

    fn record(cidr: &str, block_length: u8) -> PoolRecord {
        PoolRecord { block_length, ..PoolRecord::new(cidr.parse().unwrap()) }
    }

    fn pool(view: &View) -> &Pool {
        &view.pools.values().next().unwrap().record
    }

    #[test]
    fn the_message_about_a_full_pool_names_the_largest_owners() {
        let owners = ["n1", "n2", "n2", "n2", "n3", "n4", "n5", "n5"];
        let view = cluster(record("10.0.0.0/27", 30), &owners);
        assert_eq!(
            AllClaimed::of(&view, pool(&view)).to_string(),
            "pool p (10.0.0.0/27) has no free block (claimed 8 of 8; n2: 3, n5: 2, n1: 1, others: 2)"
        );
    }

    #[test]
    fn the_message_shows_the_labels_of_the_pool_and_of_the_node() {
        let mut view = cluster(record("10.0.0.0/24", 26), &[]);
        let mut changed = record("10.0.0.0/24", 26);
        changed.nodes.insert("zone".into(), "a".into());
        let wanted = BlockRequest::Any(Family::V4, Some("p".parse().unwrap()));
        let zone_b: Labels = [("zone".to_owned(), "b".to_owned())].into();
        view.apply(Update::Changed {
            revision: Revision::new(10),
            changes: vec![crate::store::KeyChange {
                key: "/polder/v1/pools/p".into(),
                entry: Some(Entry {
                    key: "/polder/v1/pools/p".into(),
                    value: encode(&changed),
                    revision: Revision::new(10),
                }),
            }],
        });
        let no_pool = |labels: &Labels| NoPool::of(&view, labels, &wanted).to_string();
        let why = no_pool(&zone_b);
        assert!(why.contains("labels zone=a; labels of this node: zone=b"), "{why}");
        assert!(no_pool(&Labels::new()).ends_with("labels of this node: none"));
        let zone_a: Labels = [("zone".to_owned(), "a".to_owned())].into();
        assert!(!no_pool(&zone_a).contains("labels"));
    }

    #[test]
    fn a_shortage_warning_appears_at_80_and_95_percent_of_the_blocks() {
        let levels = |claimed: usize| -> Vec<u8> {
            let view = cluster(record("10.0.0.0/24", 32), &vec!["n1"; claimed]);
            warnings(&view, &Labels::new(), &PerFamily::default())
                .iter()
                .map(|warning| warning.level)
                .collect()
        };
        assert_eq!(levels(204), [] as [u8; 0]);
        assert_eq!(levels(205), [80]);
        assert_eq!(levels(243), [80]);
        assert_eq!(levels(244), [95]);
        assert_eq!(levels(256), [95]);
    }

    #[test]
    fn the_free_addresses_of_the_node_count_only_without_a_free_block() {
        let used = |used| {
            PerFamily::new(Counts { used, resting: 2, free: 8 - used, excluded: 2 }, Counts::default())
        };
        let last = cluster(record("10.0.0.0/28", 28), &["n1"]);
        let texts = |view: &View, own| -> Vec<String> {
            warnings(view, &Labels::new(), &own).iter().map(ToString::to_string).collect()
        };
        assert_eq!(texts(&last, used(7)), [] as [&str; 0], "a pool of one block never had another");
        let warning = texts(&last, used(8));
        assert!(
            warning[0].contains("this node: 8 of 10 IPv4 addresses are used") && warning.len() == 1,
            "{warning:?}"
        );
        let another = cluster(record("10.0.0.0/24", 28), &["n1"]);
        assert_eq!(texts(&another, used(8)), [] as [&str; 0]);
    }

    #[test]
    fn blocks_of_removed_nodes_are_counted_separately() {
        let mut view = cluster(record("10.0.0.0/27", 30), &["n1", "n2"]);
        let key = "/polder/v1/fences/n2/n2".to_owned();
        let value = br#"{"node":"n2","machine_id":"m","boot_id":"b","pods":"unknown"}"#.to_vec();
        let entry = Some(Entry { key: key.clone(), value, revision: Revision::new(10) });
        view.apply(Update::Changed {
            revision: Revision::new(10),
            changes: vec![crate::store::KeyChange { key, entry }],
        });
        let claimed = ClaimedCount::of(&view, pool(&view));
        assert_eq!(claimed, ClaimedCount { owned: 1, resting: 1, total: 8 });
        assert_eq!(claimed.free(), 6);
        let vast = cluster(record("fd00::/32", 122), &["n1"]);
        assert_eq!(ClaimedCount::of(&vast, pool(&vast)).free(), (1 << 90) - 1);
        assert_eq!(Block::new("10.0.0.0/30".parse().unwrap()), pool(&view).block(0));
    }
}
