//! A pod that forges, and all who could hear it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use polder_api::{Family, Mac};
use polder_tests::fabric::Families;
use polder_tests::frame::{self, BROADCAST, Ear, Mark, Mouth, Operation};
use polder_tests::{Lab, Node, Pod, Topology, wait};
use serde_json::Value;

/// The port of the nodes' tunnels, and one that is nobody's.
pub(crate) const TUNNEL: u16 = 8472;
pub(crate) const OTHER: u16 = 8473;

const VNI: u32 = 1;

/// Nobody's.
pub(crate) const STRANGER: Mac = Mac([0x02, 0, 0, 0, 0, 0x99]);

/// Three nodes, four pods, the world, and ears everywhere.
pub(crate) struct Stage {
    /// How pods are attached.
    pub(crate) attach: &'static str,
    /// In `a`, which gets the answers.
    pub(crate) own: Ear,
    /// On the node of `a`, which hears all that comes there before it can be dropped.
    pub(crate) node: Ear,
    /// In the other pods, in the world, and in the fabric: there all is heard that leaves any node.
    others: BTreeMap<&'static str, Ear>,
    /// In `a`.
    pub(crate) mouth: Mouth,
    pub(crate) mac: Mac,
    pub(crate) gateway_mac: Mac,
    /// The forger, on the first node.
    pub(crate) a: Pod,
    /// With it.
    pub(crate) b: Pod,
    /// On a node on the same link.
    pub(crate) c: Pod,
    /// On a node behind the tunnel.
    pub(crate) d: Pod,
    pub(crate) lab: Lab,
}

/// A packet that must reach nobody.
pub(crate) struct Forged {
    pub(crate) what: String,
    pub(crate) mark: Mark,
    pub(crate) bytes: Vec<u8>,
}

/// A packet with a mark of its own.
pub(crate) fn forged(what: impl Into<String>, make: impl FnOnce(Mark) -> Vec<u8>) -> Forged {
    let mark = Mark::new();
    Forged { what: what.into(), mark, bytes: make(mark) }
}

/// Runs the test where pods hang on a bridge, and where they do not.
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

/// An address that neither a pod nor a node nor the world has.
pub(crate) fn foreign(family: Family) -> IpAddr {
    let text = if family == Family::V4 { "192.0.2.9" } else { "2001:db8::9" };
    text.parse().unwrap()
}

pub(crate) fn udp(from: IpAddr, to: IpAddr, port: u16, payload: &[u8]) -> Vec<u8> {
    frame::udp(SocketAddr::new(from, OTHER), SocketAddr::new(to, port), payload)
}

/// Sends a datagram from the own address of the host in whose namespace the calling thread is.
pub(crate) fn speak(to: IpAddr, port: u16, payload: &[u8]) {
    frame::keep_in_order();
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    UdpSocket::bind((any, 0)).and_then(|socket| socket.send_to(payload, (to, port))).unwrap();
}

/// A socket of a host, for what is sent to that address.
pub(crate) fn listen(host: &Node, address: IpAddr) -> UdpSocket {
    // The socket before may live on in a program that is just being started, see `Echo::start`.
    let socket = wait::until(&format!("port {OTHER} of {address} to be free"), || {
        host.within(|| UdpSocket::bind((address, OTHER))).map_err(|error| error.to_string())
    });
    socket.set_nonblocking(true).unwrap();
    socket
}

/// Waits until the socket gets the mark.
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
        let pods = [&b, &c, &d].map(|pod| pod.within(Ear::open));
        let hosts = [lab.world.as_ref().unwrap(), lab.fabric.node()].map(|node| node.within(Ear::open));
        let others = ["b", "c", "d", "world", "fabric"].into_iter().zip(pods.into_iter().chain(hosts));
        let gateway = a.gateway(a.v4());
        Self {
            attach,
            own: a.within(Ear::open),
            node: n1.node.within(Ear::open),
            others: others.collect(),
            mouth: a.within(|| Mouth::towards(gateway)),
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

    /// Who hears what comes to the pod, host or network of that name.
    pub(crate) fn ear(&mut self, name: &str) -> &mut Ear {
        self.others.get_mut(name).unwrap()
    }

    /// Everybody to whom a pod may send, by the name of his ear.
    pub(crate) fn receivers(&self, family: Family) -> [(&'static str, IpAddr); 4] {
        let [b, c, d] = [&self.b, &self.c, &self.d].map(|pod| pod.address_of(family));
        [("b", b), ("c", c), ("d", d), ("world", Lab::world_address(family == Family::V6))]
    }

    /// Addresses that are not that of `a`, and whose they are.
    pub(crate) fn addresses_of_others(&self, family: Family) -> Vec<(&'static str, IpAddr)> {
        let others = [("the gateway", self.a.gateway(self.a.address_of(family)))];
        others.into_iter().chain(self.receivers(family)).chain([("nobody", foreign(family))]).collect()
    }

    /// The packet in a frame such as `a` sends to anybody.
    pub(crate) fn own_frame(&self, packet: &[u8]) -> Vec<u8> {
        frame::ip_frame(self.gateway_mac, self.mac, packet)
    }

    /// Sends a datagram from `a` that is not forged, and waits until it has arrived.
    pub(crate) fn assert_arrives(&mut self, name: &str, to: IpAddr) {
        let mark = Mark::new();
        self.mouth.send(&self.own_frame(&udp(self.a.address_like(to), to, OTHER, &mark.bytes())));
        let what = format!("{name} to hear a's own packet, attach = {}", self.attach);
        self.ear(name).wait_for(&what, mark);
    }

    /// Asks the node something that it answers, and waits for the answer: it has come to where forged questions and
    /// answers go, too.
    fn assert_answered(&mut self, family: Family) {
        let (own, mark) = (self.a.address_of(family), Mark::new());
        let gateway = self.a.gateway(own);
        let question = match (own, gateway) {
            (IpAddr::V4(own), IpAddr::V4(gateway)) => {
                let target = (Mac([0; 6]), gateway);
                frame::arp((BROADCAST, self.mac), Operation::Request, (self.mac, own), target, mark)
            }
            // Without a bridge the gateway's IPv6 address is on another interface, of which nothing is told here.
            _ if self.attach == "routed" => self.own_frame(&frame::echo_request(v6(own), v6(gateway), mark)),
            _ => {
                let gateway = v6(gateway);
                self.own_frame(&frame::solicitation(v6(own), gateway, gateway, self.mac, mark))
            }
        };
        self.mouth.send(&question);
        self.own.wait_for_any("the gateway's answer", |frame| frame::is_answer(frame, gateway));
    }

    /// The forged frames were sent from `a`, and nobody outside the node and no other pod has heard them.
    pub(crate) fn assert_unheard(&mut self, frames: &[Forged]) {
        let attach = self.attach;
        for Forged { what, mark, .. } in frames {
            assert!(self.node.has_heard(*mark), "{what} was never sent, attach = {attach}");
            let hearers =
                self.others.iter_mut().filter_map(|(name, ear)| ear.has_heard(*mark).then_some(*name));
            let hearers: Vec<_> = hearers.collect();
            assert!(hearers.is_empty(), "{what} reached {hearers:?}, attach = {attach}");
        }
    }

    /// Sends the forged frames from `a`, which must reach nobody, whereas its own packets to `name` arrive.
    pub(crate) fn assert_only_own_packets_arrive(&mut self, name: &str, to: IpAddr, frames: &[Forged]) {
        self.assert_arrives(name, to);
        frames.iter().for_each(|forged| self.mouth.send(&forged.bytes));
        self.assert_arrives(name, to);
        self.assert_unheard(frames);
    }

    /// Who the nodes and the other pods believe to be where, on links on which there are pods.
    fn neighbours(&self) -> Vec<String> {
        // Those of the underlay come and go.
        let of_pods = |line: &&str| !line.contains(" dev eth0 ");
        let lines = |table: String, wanted: fn(&&str) -> bool| -> Vec<String> {
            table.lines().filter(wanted).map(str::to_owned).collect()
        };
        let nodes = self.lab.workers.iter().map(|worker| worker.node.run("ip", &["neigh", "show"]));
        let pods = [&self.b, &self.c, &self.d].map(|pod| pod.run("ip", &["neigh", "show"]));
        let nodes = nodes.flat_map(|table| lines(table, of_pods));
        nodes.chain(pods.into_iter().flat_map(|table| lines(table, |_| true))).collect()
    }

    /// Sends the forged frames, which say who is where: nobody believes them, and nobody but the node hears them.
    pub(crate) fn assert_nobody_believes(&mut self, family: Family, frames: &[Forged]) {
        self.assert_answered(family);
        let before = self.neighbours();
        frames.iter().for_each(|forged| self.mouth.send(&forged.bytes));
        self.assert_answered(family);
        let new: Vec<_> = self.neighbours().into_iter().filter(|line| !before.contains(line)).collect();
        assert!(new.is_empty(), "somebody believes a, attach = {}: {new:#?}", self.attach);
        for (name, to) in self.receivers(family) {
            self.assert_arrives(name, to);
        }
        self.assert_unheard(frames);
    }

    /// What goes through a tunnel to the node of that number: a datagram from one pod to another, as it says.
    pub(crate) fn tunnelled(&self, number: usize, from: IpAddr, to: IpAddr, mark: Mark) -> Vec<u8> {
        let link = self.lab.workers[number].node.run("ip", &["-j", "link", "show", "dev", "polder.vx"]);
        let packet = udp(from, to, OTHER, &mark.bytes());
        frame::vxlan(VNI, &frame::ip_frame(mac_of(&link, "address"), STRANGER, &packet))
    }

    /// Sends a packet from a pod to another through the tunnel from node to node, each given by its number, and waits
    /// until it has arrived.
    pub(crate) fn assert_tunnel_carries(
        &mut self,
        from: (usize, &Pod),
        to: (usize, &Pod),
        [outer, inner]: [Family; 2],
    ) {
        let mark = Mark::new();
        let packet = self.tunnelled(to.0, from.1.address_of(inner), to.1.address_of(inner), mark);
        let node = self.lab.underlay(to.0, outer == Family::V6);
        self.lab.workers[from.0].node.within(|| speak(node, TUNNEL, &packet));
        self.ear(to.1.name()).wait_for("a pod to hear what comes through a peer's tunnel", mark);
    }
}
