//! Host ports: the rules that lead packets to a port of the host to a pod, and their elements.
//!
//! The number of rules does not depend on the pods: two maps for each family have the ports. A port on one address
//! precedes the same port on all addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;

use polder_api::{Family, PortMapping, TransportProtocol};
use polder_ipam::record::ClusterRecord;
use polder_netlink::nft::{Element, InterfaceMatch, Match, PortMap, PortParts, Rule, SetMatch, Verdict};

use super::Sets;
use crate::kernel::tunnel::Encapsulation;
use crate::local_pods::LocalPod;

/// The rules for packets that arrive at the host. Loopback addresses are not translated here: this hook is before the
/// kernel's check for packets from outside to such addresses.
pub(super) fn incoming(cluster: &ClusterRecord) -> Vec<Rule> {
    // A pod with that host port would disconnect the node from its peers.
    let tunnels = Rule {
        comment: "keep tunnel packets",
        matches: vec![Match::UdpTo(Encapsulation::of(cluster).port(cluster))],
        verdict: Verdict::Accept,
    };
    std::iter::once(tunnels).chain(to_host_addresses()).collect()
}

/// The rules for packets of the host itself.
pub(super) fn local() -> Vec<Rule> {
    // IPv6 has no such rules: the kernel drops replies to ::1 from another interface.
    let to_loopback = |comment, map| Rule {
        comment,
        matches: vec![Match::Family(Family::V4), Match::ToLoopback],
        verdict: Verdict::TranslateDestination(map),
    };
    let sets = Sets::of(Family::V4);
    let loopback = [
        to_loopback(
            "translate host ports on one loopback address",
            PortMap::ByAddressAndPort(Family::V4, sets.address_ports),
        ),
        to_loopback("translate host ports on loopback addresses", PortMap::ByPort(Family::V4, sets.ports)),
    ];
    to_host_addresses().chain(loopback).collect()
}

/// The rules for packets to addresses of the host. Without the condition on the address, a pod could get packets to
/// other machines that pass the host.
fn to_host_addresses() -> impl Iterator<Item = Rule> {
    Family::BOTH.into_iter().flat_map(|family| {
        let sets = Sets::of(family);
        let rule = |comment, map| Rule {
            comment,
            // An address can leave the host while no agent updates the set.
            matches: vec![
                Match::Family(family),
                Match::Destination(SetMatch::Set(family, sets.host)),
                Match::Local,
            ],
            verdict: Verdict::TranslateDestination(map),
        };
        [
            rule(
                "translate host ports on one address",
                PortMap::ByAddressAndPort(family, sets.address_ports),
            ),
            rule("translate host ports on all addresses", PortMap::ByPort(family, sets.ports)),
        ]
    })
}

/// The rules for the source of translated packets to pods. `pods` are the interfaces to them.
pub(super) fn masquerade(pods: InterfaceMatch) -> Vec<Rule> {
    // A pod would see its own address as source, and its kernel would drop the packet.
    let hairpin = |family| Rule {
        comment: "masquerade packets of a pod to its own host port",
        matches: vec![
            Match::Output(pods),
            Match::Family(family),
            Match::AddressPair(SetMatch::Set(family, Sets::of(family).hairpins)),
        ],
        verdict: Verdict::Masquerade,
    };
    let loopback = Rule {
        comment: "masquerade packets from loopback addresses to host ports",
        matches: vec![Match::Output(pods), Match::Family(Family::V4), Match::FromLoopback],
        verdict: Verdict::Masquerade,
    };
    Family::BOTH.map(hairpin).into_iter().chain([loopback]).collect()
}

/// Whether the set or map of that name has elements of pods' host ports.
pub(crate) fn is_set(name: &str) -> bool {
    let mut families = Family::BOTH.iter().map(|family| Sets::of(*family));
    families.any(|sets| [sets.ports, sets.address_ports, sets.hairpins].contains(&name))
}

/// The elements of a pod's host ports, each with its set or map. A pod without an address of a family has no host ports
/// of that family.
pub(super) fn elements(pod: &LocalPod) -> impl Iterator<Item = (&'static str, Element)> {
    let of_address = |address| {
        let family = Family::of(address);
        let sets = Sets::of(family);
        let ports = pod.ports.iter().filter(move |port| port.is_of_family(family)).map(move |port| {
            let (host, to) = (port.single_address(), SocketAddr::new(address, port.container_port.get()));
            let set = if host.is_some() { sets.address_ports } else { sets.ports };
            (set, Element::port(host, port.protocol.number(), port.host_port.get(), to))
        });
        let hairpin =
            (!pod.ports.is_empty()).then(|| (sets.hairpins, Element::address_pair(address, address)));
        ports.chain(hairpin)
    };
    pod.addresses.iter().copied().flat_map(of_address)
}

/// The host ports that elements of the maps of one family lead to pods, with the address of each pod. Other elements are
/// left out.
pub(crate) fn found<'a>(
    family: Family,
    elements: impl IntoIterator<Item = &'a Element>,
) -> impl Iterator<Item = (IpAddr, PortMapping)> {
    elements.into_iter().filter_map(move |element| {
        let PortParts { host, protocol, port, to } = element.port_parts(family)?;
        let protocol = *TransportProtocol::ALL.iter().find(|known| known.number() == protocol)?;
        let all: IpAddr = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let mapping = PortMapping {
            protocol,
            host_address: Some(host.unwrap_or(all)),
            host_port: NonZeroU16::new(port)?,
            container_port: NonZeroU16::new(to.port())?,
        };
        Some((to.ip(), mapping))
    })
}

#[cfg(test)]
mod tests {
    use polder_api::Mac;

    use super::*;

    fn elements_of(addresses: &[&str], ports: &[&str]) -> Vec<(&'static str, Element)> {
        let pod = LocalPod {
            name: "pld1".parse().unwrap(),
            mac: Mac([2; 6]),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            ports: ports.iter().map(|port| port.parse().unwrap()).collect(),
        };
        elements(&pod).collect()
    }

    #[test]
    fn a_pod_with_a_host_port_has_an_element_in_each_of_its_families() {
        let to = |socket: &str| socket.parse().unwrap();
        let (v4, v6): (IpAddr, IpAddr) = ("10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap());
        assert_eq!(
            elements_of(&["10.0.0.5", "fd00::5"], &["8080:80/tcp", "192.0.2.1:53:5353/udp"]),
            [
                ("ports4", Element::port(None, 6, 8080, to("10.0.0.5:80"))),
                ("address_ports4", Element::port("192.0.2.1".parse().ok(), 17, 53, to("10.0.0.5:5353"))),
                ("hairpins4", Element::address_pair(v4, v4)),
                ("ports6", Element::port(None, 6, 8080, to("[fd00::5]:80"))),
                ("hairpins6", Element::address_pair(v6, v6)),
            ]
        );
        assert_eq!(elements_of(&["10.0.0.5"], &[]), []);
    }

    #[test]
    fn the_host_ports_of_a_pod_are_found_from_its_elements() {
        let elements = elements_of(
            &["10.0.0.5", "fd00::5"],
            &["8080:80/tcp", "192.0.2.1:53:5353/udp", "[2001:db8::1]:9:10/sctp"],
        );
        let all: Vec<Element> = elements.into_iter().map(|(_, element)| element).collect();
        let found_in = |family, pod: &str| -> Vec<String> {
            let found = found(family, &all).filter(|(address, _)| address.to_string() == pod);
            found.map(|(_, mapping)| mapping.to_string()).collect()
        };
        assert_eq!(found_in(Family::V4, "10.0.0.5"), ["0.0.0.0:8080:80/tcp", "192.0.2.1:53:5353/udp"]);
        assert_eq!(found_in(Family::V6, "fd00::5"), ["[::]:8080:80/tcp", "[2001:db8::1]:9:10/sctp"]);
    }
}
