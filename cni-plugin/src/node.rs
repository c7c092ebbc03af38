//! The state of the node's pod network in the kernel. It is lost at a reboot, so it was created since the last boot.

use std::collections::BTreeMap;

use polder_api::{BRIDGE, is_host_interface};
use polder_netlink::link::{Link, LinkKind};
use polder_netlink::route::{KernelTarget, Route};
use polder_netlink::{Error, RouteSocket};

/// The state of the node's pod network in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeNetwork {
    /// Whether an agent has set up the node since boot: the bridge is up, and a route has Polder's protocol number
    /// (84).
    pub set_up: bool,
    /// Number of pod interfaces that a Polder route reaches, directly or over the bridge.
    pub connected: usize,
    /// Number of pod interfaces that no Polder route reaches.
    pub cut_off: usize,
}

impl NodeNetwork {
    /// Reads the state from the network namespace of the calling thread.
    pub fn read() -> Result<Self, Error> {
        let mut socket = RouteSocket::open()?;
        Ok(Self::of(&socket.links()?, &socket.routes()?.0))
    }

    /// Derives the state from the interfaces and the Polder routes.
    pub fn of(links: &BTreeMap<String, Link>, routes: &[Route]) -> Self {
        let leads_to = |link: &Link| {
            let to = |route: &Route| match route.target {
                KernelTarget::Link { index } | KernelTarget::Gateway { index, .. } => Some(index),
                KernelTarget::Unreachable => None,
            };
            link.up && routes.iter().any(|route| to(route) == Some(link.index))
        };
        let bridge = links.get(BRIDGE).filter(|bridge| bridge.kind == LinkKind::Bridge && bridge.up);
        let reached = bridge.filter(|bridge| leads_to(bridge));
        let is_port = |link: &Link| reached.is_some_and(|bridge| link.controller == Some(bridge.index));
        let pods = links.values().filter(|link| link.kind == LinkKind::Veth && is_host_interface(&link.name));
        let mut found = Self { set_up: bridge.is_some() && !routes.is_empty(), connected: 0, cut_off: 0 };
        for pod in pods {
            let is_connected = leads_to(pod) || (pod.up && is_port(pod));
            *if is_connected { &mut found.connected } else { &mut found.cut_off } += 1;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_api::PerFamily;
    use polder_netlink::IfIndex;

    fn link(index: u32, name: &str, kind: LinkKind, controller: Option<u32>) -> (String, Link) {
        let link = Link {
            has_neighbours: true,
            index: IfIndex::new(index),
            name: name.to_owned(),
            up: true,
            running: true,
            mac: None,
            mtu: 1500,
            controller: controller.map(IfIndex::new),
            peer: None,
            alias: None,
            kind,
            filters_vlans: false,
            calls_iptables: PerFamily::default(),
            port: None,
            makes_link_local: None,
            ipv4_forwarding: true,
        };
        (name.to_owned(), link)
    }

    fn route(target: KernelTarget) -> Route {
        Route { destination: "10.244.0.0/26".parse().unwrap(), target, source: None, mtu: None }
    }

    const POD: &str = "pld0123456789ab";
    const NOWHERE: KernelTarget = KernelTarget::Unreachable;
    const TO_BRIDGE: KernelTarget = KernelTarget::Link { index: IfIndex::new(2) };
    const TO_POD: KernelTarget = KernelTarget::Link { index: IfIndex::new(3) };

    fn network(links: &[(String, Link)], targets: &[KernelTarget]) -> NodeNetwork {
        let routes: Vec<Route> = targets.iter().map(|target| route(*target)).collect();
        NodeNetwork::of(&links.iter().cloned().collect(), &routes)
    }

    #[test]
    fn a_pod_is_connected_by_a_route_to_its_bridge_or_interface() {
        let bridge = || link(2, BRIDGE, LinkKind::Bridge, None);
        let on_bridge = [bridge(), link(3, POD, LinkKind::Veth, Some(2))];
        let routed = [bridge(), link(3, POD, LinkKind::Veth, None)];
        let is = |set_up, connected, cut_off| NodeNetwork { set_up, connected, cut_off };
        assert_eq!(network(&on_bridge, &[NOWHERE, TO_BRIDGE]), is(true, 1, 0));
        assert_eq!(network(&routed, &[NOWHERE, TO_POD]), is(true, 1, 0));
        assert_eq!(network(&on_bridge, &[NOWHERE]), is(true, 0, 1), "no route leads to the bridge");
        assert_eq!(network(&routed, &[NOWHERE, TO_BRIDGE]), is(true, 0, 1), "it is no port of the bridge");
        assert_eq!(network(&on_bridge, &[]), is(false, 0, 1));
        let mut down = on_bridge.clone();
        down[0].1.up = false;
        assert_eq!(network(&down, &[NOWHERE, TO_BRIDGE]), is(false, 0, 1), "the bridge is down");
        assert_eq!(network(&[bridge()], &[NOWHERE, TO_BRIDGE]), is(true, 0, 0));
        assert_eq!(network(&[], &[]), NodeNetwork::default());
    }

    #[test]
    fn an_interface_with_only_the_name_of_a_pod_is_not_counted() {
        let links = [link(2, BRIDGE, LinkKind::Bridge, None), link(3, POD, LinkKind::Other, Some(2))];
        assert_eq!(network(&links, &[TO_BRIDGE, TO_POD]).connected, 0);
        let links = [link(2, BRIDGE, LinkKind::Bridge, None), link(3, "pldx", LinkKind::Veth, Some(2))];
        assert_eq!(network(&links, &[TO_BRIDGE, TO_POD]).connected, 0);
    }
}
