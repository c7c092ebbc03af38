//! Pairs of nodes with pods, for the data path.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use super::contestant::start_lab_with;
use super::traffic::{Endpoint, netns_of};
use crate::agent::Worker;
use crate::caller::Caller;
use crate::fabric::{Fabric, Families, address};
use crate::node::Node;
use crate::{Lab, Topology};

/// How packets get from one node to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodPath {
    /// Both pods are on one node.
    SameNode,
    /// Routes through the underlay.
    Direct,
    /// Through VXLAN.
    Vxlan,
}

impl PodPath {
    /// The name in tables and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::Direct => "direct",
            Self::Vxlan => "vxlan",
        }
    }
}

/// Two nodes with pods.
#[derive(Debug)]
pub struct Setup {
    /// The compared plugin and its configuration, as named in tables and in JSON.
    pub contestant: &'static str,
    /// The path between the nodes.
    pub path: PodPath,
    /// The pods: two on the first node, one on the second.
    pub pods: [Endpoint; 3],
    /// The host addresses of both nodes, each in the network namespace of its node.
    pub hosts: [Endpoint; 2],
    environment: Environment,
}

#[derive(Debug)]
enum Environment {
    Polder(Box<Lab>),
    Reference { nodes: Box<[Node; 2]>, _fabric: Box<Fabric> },
}

impl Setup {
    /// The two nodes.
    pub fn nodes(&self) -> [&Node; 2] {
        match &self.environment {
            Environment::Polder(lab) => [&lab.workers[0].node, &lab.workers[1].node],
            Environment::Reference { nodes, .. } => [&nodes[0], &nodes[1]],
        }
    }

    /// Whether an agent sets the nodes up.
    pub fn has_agent(&self) -> bool {
        matches!(self.environment, Environment::Polder(_))
    }

    /// Two nodes with Polder; `fastpath` is the setting of that name.
    pub fn polder(
        contestant: &'static str,
        attach: &str,
        fastpath: &str,
        path: PodPath,
    ) -> anyhow::Result<Self> {
        let backend = if path == PodPath::Vxlan { "vxlan" } else { "direct" };
        let settings = format!("attach = \"{attach}\"\nbackend = \"{backend}\"");
        let topology = Topology::one_segment(2).bootstrap(&settings);
        let lab = start_lab_with(topology, &[&format!("fastpath = {fastpath:?}")]);
        let add_endpoint = |worker: &Worker, name: &str| -> anyhow::Result<Endpoint> {
            let pod = worker.pod(name);
            let netns = worker.node.path_on_host(Path::new(pod.netns()));
            Ok(Endpoint { netns, address: pod.v4() })
        };
        let [first, second] = [&lab.workers[0], &lab.workers[1]];
        let pods = [add_endpoint(first, "a")?, add_endpoint(first, "b")?, add_endpoint(second, "c")?];
        let hosts = hosts([&first.node, &second.node]);
        Ok(Self { contestant, path, pods, hosts, environment: Environment::Polder(Box::new(lab)) })
    }

    /// Two nodes with the reference plugin `bridge`, and host-gw routes or VXLAN as flannel sets it up.
    pub fn bridge(folder: &Path, path: PodPath) -> anyhow::Result<Self> {
        let folder = folder.join(path.name());
        std::fs::create_dir_all(&folder)?;
        let fabric = Fabric::new(&folder, &[1], Families::V4, false);
        let nodes = ["b1", "b2"].map(|name| Node::boot(name, &folder));
        for (number, node) in (1..).zip(&nodes) {
            fabric.join(node, 1, number, 1500);
            node.shell("echo 1 > /proc/sys/net/ipv4/ip_forward");
            node.shell(&path_commands(path, number));
        }
        let mtu = if path == PodPath::Vxlan { 1450 } else { 1500 };
        let [first, second] = &nodes;
        let pods = [
            add_pod(first, "a", &bridge_conf(1, mtu))?,
            add_pod(first, "b", &bridge_conf(1, mtu))?,
            add_pod(second, "c", &bridge_conf(2, mtu))?,
        ];
        let hosts = hosts([first, second]);
        let environment = Environment::Reference { nodes: Box::new(nodes), _fabric: Box::new(fabric) };
        Ok(Self { contestant: "bridge", path, pods, hosts, environment })
    }
}

/// The underlay addresses of the two nodes.
fn hosts(nodes: [&Node; 2]) -> [Endpoint; 2] {
    let host = |(number, node): (u8, &Node)| Endpoint {
        netns: netns_of(node.pid()),
        address: address(1, number, false),
    };
    [host((1, nodes[0])), host((2, nodes[1]))]
}

/// The commands that give node `number` (1 or 2) the path to the pods of the other node.
fn path_commands(path: PodPath, number: u8) -> String {
    let other = 3 - number;
    let underlay: IpAddr = address(1, other, false);
    let mac = |node: u8| format!("02:fe:00:00:00:{node:02x}");
    match path {
        PodPath::Vxlan => format!(
            "ip link add flannel.1 address {} type vxlan id 1 local {} dev eth0 dstport 8472 nolearning\n\
             ip address add 10.88.{number}.0/32 dev flannel.1\nip link set flannel.1 up\n\
             ip route add 10.88.{other}.0/24 via 10.88.{other}.0 dev flannel.1 onlink\n\
             ip neighbour add 10.88.{other}.0 lladdr {} dev flannel.1 nud permanent\n\
             bridge fdb add {} dev flannel.1 dst {underlay}\n",
            mac(number),
            address(1, number, false),
            mac(other),
            mac(other),
        ),
        PodPath::SameNode | PodPath::Direct => format!("ip route add 10.88.{other}.0/24 via {underlay}\n"),
    }
}

/// The configuration that flannel passes to the plugin `bridge` on node `number`.
fn bridge_conf(number: u8, mtu: u32) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "mtu": mtu,
        "isGateway": true, "hairpinMode": true, "ipMasq": false,
        "ipam": {
            "type": "host-local",
            "ranges": [[{ "subnet": format!("10.88.{number}.0/24") }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    })
}

/// Creates a network namespace, and adds it as a pod with the reference plugin.
fn add_pod(node: &Node, name: &str, conf: &Value) -> anyhow::Result<Endpoint> {
    node.run("ip", &["netns", "add", name]);
    let netns = format!("/run/netns/{name}");
    let result = Caller::of(node).cni("eth0", "ADD", name, &netns, conf);
    let result = result.map_err(|error| anyhow::anyhow!("ADD of {name}: {error}"))?;
    let address = result["ips"][0]["address"].as_str().and_then(|text| text.split('/').next());
    let address =
        address.with_context(|| format!("the result of ADD of {name} has no address: {result}"))?.parse()?;
    Ok(Endpoint { netns: node.path_on_host(Path::new(&netns)), address })
}
