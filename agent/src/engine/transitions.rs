//! Changes of underlay addresses, of peers and of this node, without packet loss: the old address stays valid until all
//! nodes know the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_api::{Family, NodeName, PerFamily};
use polder_ipam::peers::Peer;
use polder_ipam::record::NodeRecord;
use tokio::time::Instant;

use crate::underlay::Underlay;

/// How long tunnel packets from a peer's previous address are accepted.
const GRACE: Duration = Duration::from_secs(60);

/// How long this node still sends from the old address once its record has the new one.
const OVERLAP: Duration = Duration::from_secs(1);

/// Nodes whose underlay address changed, and when.
#[derive(Debug, Default)]
pub(super) struct Transitions {
    /// The peers' records in the last pass.
    peers: BTreeMap<NodeName, Arc<NodeRecord>>,
    /// Their previous addresses, with the node and the end of validity.
    previous_underlay: BTreeMap<IpAddr, (NodeName, Instant)>,
    /// This node's previous addresses. The end of use is set once the node's record has the new address.
    own_previous: PerFamily<Option<(IpAddr, Option<Instant>)>>,
}

impl Transitions {
    /// Updates from the current records of the peers.
    pub(super) fn observe(&mut self, peers: &[Peer], now: Instant) {
        let mut current_peers = BTreeMap::new();
        for peer in peers {
            let old_record = self.peers.remove(&peer.name);
            // A new incarnation is another node.
            let same_node = old_record.filter(|record| record.incarnation == peer.record.incarnation);
            let old_addresses = same_node.iter().flat_map(|record| record.underlay.iter().copied());
            let previous_underlay = old_addresses.filter(|address| !peer.record.underlay.contains(address));
            self.previous_underlay
                .extend(previous_underlay.map(|address| (address, (peer.name.clone(), now + GRACE))));
            current_peers.insert(peer.name.clone(), Arc::clone(&peer.record));
        }
        self.peers = current_peers;
        self.previous_underlay.retain(|_, (name, until)| *until > now && self.peers.contains_key(name));
        for family in Family::BOTH {
            let own_previous = &mut self.own_previous[family];
            *own_previous = own_previous.take().filter(|(_, until)| until.is_none_or(|until| until > now));
        }
    }

    /// The peers' previous addresses that are still valid.
    pub(super) fn previous_underlay(&self) -> BTreeMap<NodeName, Vec<IpAddr>> {
        let mut previous_underlay: BTreeMap<NodeName, Vec<IpAddr>> = BTreeMap::new();
        for (address, (name, _)) in &self.previous_underlay {
            previous_underlay.entry(name.clone()).or_default().push(*address);
        }
        previous_underlay
    }

    /// The underlay with the source address for tunnels: in each family the registered address, if this node still has
    /// it, otherwise the current one. After the registration of a new address, the previous one stays in use for
    /// [`OVERLAP`]. `registered` are the addresses in the node's record, `own` all addresses of this node.
    pub(super) fn sources(
        &mut self,
        underlay: &Underlay,
        registered: &[IpAddr],
        own: &BTreeSet<IpAddr>,
        now: Instant,
    ) -> Underlay {
        let mut sources = underlay.clone();
        for family in Family::BOTH {
            let Some(uplink) = &mut sources.uplinks[family] else { continue };
            let own_previous = &mut self.own_previous[family];
            match registered.iter().copied().find(|address| Family::of(*address) == family) {
                Some(known) if known != uplink.address => *own_previous = Some((known, None)),
                _ => {
                    if let Some((_, until)) = own_previous {
                        until.get_or_insert(now + OVERLAP);
                    }
                }
            }
            let is_usable = |(address, until): &(IpAddr, Option<Instant>)| {
                own.contains(address) && until.is_none_or(|until| until > now)
            };
            *own_previous = own_previous.filter(is_usable);
            if let Some((address, _)) = own_previous {
                uplink.address = *address;
            }
        }
        sources
    }

    /// When the next of these addresses expires.
    pub(super) fn next(&self) -> Option<Instant> {
        let own_previous = self.own_previous.values().filter_map(|(_, until)| *until);
        own_previous.chain(self.previous_underlay.values().map(|(_, until)| *until)).min()
    }
}

#[cfg(test)]
mod tests {
    use polder_api::{Mac, PerFamily};
    use polder_ipam::ids::{BootId, Incarnation, MachineId};
    use polder_netlink::IfIndex;

    use super::*;
    use crate::underlay::Uplink;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn peer(incarnation: &str, underlay: &str) -> Peer {
        let record = NodeRecord {
            incarnation: Incarnation::new(incarnation),
            machine_id: MachineId::default(),
            boot_id: BootId::default(),
            underlay: vec![ip(underlay)],
            gateways: Vec::new(),
            probes: Vec::new(),
            vtep_mac: Mac([2; 6]),
            mtu: 1450,
            version: String::new(),
            kubernetes_uid: None,
        };
        Peer { name: "n2".parse().unwrap(), record: Arc::new(record), blocks: Vec::new() }
    }

    fn previous_underlay(transitions: &Transitions) -> Vec<IpAddr> {
        transitions.previous_underlay().into_values().flatten().collect()
    }

    #[test]
    fn the_previous_address_of_a_peer_stays_valid_for_the_grace_period() {
        let (mut transitions, now) = (Transitions::default(), Instant::now());
        transitions.observe(&[peer("a", "10.0.0.2")], now);
        transitions.observe(&[peer("a", "10.0.0.3")], now);
        assert_eq!(
            (previous_underlay(&transitions), transitions.next()),
            (vec![ip("10.0.0.2")], Some(now + GRACE))
        );
        transitions.observe(&[peer("a", "10.0.0.3")], now + GRACE);
        assert_eq!((previous_underlay(&transitions), transitions.next()), (vec![], None));
    }

    #[test]
    fn a_removed_peer_or_a_new_incarnation_has_no_previous_addresses() {
        let (mut transitions, now) = (Transitions::default(), Instant::now());
        transitions.observe(&[peer("a", "10.0.0.2")], now);
        transitions.observe(&[peer("b", "10.0.0.3")], now);
        assert!(previous_underlay(&transitions).is_empty());
        transitions.observe(&[peer("b", "10.0.0.4")], now);
        assert_eq!(previous_underlay(&transitions), [ip("10.0.0.3")]);
        transitions.observe(&[], now);
        assert!(previous_underlay(&transitions).is_empty());
    }

    #[test]
    fn this_node_sends_from_its_previous_address_until_peers_know_the_new_one() {
        let (mut transitions, now) = (Transitions::default(), Instant::now());
        let uplink = Uplink {
            address: ip("10.0.0.9"),
            index: IfIndex::new(2),
            interface: "eth0".to_owned(),
            mtu: 1500,
            chosen_by: String::new(),
        };
        let underlay = Underlay { uplinks: PerFamily::new(Some(uplink), None), ..Underlay::default() };
        let both = BTreeSet::from([ip("10.0.0.1"), ip("10.0.0.9")]);
        let mut source_address = |registered: &str, own: &BTreeSet<IpAddr>, at| {
            transitions
                .sources(&underlay, &[ip(registered)], own, at)
                .address(Family::V4)
                .unwrap()
                .to_string()
        };
        assert_eq!(source_address("10.0.0.1", &both, now), "10.0.0.1");
        assert_eq!(
            source_address("10.0.0.9", &both, now),
            "10.0.0.1",
            "peers receive the new address only now"
        );
        assert_eq!(source_address("10.0.0.9", &both, now + OVERLAP), "10.0.0.9");
        // The node cannot send from an address that it no longer has.
        assert_eq!(source_address("10.0.0.1", &both, now), "10.0.0.1");
        assert_eq!(source_address("10.0.0.1", &BTreeSet::from([ip("10.0.0.9")]), now), "10.0.0.9");
    }
}
