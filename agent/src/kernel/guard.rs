//! Destinations that no route of Polder may capture, whatever a record contains: etcd, gateways, other nodes, and the
//! networks that the node is connected to. A node that loses one of them can no longer receive corrected records.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use polder_api::Family;
use polder_ipam::Cidr;
use polder_ipam::needed::{RequiredFor, RequiredRange, connected_length};
use polder_netlink::{Error, Operation, route};

use super::Kernel;
use super::state::{OwnRoute, RouteTarget};

/// The guarded destinations.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct Guard {
    /// Ranges that the node needs, each with the prefix length of the smallest connected network that contains the
    /// range, or 0 if there is none. A route with a shorter prefix does not capture the range.
    ranges: Vec<(Cidr, u8)>,
    /// The single addresses among the needed ranges.
    hosts: BTreeSet<IpAddr>,
    /// The underlay addresses of other nodes. There can be thousands.
    nodes: BTreeSet<IpAddr>,
    /// The networks that the node is connected to.
    networks: Vec<Cidr>,
}

impl Guard {
    /// Guards the needed ranges and the underlay addresses of other nodes.
    pub fn new(required: &[RequiredRange], nodes: impl Iterator<Item = IpAddr>) -> Self {
        // The node's own addresses need no guard: the kernel looks up its local table first.
        let routed = || required.iter().filter(|entry| !matches!(entry.what, RequiredFor::Own(_)));
        Self {
            ranges: routed().map(|entry| (entry.range, connected_length(required, entry.range))).collect(),
            hosts: routed().filter(|entry| entry.is_host()).map(|entry| entry.range.first()).collect(),
            nodes: nodes.collect(),
            networks: routed().filter(|entry| !entry.is_host()).map(|entry| entry.range).collect(),
        }
    }

    /// Whether the kernel would use this route for a guarded destination. The most specific route wins: a route that is
    /// wider than the network of an interface captures nothing from that network.
    pub fn is_captured_by(&self, destination: &IpNetwork, route: &OwnRoute) -> bool {
        let range = Cidr::containing(destination.ip(), destination.prefix());
        let is_single = range.length() == range.family().bits();
        if is_single && matches!(route.target, RouteTarget::Device(_)) {
            // A pod of this node: Polder or another IPAM plugin allocated its address on this node.
            return self.protects(range.first());
        }
        self.is_captured(destination)
    }

    /// Whether the kernel would use any route to this destination for a guarded destination.
    pub fn is_captured(&self, destination: &IpNetwork) -> bool {
        let range = Cidr::containing(destination.ip(), destination.prefix());
        let mut inside = self.nodes.range(range.first()..=range.last());
        let captures_node = |address: &IpAddr| {
            let host = Cidr::containing(*address, Family::of(*address).bits());
            let containing = self.networks.iter().filter(|network| network.covers(host));
            range.length() >= containing.map(|network| network.length()).max().unwrap_or(0)
        };
        self.ranges.iter().any(|(needed, connected)| needed.overlaps(range) && range.length() >= *connected)
            || inside.any(captures_node)
    }

    /// Whether the address is a guarded address. No device of Polder may have this address.
    pub fn protects(&self, address: IpAddr) -> bool {
        self.hosts.contains(&address) || self.nodes.contains(&address)
    }
}

impl Kernel {
    /// Deletes Polder's routes that make etcd unreachable, and returns their destinations. Used while no records are
    /// known: these routes may be the cause.
    pub fn delete_routes_that_capture(&mut self, etcd: &[RequiredRange]) -> Result<Vec<IpNetwork>, Error> {
        let guard = Guard::new(etcd, std::iter::empty());
        let (routes, conflicting) = self.routes.routes()?;
        let routes = routes.into_iter().map(|route| (route.destination, route::delete(route.destination)));
        let conflicting = conflicting.into_iter().map(|route| (route.destination, route.delete()));
        let captured = routes.chain(conflicting).filter(|(destination, _)| guard.is_captured(destination));
        let (destinations, deletions): (Vec<IpNetwork>, Vec<Operation>) = captured.unzip();
        for outcome in self.routes.execute(deletions)? {
            match outcome {
                Err(error) if !error.is_missing() => return Err(error),
                _ => {}
            }
        }
        Ok(destinations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::state::Device;

    fn needed() -> Vec<RequiredRange> {
        let network = |range: &str, interface: &str| RequiredRange {
            range: range.parse().unwrap(),
            what: RequiredFor::Network(interface.to_owned()),
        };
        let etcd = |address: &str| {
            RequiredRange::host(
                address.parse().unwrap(),
                RequiredFor::Store("the address of etcd".to_owned()),
            )
        };
        vec![
            network("10.10.1.0/24", "eth0"),
            network("172.17.0.0/16", "docker0"),
            etcd("10.10.1.200"),
            etcd("10.99.0.5"),
            RequiredRange::host("10.10.1.254".parse().unwrap(), RequiredFor::Gateway),
            RequiredRange::host("10.98.0.1".parse().unwrap(), RequiredFor::Own("lo".to_owned())),
        ]
    }

    fn guard() -> Guard {
        let nodes = ["10.10.1.2", "10.10.2.3"].map(|node| node.parse().unwrap());
        Guard::new(&needed(), nodes.into_iter())
    }

    fn is_captured(guard: &Guard, destination: &str, target: RouteTarget) -> bool {
        let route = OwnRoute { target, source: None, mtu: None };
        guard.is_captured_by(&destination.parse().unwrap(), &route)
    }

    #[test]
    fn a_route_that_captures_etcd_a_gateway_a_node_or_a_network_is_detected() {
        let guard = guard();
        for destination in [
            "10.10.1.192/26",
            "10.10.1.0/24",
            "10.10.1.64/27",
            "10.10.2.0/26",
            "10.99.0.0/16",
            "10.99.0.5/32",
            "10.0.0.0/8",
            "172.17.3.0/26",
        ] {
            assert!(is_captured(&guard, destination, RouteTarget::Unreachable), "{destination}");
        }
    }

    #[test]
    fn a_route_that_captures_no_needed_address_is_permitted() {
        let guard = guard();
        for destination in [
            "10.244.0.0/16",
            // The routes of the interfaces are more specific.
            "10.10.0.0/23",
            "172.16.0.0/12",
            // The kernel looks up its local table first.
            "10.98.0.0/16",
            "fd00::/56",
        ] {
            assert!(!is_captured(&guard, destination, RouteTarget::Unreachable), "{destination}");
        }
    }

    #[test]
    fn a_local_pod_may_use_an_underlay_address_that_no_host_has() {
        let guard = guard();
        let pod = || RouteTarget::Device(Device::Bridge);
        assert!(!is_captured(&guard, "10.10.1.77/32", pod()));
        assert!(is_captured(&guard, "10.10.1.200/32", pod()));
        assert!(is_captured(&guard, "10.10.2.3/32", pod()));
        assert!(is_captured(&guard, "10.10.1.77/32", RouteTarget::Unreachable), "a pod of another node");
        assert!(guard.protects("10.10.1.254".parse().unwrap()));
        assert!(!guard.protects("10.10.1.77".parse().unwrap()));
    }
}
