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
    let mut own_blocks = Vec::new();
    let mut held = held_addresses(view, &mut problems);
    let mut peers = Vec::new();
    for (candidate, mut blocks) in nodes.valid.iter().zip(blocks.drain(..)) {
        let Candidate { name, known, .. } = candidate;
        if *name == me {
            own_blocks = blocks;
            continue;
        }
        let record = with_usable_gateways(view, name, &known.record, &mut problems);
        let record = with_usable_probes(name, record, &blocks, &mut problems);
        blocks.extend(held.remove(&known.record.incarnation).into_iter().flatten());
        peers.push(Peer { name: (*name).clone(), record, blocks });
    }
    problems.sort();
    ValidatedRecords { peers, own_blocks, problems }
}

/// A node whose record is validated.
struct Candidate<'a> {
    name: &'a NodeName,
    known: &'a Versioned<NodeRecord>,
    /// Its position by name among all nodes.
    rank: usize,
    /// The result of [`check_shape`].
    shape: Result<(), RecordFault>,
}

/// The nodes with valid records.
struct Nodes<'a> {
    /// Sorted by name.
    valid: Vec<Candidate<'a>>,
    /// The position of each in `valid`.
    positions: HashMap<&'a NodeName, usize>,
}

fn believable_nodes<'a>(
    view: &'a View,
    me: &NodeName,
    dead: &BTreeSet<NodeName>,
    problems: &mut Vec<RecordProblem>,
) -> Nodes<'a> {
    let candidates = view.nodes.iter().enumerate().map(|(rank, (name, known))| {
        let shape = check_shape(view, &known.record);
        Candidate { name, known, rank, shape }
    });
    let mut oldest_first: Vec<Candidate<'_>> = candidates.collect();
    // This node's own record takes precedence.
    oldest_first.sort_by_cached_key(|candidate| (candidate.name != me, candidate.known.revision));
    // For gateway addresses and tunnel MAC addresses, the oldest record takes precedence, alive or not.
    let mut owners: HashMap<UniqueAddress, &NodeName> = HashMap::new();
    for Candidate { name, known, .. } in oldest_first.iter().filter(|candidate| candidate.shape.is_ok()) {
        for identity in UniqueAddress::all(&known.record).filter(|identity| !identity.is_of_underlay()) {
            owners.entry(identity).or_insert(name);
        }
    }
    // For underlay addresses, nodes that are alive take precedence: DHCP can give them the address of a node that is
    // gone.
    let is_alive = |candidate: &Candidate<'_>| candidate.name == me || !dead.contains(candidate.name);
    let (living, gone): (Vec<_>, Vec<_>) = oldest_first.into_iter().partition(is_alive);
    let mut valid = Vec::new();
    for candidate in living.into_iter().chain(gone) {
        match check_node(&candidate, &owners) {
            Ok(()) => {
                let identities = UniqueAddress::all(&candidate.known.record);
                owners.extend(identities.map(|identity| (identity, candidate.name)));
                valid.push(candidate);
            }
            Err(fault) => {
                problems.push(RecordProblem { key: Key::Node(candidate.name.clone()).to_string(), fault });
            }
        }
    }
    valid.sort_by_key(|candidate| candidate.rank);
    let positions =
        valid.iter().enumerate().map(|(position, candidate)| (candidate.name, position)).collect();
    Nodes { valid, positions }
}

fn check_node(
    candidate: &Candidate<'_>,
    owners: &HashMap<UniqueAddress, &NodeName>,
) -> Result<(), RecordFault> {
    let Candidate { name, known, shape, .. } = candidate;
    let of_another = |identity| owners.get_key_value(&identity).filter(|(_, owner)| *owner != name);
    if let Some((identity, owner)) = UniqueAddress::all(&known.record).find_map(of_another) {
        return Err(RecordFault::OfAnother { identity: *identity, owner: (*owner).clone() });
    }
    shape.clone()
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
    let Some(first) = record.gateways.iter().find(|gateway| !in_a_pool(gateway)) else {
        return Arc::clone(record);
    };
    let key = Key::Node(name.clone()).to_string();
    problems.push(RecordProblem { key, fault: RecordFault::StrayGateway(*first) });
    let gateways = record.gateways.iter().filter(in_a_pool).copied().collect();
    Arc::new(NodeRecord { gateways, ..(**record).clone() })
}

/// The record without the probe addresses outside the node's blocks.
fn with_usable_probes(
    name: &NodeName,
    record: Arc<NodeRecord>,
    blocks: &[Block],
    problems: &mut Vec<RecordProblem>,
) -> Arc<NodeRecord> {
    let is_own = |probe: &&IpAddr| blocks.iter().any(|block| block.cidr().has(**probe));
    let Some(first) = record.probes.iter().find(|probe| !is_own(probe)) else { return record };
    let key = Key::Node(name.clone()).to_string();
    problems.push(RecordProblem { key, fault: RecordFault::StrayProbe(*first) });
    let probes = record.probes.iter().filter(is_own).copied().collect();
    Arc::new(NodeRecord { probes, ..(*record).clone() })
}

/// The valid blocks of each valid node.
fn believable_blocks(view: &View, nodes: &Nodes<'_>, problems: &mut Vec<RecordProblem>) -> Vec<Vec<Block>> {
    let mut blocks: Vec<Vec<Block>> = vec![Vec::new(); nodes.valid.len()];
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
            Ok(position) => blocks[position].push(*block),
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

/// The position of the node that owns the block, among the valid nodes.
fn check_block(
    view: &View,
    nodes: &Nodes<'_>,
    block: Block,
    claim: &BlockRecord,
) -> Result<usize, RecordFault> {
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
    match nodes.positions.get(node) {
        None => Err(RecordFault::NoNode(node.clone())),
        Some(position) if nodes.valid[*position].known.record.incarnation != *incarnation => {
            Err(RecordFault::Earlier(node.clone()))
        }
        Some(position) => Ok(*position),
    }
}

#[cfg(test)]
mod tests;
