//! Pairs of nodes with pods, for the data path.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use super::contestant::start_lab;
use super::traffic::{Endpoint, of_node};
use crate::agent::Worker;
use crate::caller::Caller;
use crate::fabric::{Fabric, Families, address};
use crate::node::Node;
use crate::{Lab, Topology};

/// How packets get from one node to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Both pods are on one node.
    SameNode,
    /// Routes through the underlay.
    Direct,
    /// Through VXLAN.
    Vxlan,
}

impl Route {
    /// The name in tables and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::Direct => "direct",
            Self::Vxlan => "vxlan",
        }
    }
}

/// Two nodes with pods: two on the first node, one on the second.
#[derive(Debug)]
pub struct Setup {
    /// The name of the contestant.
    pub contestant: &'static str,
    /// The path between the nodes.
    pub route: Route,
    /// The pods.
    pub pods: [Endpoint; 3],
    /// The nodes themselves.
    pub hosts: [Endpoint; 2],
    place: Place,
}

#[derive(Debug)]
enum Place {
    Polder(Box<Lab>),
    Reference { nodes: Box<[Node; 2]>, _fabric: Box<Fabric> },
}

impl Setup {
    /// The two nodes.
    pub fn nodes(&self) -> [&Node; 2] {
        match &self.place {
            Place::Polder(lab) => [&lab.workers[0].node, &lab.workers[1].node],
            Place::Reference { nodes, .. } => [&nodes[0], &nodes[1]],
        }
    }

    /// Whether an agent sets the nodes up.
    pub fn has_agent(&self) -> bool {
        matches!(self.place, Place::Polder(_))
    }

    /// Two nodes with Polder.
    pub fn polder(contestant: &'static str, attach: &str, route: Route) -> anyhow::Result<Self> {
        let backend = if route == Route::Vxlan { "vxlan" } else { "direct" };
        let settings = format!("attach = \"{attach}\"\nbackend = \"{backend}\"");
        let lab = start_lab(Topology::one_segment(2).bootstrap(&settings));
        let pod = |worker: &Worker, name: &str| -> anyhow::Result<Endpoint> {
            let pod = worker.pod(name);
            let netns = worker.node.outside(Path::new(pod.netns()));
            Ok(Endpoint { netns, address: pod.v4() })
        };
        let [first, second] = [&lab.workers[0], &lab.workers[1]];
        let pods = [pod(first, "a")?, pod(first, "b")?, pod(second, "c")?];
        let hosts = hosts([&first.node, &second.node]);
        Ok(Self { contestant, route, pods, hosts, place: Place::Polder(Box::new(lab)) })
    }

    /// Two nodes with the reference plugin `bridge`, and host-gw routes or VXLAN as flannel sets it up.
    pub fn bridge(folder: &Path, route: Route) -> anyhow::Result<Self> {
        let folder = folder.join(route.name());
        std::fs::create_dir_all(&folder)?;
        let fabric = Fabric::new(&folder, &[1], Families::V4, false);
        let nodes = ["b1", "b2"].map(|name| Node::boot(name, &folder));
        for (number, node) in (1..).zip(&nodes) {
            fabric.join(node, 1, number, 1500);
            node.shell("echo 1 > /proc/sys/net/ipv4/ip_forward");
            node.shell(&routes(route, number));
        }
        let mtu = if route == Route::Vxlan { 1450 } else { 1500 };
        let [first, second] = &nodes;
        let pods = [
            attach(first, "a", &conf(1, mtu))?,
            attach(first, "b", &conf(1, mtu))?,
            attach(second, "c", &conf(2, mtu))?,
        ];
        let hosts = hosts([first, second]);
        let place = Place::Reference { nodes: Box::new(nodes), _fabric: Box::new(fabric) };
        Ok(Self { contestant: "bridge", route, pods, hosts, place })
    }
}

fn hosts(nodes: [&Node; 2]) -> [Endpoint; 2] {
    let host = |(number, node): (u8, &Node)| Endpoint {
        netns: of_node(node.pid()),
        address: address(1, number, false),
    };
    [host((1, nodes[0])), host((2, nodes[1]))]
}

/// The commands that give node `own` (1 or 2) the path to the pods of the other.
fn routes(route: Route, own: u8) -> String {
    let other = 3 - own;
    let underlay: IpAddr = address(1, other, false);
    let mac = |node: u8| format!("02:fe:00:00:00:{node:02x}");
    match route {
        Route::Vxlan => format!(
            "ip link add flannel.1 address {} type vxlan id 1 local {} dev eth0 dstport 8472 nolearning\n\
             ip address add 10.88.{own}.0/32 dev flannel.1\nip link set flannel.1 up\n\
             ip route add 10.88.{other}.0/24 via 10.88.{other}.0 dev flannel.1 onlink\n\
             ip neighbour add 10.88.{other}.0 lladdr {} dev flannel.1 nud permanent\n\
             bridge fdb add {} dev flannel.1 dst {underlay}\n",
            mac(own),
            address(1, own, false),
            mac(other),
            mac(other),
        ),
        Route::SameNode | Route::Direct => format!("ip route add 10.88.{other}.0/24 via {underlay}\n"),
    }
}

/// The configuration of the plugin `bridge` on node `own`, with what flannel passes to it.
fn conf(own: u8, mtu: u32) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "mtu": mtu,
        "isGateway": true, "hairpinMode": true, "ipMasq": false,
        "ipam": {
            "type": "host-local",
            "ranges": [[{ "subnet": format!("10.88.{own}.0/24") }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    })
}

fn attach(node: &Node, name: &str, conf: &Value) -> anyhow::Result<Endpoint> {
    node.run("ip", &["netns", "add", name]);
    let netns = format!("/run/netns/{name}");
    let result = Caller::of(node).cni("eth0", "ADD", name, &netns, conf);
    let result = result.map_err(|error| anyhow::anyhow!("ADD of {name}: {error}"))?;
    let address = result["ips"][0]["address"].as_str().and_then(|text| text.split('/').next());
    let address = address.context("an address")?.parse()?;
    Ok(Endpoint { netns: node.outside(Path::new(&netns)), address })
}
