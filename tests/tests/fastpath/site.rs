//! Pods on three nodes, and what the agents count.

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::listen;
use polder_tests::probe::Echo;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

/// A client on the first node, and servers on the same node, on a node with a direct path, and on one behind a tunnel.
pub(crate) struct Site {
    pub(crate) client: Pod,
    servers: [Pod; 3],
    // Dropped before the lab.
    _echoes: Vec<Echo>,
    pub(crate) lab: Lab,
}

/// Runs the test with pods on a bridge, and with routed pods.
pub(crate) fn with_both_attachments(test: impl Fn(&mut Site)) {
    for attach in ["bridge", "routed"] {
        println!("attach = {attach}");
        test(&mut Site::start(attach));
    }
}

impl Site {
    pub(crate) fn start(attach: &str) -> Self {
        let topology = Topology::two_segments().families(Families::DUAL);
        let mut lab = Lab::build(topology.bootstrap(&format!("attach = {attach:?}")));
        lab.workers.iter().for_each(|worker| worker.configure_also("fastpath = \"auto\""));
        lab.start_agents();
        let client = lab.workers[0].pod("client");
        let servers = [0, 1, 2].map(|number: usize| lab.workers[number].pod("server"));
        let site = Self { _echoes: listen(&servers), client, servers, lab };
        let paths = [&["eth0", "polder.vx"][..], &["eth0", "polder.vx"], &["polder.vx"]];
        for (worker, paths) in site.lab.workers.iter().zip(paths) {
            paths.iter().for_each(|path| wait_for_programs(worker, path, "node"));
        }
        wait_until_attached(&site.lab.workers[0], &[&site.client, &site.servers[0]]);
        wait_until_attached(&site.lab.workers[1], &[&site.servers[1]]);
        wait_until_attached(&site.lab.workers[2], &[&site.servers[2]]);
        site
    }

    /// The node of the client.
    pub(crate) fn n1(&self) -> &Worker {
        &self.lab.workers[0]
    }

    /// Where each server is, what the client's node and the server's node count for packets from the client, the server,
    /// and the number of its node.
    pub(crate) fn servers(&self) -> [(&'static str, [&'static str; 2], &Pod, usize); 3] {
        let [beside, near, far] = &self.servers;
        [
            ("on the same node", ["pod_to_pod", "pod_to_pod"], beside, 0),
            ("over a direct path", ["pod_to_node", "node_to_pod"], near, 1),
            ("through a tunnel", ["pod_to_node", "node_to_pod"], far, 2),
        ]
    }
}

/// The names of the programs that run for the packets of an interface of the node.
pub(crate) fn attached(worker: &Worker, interface: &str) -> Vec<String> {
    let shown = ["ingress", "egress"].map(|direction| {
        worker.node.shell(&format!("tc -j filter show dev {interface} {direction} || true"))
    });
    let filters =
        shown.iter().flat_map(|shown| serde_json::from_str::<Vec<Value>>(shown).unwrap_or_default());
    let name = |filter: Value| filter["options"]["bpf_name"].as_str().map(str::to_owned);
    filters.filter_map(name).collect()
}

/// Waits until the programs of the fast path run for these pods.
pub(crate) fn wait_until_attached(worker: &Worker, pods: &[&Pod]) {
    pods.iter().for_each(|pod| wait_for_programs(worker, &pod.host_interface(), "pod"));
}

/// Waits until the programs for a `pod` or `node` behind it run on the interface.
fn wait_for_programs(worker: &Worker, interface: &str, behind: &str) {
    let both = ["from", "to"].map(|direction| format!("polder_{direction}_{behind}"));
    wait::until(&format!("the programs of {interface} on {}", worker.name()), || {
        match attached(worker, interface) {
            programs if programs == both => Ok(()),
            programs => Err(format!("{programs:?}, {}", worker.status()["fast_path"])),
        }
    });
}

/// The number of packets that took the path for that reason.
pub(crate) fn count(worker: &Worker, path: &str, reason: &str) -> u64 {
    let status = worker.status();
    let packets = status["fast_path"]["packets"].as_array().cloned().unwrap_or_default();
    let counted = packets.iter().find(|counted| counted["path"] == path && counted["reason"] == reason);
    counted.and_then(|counted| counted["packets"].as_u64()).unwrap_or_default()
}
