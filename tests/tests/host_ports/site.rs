//! Pods with host ports, and clients of them.

use std::fmt::Debug;
use std::io::ErrorKind::WouldBlock;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use polder_api::PortMapping;
use polder_tests::agent::Worker;
use polder_tests::cni;
use polder_tests::fabric::{Families, address};
use polder_tests::probe::{self, Dialogue, Echo, PORT, ask, asker};
use polder_tests::{Lab, Node, Pod, Topology, wait};
use serde_json::{Value, json};

/// The host port of most tests. It leads to [`PORT`] of the pod, where an echo server listens.
pub(crate) const HOST_PORT: u16 = 8080;

/// Both protocols at the host port.
pub(crate) const BOTH: [&str; 2] = ["8080:7007/tcp", "8080:7007/udp"];

/// The IPv4 loopback address.
pub(crate) const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Runs the test twice: with pods on a bridge, and with routed pods.
pub(crate) fn with_both_attachments(test: impl Fn(&str)) {
    for attach in ["bridge", "routed"] {
        println!("attach = {attach}");
        test(&format!("attach = {attach:?}"));
    }
}

/// One dual-stack node. The machine of etcd is a host on its link that is no node.
pub(crate) fn one_node(bootstrap: &str) -> Lab {
    Lab::start(Topology::one_segment(1).families(Families::DUAL).bootstrap(bootstrap))
}

/// The host of [`one_node`] that is no node.
pub(crate) fn outsider(lab: &Lab) -> &Node {
    lab.etcd.machine(0)
}

/// The address of the node of [`one_node`].
pub(crate) fn node_address(v6: bool) -> IpAddr {
    address(1, 1, v6)
}

/// The address of the outsider.
pub(crate) fn outside_address(v6: bool) -> IpAddr {
    address(1, 200, v6)
}

/// The names of the fields of a host port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// Those of the CNI conventions.
    Conventions,
    /// Those of Go, which containerd sends.
    Go,
}

/// The configuration of a pod with these host ports, as a runtime passes it.
pub(crate) fn conf_with(ports: &[&str]) -> Value {
    conf_spelled(ports, Spelling::Conventions)
}

/// Like [`conf_with`], with these names of the fields.
pub(crate) fn conf_spelled(ports: &[&str], spelling: Spelling) -> Value {
    let [host, container, protocol, address] = match spelling {
        Spelling::Conventions => ["hostPort", "containerPort", "protocol", "hostIP"],
        Spelling::Go => ["HostPort", "ContainerPort", "Protocol", "HostIP"],
    };
    let entry = |text: &&str| {
        let port: PortMapping = text.parse().unwrap();
        json!({
            host: port.host_port,
            container: port.container_port,
            protocol: port.protocol.as_str(),
            address: port.host_address.map_or(String::new(), |address| address.to_string()),
        })
    };
    let entries: Vec<Value> = ports.iter().map(entry).collect();
    cni::conf("1.1.0", &json!({ "runtimeConfig": { "portMappings": entries } }))
}

/// Creates a pod with these host ports.
pub(crate) fn pod_with(worker: &Worker, name: &str, ports: &[&str]) -> Pod {
    worker.pod_with(name, &conf_with(ports))
}

/// Starts echo servers on all addresses of the pod.
pub(crate) fn serve(pod: &Pod) -> Vec<Echo> {
    pod.addresses().into_iter().map(|own| pod.within(|| Echo::start(own))).collect()
}

/// The source address that the echo server behind the host port sees, over TCP and UDP, of a client in the calling
/// thread's namespace.
pub(crate) fn seen_through(to: IpAddr) -> Result<IpAddr, String> {
    let tcp = probe::tcp_at(to, HOST_PORT, 100_000)?;
    let udp = ask(&asker(SocketAddr::new(to, HOST_PORT)))?;
    if tcp == udp { Ok(tcp) } else { Err(format!("{to} sees {tcp} over TCP and {udp} over UDP")) }
}

/// Whether the host of the calling thread's namespace, or that at the address, refuses connections to the host port.
/// A connection that hangs is not refused.
pub(crate) fn is_refused(outcome: &Result<IpAddr, String>) -> bool {
    outcome.as_ref().is_err_and(|error| error.contains("refused"))
}

/// An outcome in which any address of the node is replaced by its gateway address. The kernel selects one of them for
/// masqueraded packets: without a bridge, it is the underlay address for IPv4.
pub(crate) fn of_node(outcome: Result<IpAddr, String>, gateway: IpAddr) -> Result<IpAddr, String> {
    outcome.map(|seen| if seen == node_address(seen.is_ipv6()) { gateway } else { seen })
}

/// Fails with all outcomes that are not as expected.
pub(crate) fn assert_all<T: Debug + PartialEq>(outcomes: Vec<(String, T, T)>) {
    let problems: Vec<_> = outcomes
        .into_iter()
        .filter(|(_, found, expected)| found != expected)
        .map(|(what, found, expected)| format!("{what}: {found:?} instead of {expected:?}"))
        .collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

/// Checks that the outsider reaches the pod through the host port, with its own address, over both families.
pub(crate) fn assert_reached(outsider: &Node, what: &str) {
    let outcomes = [false, true].map(|v6| {
        let found = outsider.within(|| seen_through(node_address(v6)));
        (what.to_owned(), found, Ok(outside_address(v6)))
    });
    assert_all(outcomes.into());
}

/// Waits until the node refuses connections to the host port, over both families. A connection that begins before the
/// end of the host port, but after that of its pod, is not answered.
pub(crate) fn wait_until_refused(outsider: &Node, what: &str) {
    for v6 in [false, true] {
        wait::until(&format!("the port to be closed {what}"), || {
            let found = outsider.within(|| probe::tcp_at(node_address(v6), HOST_PORT, 10));
            if is_refused(&found) { Ok(()) } else { Err(format!("{found:?}")) }
        });
    }
}

/// A UDP client of the host port, for each family.
pub(crate) fn askers(outsider: &Node) -> Vec<UdpSocket> {
    [false, true].map(|v6| outsider.within(|| asker(SocketAddr::new(node_address(v6), HOST_PORT)))).into()
}

/// Waits until each socket is answered by an echo server behind the host port, which sees its own address.
pub(crate) fn wait_for_answers(what: &str, sockets: &[UdpSocket]) {
    for socket in sockets {
        let to = socket.peer_addr().unwrap();
        let seen = wait::until(&format!("{what} to answer at {to}"), || {
            drain(socket);
            ask(socket)
        });
        assert_eq!(seen, outside_address(to.is_ipv6()), "{what} at {to}");
    }
}

/// Discards earlier answers and errors.
fn drain(socket: &UdpSocket) {
    let is_empty = |outcome: std::io::Result<usize>| outcome.is_err_and(|error| error.kind() == WouldBlock);
    socket.set_nonblocking(true).unwrap();
    while !is_empty(socket.recv(&mut [0; 2048])) {}
    socket.set_nonblocking(false).unwrap();
}

/// Sends from the sockets every millisecond during `action`, and receives nothing.
pub(crate) fn while_sending<T>(sockets: &[UdpSocket], action: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // Fails if the host has refused an earlier datagram.
                sockets.iter().for_each(|socket| drop(socket.send(b"anybody there?")));
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        let _ending = Ending(&is_over);
        action()
    })
}

/// Starts clients of the host port during `action`, one after the other, each with a new socket: some may begin while
/// the host port does not work. Returns them.
pub(crate) fn while_clients_begin(outsider: &Node, action: impl FnOnce()) -> Vec<UdpSocket> {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let mut sockets = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                sockets.extend(askers(outsider));
                // The last ones send again, and so keep what the node has tracked about them.
                sockets.iter().rev().take(100).for_each(|socket| drop(socket.send(b"anybody there?")));
            }
            sockets
        });
        let ending = Ending(&is_over);
        action();
        drop(ending);
        clients.join().unwrap()
    })
}

/// Ends a background thread also if the test panics.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The stage of a test during [`while_connecting`].
#[derive(Debug, Default)]
pub(crate) struct StageOfTest {
    /// Even numbers if the host port leads to a pod, odd ones otherwise.
    number: AtomicUsize,
    /// Number of connections that succeeded in this stage.
    succeeded: AtomicUsize,
}

impl StageOfTest {
    /// From now on, or no more, connections may fail.
    pub(crate) fn next(&self) {
        self.number.fetch_add(1, Ordering::SeqCst);
        self.succeeded.store(0, Ordering::SeqCst);
    }

    /// Waits for some more connections.
    pub(crate) fn wait_for_connections(&self) {
        let before = self.succeeded.load(Ordering::SeqCst);
        wait::until_true("connections", || self.succeeded.load(Ordering::SeqCst) >= before + 20);
    }

    /// Connects once. Returns the error, if it may not fail in this stage.
    fn connect(&self, outsider: &Node, to: IpAddr) -> Option<String> {
        let number = || self.number.load(Ordering::SeqCst);
        let before = number();
        let outcome = outsider.within(|| probe::tcp_at(to, HOST_PORT, 1000));
        let is_stable = before.is_multiple_of(2) && number() == before;
        self.succeeded.fetch_add(usize::from(is_stable && outcome.is_ok()), Ordering::SeqCst);
        outcome.err().filter(|_| is_stable).map(|error| format!("in stage {before}: {error}"))
    }
}

/// Makes many connections from the outsider to the host port during `action`, each with a new socket. All must succeed,
/// except in stages in which they may fail.
pub(crate) fn while_connecting<T>(outsider: &Node, action: impl FnOnce(&StageOfTest) -> T) -> T {
    let (is_over, stage) = (AtomicBool::new(false), StageOfTest::default());
    std::thread::scope(|scope| {
        let starter = scope.spawn(|| {
            let mut connections = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                let to = node_address(connections.len() % 2 == 1);
                // One that hangs does not hold up the others.
                let stage = &stage;
                connections.push(scope.spawn(move || stage.connect(outsider, to)));
                std::thread::park_timeout(Duration::from_millis(10));
            }
            connections
        });
        let found = {
            let _ending = Ending(&is_over);
            let found = action(&stage);
            stage.wait_for_connections();
            found
        };
        let connections = starter.join().unwrap();
        let count = connections.len();
        let failed: Vec<_> = connections.into_iter().filter_map(|one| one.join().unwrap()).collect();
        assert!(failed.is_empty(), "{} of {count} connections failed: {failed:#?}", failed.len());
        found
    })
}

/// Starts a connection from the outsider through host port `ports.0` to port `ports.1` of the pod, on which both ends
/// send.
pub(crate) fn dialogue(outsider: &Node, pod: &Pod, v6: bool, ports: (u16, u16)) -> Dialogue {
    let own = pod.address_like(outside_address(v6));
    let listener = pod.within(|| TcpListener::bind((own, ports.1))).unwrap();
    let to = SocketAddr::new(node_address(v6), ports.0);
    let ours = outsider.within(|| TcpStream::connect_timeout(&to, wait::TIMEOUT)).unwrap();
    Dialogue::over(ours, &listener)
}

/// The table of Polder, without counters, or why it cannot be listed.
pub(crate) fn table(worker: &Worker) -> String {
    worker.node.shell("nft -s list table inet polder 2>&1 || true")
}

/// Waits until the table of Polder is the same as before.
pub(crate) fn wait_for_table(worker: &Worker, what: &str, before: &str) {
    wait::until(&format!("the rules to be the same {what}"), || {
        let found = table(worker);
        if found == before { Ok(()) } else { Err(format!("{found} instead of {before}")) }
    });
}

/// The text of a host port that leads to the echo server.
pub(crate) fn port_at(address: IpAddr, port: u16, protocol: &str) -> String {
    format!("{}:{PORT}/{protocol}", SocketAddr::new(address, port))
}
