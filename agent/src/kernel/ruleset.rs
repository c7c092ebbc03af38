//! The packet filter: what is in table `inet polder`, and why.
//!
//! It judges only what comes from a pod, what claims to come through a tunnel, and the source address of what leaves
//! for the world. There is no chain for forwarded traffic: in nftables accepting a packet does not keep another
//! table from dropping it, so a rule that accepts ours would promise what it cannot hold. Chains of others that drop it are
//! found and named instead ([`crate::host::firewall`]).

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, Mac, POD_INTERFACE_PREFIX};
use polder_ipam::record::{AttachMode, ClusterRecord};
use polder_netlink::nft::{
    Chain, Element, Elements, Hook, Interface, Key, Match, Rule, Set, Table, Transaction, Verdict, Within,
};

/// The sets of one family.
#[derive(Debug, Clone, Copy)]
pub struct Sets {
    /// Every pod's MAC address with its address.
    pub senders: &'static str,
    /// The underlay addresses from which tunnels come.
    pub peers: &'static str,
    /// All pools.
    pub pools: &'static str,
    /// The node's own blocks.
    pub local: &'static str,
    /// Where pods keep their own address.
    pub unmasqueraded: &'static str,
}

impl Sets {
    /// Those of that family.
    pub const fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self {
                senders: "senders4",
                peers: "peers4",
                pools: "pools4",
                local: "local4",
                unmasqueraded: "unmasqueraded4",
            },
            Family::V6 => Self {
                senders: "senders6",
                peers: "peers6",
                pools: "pools6",
                local: "local6",
                unmasqueraded: "unmasqueraded6",
            },
        }
    }
}

/// The name of the table.
pub const NAME: &str = "polder";

/// The transaction that takes the table away, whatever the cluster's settings were.
pub fn delete() -> Transaction {
    Table { name: NAME, sets: Vec::new(), chains: Vec::new() }.delete()
}

/// The table for a cluster with these settings.
pub fn table(cluster: &ClusterRecord) -> Table {
    Table {
        name: NAME,
        sets: Family::BOTH.into_iter().flat_map(sets).collect(),
        chains: vec![
            Chain { name: "from_pods", hook: Hook::Raw, rules: from_pods(cluster) },
            Chain { name: "tunnels", hook: Hook::Input, rules: tunnels(cluster) },
            Chain { name: "masquerade", hook: Hook::SourceNat, rules: masquerade(cluster) },
        ],
    }
}

fn sets(family: Family) -> [Set; 5] {
    let sets = Sets::of(family);
    [
        Set { name: sets.senders, key: Key::Sender(family) },
        Set { name: sets.peers, key: Key::Address(family) },
        Set { name: sets.pools, key: Key::Network(family) },
        Set { name: sets.local, key: Key::Network(family) },
        Set { name: sets.unmasqueraded, key: Key::Network(family) },
    ]
}

/// Where pods are.
fn pods(cluster: &ClusterRecord) -> Interface {
    match cluster.attach {
        AttachMode::Bridge => Interface::Named(BRIDGE),
        AttachMode::Routed => Interface::Prefixed(POD_INTERFACE_PREFIX),
    }
}

fn from_pods(cluster: &ClusterRecord) -> Vec<Rule> {
    let pods = pods(cluster);
    let mut rules = Vec::new();
    for family in Family::BOTH {
        let sets = Sets::of(family);
        rules.push(Rule {
            comment: "a pod sends under its own address only",
            matches: vec![
                Match::Input(pods),
                Match::Family(family),
                Match::Sender(Within::NotSet(family, sets.senders)),
            ],
            verdict: Verdict::Drop,
        });
        // Masqueraded, it would reach another node's tunnel as if this node had sent it. Inside the pods' own
        // addresses the port is like any other.
        rules.push(Rule {
            comment: "a pod speaks to no node's tunnel",
            matches: vec![
                Match::Input(pods),
                Match::UdpTo(cluster.vxlan.port),
                Match::Family(family),
                Match::Destination(Within::NotSet(family, sets.pools)),
            ],
            verdict: Verdict::Drop,
        });
    }
    rules
}

fn tunnels(cluster: &ClusterRecord) -> Vec<Rule> {
    let rule = |family| Rule {
        comment: "only a peer's tunnel ends here",
        matches: vec![
            Match::UdpTo(cluster.vxlan.port),
            Match::VxlanOf(cluster.vxlan.vni),
            Match::Family(family),
            Match::Source(Within::NotSet(family, Sets::of(family).peers)),
        ],
        verdict: Verdict::Drop,
    };
    Family::BOTH.map(rule).into()
}

fn masquerade(cluster: &ClusterRecord) -> Vec<Rule> {
    if !cluster.masquerade.enabled {
        return Vec::new();
    }
    let rule = |family| Rule {
        comment: "a pod leaves for the world with its node's address",
        matches: vec![
            // A pod of this node is not the world, wherever its address is from.
            Match::NotOutput(pods(cluster)),
            Match::Family(family),
            Match::Source(Within::Set(family, Sets::of(family).local)),
            Match::Destination(Within::NotSet(family, Sets::of(family).unmasqueraded)),
            Match::Unicast,
        ],
        verdict: Verdict::Masquerade,
    };
    Family::BOTH.map(rule).into()
}

/// What the sets are filled with.
#[derive(Debug, Default)]
pub struct Members {
    /// Every pod's MAC address with each of its addresses.
    pub senders: Vec<(Mac, IpAddr)>,
    /// The underlay addresses of all peers.
    pub peers: Vec<IpAddr>,
    /// All pools.
    pub pools: Vec<IpNetwork>,
    /// The node's own blocks.
    pub local: Vec<IpNetwork>,
    /// Besides the pools: underlay addresses of direct peers, and what was configured.
    pub unmasqueraded: Vec<IpNetwork>,
}

/// The elements of all sets.
pub fn elements(members: &Members) -> Elements {
    let mut elements = Elements::new();
    for family in Family::BOTH {
        let sets = Sets::of(family);
        let of_family = |address: &IpAddr| Family::of(*address) == family;
        let networks = |networks: &[&[IpNetwork]]| -> BTreeSet<Element> {
            let of_family = networks.concat().into_iter().filter(|network| of_family(&network.ip()));
            Element::networks(of_family).into_iter().collect()
        };
        let senders = members.senders.iter().filter(|(_, address)| of_family(address));
        let senders = senders.map(|(mac, address)| Element::sender(*mac, *address)).collect();
        let peers = members.peers.iter().filter(|address| of_family(address));
        elements.insert(sets.senders, senders);
        elements.insert(sets.peers, peers.map(|address| Element::address(*address)).collect());
        elements.insert(sets.pools, networks(&[&members.pools]));
        elements.insert(sets.local, networks(&[&members.local]));
        elements.insert(sets.unmasqueraded, networks(&[&members.pools, &members.unmasqueraded]));
    }
    elements
}
