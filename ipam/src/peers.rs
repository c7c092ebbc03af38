//! The other nodes, as far as their records can be believed.
//!
//! Anybody who can write to the store could write a record that draws other pods' traffic. So a record that does
//! not fit the others is refused and named. Of two that contradict each other the older one stands.

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
use crate::view::{Known, View};

mod fault;

pub use fault::{Fault, Identity};

/// Another node, with the blocks that are its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: NodeName,
    /// What it says of itself.
    pub record: Arc<NodeRecord>,
    /// Its blocks; and the reserved addresses that it holds, as blocks of one address.
    pub blocks: Vec<Block>,
}

/// A record that is not applied, and why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Its key.
    pub key: String,
    /// What is wrong with it.
    pub fault: Fault,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {} is not applied: {}", self.key, self.fault)
    }
}

impl Peer {
    /// Its underlay address of that family.
    pub fn underlay(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.record.underlay, family)
    }

    /// Its own address in the pod network.
    pub fn gateway(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.record.gateways, family)
    }

    /// The address of its probe endpoint.
    pub fn probe(&self, family: Family) -> Option<IpAddr> {
        of_family(&self.record.probes, family)
    }
}

fn of_family(addresses: &[IpAddr], family: Family) -> Option<IpAddr> {
    addresses.iter().copied().find(|address| Family::of(*address) == family)
}

/// What is believed of the records.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Believed {
    /// The other nodes.
    pub peers: Vec<Peer>,
    /// The blocks that this node itself claims.
    pub own_blocks: Vec<Block>,
    /// The records that are refused.
    pub problems: Vec<Problem>,
}

/// What node `me` believes of the records. `dead` are the nodes whose agents are known not to be alive.
pub fn believe(view: &View, me: &NodeName, dead: &BTreeSet<NodeName>) -> Believed {
    let mut problems: Vec<Problem> = view
        .refused
        .iter()
        .chain(&view.doubtful)
        .map(|(key, reason)| Problem { key: key.clone(), fault: Fault::Refused(reason.clone()) })
        .collect();
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
    Believed { peers, own_blocks, problems }
}

type Nodes<'a> = BTreeMap<&'a NodeName, &'a Known<NodeRecord>>;

fn believable_nodes<'a>(
    view: &'a View,
    me: &NodeName,
    dead: &BTreeSet<NodeName>,
    problems: &mut Vec<Problem>,
) -> Nodes<'a> {
    let mut oldest_first: Vec<_> = view.nodes.iter().collect();
    // What this node says of itself it knows to be true.
    oldest_first.sort_by_key(|(name, known)| (*name != me, known.revision));
    // What is a node's for its life goes by age, whoever lives.
    let mut owners: HashMap<Identity, &NodeName> = HashMap::new();
    for (name, known) in oldest_first.iter().filter(|(_, known)| check_shape(view, &known.record).is_ok()) {
        for identity in Identity::all(&known.record).filter(|identity| !identity.is_of_underlay()) {
            owners.entry(identity).or_insert(name);
        }
    }
    // An address on the underlay is whoever's uses it: a node can have got that of one that is gone, from DHCP.
    let (living, gone): (Vec<_>, Vec<_>) =
        oldest_first.into_iter().partition(|(name, _)| *name == me || !dead.contains(*name));
    let mut nodes = Nodes::new();
    for (name, known) in living.into_iter().chain(gone) {
        match check_node(view, name, &known.record, &owners) {
            Ok(()) => {
                owners.extend(Identity::all(&known.record).map(|identity| (identity, name)));
                nodes.insert(name, known);
            }
            Err(fault) => problems.push(Problem { key: Key::Node(name.clone()).to_string(), fault }),
        }
    }
    nodes
}

fn check_node(
    view: &View,
    name: &NodeName,
    record: &NodeRecord,
    owners: &HashMap<Identity, &NodeName>,
) -> Result<(), Fault> {
    let of_another = |identity| owners.get_key_value(&identity).filter(|(_, owner)| **owner != name);
    if let Some((identity, owner)) = Identity::all(record).find_map(of_another) {
        return Err(Fault::OfAnother { identity: *identity, owner: (*owner).clone() });
    }
    check_shape(view, record)
}

/// Whether the record makes sense by itself.
fn check_shape(view: &View, record: &NodeRecord) -> Result<(), Fault> {
    for family in Family::BOTH {
        for (kind, addresses) in
            [("underlay", &record.underlay), ("gateway", &record.gateways), ("probe", &record.probes)]
        {
            if addresses.iter().filter(|address| Family::of(**address) == family).count() > 1 {
                return Err(Fault::TooMany { family, kind });
            }
        }
    }
    for address in &record.underlay {
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(Fault::Unreachable(*address));
        }
        if let Some(pool) = view.pools.values().find(|pool| pool.record.cidr().has(*address)) {
            return Err(Fault::UnderlayInPool { address: *address, pool: pool.record.name.clone() });
        }
    }
    let first = record.vtep_mac.0[0];
    if first & 1 != 0 || record.vtep_mac.0 == [0; 6] {
        return Err(Fault::Mac(record.vtep_mac));
    }
    if !MTU_RANGE.contains(&record.mtu) {
        return Err(Fault::Mtu { mtu: record.mtu });
    }
    Ok(())
}

/// The record without the gateways that are in no pool: one family's pool may be gone, and the other's is none the
/// worse for it.
fn with_usable_gateways(
    view: &View,
    name: &NodeName,
    record: &Arc<NodeRecord>,
    problems: &mut Vec<Problem>,
) -> Arc<NodeRecord> {
    let in_a_pool = |gateway: &&IpAddr| view.pools.values().any(|pool| pool.record.cidr().has(**gateway));
    let (usable, stray): (Vec<_>, Vec<_>) = record.gateways.iter().partition(in_a_pool);
    let Some(first) = stray.first() else { return Arc::clone(record) };
    let key = Key::Node(name.clone()).to_string();
    problems.push(Problem { key, fault: Fault::StrayGateway(*first) });
    Arc::new(NodeRecord { gateways: usable, ..(**record).clone() })
}

/// The record without the probe addresses that are in none of the node's blocks.
fn with_usable_probes(
    name: &NodeName,
    record: Arc<NodeRecord>,
    blocks: &[Block],
    problems: &mut Vec<Problem>,
) -> Arc<NodeRecord> {
    let is_own = |probe: &&IpAddr| blocks.iter().any(|block| block.cidr().has(**probe));
    let (usable, stray): (Vec<_>, Vec<_>) = record.probes.iter().partition(is_own);
    let Some(first) = stray.first() else { return record };
    let key = Key::Node(name.clone()).to_string();
    problems.push(Problem { key, fault: Fault::StrayProbe(*first) });
    Arc::new(NodeRecord { probes: usable, ..(*record).clone() })
}

fn believable_blocks(
    view: &View,
    nodes: &Nodes<'_>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<NodeName, Vec<Block>> {
    let mut blocks: BTreeMap<NodeName, Vec<Block>> = BTreeMap::new();
    let overlapping = overlapping(view);
    for (block, known) in &view.blocks {
        let checked = match overlapping.get(block) {
            Some(first) => {
                let node = view.blocks[first].record.node.clone();
                Err(Fault::Overlaps { first: *first, node })
            }
            None => check_block(view, nodes, *block, &known.record),
        };
        match checked {
            Ok(()) => blocks.entry(known.record.node.clone()).or_default().push(*block),
            Err(fault) => problems.push(Problem { key: Key::Block(*block).to_string(), fault }),
        }
    }
    blocks
}

/// The reserved addresses, by the incarnation that holds them.
fn held_addresses(view: &View, problems: &mut Vec<Problem>) -> BTreeMap<Incarnation, Vec<Block>> {
    let mut held: BTreeMap<Incarnation, Vec<Block>> = BTreeMap::new();
    for (address, known) in &view.reservations {
        if reservation::pool_of(view, *address).is_none() {
            let key = Key::Reservation(*address).to_string();
            problems.push(Problem { key, fault: Fault::StrayReservation });
        } else if let Some(holder) = &known.record.holder {
            let block = Block::new(Cidr::around(*address, Family::of(*address).bits()));
            held.entry(holder.incarnation.clone()).or_default().push(block);
        }
    }
    held
}

/// The blocks that overlap one that was claimed before, with that one. Blocks of one pool are of one size, and pools
/// do not overlap, unless somebody wrote one by hand.
fn overlapping(view: &View) -> BTreeMap<Block, Block> {
    let mut later = BTreeMap::new();
    // In the order of the keys a block comes behind all that cover it, and those are the ones still open.
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

fn check_block(view: &View, nodes: &Nodes<'_>, block: Block, claim: &BlockRecord) -> Result<(), Fault> {
    let BlockRecord { node, incarnation, pool: name, .. } = claim;
    match view.pools.get(name) {
        None if view.any_pool(name).is_some() => return Err(Fault::UnusablePool(name.clone())),
        None => return Err(Fault::NoPool(name.clone())),
        Some(pool) if !pool.record.has_block(block) => {
            let (cidr, block_length) = (pool.record.cidr(), pool.record.block_length());
            return Err(Fault::NoBlockOf { pool: name.clone(), cidr, block_length });
        }
        Some(_) => {}
    }
    if view.fences.contains_key(incarnation) {
        return Err(Fault::Rests(node.clone()));
    }
    match nodes.get(node) {
        None => Err(Fault::NoNode(node.clone())),
        Some(known) if known.record.incarnation != *incarnation => Err(Fault::Earlier(node.clone())),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use polder_api::Mac;

    use crate::ids::{BootId, MachineId, Nonce};
    use crate::record::{PoolRecord, encode};
    use crate::store::{Contents, Entry, Update};

    use super::*;

    /// A cluster of `me`, `a` and `b` with a block each.
    struct Cluster {
        entries: Vec<Entry>,
    }

    fn node(n: u8) -> NodeRecord {
        NodeRecord {
            incarnation: Incarnation::new(format!("i{n}")),
            machine_id: MachineId::new(format!("m{n}")),
            boot_id: BootId::new("b"),
            underlay: vec![IpAddr::from([10, 1, 0, n])],
            gateways: vec![IpAddr::from([10, 244, n, 1])],
            probes: Vec::new(),
            vtep_mac: Mac([2, 0, 0, 0, 0, n]),
            mtu: 1450,
            version: "0".into(),
        }
    }

    impl Cluster {
        fn new() -> Self {
            let mut cluster = Self { entries: Vec::new() };
            cluster.put("/polder/v1/pools/p", encode(&PoolRecord::new("10.244.0.0/16".parse().unwrap())));
            for (name, n) in [("me", 0), ("a", 1), ("b", 2)] {
                cluster.node(name, &node(n));
                cluster.block(&format!("10.244.{n}.0/26"), name, n);
            }
            cluster
        }

        fn put(&mut self, key: &str, value: Vec<u8>) {
            self.entries.retain(|entry| entry.key != key);
            let revision = i64::try_from(self.entries.len()).unwrap() + 1;
            self.entries.push(Entry { key: key.to_owned(), value, revision: Revision::new(revision) });
        }

        fn node(&mut self, name: &str, record: &NodeRecord) {
            self.put(&format!("/polder/v1/nodes/{name}"), encode(record));
        }

        fn block(&mut self, block: &str, owner: &str, n: u8) {
            let record = BlockRecord {
                node: owner.parse().unwrap(),
                incarnation: Incarnation::new(format!("i{n}")),
                pool: "p".parse().unwrap(),
                nonce: Nonce::new("x"),
            };
            let key = Key::Block(Block::new(block.parse().unwrap()));
            self.put(&key.to_string(), encode(&record));
        }

        /// The names of the peers with the number of their blocks, and the only problem.
        fn seen(self) -> (Vec<(String, usize)>, String) {
            let mut view = View::default();
            view.apply(Update::Loaded(Contents { revision: Revision::new(99), entries: self.entries }));
            let believed = believe(&view, &"me".parse().unwrap(), &BTreeSet::new());
            assert!(believed.problems.len() < 2, "{:?}", believed.problems);
            assert_eq!(believed.own_blocks, [Block::new("10.244.0.0/26".parse().unwrap())]);
            let peers =
                believed.peers.iter().map(|peer| (peer.name.to_string(), peer.blocks.len())).collect();
            (peers, believed.problems.first().map(ToString::to_string).unwrap_or_default())
        }
    }

    fn both() -> Vec<(String, usize)> {
        vec![("a".to_owned(), 1), ("b".to_owned(), 1)]
    }

    #[test]
    fn the_other_nodes_are_peers_and_the_node_itself_is_none() {
        assert_eq!(Cluster::new().seen(), (both(), String::new()));
    }

    #[test]
    fn a_node_that_claims_what_is_anothers_is_refused_and_the_first_one_stands() {
        for (change, sign) in [
            (
                NodeRecord { underlay: node(1).underlay, ..node(3) },
                "underlay address 10.1.0.1 is that of node a",
            ),
            (
                NodeRecord { gateways: node(1).gateways, ..node(3) },
                "gateway address 10.244.1.1 is that of node a",
            ),
            (
                NodeRecord { vtep_mac: node(1).vtep_mac, ..node(3) },
                "MAC address 02:00:00:00:00:01 is that of node a",
            ),
            (
                NodeRecord { underlay: node(0).underlay, ..node(3) },
                "underlay address 10.1.0.0 is that of node me",
            ),
        ] {
            let mut cluster = Cluster::new();
            cluster.node("evil", &change);
            let (peers, problem) = cluster.seen();
            assert_eq!(peers, both());
            assert!(problem.contains("/polder/v1/nodes/evil") && problem.contains(sign), "{problem}");
        }
    }

    #[test]
    fn a_node_record_that_makes_no_sense_is_refused() {
        let multicast = Mac([1, 0, 0, 0, 0, 1]);
        for (change, sign) in [
            (NodeRecord { underlay: vec!["127.0.0.1".parse().unwrap()], ..node(3) }, "no address to reach"),
            (NodeRecord { underlay: vec!["10.244.9.9".parse().unwrap()], ..node(3) }, "inside pool p"),
            (NodeRecord { vtep_mac: multicast, ..node(3) }, "no MAC address of a single interface"),
            (NodeRecord { mtu: 100, ..node(3) }, "its MTU 100"),
            (
                NodeRecord { underlay: [node(3).underlay, node(4).underlay].concat(), ..node(3) },
                "more than one",
            ),
        ] {
            let mut cluster = Cluster::new();
            cluster.node("evil", &change);
            let (peers, problem) = cluster.seen();
            assert_eq!(peers, both());
            assert!(problem.contains(sign), "{problem}");
        }
    }

    #[test]
    fn a_gateway_in_no_pool_is_ignored_and_named_and_the_node_is_not() {
        let mut cluster = Cluster::new();
        let stray = NodeRecord {
            gateways: vec!["10.244.1.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            ..node(1)
        };
        cluster.node("a", &stray);
        let (peers, problem) = cluster.seen();
        assert_eq!(peers, both());
        assert!(problem.contains("its gateway address fd00::1 is in no pool"), "{problem}");
    }

    #[test]
    fn a_probe_address_in_no_block_of_its_node_is_ignored_and_named_and_the_node_is_not() {
        for (probe, sign) in
            [("10.244.1.9", ""), ("10.244.2.9", "10.244.2.9 is in no block"), ("10.9.0.1", "10.9.0.1")]
        {
            let mut cluster = Cluster::new();
            cluster.node("a", &NodeRecord { probes: vec![probe.parse().unwrap()], ..node(1) });
            let (peers, problem) = cluster.seen();
            assert_eq!(peers, both());
            assert!(problem.contains(sign) && problem.is_empty() == sign.is_empty(), "{problem}");
        }
    }

    #[test]
    fn a_claim_that_does_not_fit_is_refused_and_draws_no_traffic() {
        for (block, owner, n, sign) in [
            ("10.9.0.0/26", "a", 1, "pool p is 10.244.0.0/16"),
            ("10.9.0.0/26", "me", 0, "pool p is 10.244.0.0/16"),
            ("10.244.9.0/27", "a", 1, "cut into blocks of /26"),
            ("10.244.9.0/26", "nobody", 1, "nobody is not a node"),
            ("10.244.9.0/26", "a", 7, "earlier incarnation of node a"),
        ] {
            let mut cluster = Cluster::new();
            cluster.block(block, owner, n);
            let (peers, problem) = cluster.seen();
            assert_eq!(peers, both());
            assert!(problem.contains(sign), "{problem}");
        }
    }

    #[test]
    fn an_underlay_address_is_that_of_the_living_node_and_everything_else_that_of_the_older_record() {
        let mut cluster = Cluster::new();
        // `b` has got the address of `a`, and is the younger record.
        cluster.node("b", &NodeRecord { underlay: node(1).underlay, ..node(2) });
        let mut view = View::default();
        view.apply(Update::Loaded(Contents {
            revision: Revision::new(99),
            entries: cluster.entries.clone(),
        }));
        let names = |view: &View, dead: &[&str]| -> Vec<String> {
            let dead = dead.iter().map(|name| name.parse().unwrap()).collect();
            let believed = believe(view, &"me".parse().unwrap(), &dead);
            believed.peers.iter().map(|peer| peer.name.to_string()).collect()
        };
        assert_eq!(names(&view, &[]), ["a"]);
        assert_eq!(names(&view, &["b"]), ["a"]);
        assert_eq!(names(&view, &["a"]), ["b"]);
        assert_eq!(names(&view, &["a", "b"]), ["a"]);
        // Nobody's death gives his gateway address to another.
        for underlay in [node(2).underlay, node(1).underlay] {
            cluster.node("b", &NodeRecord { underlay, gateways: node(1).gateways, ..node(2) });
            let entries = cluster.entries.clone();
            view.apply(Update::Loaded(Contents { revision: Revision::new(100), entries }));
            assert_eq!(names(&view, &["a"]), ["a"]);
        }
    }

    #[test]
    fn of_two_claims_that_overlap_the_older_one_stands_whichever_is_larger() {
        for (first, second) in [("10.244.8.0/26", "10.244.8.0/25"), ("10.244.8.0/25", "10.244.8.64/26")] {
            let mut cluster = Cluster::new();
            cluster.block(first, "a", 1);
            cluster.block(second, "b", 2);
            let mut view = View::default();
            view.apply(Update::Loaded(Contents { revision: Revision::new(99), entries: cluster.entries }));
            let later = overlapping(&view);
            let (first, second) = (Block::new(first.parse().unwrap()), Block::new(second.parse().unwrap()));
            assert_eq!(later, BTreeMap::from([(second, first)]));
        }
    }
}
