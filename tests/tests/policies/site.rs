//! Pods on three nodes, connections between them, and what became of these.

use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::listen;
use polder_tests::probe::{self, Echo, PORT, ask, asker};
use polder_tests::queue::{Flow, Protocol, QueueProgram, Ruling};
use polder_tests::{Lab, Pod, Topology};
use serde_json::Value;

use crate::policies::rules::QUEUE;

/// Both ways to attach a pod.
const ATTACHMENTS: [&str; 2] = ["bridge", "routed"];

/// A client on the first node, and servers on the same node, on a node with a direct path, and on one behind a tunnel.
pub(crate) struct Site {
    pub(crate) client: Pod,
    /// Another client on the same node.
    pub(crate) bystander: Pod,
    /// With the path to each, and the number of its node.
    pub(crate) servers: [(&'static str, usize, Pod); 3],
    // Dropped before the lab.
    _echoes: Vec<Echo>,
    pub(crate) lab: Lab,
}

/// What became of a connection: the address that the server saw over TCP and over UDP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) tcp: Result<IpAddr, String>,
    pub(crate) udp: Result<IpAddr, String>,
}

/// Runs the test with pods on a bridge, and with routed pods.
pub(crate) fn with_both_attachments(test: impl Fn(&mut Site)) {
    for attach in ATTACHMENTS {
        println!("attach = {attach}");
        test(&mut Site::start(attach));
    }
}

impl Site {
    fn start(attach: &str) -> Self {
        let topology = Topology::two_segments().families(Families::DUAL);
        let mut lab = Lab::build(topology.bootstrap(&format!("attach = {attach:?}")));
        lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
        lab.start_agents();
        let [n1, n2, n3] = &lab.workers[..] else { panic!("three nodes") };
        for (path, peer) in [("direct", n2), ("vxlan", n3)] {
            for family in ["ipv4", "ipv6"] {
                assert_eq!(n1.path_to(peer.name(), family), path);
            }
        }
        let servers = [
            ("on the same node", 0, n1.pod("beside")),
            ("over a direct path", 1, n2.pod("near")),
            ("through a tunnel", 2, n3.pod("far")),
        ];
        let (client, bystander) = (n1.pod("client"), n1.pod("bystander"));
        let echoes = servers.iter().flat_map(|(_, _, pod)| listen(std::slice::from_ref(pod))).collect();
        Self { client, bystander, servers, _echoes: echoes, lab }
    }

    /// The node of the clients.
    pub(crate) fn n1(&self) -> &Worker {
        &self.lab.workers[0]
    }

    /// The pods of a node.
    pub(crate) fn pods_of(&self, number: usize) -> Vec<IpAddr> {
        let clients = [&self.client, &self.bystander].into_iter().filter(|_| number == 0);
        let servers = self.servers.iter().filter(|(_, of, _)| *of == number).map(|(_, _, pod)| pod);
        clients.chain(servers).flat_map(Pod::addresses).collect()
    }

    /// A program on each node, which decides by the same policy.
    pub(crate) fn programs(
        &self,
        policy: impl Fn(&Flow) -> Ruling + Clone + Send + 'static,
    ) -> Vec<QueueProgram> {
        let start = |worker: &Worker| QueueProgram::start(&worker.node, QUEUE, policy.clone());
        self.lab.workers.iter().map(start).collect()
    }

    /// Connects from the client, and from the bystander, to all servers over both families, all at the same time. The
    /// expected outcome depends on the client and on the addresses of client and server.
    pub(crate) fn assert_outcomes<T: Debug>(
        &self,
        what: &str,
        expected: impl Fn(&Pod, IpAddr, IpAddr) -> T,
        is_as_expected: impl Fn(&T, &Outcome) -> bool,
    ) {
        let mut connections = Vec::new();
        for client in [&self.client, &self.bystander] {
            for (place, _, server) in &self.servers {
                for to in server.addresses() {
                    connections.push((client, *place, client.address_like(to), to));
                }
            }
        }
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let started = connections.iter().map(|(client, _, _, to)| scope.spawn(|| connect(client, *to)));
            let started: Vec<_> = started.collect();
            started.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let check = |((client, place, from, to), outcome): (&(&Pod, &str, IpAddr, IpAddr), Outcome)| {
            let expected = expected(client, *from, *to);
            let text =
                format!("{} {from} to {to} {place}: {outcome:?}, expected {expected:?}", client.name());
            (!is_as_expected(&expected, &outcome)).then_some(text)
        };
        let problems: Vec<_> = connections.iter().zip(outcomes).filter_map(check).collect();
        assert!(problems.is_empty(), "{what}: {problems:#?}");
    }

    /// Every connection works, and the servers see the clients' own addresses.
    pub(crate) fn assert_all_work(&self, what: &str) {
        self.assert_outcomes(what, |_, from, _| works(from), PartialEq::eq);
    }
}

/// Connects from a pod to the echo servers at that address.
pub(crate) fn connect(client: &Pod, to: IpAddr) -> Outcome {
    std::thread::scope(|scope| {
        let tcp = scope.spawn(|| client.within(|| probe::tcp(to, 300_000)));
        let udp = client.within(|| ask(&asker(SocketAddr::new(to, PORT))));
        Outcome { tcp: tcp.join().unwrap(), udp }
    })
}

/// The outcome of a connection that works.
pub(crate) fn works(from: IpAddr) -> Outcome {
    Outcome { tcp: Ok(from), udp: Ok(from) }
}

impl Outcome {
    /// Nothing came back.
    pub(crate) fn is_time_out(&self) -> bool {
        let tcp = self.tcp.as_ref().is_err_and(|error| error.contains("timed out"));
        // EAGAIN: the time-out of a socket.
        tcp && self.udp.as_ref().is_err_and(|error| error.contains("os error 11"))
    }

    /// The connection was reset, and the datagram was answered by an ICMP error: "communication administratively
    /// prohibited". For IPv4 the kernel makes EHOSTUNREACH of it, for IPv6 EACCES.
    pub(crate) fn is_rejected(&self, v6: bool) -> bool {
        let expected = if v6 { "Permission denied" } else { "No route to host" };
        self.tcp.as_ref().is_err_and(|error| error.contains("refused"))
            && self.udp.as_ref().is_err_and(|error| error.contains(expected))
    }
}

/// The first packets of a connection to the echo servers.
pub(crate) fn flows(source: IpAddr, destination: IpAddr) -> [Flow; 2] {
    [Protocol::Tcp, Protocol::Udp].map(|protocol| Flow { protocol, source, destination, port: PORT })
}

/// The problems in the status of a node.
pub(crate) fn problems(worker: &Worker) -> Vec<String> {
    let status = worker.status();
    let problems = status["problems"].as_array().into_iter().flatten();
    problems.filter_map(Value::as_str).map(str::to_owned).collect()
}
