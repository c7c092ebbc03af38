//! The sets of the packet filter: their names and the types of their elements.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use polder_api::Family;
use polder_ipam::Pool;
use polder_netlink::nft::{ElementKey, Set, TableKind};

/// The sets of one family.
#[derive(Debug, Clone, Copy)]
pub struct Sets {
    /// The MAC address of every pod with each of its addresses.
    pub senders: &'static str,
    /// The underlay addresses from which tunnel packets are accepted.
    pub peers: &'static str,
    /// All pools.
    pub pools: &'static str,
    /// The node's own underlay addresses.
    pub underlay: &'static str,
    /// The node's own blocks.
    pub local: &'static str,
    /// The node's own addresses in the pod network.
    pub own: &'static str,
    /// The networks to which pods keep their source address.
    pub unmasqueraded: &'static str,
    /// The host's addresses, which have the host ports.
    pub host: &'static str,
    /// A map from host ports on all addresses of the host to pods.
    pub ports: &'static str,
    /// A map from host ports on one address of the host to pods.
    pub address_ports: &'static str,
    /// The address of each pod with host ports, as pair of source and destination.
    pub hairpins: &'static str,
}

impl Sets {
    /// The set names of that family.
    pub const fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self {
                senders: "senders4",
                peers: "peers4",
                pools: "pools4",
                underlay: "underlay4",
                local: "local4",
                own: "own4",
                unmasqueraded: "unmasqueraded4",
                host: "host4",
                ports: "ports4",
                address_ports: "address_ports4",
                hairpins: "hairpins4",
            },
            Family::V6 => Self {
                senders: "senders6",
                peers: "peers6",
                pools: "pools6",
                underlay: "underlay6",
                local: "local6",
                own: "own6",
                unmasqueraded: "unmasqueraded6",
                host: "host6",
                ports: "ports6",
                address_ports: "address_ports6",
                hairpins: "hairpins6",
            },
        }
    }
}

/// The declarations of the sets of one family.
pub fn declared(family: Family) -> Vec<Set> {
    let sets = Sets::of(family);
    let of = |table, name, key| Set { table, name, key };
    let mut all = vec![
        of(TableKind::Ip, sets.senders, ElementKey::Sender(family)),
        of(TableKind::Ip, sets.peers, ElementKey::Address(family)),
        of(TableKind::Ip, sets.pools, ElementKey::Network(family)),
        of(TableKind::Ip, sets.underlay, ElementKey::Address(family)),
        of(TableKind::Ip, sets.local, ElementKey::Network(family)),
        of(TableKind::Ip, sets.own, ElementKey::Address(family)),
        of(TableKind::Ip, sets.unmasqueraded, ElementKey::Network(family)),
        of(TableKind::Ip, sets.host, ElementKey::Address(family)),
        of(TableKind::Ip, sets.ports, ElementKey::Port(family)),
        of(TableKind::Ip, sets.address_ports, ElementKey::AddressPort(family)),
        of(TableKind::Ip, sets.hairpins, ElementKey::AddressPair(family)),
    ];
    if family == Family::V4 {
        all.push(of(TableKind::Arp, sets.senders, ElementKey::Sender(family)));
    }
    all
}

/// Family and prefix length of the networks in which peers have addresses: blocks of the pools, and single addresses.
pub type Lengths = BTreeSet<(Family, u8)>;

/// The lengths for pods with addresses of these pools.
pub fn lengths<'a>(pools: impl IntoIterator<Item = &'a Pool>) -> Lengths {
    let single = Family::BOTH.map(|family| (family, family.bits()));
    pools.into_iter().map(|pool| (pool.family(), pool.block_length())).chain(single).collect()
}

/// The set of inner source networks that peers may use in tunnels, for one family each and one prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TunnelSources {
    /// The family of the underlay.
    pub tunnel: Family,
    /// The family of the packets in the tunnel.
    pub carried: Family,
    /// The prefix length of the networks.
    pub length: u8,
}

/// The names of all possible sets.
static TUNNEL_SOURCES: LazyLock<BTreeMap<TunnelSources, String>> = LazyLock::new(|| {
    let number = |family| if family == Family::V4 { 4 } else { 6 };
    let mut all = BTreeMap::new();
    for tunnel in Family::BOTH {
        for carried in Family::BOTH {
            for length in 0..=carried.bits() {
                let name = format!("bearers{}_{}_{length}", number(tunnel), number(carried));
                all.insert(TunnelSources { tunnel, carried, length }, name);
            }
        }
    }
    all
});

impl TunnelSources {
    /// The sets for networks of these lengths, for both tunnel families.
    pub fn all(lengths: &Lengths) -> Vec<Self> {
        let of = |tunnel| {
            lengths.iter().map(move |(carried, length)| Self { tunnel, carried: *carried, length: *length })
        };
        Family::BOTH.into_iter().flat_map(of).collect()
    }

    /// The name of the set, e.g. `bearers4_6_64`: tunnel family, carried family and prefix length.
    pub fn name(&self) -> &'static str {
        TUNNEL_SOURCES.get(self).map(String::as_str).expect("a prefix is no longer than an address")
    }

    /// The declaration of the set.
    pub fn set(&self) -> Set {
        Set {
            table: TableKind::Ip,
            name: self.name(),
            key: ElementKey::TunnelSource(self.tunnel, self.carried),
        }
    }
}
