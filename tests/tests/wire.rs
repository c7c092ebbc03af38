//! Forged packets from a pod, or from a host that is not a node: they reach no receiver.
//!
//! In every test the forged packets are sent first, then a genuine one on the same path. When that has arrived, the
//! others would have arrived too.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod wire {
    pub(crate) mod stage;
}

use std::net::{IpAddr, Ipv6Addr};

use polder_api::{Family, Mac};
use polder_tests::fabric::address;
use polder_tests::frame::{self, ALL_NODES, ALL_NODES_MAC, BROADCAST, FrameSender, Mark, Operation};
use polder_tests::{Lab, Node, Pod, wait};

use wire::stage::{
    Forged, OTHER, STRANGER, Stage, TUNNEL, foreign, forged, listen, on_both_stages, send_datagram, udp, v4,
    v6, wait_for,
};

/// Each outer family with each inner family.
const NESTED: [[Family; 2]; 4] =
    [[Family::V4, Family::V4], [Family::V4, Family::V6], [Family::V6, Family::V4], [Family::V6, Family::V6]];

#[test]
fn a_pod_sends_under_its_own_address_only() {
    on_both_stages(|stage| {
        for family in Family::BOTH {
            for (name, to) in stage.receivers(family) {
                let mut frames = Vec::new();
                for (owner, from) in stage.addresses_of_others(family) {
                    let packet = |mark: Mark| stage.own_frame(&udp(from, to, OTHER, &mark.bytes()));
                    frames.push(forged(format!("a packet to {name} from the address of {owner}"), packet));
                    let tagged = |mark| frame::with_priority(&packet(mark));
                    frames.push(forged(format!("a tagged one to {name} from that of {owner}"), tagged));
                }
                stage.assert_only_own_packets_arrive(name, to, &frames);
            }
        }
    });
}

#[test]
fn a_pod_sends_under_its_own_mac_address_only() {
    on_both_stages(|stage| {
        for family in Family::BOTH {
            let macs = [&stage.b, &stage.c].map(|pod| Mac::of_pod(pod.v4()));
            let macs = [stage.gateway_mac, STRANGER, macs[0], macs[1]];
            for (name, to) in stage.receivers(family) {
                let own = stage.a.address_of(family);
                let frames = macs.map(|mac| {
                    forged(format!("a packet from {mac} to {name}"), |mark| {
                        frame::ip_frame(stage.gateway_mac, mac, &udp(own, to, OTHER, &mark.bytes()))
                    })
                });
                stage.assert_only_own_packets_arrive(name, to, &frames);
            }
        }
    });
}

#[test]
fn frames_of_a_pod_with_a_foreign_destination_do_not_reach_other_pods() {
    on_both_stages(|stage| {
        for family in Family::BOTH {
            let (own, to) = (stage.a.address_of(family), stage.b.address_of(family));
            let frames = [Mac::of_pod(stage.b.v4()), BROADCAST, ALL_NODES_MAC, STRANGER].map(|mac| {
                forged(format!("a frame to {mac}"), |mark| {
                    frame::ip_frame(mac, stage.mac, &udp(own, to, OTHER, &mark.bytes()))
                })
            });
            stage.assert_only_own_packets_arrive("b", to, &frames);
        }
    });
}

#[test]
fn arp_messages_of_a_pod_with_a_foreign_address_are_dropped() {
    on_both_stages(|stage| {
        let mut frames = Vec::new();
        let (own, gateway) = (v4(stage.a.v4()), v4(stage.a.gateway(stage.a.v4())));
        for (owner, of) in stage.addresses_of_others(Family::V4) {
            let sender = (stage.mac, v4(of));
            for (to, mac) in
                [("all", BROADCAST), ("the gateway", stage.gateway_mac), ("b", Mac::of_pod(stage.b.v4()))]
            {
                for (kind, operation, target) in [
                    ("reply", Operation::Reply, (stage.gateway_mac, gateway)),
                    ("reply that nobody asked for", Operation::Reply, (BROADCAST, v4(of))),
                    ("request for the same", Operation::Request, (Mac([0; 6]), v4(of))),
                    ("request for its own", Operation::Request, (Mac([0; 6]), own)),
                ] {
                    frames.push(forged(format!("a {kind} to {to}: {of} ({owner}) is at a"), |mark| {
                        frame::arp((mac, stage.mac), operation, sender, target, mark)
                    }));
                }
            }
        }
        stage.assert_no_effect(Family::V4, &frames);
    });
}

/// `a` sends an ARP request for the gateway, with another address and its own MAC address: the receiver of a request
/// usually records both.
fn arp_request_from(stage: &Stage, address: IpAddr) -> Forged {
    forged(format!("a request under {address}"), |mark| {
        let gateway = (Mac([0; 6]), v4(stage.a.gateway(address)));
        let sender = (stage.mac, v4(address));
        frame::arp((stage.gateway_mac, stage.mac), Operation::Request, sender, gateway, mark)
    })
}

/// `a` announces, unsolicited, that an address is at its MAC address. Over IPv6 it sends that from its own address.
fn advertisement_of(stage: &Stage, address: IpAddr) -> Forged {
    forged(format!("a claim of {address}"), |mark| {
        let gateway = stage.a.gateway(address);
        match (address, gateway, stage.a.address_like(address)) {
            (IpAddr::V6(address), IpAddr::V6(gateway), IpAddr::V6(own)) => {
                stage.own_frame(&frame::advertisement(own, gateway, address, stage.mac, mark))
            }
            _ => {
                let sender = (stage.mac, v4(address));
                let asker = (stage.gateway_mac, v4(gateway));
                frame::arp((stage.gateway_mac, stage.mac), Operation::Reply, sender, asker, mark)
            }
        }
    })
}

#[test]
fn an_arp_request_from_a_foreign_address_creates_no_neighbour_entry() {
    on_both_stages(|stage| {
        let others = stage.addresses_of_others(Family::V4);
        let frames: Vec<_> =
            others.into_iter().map(|(_, address)| arp_request_from(stage, address)).collect();
        stage.assert_no_effect(Family::V4, &frames);
    });
}

#[test]
fn packets_to_a_deleted_pod_cannot_be_redirected_to_another_pod() {
    on_both_stages(|stage| {
        let gone = stage.b.addresses();
        let assert_delivered = |stage: &mut Stage, name: &str, to: IpAddr| {
            let mark = Mark::new();
            stage.d.within(|| send_datagram(to, OTHER, &mark.bytes()));
            let capture = if name == "a" { &mut stage.own } else { stage.capture(name) };
            capture.wait_for(&format!("{name} to receive d"), mark);
        };
        gone.iter().for_each(|address| assert_delivered(stage, "b", *address));
        stage.lab.workers[0].delete(&stage.b);
        let mut stolen = Vec::new();
        for address in gone {
            let mut before = vec![advertisement_of(stage, address)];
            if address.is_ipv4() {
                before.push(arp_request_from(stage, address));
            }
            // It claims the address before the host has a neighbour entry for it, and while the host may be resolving
            // it.
            for (when, claims) in [("before", before), ("meanwhile", vec![advertisement_of(stage, address)])]
            {
                claims.iter().for_each(|claim| stage.sender.send(&claim.bytes));
                let mark = Mark::new();
                stage.d.within(|| send_datagram(address, OTHER, &mark.bytes()));
                stolen.push((format!("what is sent to {address}, claimed {when}"), mark));
            }
            let own = stage.a.address_like(address);
            assert_delivered(stage, "a", own);
            // The host would now send the packets that it queues while it resolves the address.
            let late = advertisement_of(stage, address);
            stage.sender.send(&late.bytes);
            assert_delivered(stage, "a", own);
        }
        stolen.retain(|(_, mark)| stage.own.has_received(*mark));
        assert!(stolen.is_empty(), "attach = {}, a has received {stolen:#?}", stage.attach);
    });
}

#[test]
fn neighbour_advertisements_of_a_pod_with_a_foreign_address_are_dropped() {
    on_both_stages(|stage| {
        let mut frames = Vec::new();
        let own = v6(stage.a.address_of(Family::V6));
        let (gateway, b) = (v6(stage.a.gateway(own.into())), v6(stage.b.address_of(Family::V6)));
        for (owner, of) in stage.addresses_of_others(Family::V6) {
            for (to, mac, receiver) in [
                ("all", ALL_NODES_MAC, ALL_NODES),
                ("the gateway", stage.gateway_mac, gateway),
                ("b", Mac::of_pod(stage.b.v4()), b),
            ] {
                for from in [own, v6(of), "fe80::99".parse().unwrap()] {
                    let what = format!("{from} tells {to} that {of} ({owner}) is at a");
                    frames.push(forged(format!("an advertisement: {what}"), |mark| {
                        let packet = frame::advertisement(from, receiver, v6(of), stage.mac, mark);
                        frame::ip_frame(mac, stage.mac, &packet)
                    }));
                    frames.push(forged(format!("a solicitation: {what}"), |mark| {
                        let packet = frame::solicitation(v6(of), receiver, gateway, stage.mac, mark);
                        frame::ip_frame(mac, stage.mac, &packet)
                    }));
                }
            }
        }
        stage.assert_no_effect(Family::V6, &frames);
    });
}

#[test]
fn router_advertisements_of_a_pod_are_ignored() {
    let [tried, taken] = [0xfd66, 0xfd67].map(|first| Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0));
    let known = |node: &Node| node.run("ip", &["-6", "address"]) + &node.run("ip", &["-6", "route"]);
    on_both_stages(|stage| {
        // A host that is not a router accepts this packet from the router's side: it is valid.
        let world = Lab::world_address(true);
        let router = stage.lab.fabric.node().within(|| FrameSender::towards(world));
        let link_local = "fe80::99".parse().unwrap();
        let packet = frame::router_advertisement(link_local, ALL_NODES, taken, STRANGER, Mark::new());
        router.send(&frame::ip_frame(ALL_NODES_MAC, STRANGER, &packet));
        wait::until("the world to take a router for a router", || {
            let known = known(stage.world());
            if known.contains("fd67:") && known.contains("via fe80::99") { Ok(()) } else { Err(known) }
        });

        let own = v6(stage.a.address_of(Family::V6));
        let (gateway, b) = (v6(stage.a.gateway(own.into())), v6(stage.b.address_of(Family::V6)));
        let mut frames = Vec::new();
        for from in [link_local, own, gateway, b] {
            for (to, mac) in [
                (ALL_NODES, ALL_NODES_MAC),
                (ALL_NODES, stage.gateway_mac),
                (gateway, stage.gateway_mac),
                (b, Mac::of_pod(stage.b.v4())),
            ] {
                frames.push(forged(format!("a router advertisement from {from} to {to} at {mac}"), |mark| {
                    let packet = frame::router_advertisement(from, to, tried, stage.mac, mark);
                    frame::ip_frame(mac, stage.mac, &packet)
                }));
            }
        }
        stage.assert_no_effect(Family::V6, &frames);
        let nodes = stage.lab.workers.iter().map(|worker| known(&worker.node));
        let pods = [&stage.b, &stage.c, &stage.d]
            .map(|pod| pod.run("ip", &["-6", "address"]) + &pod.run("ip", &["-6", "route"]));
        for known in nodes.chain(pods) {
            assert!(!known.contains("fd66:") && !known.contains(" ra "), "somebody believes a: {known}");
        }
    });
}

impl Stage {
    /// Sends datagrams from `a` to a node's tunnel port, with and without a well-formed packet for the pod there.
    /// Datagrams to another port must arrive before and after.
    fn send_to_tunnel(&mut self, target: IpAddr, to: (usize, &Pod)) -> Vec<Forged> {
        let own = self.a.address_like(target);
        let socket = listen(&self.lab.workers[to.0].node, target);
        let assert_received = |stage: &Self| {
            let mark = Mark::new();
            stage.sender.send(&stage.own_frame(&udp(own, target, OTHER, &mark.bytes())));
            wait_for(&socket, "the node to receive a's own packet", mark);
        };
        let mut frames = vec![forged(format!("a datagram to the tunnel at {target}"), |mark| {
            self.own_frame(&udp(own, target, TUNNEL, &mark.bytes()))
        })];
        for inner in Family::BOTH {
            for pod in [&self.a, &self.d, &self.c] {
                frames.push(forged(format!("an {inner} packet to the tunnel at {target}"), |mark| {
                    let (from, to_pod) = (pod.address_of(inner), to.1.address_of(inner));
                    let packet = self.tunnelled(to.0, from, to_pod, mark);
                    self.own_frame(&udp(own, target, TUNNEL, &packet))
                }));
            }
        }
        assert_received(self);
        frames.iter().for_each(|forged| self.sender.send(&forged.bytes));
        assert_received(self);
        frames
    }
}

#[test]
fn a_pod_cannot_send_packets_to_a_nodes_tunnel() {
    on_both_stages(|stage| {
        let [a, b, c, d] = [&stage.a, &stage.b, &stage.c, &stage.d].map(Pod::clone);
        for outer in Family::BOTH {
            for (peer, victim) in [((2, &d), (0, &b)), ((0, &a), (1, &c)), ((0, &a), (2, &d))] {
                stage.assert_tunnel_carries(peer, victim, [outer, outer]);
                // Pods may use the same port between each other, so these datagrams reach the other node.
                let gateway = victim.1.gateway(victim.1.address_of(outer));
                let at_gateway = stage.send_to_tunnel(gateway, victim);
                let underlay = stage.lab.underlay(victim.0, outer == Family::V6);
                let at_underlay = stage.send_to_tunnel(underlay, victim);
                stage.assert_tunnel_carries(peer, victim, [outer, outer]);
                stage.assert_not_received(&at_underlay);
                for Forged { what, mark, .. } in at_gateway {
                    let capture = stage.capture(victim.1.name());
                    assert!(!capture.has_received(mark), "{what} reached {}", victim.1.name());
                }
            }
        }
    });
}

#[test]
fn only_a_peer_reaches_a_pod_through_a_tunnel() {
    on_both_stages(|stage| {
        let (b, d) = (stage.b.clone(), stage.d.clone());
        for [outer, inner] in NESTED {
            let target = stage.lab.underlay(0, outer == Family::V6);
            let socket = listen(&stage.lab.workers[0].node, target);
            stage.assert_tunnel_carries((2, &d), (0, &b), [outer, inner]);
            let mut packets = Vec::new();
            for host in [stage.world(), stage.lab.etcd.machine(0)] {
                for (owner, from) in stage.addresses_of_others(inner) {
                    let what =
                        format!("{host}, over {outer}, from the address of {owner}", host = host.name());
                    let packet = forged(what, |mark| stage.tunnelled(0, from, b.address_of(inner), mark));
                    host.within(|| send_datagram(target, TUNNEL, &packet.bytes));
                    packets.push(packet);
                }
                let mark = Mark::new();
                host.within(|| send_datagram(target, OTHER, &mark.bytes()));
                wait_for(&socket, "the node to receive a host's own packet", mark);
            }
            stage.assert_tunnel_carries((2, &d), (0, &b), [outer, inner]);
            for Forged { what, mark, .. } in packets {
                assert!(stage.node.has_received(mark), "the packet of {what} did not come");
                assert!(!stage.capture("b").has_received(mark), "b has received {what}");
            }
        }
    });
}

#[test]
fn a_peers_tunnel_delivers_only_packets_of_its_own_pods() {
    on_both_stages(|stage| {
        let [b, c, d] = [&stage.b, &stage.c, &stage.d].map(Pod::clone);
        let mut arrived = Vec::new();
        for [outer, inner] in NESTED {
            for (number, own, other) in [(1, &c, &d), (2, &d, &c)] {
                let peer = &stage.lab.workers[number].node;
                let target = stage.lab.underlay(0, outer == Family::V6);
                let sources = [
                    ("another peer's pod", other.address_of(inner)),
                    ("another peer's gateway", other.gateway(other.address_of(inner))),
                    ("another peer", stage.lab.underlay(3 - number, inner == Family::V6)),
                    ("this node's pod", stage.a.address_of(inner)),
                    ("this node's gateway", stage.a.gateway(stage.a.address_of(inner))),
                    ("a host on the link", address(1, 77, inner == Family::V6)),
                    ("the world", Lab::world_address(inner == Family::V6)),
                    ("nobody", foreign(inner)),
                ];
                let packets = sources.map(|(owner, from)| {
                    forged(format!("over {outer} from {}: {owner}'s {from}", own.node()), |mark| {
                        stage.tunnelled(0, from, b.address_of(inner), mark)
                    })
                });
                peer.within(|| {
                    packets.iter().for_each(|packet| send_datagram(target, TUNNEL, &packet.bytes));
                });
                stage.assert_tunnel_carries((number, own), (0, &b), [outer, inner]);
                let capture = stage.capture("b");
                let received = packets.into_iter().filter(|packet| capture.has_received(packet.mark));
                arrived.extend(received.map(|packet| packet.what));
            }
        }
        assert!(arrived.is_empty(), "attach = {}, b has received {arrived:#?}", stage.attach);
    });
}
