//! The desired kernel state, computed from the cluster, the node and its pods only.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::{Family, IfName, Mac, NodeName};
use polder_ipam::ledger::AttachmentEntry;
use polder_ipam::record::{AttachMode, ClusterRecord};
use polder_ipam::{Block, Cidr};
use polder_netlink::IfIndex;
use polder_netlink::link::Port;
use polder_netlink::neighbour::Destination;
use polder_netlink::nft::{Elements, Table};
use polder_netlink::route::{NextHop, RouteLookup};

use super::endpoint;
use super::features::Features;
use super::guard::Guard;
use super::plan::Prune;
use super::ruleset::{self, Lengths, Members};
use super::state::{Device, DeviceIdentity, DeviceKind, OwnLink, OwnRoute, PodLink, RouteTarget, State};
use super::sysctl;
use super::tunnel::{Encapsulation, Entries};
use super::unreachable::{OffLink, TunnelObstacle, Unreachable};
use crate::local_pods::LocalPod;
use crate::underlay::Underlay;
use polder_ipam::peers::Peer;

/// The desired kernel state.
#[derive(Debug, Clone, PartialEq)]
pub struct Desired {
    /// State that netlink reads and changes.
    pub state: State,
    /// Kernel settings in the order of writing: path under `/proc/sys` and value.
    pub sysctls: Vec<(String, String)>,
    /// The packet filter.
    pub table: Table,
    /// The elements of the table's sets.
    pub elements: Elements,
    /// Destinations that no route of Polder may capture.
    pub guard: Guard,
    /// The settings of the host's end of each pod's pair.
    pub pod_link: PodLink,
    /// Hash of the state that does not depend on the pods.
    fingerprint: u64,
}

/// A compact copy of the desired state without the pods, to detect whether that state has changed. Plugins create and
/// delete the kernel state of pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredDigest {
    /// Hash of the desired state without the pods.
    fingerprint: u64,
    /// Whether unwanted objects are deleted.
    prune: Prune,
    /// Kernel settings: path under `/proc/sys` and value.
    pub sysctls: Vec<(String, String)>,
}

impl Desired {
    /// The compact copy of this state.
    pub fn digest(&self, prune: Prune) -> DesiredDigest {
        DesiredDigest { fingerprint: self.fingerprint, prune, sysctls: self.sysctls.clone() }
    }
}

/// The inputs of the desired state.
#[derive(Debug, Clone)]
pub struct Inputs<'a> {
    /// The settings of the cluster.
    pub cluster: &'a ClusterRecord,
    /// All pools.
    pub pools: &'a [Cidr],
    /// Prefix lengths of the networks in which peers have addresses.
    pub lengths: &'a Lengths,
    /// This node.
    pub node: &'a NodeName,
    /// The node's own blocks.
    pub blocks: &'a [Block],
    /// The node's own addresses in the pod network.
    pub gateways: &'a [IpAddr],
    /// The node's addresses on the underlay.
    pub underlay: &'a Underlay,
    /// The MTU of the node's pods, in bytes.
    pub mtu: u32,
    /// The other nodes.
    pub peers: &'a [Peer],
    /// Former underlay addresses of peers. Tunnel packets from these addresses are still accepted.
    pub previous_underlay: &'a BTreeMap<NodeName, Vec<IpAddr>>,
    /// The host's routes to the peers' underlay addresses.
    pub underlay_routes: &'a BTreeMap<IpAddr, Option<RouteLookup>>,
    /// The attachments of the ledger.
    pub pods: &'a [AttachmentEntry],
    /// The families in which every pod has an address.
    pub families: &'a BTreeSet<Family>,
    /// The addresses of the host that have host ports, besides `gateways`.
    pub host_addresses: &'a BTreeSet<IpAddr>,
    /// The features of this kernel.
    pub features: Features,
    /// Foreign interfaces on which pods' packets arrive.
    pub ingress_interfaces: &'a BTreeSet<String>,
    /// Interfaces that deliver a packet by its IP addresses, without link-layer addresses.
    pub layer3_interfaces: &'a BTreeSet<IfIndex>,
    /// The peers on the same link for whose pods a tunnel is used, because the link drops the packets.
    pub tunnel_instead_of_direct: &'a BTreeSet<(NodeName, Family)>,
}

/// The path to a peer's blocks of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// Directly to the peer's underlay address.
    Direct {
        /// The peer's underlay address.
        via: IpAddr,
        /// The outgoing interface.
        index: IfIndex,
    },
    /// Through a tunnel.
    Tunnel {
        /// The encapsulation of the tunnel.
        encapsulation: Encapsulation,
        /// The family of the underlay.
        over: Family,
        /// The peer's underlay address.
        remote: IpAddr,
        /// The next hop of the routes, an address behind the tunnel.
        next_hop: IpAddr,
    },
    /// No path; the reason.
    Unreachable(Unreachable),
}

/// The next hop to a peer on the same link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnLink {
    /// The peer's underlay address.
    pub via: IpAddr,
    /// The outgoing interface.
    pub index: IfIndex,
}

/// The path to a peer's pods of one family, and its properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerPath {
    /// The path.
    pub path: Path,
    /// The next hop if the peer is on the same link and the backend uses direct routes; also if the path is a tunnel.
    pub on_link: Option<OnLink>,
    /// The peer's own address in the pod network, if it has one.
    pub gateway: Option<IpAddr>,
    /// The address of the peer's probe endpoint, if it has one. Packets to it take the same path as packets to pods.
    pub probe: Option<IpAddr>,
    /// The smaller of the pod MTUs of both nodes, in bytes.
    pub mtu: u32,
}

impl Inputs<'_> {
    /// The paths to the pods of all peers, for each family in which the peer has blocks.
    pub fn peer_paths(&self) -> BTreeMap<(NodeName, Family), PeerPath> {
        let families = self.peers.iter().flat_map(|peer| Family::BOTH.map(|family| (peer, family)));
        let peer_paths = families.filter_map(|(peer, family)| {
            peer.blocks.iter().find(|block| block.family() == family)?;
            let peer_path = PeerPath {
                path: self.path(peer, family),
                on_link: self.direct(peer, family).and_then(Result::ok),
                gateway: peer.gateway(family),
                probe: peer.probe(family),
                mtu: self.mtu.min(peer.record.mtu),
            };
            Some(((peer.name.clone(), family), peer_path))
        });
        // Uses `collect`: inserting ascending keys one by one leaves the B-tree nodes half full (more memory).
        peer_paths.collect()
    }

    /// The pods with an interface, or whose interface is being created.
    fn existing_pods(&self) -> impl Iterator<Item = &AttachmentEntry> {
        self.pods.iter().filter(|pod| pod.has_interface())
    }

    /// Whether a pod has a host port.
    pub fn has_host_ports(&self) -> bool {
        self.existing_pods().any(|pod| !pod.ports.is_empty())
    }

    /// The addresses of a pod that are in none of the node's blocks. Each needs its own route.
    fn addresses_outside_blocks<'p>(
        &self,
        pod: &'p AttachmentEntry,
    ) -> impl Iterator<Item = IpAddr> + use<'p, '_> {
        let blocks = self.blocks;
        let is_outside = |address: &IpAddr| !blocks.iter().any(|block| block.cidr().has(*address));
        pod.addresses.iter().copied().filter(is_outside)
    }

    /// The path to the peer's blocks of that family.
    pub fn path(&self, peer: &Peer, family: Family) -> Path {
        let backend = self.cluster.backend;
        match self.direct(peer, family) {
            Some(Ok(OnLink { via, index })) => {
                let direct = Path::Direct { via, index };
                if !backend.uses_tunnels() || !self.uses_tunnel_on_link(peer, family) {
                    return direct;
                }
                match self.tunnelled(peer, family) {
                    Path::Unreachable(_) => direct,
                    tunnel => tunnel,
                }
            }
            Some(Err(why)) if !backend.uses_tunnels() => {
                Path::Unreachable(Unreachable::OffLink { why, backend })
            }
            _ => self.tunnelled(peer, family),
        }
    }

    fn uses_tunnel_on_link(&self, peer: &Peer, family: Family) -> bool {
        let peers = self.tunnel_instead_of_direct;
        !peers.is_empty() && peers.contains(&(peer.name.clone(), family))
    }

    /// The direct next hop, or why there is no direct path; `None` if the backend does not use direct routes.
    fn direct(&self, peer: &Peer, family: Family) -> Option<Result<OnLink, OffLink>> {
        self.cluster.backend.uses_direct_routes().then(|| self.on_link(peer, family))
    }

    fn on_link(&self, peer: &Peer, family: Family) -> Result<OnLink, OffLink> {
        let via = peer.underlay(family).ok_or(OffLink::NoAddress(family))?;
        match self.underlay_routes.get(&via).copied().flatten() {
            None => Err(OffLink::NoRoute(via)),
            Some(RouteLookup { local: true, .. }) => Err(OffLink::OwnAddress(via)),
            Some(RouteLookup { next_hop: NextHop::Router(router), .. }) => {
                Err(OffLink::Behind { address: via, router })
            }
            Some(RouteLookup { next_hop: NextHop::Unsupported, .. }) => Err(OffLink::Unsupported(via)),
            // The link may drop packets with pod addresses. With the backend `direct`, the link is used nevertheless,
            // because there is no tunnel.
            Some(RouteLookup { index, .. })
                if self.cluster.backend.uses_tunnels() && self.layer3_interfaces.contains(&index) =>
            {
                Err(OffLink::NoLinkLayer(via))
            }
            Some(RouteLookup { index, .. }) => Ok(OnLink { via, index }),
        }
    }

    fn tunnelled(&self, peer: &Peer, family: Family) -> Path {
        let encapsulation = Encapsulation::of(self.cluster);
        if !self.features.tunnels {
            return Path::Unreachable(Unreachable::TunnelsUnsupported(encapsulation.path_kind()));
        }
        let Some(gateway) = peer.gateway(family) else {
            return Path::Unreachable(Unreachable::NoGateway(family));
        };
        let next_hop = encapsulation.next_hop(&peer.record, gateway);
        let mut reasons = Vec::new();
        for over in self.underlay.tunnel_families() {
            let Some(remote) = peer.underlay(over) else {
                reasons.push(TunnelObstacle::NoAddress(over));
                continue;
            };
            match self.underlay_routes.get(&remote).copied().flatten() {
                Some(lookup) if !lookup.local => {
                    return Path::Tunnel { encapsulation, over, remote, next_hop };
                }
                Some(_) => reasons.push(TunnelObstacle::OwnAddress(OffLink::OwnAddress(remote))),
                None => reasons.push(TunnelObstacle::NoRoute(remote)),
            }
        }
        Path::Unreachable(Unreachable::NoTunnelPath(reasons))
    }
}

/// The MTU of pods on a node without an underlay, in bytes: the MTU of Ethernet.
const MTU_WITHOUT_UNDERLAY: u32 = 1500;

/// The MTU of pods on this underlay, in bytes: the smallest MTU of the uplinks, minus the overhead of a tunnel, or the
/// configured MTU if that is smaller.
pub fn pod_mtu(underlay: &Underlay, cluster: &ClusterRecord, configured: Option<u32>) -> u32 {
    let narrowest = underlay.uplinks.values().map(|uplink| uplink.mtu).min();
    let Some((over, narrowest)) = underlay.tunnel_families().next().zip(narrowest) else {
        return configured.unwrap_or(MTU_WITHOUT_UNDERLAY);
    };
    let overhead = if cluster.backend.uses_tunnels() { Encapsulation::of(cluster).overhead(over) } else { 0 };
    let carried = narrowest.saturating_sub(overhead);
    configured.unwrap_or(carried).min(carried)
}

/// The MAC address of the bridge, derived from the node name: the pods' neighbour entries for their gateway stay valid
/// when the bridge is created again.
pub fn bridge_mac(node: &NodeName) -> Mac {
    Mac::hashed(0x06, &[b"bridge", node.as_str().as_bytes()])
}

/// Computes the desired kernel state. `present` are the existing pod interfaces, `accept_ra_paths` the `accept_ra`
/// settings of foreign interfaces: they are inputs because the agent does not create these interfaces.
pub fn desired(inputs: &Inputs<'_>, present: &BTreeSet<IfName>, accept_ra_paths: &[String]) -> Desired {
    let mut state = State::default();
    devices(inputs, &mut state);
    // Tunnel devices also get the gateway addresses: masquerading uses an address of the outgoing device as source, and
    // peers accept only gateway addresses.
    for device in state.links.keys() {
        let usable = inputs.gateways.iter().filter(|gateway| state.has_family(device, Family::of(**gateway)));
        state
            .addresses
            .extend(usable.map(|gateway| (device.clone(), host_prefix(*gateway))).collect::<Vec<_>>());
    }
    // Pool addresses in no known block are unreachable. Without these routes, packets to them would follow the default
    // route and leave the cluster.
    for pool in inputs.pools {
        let nowhere = OwnRoute { target: RouteTarget::Unreachable, source: None, mtu: None };
        state.routes.insert((*pool).into(), nowhere);
    }
    for block in inputs.blocks {
        let target = match inputs.cluster.attach {
            AttachMode::Bridge => RouteTarget::Device(Device::Bridge),
            AttachMode::Routed => RouteTarget::Unreachable,
        };
        state.routes.insert(block.cidr().into(), OwnRoute { target, source: None, mtu: None });
    }
    let mut members = Members {
        pools: inputs.pools.iter().map(|pool| (*pool).into()).collect(),
        underlay: inputs.underlay.addresses(),
        local: inputs.blocks.iter().map(|block| block.cidr().into()).collect(),
        own: inputs.gateways.to_vec(),
        host: inputs.host_addresses.iter().chain(inputs.gateways).copied().collect(),
        unmasqueraded: inputs.cluster.masquerade.except.iter().map(|cidr| (*cidr).into()).collect(),
        ..Members::default()
    };
    for peer in inputs.peers {
        let previous_underlay = inputs.previous_underlay.get(&peer.name).into_iter().flatten();
        for underlay in peer.record.underlay.iter().chain(previous_underlay) {
            members.peers.push(*underlay);
            let pods = peer.blocks.iter().map(|block| block.cidr().into());
            // Packets that the peer itself sends.
            let own = peer.record.underlay.iter().map(|own| host_prefix(*own));
            members.tunnel_sources.extend(pods.chain(own).map(|network| (*underlay, network)));
        }
        add_peer_routes(inputs, peer, &mut state, &mut members);
    }
    let pods = || inputs.existing_pods();
    // Packets from a pod address outside the node's blocks are also masqueraded when they leave the cluster.
    members.local.extend(pods().flat_map(|pod| inputs.addresses_outside_blocks(pod)).map(host_prefix));
    let nodes = inputs.peers.iter().flat_map(|peer| peer.record.underlay.iter().copied());
    let guard = Guard::new(&inputs.underlay.needed, nodes);
    let table = ruleset::table(inputs.cluster, inputs.lengths);
    let fingerprint = {
        let mut hasher = DefaultHasher::new();
        (&state, &members, &table, &guard).hash(&mut hasher);
        hasher.finish()
    };
    let pod_link = pod_link(inputs);
    for pod in pods() {
        members.pods.extend(ruleset::pod_elements(&LocalPod::of(pod)));
        let name = if pod.attachment.is_probe() {
            endpoint::interface(inputs.cluster.attach)
        } else {
            pod.attachment.host_interface()
        };
        if present.contains(&name) {
            wire_pod(inputs, pod, name, pod_link, &mut state);
        } else if pod.attachment.is_probe() && inputs.cluster.attach == AttachMode::Bridge {
            // The interface of the probe endpoint is deleted when its agent ends. The next agent creates it again, with
            // the same addresses.
            let neighbours = pod.addresses.iter().map(|address| ((Device::Bridge, *address), pod.mac));
            state.neighbours.extend(neighbours);
        }
    }
    state.routes.retain(|destination, route| !guard.is_captured_by(destination, route));
    state.addresses.retain(|(_, address)| !guard.protects(address.ip()));
    Desired {
        guard,
        sysctls: sysctl::desired(sysctl::Inputs {
            families: inputs.families,
            attach: inputs.cluster.attach,
            state: &state,
            accept_ra_paths,
            ingress_interfaces: inputs.ingress_interfaces,
            has_host_ports: inputs.has_host_ports(),
            has_fast_path: inputs.features.fast_path,
        }),
        state,
        table,
        elements: ruleset::elements(&members, inputs.lengths),
        pod_link,
        fingerprint,
    }
}

fn devices(inputs: &Inputs<'_>, state: &mut State) {
    let bridge = OwnLink {
        kind: DeviceKind::Bridge { filters_vlans: false },
        mac: bridge_mac(inputs.node),
        mtu: inputs.mtu,
        up: true,
        identity: DeviceIdentity::Correct,
    };
    state.links.insert(Device::Bridge, bridge);
    let encapsulation = Encapsulation::of(inputs.cluster);
    for (family, uplink) in inputs.underlay.uplinks.iter().filter(|_| inputs.features.tunnels) {
        let tunnel = OwnLink {
            kind: DeviceKind::Tunnel(encapsulation.device(inputs.cluster, Some(uplink.address))),
            mac: encapsulation.mac(inputs.cluster, inputs.node),
            mtu: uplink.mtu.saturating_sub(encapsulation.overhead(family)),
            up: true,
            identity: DeviceIdentity::Correct,
        };
        state.links.insert(Device::Tunnel(family), tunnel);
    }
}

fn add_peer_routes(inputs: &Inputs<'_>, peer: &Peer, state: &mut State, members: &mut Members) {
    // Packets that are too large for the peer's pods are rejected here, where the sender can be notified.
    let mtu = (peer.record.mtu < inputs.mtu).then_some(peer.record.mtu);
    for family in Family::BOTH {
        let mut blocks = peer.blocks.iter().filter(|block| block.family() == family).peekable();
        if blocks.peek().is_none() {
            continue;
        }
        let route = match inputs.path(peer, family) {
            Path::Unreachable(_) => continue,
            Path::Direct { via, index } => {
                members.unmasqueraded.push(host_prefix(via));
                OwnRoute { target: RouteTarget::Direct(Device::Uplink(index), via), source: None, mtu }
            }
            Path::Tunnel { encapsulation, over, remote, next_hop } => {
                let device = Device::Tunnel(over);
                let Entries { mac, to } = encapsulation.entries(&peer.record, remote);
                state.neighbours.insert((device.clone(), next_hop), mac);
                state.fdb.insert((device, mac), to);
                // Replies to the node's own packets return through the tunnel only if the source address is in the pod
                // network.
                let source = inputs.gateways.iter().copied().find(|own| Family::of(*own) == family);
                OwnRoute { target: RouteTarget::Tunnel(over, next_hop), source, mtu }
            }
        };
        for block in blocks {
            state.routes.insert(block.cidr().into(), route.clone());
        }
    }
}

/// The settings of the host's end of each pod's pair.
fn pod_link(inputs: &Inputs<'_>) -> PodLink {
    let is_routed = inputs.cluster.attach == AttachMode::Routed;
    PodLink {
        port: (!is_routed).then(|| Port::of_pod(inputs.features.locked_ports)),
        up: true,
        ipv4_forwarding: is_routed && inputs.families.contains(&Family::V4),
    }
}

fn wire_pod(inputs: &Inputs<'_>, pod: &AttachmentEntry, name: IfName, link: PodLink, state: &mut State) {
    let device = Device::Pod(name.clone());
    let neighbour_device = match inputs.cluster.attach {
        AttachMode::Bridge => {
            state.fdb.insert((device, pod.mac), Destination::Port);
            Device::Bridge
        }
        AttachMode::Routed => {
            for address in &pod.addresses {
                let route = OwnRoute { target: RouteTarget::Device(device.clone()), source: None, mtu: None };
                state.routes.insert(host_prefix(*address), route);
            }
            device
        }
    };
    for address in inputs.addresses_outside_blocks(pod) {
        let route =
            OwnRoute { target: RouteTarget::Device(neighbour_device.clone()), source: None, mtu: None };
        state.routes.insert(host_prefix(address), route);
    }
    for address in &pod.addresses {
        state.neighbours.insert((neighbour_device.clone(), *address), pod.mac);
    }
    state.pods.insert(name, link);
}

fn host_prefix(address: IpAddr) -> IpNetwork {
    IpNetwork::new(address, Family::of(address).bits()).expect("prefix length 32 or 128 is valid")
}
