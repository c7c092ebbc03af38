//! VXLAN: frames in UDP (RFC 7348).

use std::fmt;
use std::net::IpAddr;

use polder_api::status::PathKind;
use polder_api::{Family, Mac, NodeName};
use polder_ipam::record::{ClusterRecord, NodeRecord, VxlanSettings};
use polder_netlink::link::{self, Vxlan};
use polder_netlink::neighbour::Destination;
use polder_netlink::nft::{Match, Rule, SetMatch, Verdict};
use polder_netlink::{IfIndex, Operation};

use super::Entries;
use crate::kernel::ruleset::sets::{Sets, TunnelSources};

pub(super) const PATH: PathKind = PathKind::Vxlan;
pub(super) const TITLE: &str = "VXLAN";
pub(super) const UNSUPPORTED: &str =
    "vxlan is not available (module vxlan): only peers on the same link can be reached";

/// Size of the outer IP header, UDP, VXLAN and the inner Ethernet header, in bytes.
pub(super) const fn overhead(underlay: Family) -> u32 {
    let ip = match underlay {
        Family::V4 => 20,
        Family::V6 => 40,
    };
    ip + 8 + 8 + 14
}

/// The same whenever the device is created again: peers have it in their neighbour and FDB entries.
pub(super) fn mac(cluster: &ClusterRecord, node: &NodeName) -> Mac {
    Mac::hashed(0x06, &[b"vtep", cluster.id.to_string().as_bytes(), node.as_str().as_bytes()])
}

pub(super) const fn device(settings: VxlanSettings, local: Option<IpAddr>) -> Vxlan {
    let VxlanSettings { vni, port } = settings;
    Vxlan { vni, port, local, learning: false }
}

/// In IPv4, the peer's own address in the pod network; in IPv6, an address for the tunnel only. The kernel refuses a
/// route of an IPv6 prefix through an address inside it while the prefix is routed through another device
/// (`ip6_route_check_nh_onlink` in `net/ipv6/route.c`).
pub(super) fn next_hop(peer: &NodeRecord, gateway: IpAddr) -> IpAddr {
    match Family::of(gateway) {
        Family::V4 => gateway,
        Family::V6 => peer.vtep_mac.link_local().into(),
    }
}

pub(super) fn entries(peer: &NodeRecord, remote: IpAddr) -> Entries {
    Entries { mac: peer.vtep_mac, to: Destination::Remote(remote) }
}

/// Only the source address can be changed.
pub(super) fn adjust(device: &Vxlan, index: IfIndex) -> Option<Operation> {
    device.local.map(|local| link::send_from(index, local))
}

/// Whether the other device is on the same port. With the same VNI, it prevents the creation of this device; if it
/// collects metadata (`external`), this device cannot be set up.
pub(super) const fn is_conflict(device: &Vxlan, other: &Vxlan) -> bool {
    other.port == device.port && (other.vni == device.vni || other.vni == 0)
}

/// The remedy for the other device with that name.
pub(super) fn conflict_remedy(name: &str, other: &Vxlan, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(
        f,
        "Device {name} has port {} and VNI {}. If no other network uses it: ip link delete {name}. Otherwise give \
         Polder another port or VNI: polderctl cluster set --help",
        other.port, other.vni
    )
}

pub(super) fn describe(device: &Vxlan, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "vxlan {} on port {}", device.vni, device.port)?;
    device.local.map_or(Ok(()), |local| write!(f, " from {local}"))
}

pub(super) fn rules(settings: VxlanSettings, tunnel_sources: &[TunnelSources]) -> Vec<Rule> {
    let tunnel =
        |family| vec![Match::UdpTo(settings.port), Match::VxlanOf(settings.vni), Match::Family(family)];
    let stranger = |family| Rule {
        comment: "drop tunnel packets that do not come from a peer",
        matches: [tunnel(family), vec![Match::Source(SetMatch::NotSet(family, Sets::of(family).peers))]]
            .concat(),
        verdict: Verdict::Drop,
    };
    let own = |sources: &TunnelSources| {
        let TunnelSources { tunnel: family, carried, length } = *sources;
        let within = SetMatch::Set(family, sources.name());
        Rule {
            comment: "accept packets from a peer's own pods",
            matches: [
                tunnel(family),
                vec![
                    Match::InnerFamily(carried),
                    Match::TunnelSource { inner: carried, length, set: within },
                ],
            ]
            .concat(),
            verdict: Verdict::Accept,
        }
    };
    let other = |family| Rule {
        comment: "drop all other packets from a peer",
        matches: tunnel(family),
        verdict: Verdict::Drop,
    };
    let strangers = Family::BOTH.map(stranger).into_iter();
    strangers.chain(tunnel_sources.iter().map(own)).chain(Family::BOTH.map(other)).collect()
}
