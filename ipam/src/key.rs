//! The datastore key of each record.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use polder_api::{Family, NodeName, PoolName};

use crate::ids::Incarnation;
use crate::prefix;
use crate::{Block, Cidr};

/// The keys from `start` (included) to `end` (excluded), in byte order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// The first key of the range.
    pub start: String,
    /// The first key after the range.
    pub end: String,
}

impl Range {
    /// The keys that start with `prefix`, which must not be empty. Its last character must have a successor, like
    /// '/'.
    pub fn prefix(prefix: String) -> Self {
        let mut end = prefix.clone();
        let last = end.pop().and_then(|last| char::from_u32(u32::from(last) + 1));
        end.push(last.expect("a prefix that ends with '/'"));
        Self { start: prefix, end }
    }

    /// The range of this key alone.
    pub fn single(key: String) -> Self {
        let end = format!("{key}\0");
        Self { start: key, end }
    }

    /// Whether the key is in the range.
    pub fn has(&self, key: &str) -> bool {
        self.start.as_str() <= key && key < self.end.as_str()
    }
}

/// The key of a record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The settings of the cluster.
    Cluster,
    /// A pool.
    Pool(PoolName),
    /// A node.
    Node(NodeName),
    /// The claim of a block. The keys sort by address: the claims inside a range of addresses are a range of keys.
    Block(Block),
    /// The published owner of an address, for people and tools.
    Address(NodeName, IpAddr),
    /// The lease record of a node, deleted when its lease expires.
    Lease(NodeName),
    /// The fence of a removed node: its name and incarnation.
    Fence(NodeName, Incarnation),
    /// The reservation of an address for a workload.
    Reservation(IpAddr),
    /// The request for a check on all nodes.
    Inspection,
    /// The check result of a node.
    Answer(NodeName),
    /// The agent that compares the nodes with Kubernetes, deleted when its lease expires.
    Leader,
}

/// A text that is not the key of a record.
/// Remedy: delete the key with etcdctl del, if no newer release wrote it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
#[error("{0} is not a key of a known kind")]
pub struct UnknownKey(String);

impl Key {
    /// All records that every agent watches: claims, settings, fences, inspections, the leader, nodes, pools,
    /// reservations.
    /// Addresses, leases and answers sort before them and are left out: they change with every pod or every minute,
    /// or concern one reader only.
    pub fn followed() -> Range {
        // Ends at the prefix: etcd rejects the whole range if the permission of the role ends before it.
        Range { start: below("b"), ..Range::prefix(prefix::in_use().to_owned()) }
    }

    /// The published addresses of a node.
    pub fn addresses_of(node: &NodeName) -> Range {
        Range::prefix(below(&format!("addresses/{node}/")))
    }

    /// The lease records of all nodes.
    pub fn all_leases() -> Range {
        Range::prefix(below("alive/"))
    }

    /// The published addresses of all nodes.
    pub fn all_addresses() -> Range {
        Range::prefix(below("addresses/"))
    }

    /// The check results of all nodes.
    pub fn all_answers() -> Range {
        Range::prefix(below("answers/"))
    }

    /// The records of all nodes.
    pub fn all_nodes() -> Range {
        Range::prefix(below("nodes/"))
    }

    /// The records of all pools.
    pub fn all_pools() -> Range {
        Range::prefix(below("pools/"))
    }

    /// All reservations.
    pub fn all_reservations() -> Range {
        Range::prefix(below("reservations/"))
    }

    /// The claims of all blocks of any size that start inside `cidr`.
    pub fn blocks_in(cidr: Cidr) -> Range {
        let end = format!("{}~", block_base(cidr.family(), cidr.last()));
        Range { start: block_base(cidr.family(), cidr.first()), end }
    }
}

/// The key with the cluster's prefix.
fn below(rest: &str) -> String {
    format!("{}{rest}", prefix::in_use())
}

/// The key of a block without its length. The hexadecimal digits sort like the addresses, and `~` sorts after
/// everything that can follow.
fn block_base(family: Family, base: IpAddr) -> String {
    let (family, hex) = match base {
        IpAddr::V4(v4) => (family, format!("{:08x}", v4.to_bits())),
        IpAddr::V6(v6) => (family, format!("{:032x}", v6.to_bits())),
    };
    let number = if family == Family::V4 { '4' } else { '6' };
    below(&format!("blocks/{number}-{hex}"))
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = prefix::in_use();
        match self {
            Self::Cluster => write!(f, "{prefix}cluster"),
            Self::Pool(name) => write!(f, "{prefix}pools/{name}"),
            Self::Node(name) => write!(f, "{prefix}nodes/{name}"),
            Self::Block(block) => {
                let cidr = block.cidr();
                write!(f, "{}-{}", block_base(cidr.family(), cidr.first()), cidr.length())
            }
            Self::Address(node, ip) => write!(f, "{prefix}addresses/{node}/{ip}"),
            Self::Lease(node) => write!(f, "{prefix}alive/{node}"),
            Self::Fence(node, incarnation) => write!(f, "{prefix}fences/{node}/{incarnation}"),
            Self::Reservation(ip) => write!(f, "{prefix}reservations/{ip}"),
            Self::Inspection => write!(f, "{prefix}inspection"),
            Self::Answer(node) => write!(f, "{prefix}answers/{node}"),
            Self::Leader => write!(f, "{prefix}leader"),
        }
    }
}

impl FromStr for Key {
    type Err = UnknownKey;
    fn from_str(text: &str) -> Result<Self, UnknownKey> {
        parse(text).filter(|key| key.to_string() == text).ok_or_else(|| UnknownKey(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Key> {
    let parts: Vec<_> = text.strip_prefix(prefix::in_use())?.split('/').collect();
    match parts.as_slice() {
        ["cluster"] => Some(Key::Cluster),
        ["inspection"] => Some(Key::Inspection),
        ["leader"] => Some(Key::Leader),
        ["answers", node] => Some(Key::Answer(node.parse().ok()?)),
        ["pools", name] => Some(Key::Pool(name.parse().ok()?)),
        ["nodes", name] => Some(Key::Node(name.parse().ok()?)),
        ["addresses", node, ip] => Some(Key::Address(node.parse().ok()?, ip.parse().ok()?)),
        ["alive", node] => Some(Key::Lease(node.parse().ok()?)),
        ["fences", node, incarnation] if !incarnation.is_empty() => {
            Some(Key::Fence(node.parse().ok()?, Incarnation::new(*incarnation)))
        }
        ["reservations", ip] => Some(Key::Reservation(ip.parse().ok()?)),
        ["blocks", block] => {
            let (family, rest) = block.split_once('-')?;
            let (hex, length) = rest.split_once('-')?;
            let base: IpAddr = match family {
                "4" => std::net::Ipv4Addr::from_bits(u32::from_str_radix(hex, 16).ok()?).into(),
                "6" => std::net::Ipv6Addr::from_bits(u128::from_str_radix(hex, 16).ok()?).into(),
                _ => return None,
            };
            Some(Key::Block(Block::new(Cidr::containing(base, length.parse().ok()?))))
        }
        _ => None,
    }
}

/// The name of a record in the datastore, of a known or an unknown kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// A key of a known kind.
    Key(Key),
    /// Any other name.
    Unknown(String),
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        text.parse().map_or_else(|UnknownKey(text)| Self::Unknown(text), Self::Key)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => key.fmt(f),
            Self::Unknown(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> Key {
        Key::Block(Block::new(text.parse().unwrap()))
    }

    #[test]
    fn a_key_is_parsed_as_it_was_formatted() {
        for (key, text) in [
            (Key::Cluster, "/polder/v1/cluster"),
            (Key::Pool("main".parse().unwrap()), "/polder/v1/pools/main"),
            (Key::Node("n1".parse().unwrap()), "/polder/v1/nodes/n1"),
            (block("10.244.0.64/26"), "/polder/v1/blocks/4-0af40040-26"),
            (block("fd00::40/122"), "/polder/v1/blocks/6-fd000000000000000000000000000040-122"),
            (
                Key::Address("n1".parse().unwrap(), "10.244.0.65".parse().unwrap()),
                "/polder/v1/addresses/n1/10.244.0.65",
            ),
            (Key::Lease("n1".parse().unwrap()), "/polder/v1/alive/n1"),
            (Key::Fence("n1".parse().unwrap(), Incarnation::new("i")), "/polder/v1/fences/n1/i"),
            (Key::Inspection, "/polder/v1/inspection"),
            (Key::Leader, "/polder/v1/leader"),
            (Key::Answer("n1".parse().unwrap()), "/polder/v1/answers/n1"),
        ] {
            assert_eq!(key.to_string(), text);
            assert_eq!(text.parse::<Key>().unwrap(), key);
            assert_eq!(Name::from(text), Name::Key(key));
        }
    }

    #[test]
    fn a_block_key_in_another_spelling_is_refused() {
        for bad in
            ["4-0af40041-26", "4-AF40040-26", "4-0AF40040-26", "4-af40040-26", "4-0af40040-026", "5-00-1"]
        {
            let text = below(&format!("blocks/{bad}"));
            assert!(text.parse::<Key>().is_err(), "{bad} was taken");
            assert_eq!(Name::from(&*text).to_string(), text);
        }
    }

    #[test]
    fn the_keys_of_the_claims_inside_a_range_form_one_range() {
        let range = Key::blocks_in("10.244.0.64/26".parse().unwrap());
        for (other, inside) in [
            ("10.244.0.64/26", true),
            ("10.244.0.64/28", true),
            ("10.244.0.127/32", true),
            ("10.244.0.128/26", false),
            ("10.244.0.63/32", false),
            ("10.244.0.0/26", false),
        ] {
            assert_eq!(range.has(&block(other).to_string()), inside, "{other}");
        }
    }

    #[test]
    fn agents_watch_shared_records_but_not_those_of_every_pod() {
        let followed = Key::followed();
        for key in [
            Key::Cluster,
            Key::Pool("p".parse().unwrap()),
            Key::Node("n".parse().unwrap()),
            Key::Inspection,
            Key::Leader,
            block("0.0.0.0/26"),
        ] {
            assert!(followed.has(&key.to_string()), "{key}");
        }
        let node: NodeName = "n".parse().unwrap();
        let address = Key::Address(node.clone(), "10.0.0.1".parse().unwrap());
        for key in [Key::Lease(node.clone()), Key::Answer(node), address] {
            assert!(!followed.has(&key.to_string()), "{key}");
        }
        let granted = Range::prefix(prefix::in_use().to_owned());
        assert!(followed.start > granted.start && followed.end <= granted.end, "{followed:?}");
    }
}
