//! Chooses the node's underlay addresses: by the route to its peers, not by the default route.

use std::collections::BTreeSet;
use std::net::IpAddr;

use polder_api::{Family, PerFamily};
use polder_ipam::Cidr;
use polder_ipam::cause::HostError;
use polder_ipam::needed::{RequiredFor, RequiredRange};
use polder_netlink::IfIndex;
use polder_netlink::address::Address;
use polder_netlink::route::RouteLookup;

use crate::config::UnderlayConfig;
use crate::kernel::snapshot::{HostNetwork, RouteTo};

/// The node's addresses on the underlay, the network between the nodes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Underlay {
    /// At most one per family.
    pub uplinks: PerFamily<Option<Uplink>>,
    /// The node's other addresses, and why they were not chosen.
    pub others: Vec<Other>,
    /// Ranges that the node must reach outside the pod network.
    pub needed: Vec<RequiredRange>,
}

/// Why the node has no underlay address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotChosen {
    /// The engine has not read the interfaces yet.
    ///
    /// Remedy: none, the agent has just started and retries.
    #[error("the underlay addresses are not chosen yet")]
    NotYet,
    /// The kernel's interfaces cannot be read.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text. The agent retries.
    #[error("cannot list interfaces: {0}")]
    Unreadable(#[source] HostError),
    /// No route determines which address to use.
    #[error(
        "cannot determine the underlay address of this node: it has no route to peers, to etcd or out of the cluster; \
         its addresses are [{}]. Set underlay.interface or underlay.addresses",
        seen.join(", ")
    )]
    Undecided {
        /// The addresses and their interfaces.
        seen: Vec<String>,
    },
    /// The configured address is missing.
    #[error(
        "underlay.addresses: no interface that is up has {0}, or the address is unsuitable: use a global address that \
         is not temporary, deprecated or a duplicate"
    )]
    NoAddress(IpAddr),
    /// The configured interface does not exist or is down.
    ///
    /// Remedy: set `underlay.interface` to an interface of this node: `ip link` lists them. Or set the interface up.
    #[error("underlay.interface: interface {0} does not exist or is down")]
    NoInterface(String),
}

/// An address that was not chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// The address.
    pub address: IpAddr,
    /// Its interface; `None` if that is down or belongs to Polder.
    pub interface: Option<String>,
    /// Why it was not chosen.
    pub reason: String,
}

/// One address, and the interface that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// The address.
    pub address: IpAddr,
    /// Index of the interface.
    pub index: IfIndex,
    /// Name of the interface.
    pub interface: String,
    /// MTU of the interface, in bytes.
    pub mtu: u32,
    /// The reason for this choice, for example the route to a peer.
    pub chosen_by: String,
}

/// Maximum number of addresses with a reported reason: a host may have one for every service.
const OTHERS: usize = 16;

/// Maximum number of protected host addresses outside a local network: a host may have one for every service.
const OWN_ADDRESSES: usize = 64;

/// The loopback interface.
pub const LOOPBACK: &str = "lo";

/// The inputs of the choice.
#[derive(Debug, Clone, Default)]
pub struct UnderlayInputs {
    /// Interfaces, addresses and routes in the kernel.
    pub network: HostNetwork,
    /// etcd's addresses.
    pub store: Vec<RequiredRange>,
    /// This node's own blocks and the addresses of its attachments. Another plugin may have routes to them.
    pub pods: Vec<Cidr>,
    /// The cluster's pools: an address of the node inside a pool is left over from another network.
    pub pools: Vec<Cidr>,
    /// The addresses of this node's own record, which peers use.
    pub registered: Vec<IpAddr>,
    /// The addresses of this node's Node object in Kubernetes, in its order.
    pub node_object: Vec<IpAddr>,
}

impl UnderlayInputs {
    /// The addresses that peers could use, in the kernel's order.
    fn candidates(&self, family: Family) -> impl Iterator<Item = (&Address, &(String, u32))> {
        let usable = move |address: &&Address| {
            let ip = address.address.ip();
            Family::of(ip) == family && address.global && !address.temporary && !ip.is_loopback()
        };
        let with_interface =
            |address| Some((address, self.network.interfaces.get(&(address as &Address).index)?));
        self.network.addresses.iter().filter(usable).filter_map(with_interface)
    }

    /// Addresses outside the pools, if any exist: peers reject addresses inside a pool.
    fn preferred(&self, family: Family) -> Vec<&Address> {
        let is_in_a_pool = |found: &&Address| self.pools.iter().any(|pool| pool.has(found.address.ip()));
        let (inside, outside): (Vec<_>, Vec<_>) =
            self.candidates(family).map(|(found, _)| found).partition(is_in_a_pool);
        if outside.is_empty() { inside } else { outside }
    }

    /// The addresses that were not chosen, with the reason.
    fn others(&self, uplinks: &PerFamily<Option<Uplink>>) -> Vec<Other> {
        let other = |found: &Address| {
            let address = found.address.ip();
            let uplink = uplinks[Family::of(address)].as_ref();
            let is_chosen = uplink.is_some_and(|uplink| uplink.address == address);
            // Polder's interfaces and loopback addresses are not candidates.
            if address.is_loopback() || is_chosen || self.network.own.contains(&found.index) {
                return None;
            }
            let interface = self.network.interfaces.get(&found.index).map(|(name, _)| name.clone());
            let reason = match (&interface, uplink) {
                (None, _) => "its interface is down".to_owned(),
                _ if !found.global => "its scope is not global".to_owned(),
                _ if found.temporary => "it is temporary, deprecated or a duplicate".to_owned(),
                (_, Some(uplink)) => format!("{} was chosen by {}", uplink.address, uplink.chosen_by),
                (_, None) => "it is not configured, and no route to peers uses it".to_owned(),
            };
            Some(Other { address, interface, reason })
        };
        self.network.addresses.iter().filter_map(other).take(OTHERS).collect()
    }

    /// Ranges that the node must reach outside the pod network.
    fn needed(&self) -> Vec<RequiredRange> {
        let is_elsewhere = |address: &IpAddr| match address {
            IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_loopback() && !v4.is_unspecified(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && !v6.is_loopback() && !v6.is_unspecified(),
        };
        let name = |index: IfIndex| {
            let interface = self.network.interfaces.get(&index).map(|(name, _)| name.clone());
            interface.filter(|name| name != LOOPBACK && !self.network.own.contains(&index))
        };
        let is_pods = |range: Cidr| self.pods.iter().any(|pods| pods.covers(range));
        let mut needed = self.store.clone();
        for route in &self.network.configured {
            if route.index.is_some_and(|index| self.network.own.contains(&index)) {
                continue;
            }
            let range = Cidr::containing(route.destination.ip(), route.destination.prefix());
            let gateways = route.gateways.iter().copied().filter(is_elsewhere);
            needed.extend(gateways.map(|gateway| RequiredRange::host(gateway, RequiredFor::Gateway)));
            let is_network = route.gateways.is_empty() && range.length() > 0 && is_elsewhere(&range.first());
            if let Some(interface) = route.index.and_then(name).filter(|_| is_network && !is_pods(range)) {
                needed.push(RequiredRange { range, what: RequiredFor::Network(interface) });
            }
        }
        let routers =
            self.network.routes.iter().filter_map(|(_, route)| route.next_hop.router()).filter(is_elsewhere);
        needed.extend(routers.map(|router| RequiredRange::host(router, RequiredFor::Gateway)));
        let in_a_network = |range: Cidr| {
            needed
                .iter()
                .any(|network| matches!(network.what, RequiredFor::Network(_)) && network.range.covers(range))
        };
        let alone = self.network.addresses.iter().filter_map(|found| {
            let address = found.address.ip();
            let (interface, _) = self.network.interfaces.get(&found.index)?;
            let own = RequiredRange::host(address, RequiredFor::Own(interface.clone()));
            (is_elsewhere(&address) && !in_a_network(own.range) && !is_pods(own.range)).then_some(own)
        });
        let alone: Vec<RequiredRange> = alone.take(OWN_ADDRESSES).collect();
        needed.extend(alone);
        needed.sort();
        needed.dedup();
        needed
    }

    /// The source address for a route. The kernel prefers a host address (/32, /128) to an address with a network
    /// prefix, but a host address may be virtual and move to another node. It also prefers temporary addresses to
    /// permanent ones (`use_tempaddr`).
    fn source(&self, family: Family, route: &RouteLookup) -> Option<IpAddr> {
        let preferred = self.preferred(family);
        let on_it: Vec<&Address> =
            preferred.iter().copied().filter(|found| found.index == route.index).collect();
        let of_network = on_it.iter().find(|found| found.address.prefix() < family.bits());
        let chosen = preferred.iter().copied().find(|found| Some(found.address.ip()) == route.source);
        let found = match chosen {
            Some(chosen) if chosen.address.prefix() < family.bits() || chosen.index != route.index => {
                Some(chosen)
            }
            Some(whole) => of_network.copied().or(Some(whole)),
            // The kernel's choice is not usable.
            None => of_network.or(on_it.first()).copied(),
        };
        Some(found?.address.ip())
    }

    /// Whether routes to nodes exist, but none uses that address: it was chosen while the interface of the correct
    /// address was down. Without this check it would stay in use.
    fn is_astray(&self, uplink: &Uplink) -> bool {
        self.has_routes_to_nodes(uplink) && !self.routes_from(uplink).any(|(_, is_from_it)| is_from_it)
    }

    /// Whether the nodes are reached from that address, or no route to a node is known. A node whose Node object has an
    /// address in another network than the cluster's underlay stays in the network of its peers.
    fn reaches_nodes(&self, uplink: &Uplink) -> bool {
        let reaches = |(what, is_from_it): (&RouteTo, bool)| matches!(what, RouteTo::Node(_)) && is_from_it;
        !self.has_routes_to_nodes(uplink) || self.routes_from(uplink).any(reaches)
    }

    fn has_routes_to_nodes(&self, uplink: &Uplink) -> bool {
        self.routes_from(uplink).any(|(what, _)| matches!(what, RouteTo::Node(_)))
    }

    /// The routes of the address's family, and whether each uses the address or its interface.
    fn routes_from(&self, uplink: &Uplink) -> impl Iterator<Item = (&RouteTo, bool)> {
        let (family, index, address) = (Family::of(uplink.address), uplink.index, uplink.address);
        let is_of_family = move |route: &RouteLookup| {
            !route.local && route.source.is_some_and(|source| Family::of(source) == family)
        };
        let routes = self.network.routes.iter().filter(move |(_, route)| is_of_family(route));
        routes.map(move |(what, route)| (what, route.index == index || route.source == Some(address)))
    }

    fn uplink(&self, address: IpAddr, chosen_by: String) -> Option<Uplink> {
        let mut candidates = self.candidates(Family::of(address));
        let (found, (interface, _)) = candidates.find(|(found, _)| found.address.ip() == address)?;
        let mtu = self.mtu(found)?;
        Some(Uplink { address, index: found.index, interface: interface.clone(), mtu, chosen_by })
    }

    /// The MTU for packets from that address: packets from a host address on loopback leave through another interface.
    fn mtu(&self, of: &Address) -> Option<u32> {
        let (interface, own) = self.network.interfaces.get(&of.index)?;
        let family = Family::of(of.address.ip());
        let routes = || self.network.routes.iter().map(|(_, route)| route).filter(|route| !route.local);
        let from_it: Vec<IfIndex> =
            routes().filter(|route| route.source == Some(of.address.ip())).map(|route| route.index).collect();
        let leave_by: Vec<IfIndex> = match from_it.as_slice() {
            // No route has this source, and packets do not leave through loopback.
            [] if interface == LOOPBACK => routes()
                .filter(|route| route.source.map(Family::of) == Some(family))
                .map(|route| route.index)
                .collect(),
            known if known.contains(&of.index) => Vec::new(),
            known => known.to_vec(),
        };
        let carried =
            leave_by.iter().filter_map(|index| self.network.interfaces.get(index).map(|(_, mtu)| *mtu));
        Some(carried.fold(*own, u32::min))
    }
}

impl Underlay {
    /// Chooses the addresses. A current address is kept as long as it exists, because a change affects every peer.
    pub fn choose(
        config: &UnderlayConfig,
        facts: &UnderlayInputs,
        current: &Self,
    ) -> Result<Self, NotChosen> {
        let mut uplinks = PerFamily::NONE;
        for family in Family::BOTH {
            uplinks[family] = choose(family, config, facts, current.uplinks[family].as_ref())?;
        }
        if uplinks.is_empty() {
            let seen: Vec<_> = Family::BOTH.iter().flat_map(|family| facts.candidates(*family)).collect();
            let seen: Vec<_> =
                seen.iter().map(|(found, (name, _))| format!("{} on {name}", found.address.ip())).collect();
            return Err(NotChosen::Undecided { seen });
        }
        let others = facts.others(&uplinks);
        Ok(Self { uplinks, others, needed: facts.needed() })
    }

    /// The addresses, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.uplinks.values().map(|uplink| uplink.address).collect()
    }

    /// The names of the interfaces with these addresses.
    pub fn interfaces(&self) -> BTreeSet<String> {
        self.uplinks.values().map(|uplink| uplink.interface.clone()).collect()
    }

    /// The address of that family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        Some(self.uplinks[family].as_ref()?.address)
    }

    /// The underlay of a node without peers: no addresses.
    pub fn of_lone_node(facts: &UnderlayInputs) -> Self {
        Self { uplinks: PerFamily::NONE, others: Vec::new(), needed: facts.needed() }
    }

    /// The underlay families for tunnels, in order of preference.
    pub fn tunnel_families(&self) -> impl Iterator<Item = Family> {
        self.uplinks.families()
    }
}

fn choose(
    family: Family,
    config: &UnderlayConfig,
    facts: &UnderlayInputs,
    current: Option<&Uplink>,
) -> Result<Option<Uplink>, NotChosen> {
    if !config.addresses.is_empty() {
        let Some(address) = config.addresses.iter().find(|address| Family::of(**address) == family) else {
            return Ok(None);
        };
        let uplink = facts.uplink(*address, "underlay.addresses".to_owned());
        return uplink.map(Some).ok_or(NotChosen::NoAddress(*address));
    }
    if let Some(name) = &config.interface {
        if !facts.network.interfaces.values().any(|(interface, _)| interface == name) {
            return Err(NotChosen::NoInterface(name.clone()));
        }
        let mut on_it = facts.candidates(family).filter(|(_, (interface, _))| interface == name);
        let found = on_it.next().map(|(found, _)| found.address.ip());
        return Ok(found.and_then(|address| facts.uplink(address, "underlay.interface".to_owned())));
    }
    let of_family = |addresses: &'_ [IpAddr]| -> Vec<IpAddr> {
        addresses.iter().copied().filter(|address| Family::of(*address) == family).collect()
    };
    let is_pods = |address: &IpAddr| facts.pools.iter().any(|pool| pool.has(*address));
    let node_object = of_family(&facts.node_object).into_iter().filter(|address| !is_pods(address));
    let node_object =
        node_object.filter_map(|address| facts.uplink(address, "InternalIP of the Node object".to_owned()));
    let node_object = node_object.filter(|uplink| facts.reaches_nodes(uplink));
    let in_use = current.and_then(|uplink| facts.uplink(uplink.address, uplink.chosen_by.clone()));
    let registered = of_family(&facts.registered).into_iter();
    let registered =
        registered.filter_map(|address| facts.uplink(address, "this node's own record".to_owned()));
    let known = node_object.chain(in_use).chain(registered);
    if let Some(uplink) = { known }.find(|uplink| !facts.is_astray(uplink)) {
        return Ok(Some(uplink));
    }
    let by_route = facts.network.routes.iter().find_map(|(what, lookup)| {
        let is_of_family = lookup.source.is_some_and(|source| Family::of(source) == family) && !lookup.local;
        let source = if is_of_family { facts.source(family, lookup) } else { None };
        facts.uplink(source?, format!("the route to {what}"))
    });
    if by_route.is_some() {
        return Ok(by_route);
    }
    match facts.preferred(family).as_slice() {
        [only] => Ok(facts.uplink(only.address.ip(), format!("the only {family} address"))),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests;
