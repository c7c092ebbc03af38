//! The packet filter: the rules of the tables `inet polder` and `arp polder`, and their reasons.
//!
//! It filters only packets from pods and packets through tunnels, translates the source address of packets that leave
//! the cluster, and the destination of packets to host ports.
//! It has no chain for forwarded traffic: in nftables, a rule that accepts a packet does not keep another table from
//! dropping it, so a rule that accepts pod packets would guarantee nothing. Foreign chains that drop these packets are
//! found and reported instead ([`crate::host::firewall`]).

pub(crate) mod host_ports;
pub mod sets;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{BRIDGE, Family, POD_INTERFACE_PREFIX};
use polder_ipam::record::{AttachMode, ClusterRecord};
use polder_netlink::nft::{
    Chain, Element, Elements, Hook, InterfaceMatch, Match, Rule, SetMatch, Table, Verdict,
};

pub use self::sets::{Lengths, Sets, lengths};

use self::sets::TunnelSources;
use super::tunnel::{self, Encapsulation};
use crate::local_pods::LocalPod;

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
            Chain { name: "host_ports", hook: Hook::DestinationNat, rules: host_ports::incoming(cluster) },
            Chain { name: "local_host_ports", hook: Hook::LocalDestinationNat, rules: host_ports::local() },
        ],
    }
}

/// The part of the table that changes with each pod: the sets with elements of single pods, without rules.
pub fn pod_sets() -> Table {
    let sets = Family::BOTH.into_iter().flat_map(sets::declared);
    Table { name: NAME, sets: sets.filter(|set| is_of_pods(set.name)).collect(), chains: Vec::new() }
}

/// Whether the set of that name has elements of single pods.
pub fn is_of_pods(set: &str) -> bool {
    host_ports::is_set(set) || Family::BOTH.iter().any(|family| Sets::of(*family).senders == set)
}

/// The elements of a pod, each with its set: its addresses, from which it may send, and its host ports.
pub fn pod_elements(pod: &LocalPod) -> impl Iterator<Item = (&'static str, Element)> {
    let senders = pod
        .addresses
        .iter()
        .map(|address| (Sets::of(Family::of(*address)).senders, Element::sender(pod.mac, *address)));
    senders.chain(host_ports::elements(pod))
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
    // The kernel accepts packets to these addresses on interfaces with `route_localnet`, which host ports need. They
    // would reach services that listen on the loopback interface only.
    rules.push(Rule {
        comment: "drop packets from pods to loopback addresses of the host",
        matches: vec![Match::Input(pods), Match::Family(Family::V4), Match::ToLoopback],
        verdict: Verdict::Drop,
    });
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
    let always: Vec<Rule> =
        host_ports::masquerade(pods(cluster)).into_iter().chain(Family::BOTH.map(guest)).collect();
    if !cluster.masquerade.enabled {
        return always;
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
    always.into_iter().chain(Family::BOTH.map(test)).chain(Family::BOTH.map(rule)).collect()
}

/// The contents of the sets.
#[derive(Debug, Default, Hash)]
pub struct Members {
    /// The elements of all pods, each with its set.
    pub pods: Vec<(&'static str, Element)>,
    /// The host's addresses.
    pub host: BTreeSet<IpAddr>,
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
        let addresses = |addresses: &mut dyn Iterator<Item = &IpAddr>| -> BTreeSet<Element> {
            let of_family = addresses.filter(|address| of_family(address));
            of_family.map(|address| Element::address(*address)).collect()
        };
        elements.insert(sets.host, addresses(&mut members.host.iter()));
        for of_pods in [sets.senders, sets.ports, sets.address_ports, sets.hairpins] {
            elements.insert(of_pods, BTreeSet::new());
        }
        elements.insert(sets.peers, addresses(&mut members.peers.iter()));
        elements.insert(sets.underlay, addresses(&mut members.underlay.iter()));
        elements.insert(sets.pools, networks(&[&members.pools]));
        elements.insert(sets.own, addresses(&mut members.own.iter()));
        elements.insert(sets.local, networks(&[&members.local]));
        elements.insert(sets.unmasqueraded, networks(&[&members.pools, &members.unmasqueraded]));
    }
    for (set, element) in &members.pods {
        elements.entry(set).or_default().insert(element.clone());
    }
    elements
}

#[cfg(test)]
mod tests {
    use polder_ipam::ids::ClusterId;
    use polder_netlink::nft::Set;

    use super::*;

    #[test]
    fn the_sets_that_change_with_each_pod_are_declared_as_in_the_table() {
        let whole = table(&ClusterRecord::new(ClusterId::new("c")), &lengths([]));
        let of_pods = |set: &&Set| {
            ["senders", "ports", "address_ports", "hairpins"].iter().any(|name| set.name.starts_with(name))
        };
        let in_table: Vec<&Set> = whole.sets.iter().filter(of_pods).collect();
        assert_eq!(in_table.len(), 9, "four of each family, and the senders of ARP");
        assert_eq!(pod_sets().sets.iter().collect::<Vec<_>>(), in_table);
        assert_eq!(pod_sets().name, whole.name);
    }
}
