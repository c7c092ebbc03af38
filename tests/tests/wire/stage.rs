//! A pod that sends forged packets, and captures at all possible receivers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use polder_api::{Family, Mac};
use polder_tests::fabric::Families;
use polder_tests::frame::{self, BROADCAST, Capture, FrameSender, Mark, Operation};
use polder_tests::{Lab, Node, Pod, Topology, wait};
use serde_json::Value;

/// UDP port of the nodes' tunnels.
pub(crate) const TUNNEL: u16 = 8472;
/// UDP port of all other datagrams of the tests.
pub(crate) const OTHER: u16 = 8473;

const VNI: u32 = 1;

/// A MAC address that no interface has.
pub(crate) const STRANGER: Mac = Mac([0x02, 0, 0, 0, 0, 0x99]);

/// Three nodes, four pods, a host outside the cluster, and captures at all receivers.
pub(crate) struct Stage {
    /// How pods are attached: `bridge` or `routed`.
    pub(crate) attach: &'static str,
    /// Capture in `a`, which receives the answers.
    pub(crate) own: Capture,
    /// Capture on the node of `a`: receives all packets of `a` before a filter can drop them.
    pub(crate) node: Capture,
    /// Captures by name: in the other pods, in `world`, and in `fabric`, which all packets between hosts pass.
    others: BTreeMap<&'static str, Capture>,
    /// Sends frames from `a`.
    pub(crate) sender: FrameSender,
    /// MAC address of `eth0` in `a`.
    pub(crate) mac: Mac,
    /// MAC address of the gateway of `a`.
    pub(crate) gateway_mac: Mac,
    /// The pod that sends forged packets, on the first node.
    pub(crate) a: Pod,
    /// A pod on the same node.
    pub(crate) b: Pod,
    /// A pod on the second node, on the same link.
    pub(crate) c: Pod,
    /// A pod on the third node, behind the tunnel.
    pub(crate) d: Pod,
    pub(crate) lab: Lab,
}

/// A packet that must not reach any receiver.
pub(crate) struct Forged {
    pub(crate) what: String,
    pub(crate) mark: Mark,
    pub(crate) bytes: Vec<u8>,
}

/// Builds a packet with a new mark.
pub(crate) fn forged(what: impl Into<String>, make: impl FnOnce(Mark) -> Vec<u8>) -> Forged {
    let mark = Mark::new();
    Forged { what: what.into(), mark, bytes: make(mark) }
}

/// Runs the test twice: with pods on a bridge, and with routed pods.
pub(crate) fn on_both_stages(test: impl Fn(&mut Stage)) {
    for attach in ["bridge", "routed"] {
        test(&mut Stage::new(attach));
    }
}

fn mac_of(json: &str, key: &str) -> Mac {
    let found: Value = serde_json::from_str(json).unwrap();
    found[0][key].as_str().unwrap().parse().unwrap()
}

pub(crate) fn v4(address: IpAddr) -> Ipv4Addr {
    if let IpAddr::V4(v4) = address { v4 } else { panic!("{address} is not of IPv4") }
}

pub(crate) fn v6(address: IpAddr) -> Ipv6Addr {
    if let IpAddr::V6(v6) = address { v6 } else { panic!("{address} is not of IPv6") }
}

/// An address that no pod, node or host outside the cluster has (RFC 5737, RFC 3849).
pub(crate) fn foreign(family: Family) -> IpAddr {
    let text = if family == Family::V4 { "192.0.2.9" } else { "2001:db8::9" };
    text.parse().unwrap()
}

pub(crate) fn udp(from: IpAddr, to: IpAddr, port: u16, payload: &[u8]) -> Vec<u8> {
    frame::udp(SocketAddr::new(from, OTHER), SocketAddr::new(to, port), payload)
}

/// Sends a datagram in the calling thread's network namespace, with its host's own source address.
pub(crate) fn send_datagram(to: IpAddr, port: u16, payload: &[u8]) {
    frame::keep_in_order();
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    UdpSocket::bind((any, 0)).and_then(|socket| socket.send_to(payload, (to, port))).unwrap();
}

/// A UDP socket of the host on `address` and port [`OTHER`].
pub(crate) fn listen(host: &Node, address: IpAddr) -> UdpSocket {
    // A program that is just being started may have a copy of the previous socket, see `Echo::start`.
    let socket = wait::until(&format!("port {OTHER} of {address} to be free"), || {
        host.within(|| UdpSocket::bind((address, OTHER))).map_err(|error| error.to_string())
    });
    socket.set_nonblocking(true).unwrap();
    socket
}

/// Waits until the socket receives a datagram with the mark.
pub(crate) fn wait_for(socket: &UdpSocket, what: &str, mark: Mark) {
    let mut buffer = [0; 2048];
    let mut receive = || socket.recv(&mut buffer).ok().map(|length| Mark::find(&buffer[..length]));
    wait::until_true(what, || std::iter::from_fn(&mut receive).any(|found| found == Some(mark)));
}

impl Stage {
    fn new(attach: &'static str) -> Self {
        let bootstrap = format!("attach = {attach:?}");
        let lab = Lab::start(Topology::two_segments().families(Families::DUAL).bootstrap(&bootstrap));
        let [n1, n2, n3] = [0, 1, 2].map(|number| &lab.workers[number]);
        let (a, b, c, d) = (n1.pod("a"), n1.pod("b"), n2.pod("c"), n3.pod("d"));
        let pods = [&b, &c, &d].map(|pod| pod.within(Capture::open));
        let hosts = [lab.world.as_ref().unwrap(), lab.fabric.node()].map(|node| node.within(Capture::open));
        let others = ["b", "c", "d", "world", "fabric"].into_iter().zip(pods.into_iter().chain(hosts));
        let gateway = a.gateway(a.v4());
        Self {
            attach,
            own: a.within(Capture::open),
            node: n1.node.within(Capture::open),
            others: others.collect(),
            sender: a.within(|| FrameSender::towards(gateway)),
            mac: mac_of(&a.run("ip", &["-j", "link", "show", "dev", "eth0"]), "address"),
            gateway_mac: mac_of(&a.run("ip", &["-j", "neigh", "show", &gateway.to_string()]), "lladdr"),
            a,
            b,
            c,
            d,
            lab,
        }
    }

    pub(crate) fn world(&self) -> &Node {
        self.lab.world.as_ref().unwrap()
    }

    /// The capture in the pod, host or network of that name.
    pub(crate) fn capture(&mut self, name: &str) -> &mut Capture {
        self.others.get_mut(name).unwrap()
    }

    /// All receivers to which a pod may send: name of the capture, and address.
    pub(crate) fn receivers(&self, family: Family) -> [(&'static str, IpAddr); 4] {
        let [b, c, d] = [&self.b, &self.c, &self.d].map(|pod| pod.address_of(family));
        [("b", b), ("c", c), ("d", d), ("world", Lab::world_address(family == Family::V6))]
    }

    /// Addresses that `a` does not have, each with the name of its owner.
    pub(crate) fn addresses_of_others(&self, family: Family) -> Vec<(&'static str, IpAddr)> {
        let others = [("the gateway", self.a.gateway(self.a.address_of(family)))];
        others.into_iter().chain(self.receivers(family)).chain([("nobody", foreign(family))]).collect()
    }

    /// The packet in a frame from `a` to its gateway.
    pub(crate) fn own_frame(&self, packet: &[u8]) -> Vec<u8> {
        frame::ip_frame(self.gateway_mac, self.mac, packet)
    }

    /// Sends a genuine datagram from `a`, and waits until the capture `name` receives it.
    pub(crate) fn assert_arrives(&mut self, name: &str, to: IpAddr) {
        let mark = Mark::new();
        self.sender.send(&self.own_frame(&udp(self.a.address_like(to), to, OTHER, &mark.bytes())));
        let what = format!("{name} to receive a's own packet, attach = {}", self.attach);
        self.capture(name).wait_for(&what, mark);
    }

    /// Sends a genuine request to the node and waits for the answer. Forged frames that were sent before take the same
    /// path, so they have arrived, too.
    fn assert_answered(&mut self, family: Family) {
        let (own, mark) = (self.a.address_of(family), Mark::new());
        let gateway = self.a.gateway(own);
        let question = match (own, gateway) {
            (IpAddr::V4(own), IpAddr::V4(gateway)) => {
                let target = (Mac([0; 6]), gateway);
                frame::arp((BROADCAST, self.mac), Operation::Request, (self.mac, own), target, mark)
            }
            // Without a bridge, the gateway's IPv6 address is on another interface: solicitations for it get no answer.
            _ if self.attach == "routed" => self.own_frame(&frame::echo_request(v6(own), v6(gateway), mark)),
            _ => {
                let gateway = v6(gateway);
                self.own_frame(&frame::solicitation(v6(own), gateway, gateway, self.mac, mark))
            }
        };
        self.sender.send(&question);
        self.own.wait_for_any("the gateway's answer", |frame| frame::is_answer(frame, gateway));
    }

    /// Checks that the node of `a` received the forged frames, and that no other pod or host did.
    pub(crate) fn assert_not_received(&mut self, frames: &[Forged]) {
        let attach = self.attach;
        for Forged { what, mark, .. } in frames {
            assert!(self.node.has_received(*mark), "{what} was never sent, attach = {attach}");
            let receivers = self
                .others
                .iter_mut()
                .filter_map(|(name, capture)| capture.has_received(*mark).then_some(*name));
            let receivers: Vec<_> = receivers.collect();
            assert!(receivers.is_empty(), "{what} reached {receivers:?}, attach = {attach}");
        }
    }

    /// Sends the forged frames from `a`: they must not reach any receiver, but genuine packets to `name` arrive.
    pub(crate) fn assert_only_own_packets_arrive(&mut self, name: &str, to: IpAddr, frames: &[Forged]) {
        self.assert_arrives(name, to);
        frames.iter().for_each(|forged| self.sender.send(&forged.bytes));
        self.assert_arrives(name, to);
        self.assert_not_received(frames);
    }

    /// The neighbour entries of the nodes and the other pods, without those of the underlay.
    fn neighbours(&self) -> Vec<String> {
        // Entries of the underlay (`eth0` of a node) can change at any time.
        let of_pods = |line: &&str| !line.contains(" dev eth0 ");
        let lines = |table: String, wanted: fn(&&str) -> bool| -> Vec<String> {
            table.lines().filter(wanted).map(str::to_owned).collect()
        };
        let nodes = self.lab.workers.iter().map(|worker| worker.node.run("ip", &["neigh", "show"]));
        let pods = [&self.b, &self.c, &self.d].map(|pod| pod.run("ip", &["neigh", "show"]));
        let nodes = nodes.flat_map(|table| lines(table, of_pods));
        nodes.chain(pods.into_iter().flat_map(|table| lines(table, |_| true))).collect()
    }

    /// Sends forged neighbour messages: they must not add or change a neighbour entry, and only the node receives them.
    pub(crate) fn assert_no_effect(&mut self, family: Family, frames: &[Forged]) {
        self.assert_answered(family);
        let before = self.neighbours();
        frames.iter().for_each(|forged| self.sender.send(&forged.bytes));
        self.assert_answered(family);
        let new: Vec<_> = self.neighbours().into_iter().filter(|line| !before.contains(line)).collect();
        assert!(new.is_empty(), "somebody believes a, attach = {}: {new:#?}", self.attach);
        for (name, to) in self.receivers(family) {
            self.assert_arrives(name, to);
        }
        self.assert_not_received(frames);
    }

    /// The payload of a tunnel packet to the node with that index: a datagram with these inner addresses.
    pub(crate) fn tunnelled(&self, number: usize, from: IpAddr, to: IpAddr, mark: Mark) -> Vec<u8> {
        let link = self.lab.workers[number].node.run("ip", &["-j", "link", "show", "dev", "polder.vx"]);
        let packet = udp(from, to, OTHER, &mark.bytes());
        frame::vxlan(VNI, &frame::ip_frame(mac_of(&link, "address"), STRANGER, &packet))
    }

    /// Sends a tunnel packet from one pod to another and waits until it arrives. Each pod is given with the index of
    /// its node.
    pub(crate) fn assert_tunnel_carries(
        &mut self,
        from: (usize, &Pod),
        to: (usize, &Pod),
        [outer, inner]: [Family; 2],
    ) {
        let mark = Mark::new();
        let packet = self.tunnelled(to.0, from.1.address_of(inner), to.1.address_of(inner), mark);
        let node = self.lab.underlay(to.0, outer == Family::V6);
        self.lab.workers[from.0].node.within(|| send_datagram(node, TUNNEL, &packet));
        self.capture(to.1.name()).wait_for("a pod to receive what comes through a peer's tunnel", mark);
    }
}
