//! A complete lab: fabric, etcd, and nodes with agents.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::agent::Worker;
use crate::disk::Disk;
use crate::etcd::{Etcd, Tls};
use crate::fabric::{Fabric, Families, WORLD, address};
use crate::node::Node;
use crate::{probe, wait};

/// Configuration of a lab. The defaults are one segment with IPv4 and one etcd member.
#[derive(Debug, Clone)]
pub struct Topology {
    /// The segment of each node.
    pub nodes: Vec<u8>,
    /// The families of the underlay.
    pub underlay: Families,
    /// Whether a router connects the segments. It is then the default route of all nodes.
    pub router: bool,
    /// The MTU of the underlay, in bytes.
    pub mtu: u32,
    /// The cluster's pools.
    pub pools: Vec<&'static str>,
    /// Further keys of the agents' `[bootstrap]`.
    pub bootstrap: String,
    /// Number of etcd members.
    pub etcd_members: u8,
    /// Size of a separate disk for each node's `/var/lib`, in MiB; `None` for no separate disk.
    pub disk: Option<u32>,
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            nodes: vec![1, 1],
            underlay: Families::V4,
            router: false,
            mtu: 1500,
            pools: vec![POOL4],
            bootstrap: String::new(),
            etcd_members: 1,
            disk: None,
        }
    }
}

/// The default IPv4 pool.
pub const POOL4: &str = "10.244.0.0/16";
/// The default IPv6 pool.
pub const POOL6: &str = "fd00:244::/56";

/// The first host number of etcd members and of nodes, and the host number of the outside host.
const ETCD_HOST: u8 = 200;
const NODE_HOST: u8 = 1;
const WORLD_HOST: u8 = 7;

impl Topology {
    /// All nodes on one segment.
    pub fn one_segment(nodes: usize) -> Self {
        Self { nodes: vec![1; nodes], ..Self::default() }
    }

    /// Nodes 1 and 2 on one segment, node 3 on another, behind a router.
    pub fn two_segments() -> Self {
        Self { nodes: vec![1, 1, 2], router: true, ..Self::default() }
    }

    /// Uses these families for the underlay and the pods.
    #[must_use]
    pub fn families(mut self, families: Families) -> Self {
        self.underlay = families;
        self.pools = match (families.v4, families.v6) {
            (true, true) => vec![POOL4, POOL6],
            (false, _) => vec![POOL6],
            (true, false) => vec![POOL4],
        };
        self
    }

    /// Adds keys to the initial settings.
    #[must_use]
    pub fn bootstrap(mut self, lines: &str) -> Self {
        self.bootstrap = lines.to_owned();
        self
    }
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    /// The nodes, `n1` first.
    pub workers: Vec<Worker>,
    /// etcd.
    pub etcd: Etcd,
    /// The network between the nodes.
    pub fabric: Fabric,
    /// A host outside the cluster on its own segment, if the lab has a router.
    pub world: Option<Node>,
    /// The lab's configuration.
    pub topology: Topology,
    /// Whether the lab keeps running when the program fails, and prints how to enter it. Default: true, except in
    /// continuous integration (`CI` is set).
    pub keep_failed: bool,
    disks: Vec<Disk>,
    folder: Option<tempfile::TempDir>,
    kept: bool,
}

impl Lab {
    /// Builds the lab, and starts all agents. Returns when they serve.
    pub fn start(topology: Topology) -> Self {
        let mut lab = Self::build(topology);
        lab.start_agents();
        lab
    }

    /// A lab with one ready dual-stack node.
    pub fn start_node() -> Self {
        Self::start(Topology::one_segment(1).families(Families::DUAL))
    }

    /// Starts all agents. Returns when they serve, and have paths to each other.
    pub fn start_agents(&mut self) {
        self.workers.iter_mut().for_each(Worker::start);
        self.workers.iter().for_each(Worker::wait_until_ready);
        for worker in &self.workers {
            for peer in self.workers.iter().filter(|peer| peer.name() != worker.name()) {
                for pool in &self.topology.pools {
                    let family = if pool.contains(':') { "ipv6" } else { "ipv4" };
                    let what =
                        format!("{} to have a route to the {family} pods of {}", worker.name(), peer.name());
                    wait::until_true(&what, || worker.has_path_to(peer.name(), family));
                }
            }
        }
    }

    /// Builds the lab. Only etcd runs.
    pub fn build(topology: Topology) -> Self {
        Self::build_with_tls(topology, |_| None)
    }

    /// Builds the lab with an etcd that uses TLS; the certificates are created for its addresses.
    pub fn build_with_tls(topology: Topology, tls: impl FnOnce(&[IpAddr]) -> Option<Tls>) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the lab needs root: run it with sudo scripts/test");
        let folder = tempfile::Builder::new().prefix("polder-lab-").tempdir().expect("a temporary folder");
        let mut segments: Vec<u8> = topology.nodes.clone();
        segments.push(1);
        if topology.router {
            segments.push(WORLD);
        }
        segments.sort_unstable();
        segments.dedup();
        let fabric = Fabric::new(folder.path(), &segments, topology.underlay, topology.router);
        let machine = |name: &str, segment: u8, host: u8| {
            let node = Node::boot(name, folder.path());
            fabric.join(&node, segment, host, topology.mtu);
            if topology.router {
                fabric.default_route(&node, segment);
            }
            node
        };
        let v6 = !topology.underlay.v4;
        let etcd_addresses: Vec<IpAddr> =
            (0..topology.etcd_members).map(|number| address(1, ETCD_HOST + number, v6)).collect();
        let etcd_machines = (0..topology.etcd_members).zip(&etcd_addresses);
        let etcd_machines = etcd_machines
            .map(|(number, address)| (machine(&format!("etcd{number}"), 1, ETCD_HOST + number), *address));
        let etcd = Etcd::start(etcd_machines.collect(), tls(&etcd_addresses));
        let world = topology.router.then(|| machine("world", WORLD, WORLD_HOST));
        let mut lab = Self {
            workers: Vec::new(),
            etcd,
            fabric,
            world,
            topology,
            keep_failed: std::env::var_os("CI").is_none(),
            disks: Vec::new(),
            folder: Some(folder),
            kept: false,
        };
        for segment in lab.topology.nodes.clone() {
            lab.add_worker(segment);
        }
        lab
    }

    /// Boots another node on that segment. Its agent does not run yet.
    pub fn add_worker(&mut self, segment: u8) -> &mut Worker {
        let number = u8::try_from(self.workers.len()).expect("a small lab");
        let name = format!("n{}", number + 1);
        if let Some(size) = self.topology.disk {
            self.disks.push(Disk::mount(&self.folder().join(&name).join("var-lib"), size));
        }
        let node = Node::boot(&name, self.folder());
        self.plug_in(&node, segment, number);
        let config = self.config(node.name());
        self.workers.push(Worker::new(node, segment, &config));
        self.workers.last_mut().expect("it was just added")
    }

    fn plug_in(&self, node: &Node, segment: u8, number: u8) {
        self.fabric.join(node, segment, NODE_HOST + number, self.topology.mtu);
        if self.topology.router {
            self.fabric.default_route(node, segment);
        }
    }

    /// Powers a node off and boots it again with its network. Its agent does not run yet.
    pub fn reboot(&mut self, number: usize) {
        self.workers[number].reboot();
        let worker = &self.workers[number];
        self.plug_in(&worker.node, worker.segment, u8::try_from(number).expect("a small lab"));
    }

    /// The underlay address of a node.
    pub fn underlay(&self, number: usize, v6: bool) -> IpAddr {
        address(self.workers[number].segment, NODE_HOST + u8::try_from(number).expect("a small lab"), v6)
    }

    /// The address of the host outside the cluster.
    pub fn world_address(v6: bool) -> IpAddr {
        address(WORLD, WORLD_HOST, v6)
    }

    /// The agent's configuration for the node of that name.
    pub fn config(&self, name: &str) -> String {
        let quoted = |items: &[String]| {
            let items: Vec<_> = items.iter().map(|item| format!("{item:?}")).collect();
            items.join(", ")
        };
        let pools: Vec<String> = self.topology.pools.iter().map(|pool| (*pool).to_owned()).collect();
        format!(
            "node = \"{name}\"\ncni_conf_dir = \"/run/cni/net.d\"\n[etcd]\nendpoints = [{}]\n\
             [bootstrap]\npools = [{}]\n{}\n",
            quoted(&self.etcd.endpoints()),
            quoted(&pools),
            self.topology.bootstrap
        )
    }

    /// The folder of the lab's files.
    pub fn folder(&self) -> &Path {
        self.folder.as_ref().expect("the folder is there as long as the lab").path()
    }

    /// Keeps the lab running after the end of this program. Returns the folder of its files.
    pub fn keep(&mut self) -> PathBuf {
        self.kept = true;
        self.workers.iter_mut().for_each(Worker::keep);
        self.etcd.keep();
        self.fabric.keep();
        if let Some(world) = &mut self.world {
            world.keep();
        }
        self.folder.take().expect("a lab is kept once").keep()
    }

    /// Commands to enter the nodes and to end the lab, with the folders of the logs.
    pub fn how_to_enter(&self) -> String {
        let workers = self.workers.iter().map(|worker| &worker.node);
        let all: Vec<_> =
            workers.chain(self.etcd.nodes()).chain([self.fabric.node()]).chain(&self.world).collect();
        let line = |node: &&Node| {
            format!("  {:8} {}   (logs in {})\n", node.name(), node.how_to_enter(), node.folder().display())
        };
        let pids: Vec<_> = all.iter().map(|node| node.pid().to_string()).collect();
        let lines: String = all.iter().map(line).collect();
        format!("{lines}  It ends with: kill -9 {}; rm -r {}\n", pids.join(" "), self.folder().display())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.kept {
            for worker in &self.workers {
                let log = worker.log();
                let lines: Vec<_> = log.lines().collect();
                eprintln!("--- the end of the agent's log on {}:", worker.name());
                lines[lines.len().saturating_sub(25)..].iter().for_each(|line| eprintln!("{line}"));
                eprintln!("--- dropped on {}:\n{}", worker.name(), probe::drops(worker.node.command("sh")));
            }
            if self.keep_failed {
                eprintln!("\nThe lab is kept, for a look at what went wrong:\n{}", self.how_to_enter());
                self.keep();
            }
        }
    }
}
