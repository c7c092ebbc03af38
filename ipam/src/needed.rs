//! Addresses that a node must reach outside the pod network: etcd, gateways, its own addresses and its networks.
//!
//! Whatever the records contain, the kernel must never choose a Polder route for these addresses. Pure.

use std::fmt;
use std::net::IpAddr;

use polder_api::Family;

use crate::Cidr;

/// A host or a network that the node must reach.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequiredRange {
    /// The addresses. A host is a range of one.
    pub range: Cidr,
    /// The kind; its text follows the range in messages.
    pub what: RequiredFor,
}

/// The kind of a needed address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RequiredFor {
    /// A member of etcd, or a host that the agent needs to find it; the text describes it.
    Store(String),
    /// The next hop of a route of the host.
    Gateway,
    /// The network of the interface with this name.
    Network(String),
    /// An address of the node itself, on the interface with this name. The kernel prefers it to any route.
    Own(String),
}

impl RequiredRange {
    /// A single host.
    pub fn host(address: IpAddr, what: RequiredFor) -> Self {
        Self { range: Cidr::containing(address, Family::of(address).bits()), what }
    }

    /// Whether it is a single host: packets to it use the most specific route.
    pub fn is_host(&self) -> bool {
        !matches!(self.what, RequiredFor::Network(_))
    }
}

impl fmt::Display for RequiredRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            RequiredFor::Store(what) => write!(f, "{}, {what}", self.range.first()),
            RequiredFor::Gateway => write!(f, "{}, a gateway of this node's routes", self.range.first()),
            RequiredFor::Network(interface) => {
                write!(f, "{}, the network of this node's interface {interface}", self.range)
            }
            RequiredFor::Own(interface) => {
                write!(f, "{}, the address of this node's interface {interface}", self.range.first())
            }
        }
    }
}

/// The first entry that overlaps the range. Hosts come first, because they are more specific.
pub fn overlapping(needed: &[RequiredRange], range: Cidr) -> Option<&RequiredRange> {
    let mut inside: Vec<&RequiredRange> =
        needed.iter().filter(|needed| needed.range.overlaps(range)).collect();
    inside.sort_by_key(|needed| !needed.is_host());
    inside.first().copied()
}

/// The prefix length of the most specific network of the node that contains the range. 0 if there is no such network:
/// the range is then reached by a route that may be as wide as the default route.
pub fn connected_length(needed: &[RequiredRange], range: Cidr) -> u8 {
    let networks = needed.iter().filter(|network| !network.is_host());
    let around = networks.filter(|network| network.range.covers(range));
    around.map(|network| network.range.length()).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    fn needed() -> Vec<RequiredRange> {
        vec![
            RequiredRange { range: cidr("10.10.1.0/24"), what: RequiredFor::Network("eth0".to_owned()) },
            RequiredRange::host("10.10.1.254".parse().unwrap(), RequiredFor::Gateway),
            RequiredRange::host(
                "10.10.1.200".parse().unwrap(),
                RequiredFor::Store("the address of etcd".to_owned()),
            ),
            RequiredRange::host(
                "10.99.0.5".parse().unwrap(),
                RequiredFor::Store("the address of etcd".to_owned()),
            ),
        ]
    }

    #[test]
    fn an_overlap_names_the_needed_host_before_its_network() {
        let needed = needed();
        for (range, expected) in [
            ("10.10.1.192/26", "10.10.1.254, a gateway"),
            ("10.10.1.128/27", "10.10.1.0/24, the network of this node's interface eth0"),
            ("10.99.0.0/16", "10.99.0.5, the address of etcd"),
            ("10.0.0.0/8", "10.10.1.254"),
        ] {
            let found = overlapping(&needed, cidr(range)).unwrap().to_string();
            assert!(found.contains(expected), "{range}: {found}");
        }
        assert_eq!(overlapping(&needed, cidr("10.244.0.0/16")), None);
        assert_eq!(overlapping(&needed, cidr("fd00::/8")), None);
    }

    #[test]
    fn a_range_is_reached_by_the_narrowest_needed_network() {
        let needed = needed();
        for (range, length) in [("10.10.1.200/32", 24), ("10.10.1.0/24", 24), ("10.99.0.5/32", 0)] {
            assert_eq!(connected_length(&needed, cidr(range)), length, "{range}");
        }
    }
}
