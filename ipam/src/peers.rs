//! The other nodes, according to the records that pass validation.
//!
//! Any client that can write to the datastore could write a record that redirects the traffic of other pods. So a
//! record that contradicts others is refused and reported. Of two contradicting records the older one is used, except
//! for underlay addresses: there, the record of a node that is alive is preferred.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::ids::Incarnation;
use crate::key::Key;
use crate::record::{BlockRecord, NodeRecord};
use crate::reservation;
use crate::{Block, Cidr};
use polder_api::{Family, NodeName};

use crate::Revision;
use crate::record::MTU_RANGE;
use crate::view::{Versioned, View};

mod fault;

pub use fault::{RecordFault, UniqueAddress};

/// Another node, with its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: NodeName,
    /// The record that it wrote, without gateway and probe addresses that are not usable.
    pub record: Arc<NodeRecord>,
    /// Its blocks, and the reserved addresses that it holds as blocks of one address.
    pub blocks: Vec<Block>,
}

/// A problem with a record, which is not applied or only in part.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordProblem {
    /// Key of the record in the datastore.
    pub key: String,
    /// Result of the validation.
    pub fault: RecordFault,
}

impl fmt::Display for RecordProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, fault } = self;
        if fault.is_partial() {
            write!(f, "record {key} of the datastore: {fault}")
        } else {
            write!(f, "record {key} of the datastore is ignored: {fault}")
        }
    }
}

impl Peer {
    /// Its underlay address of this family.
    pub fn underlay(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.record.underlay, family)
    }

    /// Its gateway address of this family.
    pub fn gateway(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.record.gateways, family)
    }

    /// The address of its probe endpoint, of this family.
    pub fn probe(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.record.probes, family)
    }
}

fn of_family(addresses: &[IpAddr], family: Family) -> Option<IpAddr> {
    addresses.iter().copied().find(|address| Family::of(*address) == family)
}

/// The result of validating all records.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ValidatedRecords {
    /// The other nodes.
    pub peers: Vec<Peer>,
    /// The valid blocks of this node itself.
    pub own_blocks: Vec<Block>,
    /// The records with problems, sorted by key.
    pub problems: Vec<RecordProblem>,
}

/// Validates the records from the view of node `me`. `dead` contains the nodes whose agents are known not to be alive.
pub fn validate(view: &View, me: &NodeName, dead: &BTreeSet<NodeName>) -> ValidatedRecords {
    let problem = |key: &String, fault| RecordProblem { key: key.clone(), fault };
    let refused = view.refused.iter().map(|(key, why)| problem(key, RecordFault::Refused(why.clone())));
    let doubtful = view.doubtful.iter().map(|(key, why)| problem(key, RecordFault::Doubtful(why.clone())));
    let mut problems: Vec<RecordProblem> = refused.chain(doubtful).collect();
    let nodes = believable_nodes(view, me, dead, &mut problems);
    let mut blocks = believable_blocks(view, &nodes, &mut problems);
    let own_blocks = blocks.remove(me).unwrap_or_default();
    let mut held = held_addresses(view, &mut problems);
    let mut peers = Vec::new();
    for (name, known) in nodes.into_iter().filter(|(name, _)| *name != me) {
        let record = with_usable_gateways(view, name, &known.record, &mut problems);
        let mut blocks = blocks.remove(name).unwrap_or_default();
        let record = with_usable_probes(name, record, &blocks, &mut problems);
        blocks.extend(held.remove(&known.record.incarnation).into_iter().flatten());
        peers.push(Peer { name: name.clone(), record, blocks });
    }
    problems.sort();
    ValidatedRecords { peers, own_blocks, problems }
}

type Nodes<'a> = BTreeMap<&'a NodeName, &'a Versioned<NodeRecord>>;

fn believable_nodes<'a>(
    view: &'a View,
    me: &NodeName,
    dead: &BTreeSet<NodeName>,
    problems: &mut Vec<RecordProblem>,
) -> Nodes<'a> {
    let mut oldest_first: Vec<_> = view.nodes.iter().collect();
    // This node's own record takes precedence.
    oldest_first.sort_by_key(|(name, known)| (*name != me, known.revision));
    // For gateway addresses and tunnel MAC addresses, the oldest record takes precedence, alive or not.
    let mut owners: HashMap<UniqueAddress, &NodeName> = HashMap::new();
    for (name, known) in oldest_first.iter().filter(|(_, known)| check_shape(view, &known.record).is_ok()) {
        for identity in UniqueAddress::all(&known.record).filter(|identity| !identity.is_of_underlay()) {
            owners.entry(identity).or_insert(name);
        }
    }
    // For underlay addresses, nodes that are alive take precedence: DHCP can give them the address of a node that is
    // gone.
    let (living, gone): (Vec<_>, Vec<_>) =
        oldest_first.into_iter().partition(|(name, _)| *name == me || !dead.contains(*name));
    let mut nodes = Nodes::new();
    for (name, known) in living.into_iter().chain(gone) {
        match check_node(view, name, &known.record, &owners) {
            Ok(()) => {
                owners.extend(UniqueAddress::all(&known.record).map(|identity| (identity, name)));
                nodes.insert(name, known);
            }
            Err(fault) => problems.push(RecordProblem { key: Key::Node(name.clone()).to_string(), fault }),
        }
    }
    nodes
}

fn check_node(
    view: &View,
    name: &NodeName,
    record: &NodeRecord,
    owners: &HashMap<UniqueAddress, &NodeName>,
) -> Result<(), RecordFault> {
    let of_another = |identity| owners.get_key_value(&identity).filter(|(_, owner)| **owner != name);
    if let Some((identity, owner)) = UniqueAddress::all(record).find_map(of_another) {
        return Err(RecordFault::OfAnother { identity: *identity, owner: (*owner).clone() });
    }
    check_shape(view, record)
}

/// Checks the record by itself and against the pools.
fn check_shape(view: &View, record: &NodeRecord) -> Result<(), RecordFault> {
    for family in Family::BOTH {
        for (kind, addresses) in
            [("underlay", &record.underlay), ("gateway", &record.gateways), ("probe", &record.probes)]
        {
            if addresses.iter().filter(|address| Family::of(**address) == family).count() > 1 {
                return Err(RecordFault::TooMany { family, kind });
            }
        }
    }
    for address in &record.underlay {
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(RecordFault::Unreachable(*address));
        }
        if let Some(pool) = view.pools.values().find(|pool| pool.record.cidr().has(*address)) {
            return Err(RecordFault::UnderlayInPool { address: *address, pool: pool.record.name.clone() });
        }
    }
    let first = record.vtep_mac.0[0];
    if first & 1 != 0 || record.vtep_mac.0 == [0; 6] {
        return Err(RecordFault::Mac(record.vtep_mac));
    }
    if !MTU_RANGE.contains(&record.mtu) {
        return Err(RecordFault::Mtu { mtu: record.mtu });
    }
    Ok(())
}

/// The record without the gateways outside all pools: if the pool of one family is gone, the other family still works.
fn with_usable_gateways(
    view: &View,
    name: &NodeName,
    record: &Arc<NodeRecord>,
    problems: &mut Vec<RecordProblem>,
) -> Arc<NodeRecord> {
    let in_a_pool = |gateway: &&IpAddr| view.pools.values().any(|pool| pool.record.cidr().has(**gateway));
    let (usable, stray): (Vec<_>, Vec<_>) = record.gateways.iter().partition(in_a_pool);
    let Some(first) = stray.first() else { return Arc::clone(record) };
    let key = Key::Node(name.clone()).to_string();
    problems.push(RecordProblem { key, fault: RecordFault::StrayGateway(*first) });
    Arc::new(NodeRecord { gateways: usable, ..(**record).clone() })
}

/// The record without the probe addresses outside the node's blocks.
fn with_usable_probes(
    name: &NodeName,
    record: Arc<NodeRecord>,
    blocks: &[Block],
    problems: &mut Vec<RecordProblem>,
) -> Arc<NodeRecord> {
    let is_own = |probe: &&IpAddr| blocks.iter().any(|block| block.cidr().has(**probe));
    let (usable, stray): (Vec<_>, Vec<_>) = record.probes.iter().partition(is_own);
    let Some(first) = stray.first() else { return record };
    let key = Key::Node(name.clone()).to_string();
    problems.push(RecordProblem { key, fault: RecordFault::StrayProbe(*first) });
    Arc::new(NodeRecord { probes: usable, ..(*record).clone() })
}

fn believable_blocks(
    view: &View,
    nodes: &Nodes<'_>,
    problems: &mut Vec<RecordProblem>,
) -> BTreeMap<NodeName, Vec<Block>> {
    let mut blocks: BTreeMap<NodeName, Vec<Block>> = BTreeMap::new();
    let overlapping = overlapping(view);
    for (block, known) in &view.blocks {
        let checked = match overlapping.get(block) {
            Some(first) => {
                let node = view.blocks[first].record.node.clone();
                Err(RecordFault::Overlaps { first: *first, node })
            }
            None => check_block(view, nodes, *block, &known.record),
        };
        match checked {
            Ok(()) => blocks.entry(known.record.node.clone()).or_default().push(*block),
            Err(fault) => problems.push(RecordProblem { key: Key::Block(*block).to_string(), fault }),
        }
    }
    blocks
}

/// The reserved addresses, by the incarnation of their holder.
fn held_addresses(view: &View, problems: &mut Vec<RecordProblem>) -> BTreeMap<Incarnation, Vec<Block>> {
    let mut held: BTreeMap<Incarnation, Vec<Block>> = BTreeMap::new();
    for (address, known) in &view.reservations {
        if reservation::pool_of(view, *address).is_none() {
            let key = Key::Reservation(*address).to_string();
            problems.push(RecordProblem { key, fault: RecordFault::StrayReservation });
        } else if let Some(holder) = &known.record.holder {
            let block = Block::new(Cidr::containing(*address, Family::of(*address).bits()));
            held.entry(holder.incarnation.clone()).or_default().push(block);
        }
    }
    held
}

/// The blocks that overlap an earlier claim, each with the block of that claim. Blocks overlap only if a record was
/// written by hand: blocks of one pool have one size, and pools do not overlap.
fn overlapping(view: &View) -> BTreeMap<Block, Block> {
    let mut later = BTreeMap::new();
    // In key order, a block follows all blocks that contain it: those are kept in `open`.
    let mut open: Vec<(Block, Revision)> = Vec::new();
    for (block, known) in &view.blocks {
        open.retain(|(outer, _)| outer.cidr().covers(block.cidr()));
        for (outer, revision) in &open {
            if *revision < known.revision {
                later.insert(*block, *outer);
            } else {
                later.insert(*outer, *block);
            }
        }
        open.push((*block, known.revision));
    }
    later
}

fn check_block(view: &View, nodes: &Nodes<'_>, block: Block, claim: &BlockRecord) -> Result<(), RecordFault> {
    let BlockRecord { node, incarnation, pool: name, .. } = claim;
    match view.pools.get(name) {
        None if view.any_pool(name).is_some() => return Err(RecordFault::UnusablePool(name.clone())),
        None => return Err(RecordFault::NoPool(name.clone())),
        Some(pool) if !pool.record.has_block(block) => {
            let (cidr, block_length) = (pool.record.cidr(), pool.record.block_length());
            return Err(RecordFault::NoBlockOf { pool: name.clone(), cidr, block_length });
        }
        Some(_) => {}
    }
    if view.fences.contains_key(incarnation) {
        return Err(RecordFault::Rests(node.clone()));
    }
    match nodes.get(node) {
        None => Err(RecordFault::NoNode(node.clone())),
        Some(known) if known.record.incarnation != *incarnation => Err(RecordFault::Earlier(node.clone())),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
