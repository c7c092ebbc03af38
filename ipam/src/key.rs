//! Where in the store each record is.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use polder_api::{Family, NodeName, PoolName};

use crate::ids::Incarnation;
use crate::prefix;
use crate::{Block, Cidr};

/// The keys from `start` up to but not including `end`, by their bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// The first key that is in it.
    pub start: String,
    /// The first key behind it.
    pub end: String,
}

impl Range {
    /// The keys that start with `prefix`, which must not be empty and not end with the last character there is.
    pub fn prefix(prefix: String) -> Self {
        let mut end = prefix.clone();
        let last = end.pop().and_then(|last| char::from_u32(u32::from(last) + 1));
        end.push(last.expect("a prefix that ends with '/'"));
        Self { start: prefix, end }
    }

    /// That key alone.
    pub fn single(key: String) -> Self {
        let end = format!("{key}\0");
        Self { start: key, end }
    }

    /// Whether the key is in it.
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
    /// The claim of a block. Sorts by address: the claims inside a range of addresses are a range of keys.
    Block(Block),
    /// What has an address, for people and tools.
    Address(NodeName, IpAddr),
    /// The lease of a living node.
    Alive(NodeName),
    /// A node that was removed: its name, and which of the nodes of that name.
    Fence(NodeName, Incarnation),
    /// An address that belongs to a workload by name.
    Reservation(IpAddr),
    /// The wish that every node looks at itself.
    Inspection,
    /// What a node has found that looked at itself.
    Answer(NodeName),
}

/// A key that names no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a key of a known kind")]
pub struct UnknownKey(String);

impl Key {
    /// All records that every agent follows: claims, settings, fences, inspections, nodes, pools, reservations. Addresses,
    /// leases and answers, which change with every pod and every minute or concern one reader alone, sort before them
    /// and are left out.
    pub fn followed() -> Range {
        // No further than the prefix: etcd refuses the whole range where a role ends before it.
        Range { start: below("b"), ..Range::prefix(prefix::in_use().to_owned()) }
    }

    /// The records of all addresses of a node.
    pub fn addresses_of(node: &NodeName) -> Range {
        Range::prefix(below(&format!("addresses/{node}/")))
    }

    /// The leases of all nodes.
    pub fn all_alive() -> Range {
        Range::prefix(below("alive/"))
    }

    /// The records of all addresses of all nodes.
    pub fn all_addresses() -> Range {
        Range::prefix(below("addresses/"))
    }

    /// What all nodes have answered.
    pub fn all_answers() -> Range {
        Range::prefix(below("answers/"))
    }

    /// All nodes.
    pub fn all_nodes() -> Range {
        Range::prefix(below("nodes/"))
    }

    /// All pools.
    pub fn all_pools() -> Range {
        Range::prefix(below("pools/"))
    }

    /// All reservations.
    pub fn all_reservations() -> Range {
        Range::prefix(below("reservations/"))
    }

    /// The claims of all blocks that start inside `cidr`, whatever their size.
    pub fn blocks_in(cidr: Cidr) -> Range {
        let end = format!("{}~", block_base(cidr.family(), cidr.last()));
        Range { start: block_base(cidr.family(), cidr.first()), end }
    }
}

/// That key of this cluster.
fn below(rest: &str) -> String {
    format!("{}{rest}", prefix::in_use())
}

/// The key of a block up to its length. The hex digits sort like the addresses, and `~` sorts behind everything
/// that can follow.
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
            Self::Alive(node) => write!(f, "{prefix}alive/{node}"),
            Self::Fence(node, incarnation) => write!(f, "{prefix}fences/{node}/{incarnation}"),
            Self::Reservation(ip) => write!(f, "{prefix}reservations/{ip}"),
            Self::Inspection => write!(f, "{prefix}inspection"),
            Self::Answer(node) => write!(f, "{prefix}answers/{node}"),
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
        ["answers", node] => Some(Key::Answer(node.parse().ok()?)),
        ["pools", name] => Some(Key::Pool(name.parse().ok()?)),
        ["nodes", name] => Some(Key::Node(name.parse().ok()?)),
        ["addresses", node, ip] => Some(Key::Address(node.parse().ok()?, ip.parse().ok()?)),
        ["alive", node] => Some(Key::Alive(node.parse().ok()?)),
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
            Some(Key::Block(Block::new(Cidr::around(base, length.parse().ok()?))))
        }
        _ => None,
    }
}

/// The name of a record as the store has it, whether or not it is of a known kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// A key.
    Key(Key),
    /// It is none.
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
    fn a_key_reads_as_it_was_written() {
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
            (Key::Alive("n1".parse().unwrap()), "/polder/v1/alive/n1"),
            (Key::Fence("n1".parse().unwrap(), Incarnation::new("i")), "/polder/v1/fences/n1/i"),
            (Key::Inspection, "/polder/v1/inspection"),
            (Key::Answer("n1".parse().unwrap()), "/polder/v1/answers/n1"),
        ] {
            assert_eq!(key.to_string(), text);
            assert_eq!(text.parse::<Key>().unwrap(), key);
            assert_eq!(Name::from(text), Name::Key(key));
        }
    }

    #[test]
    fn a_second_spelling_of_a_block_is_not_its_key() {
        for bad in
            ["4-0af40041-26", "4-AF40040-26", "4-0AF40040-26", "4-af40040-26", "4-0af40040-026", "5-00-1"]
        {
            let text = below(&format!("blocks/{bad}"));
            assert!(text.parse::<Key>().is_err(), "{bad} was taken");
            assert_eq!(Name::from(&*text).to_string(), text);
        }
    }

    #[test]
    fn the_claims_inside_a_range_are_a_range_of_keys() {
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
    fn agents_follow_what_concerns_all_and_not_what_changes_with_every_pod() {
        let followed = Key::followed();
        for key in [
            Key::Cluster,
            Key::Pool("p".parse().unwrap()),
            Key::Node("n".parse().unwrap()),
            Key::Inspection,
            block("0.0.0.0/26"),
        ] {
            assert!(followed.has(&key.to_string()), "{key}");
        }
        let node: NodeName = "n".parse().unwrap();
        let address = Key::Address(node.clone(), "10.0.0.1".parse().unwrap());
        for key in [Key::Alive(node.clone()), Key::Answer(node), address] {
            assert!(!followed.has(&key.to_string()), "{key}");
        }
        let granted = Range::prefix(prefix::in_use().to_owned());
        assert!(followed.start > granted.start && followed.end <= granted.end, "{followed:?}");
    }
}
