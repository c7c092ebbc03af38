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
    leaving: PerFamily<Option<(IpAddr, Option<Instant>)>>,
}

impl Transitions {
    /// Updates from the current records of the peers.
    pub(super) fn observe(&mut self, peers: &[Peer], now: Instant) {
        let mut still_there = BTreeMap::new();
        for peer in peers {
            let before = self.peers.remove(&peer.name);
            // A new incarnation is another node.
            let before = before.filter(|before| before.incarnation == peer.record.incarnation);
            let before = before.iter().flat_map(|before| before.underlay.iter().copied());
            let previous_underlay = before.filter(|address| !peer.record.underlay.contains(address));
            self.previous_underlay
                .extend(previous_underlay.map(|address| (address, (peer.name.clone(), now + GRACE))));
            still_there.insert(peer.name.clone(), Arc::clone(&peer.record));
        }
        self.peers = still_there;
        self.previous_underlay.retain(|_, (name, until)| *until > now && self.peers.contains_key(name));
        for family in Family::BOTH {
            let leaving = &mut self.leaving[family];
            *leaving = leaving.take().filter(|(_, until)| until.is_none_or(|until| until > now));
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

    /// The underlay with the source addresses for tunnels: the addresses that the peers know, while this node has them.
    /// `registered` are the addresses in the node's record, `own` all addresses of this node.
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
            let leaving = &mut self.leaving[family];
            match registered.iter().copied().find(|address| Family::of(*address) == family) {
                Some(known) if known != uplink.address => *leaving = Some((known, None)),
                _ => {
                    if let Some((_, until)) = leaving {
                        until.get_or_insert(now + OVERLAP);
                    }
                }
            }
            let is_good = |(address, until): &(IpAddr, Option<Instant>)| {
                own.contains(address) && until.is_none_or(|until| until > now)
            };
            *leaving = leaving.filter(is_good);
            if let Some((address, _)) = leaving {
                uplink.address = *address;
            }
        }
        sources
    }

    /// When the next of these addresses expires.
    pub(super) fn next(&self) -> Option<Instant> {
        let leaving = self.leaving.values().filter_map(|(_, until)| *until);
        leaving.chain(self.previous_underlay.values().map(|(_, until)| *until)).min()
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
        };
        Peer { name: "n2".parse().unwrap(), record: Arc::new(record), blocks: Vec::new() }
    }

    fn previous_underlay(transitions: &Transitions) -> Vec<IpAddr> {
        transitions.previous_underlay().into_values().flatten().collect()
    }

    #[test]
    fn what_a_peer_has_left_is_good_for_a_while() {
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
    fn a_node_that_is_gone_or_another_has_left_nothing() {
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
    fn this_node_sends_from_its_old_address_until_the_others_know_the_new_one() {
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
        let mut from = |registered: &str, own: &BTreeSet<IpAddr>, at| {
            transitions
                .sources(&underlay, &[ip(registered)], own, at)
                .address(Family::V4)
                .unwrap()
                .to_string()
        };
        assert_eq!(from("10.0.0.1", &both, now), "10.0.0.1");
        assert_eq!(from("10.0.0.9", &both, now), "10.0.0.1", "the others hear of it just now");
        assert_eq!(from("10.0.0.9", &both, now + OVERLAP), "10.0.0.9");
        // The node cannot send from an address that it no longer has.
        assert_eq!(from("10.0.0.1", &both, now), "10.0.0.1");
        assert_eq!(from("10.0.0.1", &BTreeSet::from([ip("10.0.0.9")]), now), "10.0.0.9");
    }
}
