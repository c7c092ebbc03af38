//! The packet filter: the rules of the tables `inet polder` and `arp polder`, and their reasons.
//!
//! It filters only packets from pods and packets through tunnels, and translates the source address of packets that
//! leave the cluster.
//! It has no chain for forwarded traffic: in nftables, a rule that accepts a packet does not keep another table from
//! dropping it, so a rule that accepts pod packets would guarantee nothing. Foreign chains that drop these packets are
//! found and reported instead ([`crate::host::firewall`]).

pub mod sets;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, Mac, POD_INTERFACE_PREFIX};
use polder_ipam::record::{AttachMode, ClusterRecord};
use polder_netlink::nft::{
    Chain, Element, Elements, Hook, InterfaceMatch, Match, Rule, Set, SetMatch, Table, Verdict,
};

pub use self::sets::{Lengths, Sets, lengths};

use self::sets::TunnelSources;
use super::tunnel::{self, Encapsulation};

/// The name of the table.
pub const NAME: &str = "polder";

/// The name of the table that keeps the kernel's NAT running while the table `polder` does not exist.
pub const ANCHOR: &str = "polder_nat";

/// The table without contents, to delete it whatever the settings of the cluster were.
pub fn empty() -> Table {
    Table { name: NAME, sets: Vec::new(), chains: Vec::new() }
}

/// The table for a cluster with these settings, whose blocks have these lengths.
pub fn table(cluster: &ClusterRecord, lengths: &Lengths) -> Table {
    let tunnel_sources = TunnelSources::all(lengths);
    Table {
        name: NAME,
        sets: Family::BOTH
            .into_iter()
            .flat_map(sets::declared)
            .chain(tunnel_sources.iter().map(TunnelSources::set))
            .collect(),
        chains: vec![
            Chain { name: "from_pods", hook: Hook::Raw, rules: from_pods(cluster) },
            Chain { name: "arp_from_pods", hook: Hook::ArpInput, rules: arp_from_pods(cluster) },
            Chain {
                name: "tunnels",
                hook: Hook::Input,
                rules: Encapsulation::of(cluster).rules(cluster, &tunnel_sources),
            },
            Chain { name: "masquerading", hook: Hook::SourceNat, rules: masquerade(cluster) },
        ],
    }
}

/// The part of the table that changes with each pod: the sets of the pods' own addresses, without rules.
pub fn sender_sets() -> Table {
    let is_of_senders = |set: &Set| Family::BOTH.iter().any(|family| Sets::of(*family).senders == set.name);
    let sets = Family::BOTH.into_iter().flat_map(sets::declared).filter(is_of_senders).collect();
    Table { name: NAME, sets, chains: Vec::new() }
}

/// The interfaces on which pods' packets arrive.
fn pods(cluster: &ClusterRecord) -> InterfaceMatch {
    match cluster.attach {
        AttachMode::Bridge => InterfaceMatch::Named(BRIDGE),
        AttachMode::Routed => InterfaceMatch::Prefixed(POD_INTERFACE_PREFIX),
    }
}

fn from_pods(cluster: &ClusterRecord) -> Vec<Rule> {
    let pods = pods(cluster);
    let mut rules = Vec::new();
    for family in Family::BOTH {
        let sets = Sets::of(family);
        rules.push(Rule {
            comment: "drop packets with a source address that is not the pod's own",
            matches: vec![
                Match::Input(pods),
                Match::Family(family),
                Match::Sender(SetMatch::NotSet(family, sets.senders)),
            ],
            verdict: Verdict::Drop,
        });
        // After masquerading, the packet would reach another node's tunnel port as if this node had sent it. For pod
        // addresses as destination, the port has no special meaning.
        rules.push(Rule {
            comment: "drop packets from pods to the tunnel port of nodes",
            matches: vec![
                Match::Input(pods),
                Match::UdpTo(Encapsulation::of(cluster).port(cluster)),
                Match::Family(family),
                Match::Destination(SetMatch::NotSet(family, sets.pools)),
            ],
            verdict: Verdict::Drop,
        });
    }
    // The host has neighbour entries for its pods. A pod that answers for an address of no pod would receive the
    // packets to it.
    rules.push(Rule {
        comment: "drop neighbour advertisements from pods",
        matches: vec![Match::Input(pods), Match::Icmpv6(NEIGHBOUR_ADVERTISEMENT)],
        verdict: Verdict::Drop,
    });
    rules
}

/// `ICMPv6` type (RFC 4861, section 4.4).
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

fn arp_from_pods(cluster: &ClusterRecord) -> Vec<Rule> {
    let pods = pods(cluster);
    let senders = Sets::of(Family::V4).senders;
    vec![
        Rule {
            comment: "drop ARP replies from pods",
            matches: vec![Match::Input(pods), Match::ArpReply],
            verdict: Verdict::Drop,
        },
        Rule {
            comment: "drop ARP requests with a sender address that is not the pod's own",
            matches: vec![Match::Input(pods), Match::ArpSender(SetMatch::NotSet(Family::V4, senders))],
            verdict: Verdict::Drop,
        },
    ]
}

fn masquerade(cluster: &ClusterRecord) -> Vec<Rule> {
    // Packets with a non-pod source address enter a tunnel with this node's own address in the pod network: the replies
    // return to this node, and the peer accepts no other address but the underlay address. The underlay address is not
    // masqueraded, because a masqueraded connection ends when its path changes.
    let guest = |family| Rule {
        comment: "masquerade non-pod packets that enter a tunnel",
        matches: vec![
            Match::Output(InterfaceMatch::Prefixed(tunnel::PREFIX)),
            Match::Family(family),
            Match::Source(SetMatch::NotSet(family, Sets::of(family).pools)),
            Match::Source(SetMatch::NotSet(family, Sets::of(family).underlay)),
            Match::Unicast,
        ],
        verdict: Verdict::Masquerade,
    };
    // Pod packets to a peer's underlay address keep their source address only on a direct path. A probe of that path
    // has to keep it before the path is used.
    let test = |family| Rule {
        comment: "keep the source address of probes of direct paths",
        matches: vec![
            Match::Family(family),
            Match::Source(SetMatch::Set(family, Sets::of(family).own)),
            Match::Destination(SetMatch::Set(family, Sets::of(family).peers)),
        ],
        verdict: Verdict::Accept,
    };
    let guests = Family::BOTH.map(guest);
    if !cluster.masquerade.enabled {
        return guests.into();
    }
    let rule = |family| Rule {
        comment: "masquerade pod packets that leave the cluster",
        matches: vec![
            // Packets to a pod of this node do not leave the cluster, whatever range its address is from.
            Match::NotOutput(pods(cluster)),
            Match::Family(family),
            Match::Source(SetMatch::Set(family, Sets::of(family).local)),
            Match::Destination(SetMatch::NotSet(family, Sets::of(family).unmasqueraded)),
            Match::Unicast,
        ],
        verdict: Verdict::Masquerade,
    };
    guests.into_iter().chain(Family::BOTH.map(test)).chain(Family::BOTH.map(rule)).collect()
}

/// The contents of the sets.
#[derive(Debug, Default, Hash)]
pub struct Members {
    /// The MAC address of every pod with each of its addresses.
    pub senders: Vec<(Mac, IpAddr)>,
    /// The underlay addresses of all peers.
    pub peers: Vec<IpAddr>,
    /// The underlay address of a peer, with a network: tunnel packets from the peer may have inner source addresses in
    /// the network.
    pub tunnel_sources: Vec<(IpAddr, IpNetwork)>,
    /// All pools.
    pub pools: Vec<IpNetwork>,
    /// The node's own underlay addresses.
    pub underlay: Vec<IpAddr>,
    /// The node's own blocks.
    pub local: Vec<IpNetwork>,
    /// The node's own addresses in the pod network.
    pub own: Vec<IpAddr>,
    /// Networks to which pods keep their source address, besides the pools: underlay addresses of direct peers, and
    /// configured networks.
    pub unmasqueraded: Vec<IpNetwork>,
}

/// The elements of all sets.
pub fn elements(members: &Members, lengths: &Lengths) -> Elements {
    let mut elements: Elements =
        TunnelSources::all(lengths).iter().map(|sources| (sources.name(), BTreeSet::new())).collect();
    for (underlay, network) in &members.tunnel_sources {
        let carried = Family::of(network.ip());
        let sources = TunnelSources { tunnel: Family::of(*underlay), carried, length: network.prefix() };
        elements.entry(sources.name()).or_default().insert(Element::tunnel_source(*underlay, *network));
    }
    for family in Family::BOTH {
        let sets = Sets::of(family);
        let of_family = |address: &IpAddr| Family::of(*address) == family;
        let networks = |networks: &[&[IpNetwork]]| -> BTreeSet<Element> {
            let of_family = networks.concat().into_iter().filter(|network| of_family(&network.ip()));
            Element::networks(of_family).into_iter().collect()
        };
        let senders = members.senders.iter().filter(|(_, address)| of_family(address));
        let senders = senders.map(|(mac, address)| Element::sender(*mac, *address)).collect();
        let addresses = |addresses: &[IpAddr]| {
            addresses
                .iter()
                .filter(|address| of_family(address))
                .map(|address| Element::address(*address))
                .collect()
        };
        elements.insert(sets.senders, senders);
        elements.insert(sets.peers, addresses(&members.peers));
        elements.insert(sets.underlay, addresses(&members.underlay));
        elements.insert(sets.pools, networks(&[&members.pools]));
        elements.insert(sets.own, addresses(&members.own));
        elements.insert(sets.local, networks(&[&members.local]));
        elements.insert(sets.unmasqueraded, networks(&[&members.pools, &members.unmasqueraded]));
    }
    elements
}

#[cfg(test)]
mod tests {
    use polder_ipam::ids::ClusterId;

    use super::*;

    #[test]
    fn the_sets_that_change_with_each_pod_are_declared_as_in_the_table() {
        let whole = table(&ClusterRecord::new(ClusterId::new("c")), &lengths([]));
        let of_senders = |set: &&Set| set.name.starts_with("senders");
        let in_table: Vec<&Set> = whole.sets.iter().filter(of_senders).collect();
        assert_eq!(in_table.len(), 3, "IPv4 with ARP, and IPv6");
        assert_eq!(sender_sets().sets.iter().collect::<Vec<_>>(), in_table);
        assert_eq!(sender_sets().name, whole.name);
    }
}
