//! Those that the benchmark compares: each a plugin on a node of its own.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::runtime::{Call, Outcome, Runtime};
use crate::agent::{CNI_PLUGINS, Worker, dist};
use crate::node::Node;
use crate::{Lab, Topology};

/// Variable with the path of the floor program.
const FLOOR: &str = "POLDER_FLOOR";

/// The agents' cool-down: the shortest, so that what follows its end belongs to the measurement.
pub const COOLDOWN: Duration = Duration::from_secs(10);

/// The first host interface index and the first address of the floor's pods.
const FIRST_INDEX: u32 = 100_000;
const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 1, 0);

/// Who is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Polder with pods on a bridge
    Polder,
    /// Polder with `attach = "routed"`
    PolderRouted,
    /// Polder with pods on a bridge, each with ten host ports
    PolderPorts,
    /// The floor program with a bridge
    Floor,
    /// The floor program without a bridge
    FloorRouted,
    /// The reference plugin `bridge` with `host-local`
    Bridge,
    /// The same with `ipMasq`
    #[value(name = "bridge-masq")]
    BridgeMasquerade,
    /// The reference plugin `ptp` with `host-local`
    #[value(name = "ptp")]
    PointToPoint,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Polder,
        Self::PolderRouted,
        Self::PolderPorts,
        Self::Floor,
        Self::FloorRouted,
        Self::Bridge,
        Self::BridgeMasquerade,
        Self::PointToPoint,
    ];

    /// The name in tables and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Polder => "polder",
            Self::PolderRouted => "polder-routed",
            Self::PolderPorts => "polder-ports",
            Self::Floor => "floor",
            Self::FloorRouted => "floor-routed",
            Self::Bridge => "bridge",
            Self::BridgeMasquerade => "bridge-masq",
            Self::PointToPoint => "ptp",
        }
    }

    fn is_floor(self) -> bool {
        matches!(self, Self::Floor | Self::FloorRouted)
    }

    fn is_polder(self) -> bool {
        matches!(self, Self::Polder | Self::PolderRouted | Self::PolderPorts)
    }

    /// The network configuration.
    fn conf(self) -> Value {
        if self.is_polder() {
            return Worker::netconf("1.1.0");
        }
        // The newest version of Debian's plugins.
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "bench" });
        if self.is_floor() {
            return conf;
        }
        conf["ipam"] = json!({
            "type": "host-local",
            "ranges": [[{ "subnet": "10.88.0.0/16" }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        });
        if self == Self::PointToPoint {
            conf["type"] = "ptp".into();
            return conf;
        }
        conf["type"] = "bridge".into();
        conf["bridge"] = "cni0".into();
        conf["isGateway"] = true.into();
        conf["ipMasq"] = (self == Self::BridgeMasquerade).into();
        conf
    }

    fn program(self) -> anyhow::Result<PathBuf> {
        let path = match self {
            Self::Polder | Self::PolderRouted | Self::PolderPorts => dist().join("polder"),
            Self::Floor | Self::FloorRouted => std::env::var_os(FLOOR)
                .with_context(|| format!("{FLOOR} is not set: run sudo scripts/bench"))?
                .into(),
            Self::Bridge | Self::BridgeMasquerade => Path::new(CNI_PLUGINS).join("bridge"),
            Self::PointToPoint => Path::new(CNI_PLUGINS).join("ptp"),
        };
        ensure!(path.exists(), "{} is missing: run sudo scripts/bench", path.display());
        Ok(path)
    }
}

/// The node of a contestant.
#[derive(Debug)]
pub enum Place {
    /// A lab with an agent and etcd.
    Lab(Box<Lab>),
    /// A node alone.
    Node(Node),
}

/// A contestant with its node.
#[derive(Debug)]
pub struct Contestant {
    // Dropped first: it runs in the node.
    runtime: Runtime,
    /// Who it is.
    pub kind: Kind,
    /// The node.
    pub place: Place,
    program: PathBuf,
    conf: Value,
    bridge: Option<u32>,
    calls: u32,
}

impl Contestant {
    /// Boots a node for a contestant, with this number of network namespaces for pods.
    pub fn prepare(kind: Kind, folder: &Path, namespaces: usize) -> anyhow::Result<Self> {
        let place = if kind.is_polder() {
            let routed = "attach = \"routed\"";
            let topology =
                Topology::one_segment(1).bootstrap(if kind == Kind::PolderRouted { routed } else { "" });
            Place::Lab(Box::new(start_lab(topology)))
        } else {
            let node = Node::boot(kind.name(), folder);
            node.shell("echo 1 > /proc/sys/net/ipv4/ip_forward");
            Place::Node(node)
        };
        Self::on(kind, place, namespaces)
    }

    /// A contestant on a node that runs already.
    pub fn on(kind: Kind, place: Place, namespaces: usize) -> anyhow::Result<Self> {
        let node = match &place {
            Place::Lab(lab) => &lab.workers[0].node,
            Place::Node(node) => node,
        };
        let bridge = if kind == Kind::Floor {
            node.shell(
                "ip link add floor0 address 02:84:00:00:00:01 type bridge mcast_snooping 0\n\
                 ip address add 10.99.0.1/16 dev floor0\nip link set floor0 up",
            );
            Some(node.shell("cat /sys/class/net/floor0/ifindex").trim().parse()?)
        } else {
            None
        };
        let runtime = Runtime::start(node, namespaces)?;
        Ok(Self { runtime, kind, program: kind.program()?, conf: kind.conf(), bridge, calls: 0, place })
    }

    /// The agent's node, if the contestant has an agent.
    pub fn worker(&self) -> Option<&Worker> {
        match &self.place {
            Place::Lab(lab) => lab.workers.first(),
            Place::Node(_) => None,
        }
    }

    /// Calls for new pods in the network namespaces from `first` on.
    pub fn pods(&mut self, first: usize, count: usize) -> Vec<Call> {
        (first..first + count)
            .map(|namespace| {
                self.calls += 1;
                let container = format!("bench-{}", self.calls);
                let arguments = if self.kind.is_floor() {
                    let address = Ipv4Addr::from(u32::from(FIRST_ADDRESS) + self.calls % 60_000);
                    let bridge = self.bridge.map(|bridge| format!(";bridge={bridge}")).unwrap_or_default();
                    format!("address={address};index={}{bridge}", FIRST_INDEX + self.calls)
                } else {
                    format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={container}")
                };
                let runtime_config = match self.kind {
                    Kind::PolderPorts => json!({ "portMappings": ports_of(self.calls) }),
                    _ => Value::Null,
                };
                Call { container, namespace, arguments, runtime_config }
            })
            .collect()
    }

    /// Calls the plugin.
    pub fn run(&mut self, verb: &str, calls: &[Call], at_once: usize) -> anyhow::Result<Outcome> {
        let outcome = self.runtime.run(verb, &self.program, &self.conf, calls, at_once);
        outcome.with_context(|| format!("{} of {}", verb, self.kind.name()))
    }

    /// Processor time of the agent since its start, in milliseconds; `None` without an agent.
    pub fn agent_cpu(&self) -> anyhow::Result<Option<f64>> {
        self.worker().and_then(Worker::agent_pid).map(processor_time).transpose()
    }

    /// Waits until the agent has nothing to do any more after calls, at most three seconds.
    pub fn settle(&self) -> anyhow::Result<()> {
        /// A pause between two looks, and the processor time of an idle agent in it, in milliseconds.
        const PAUSE: Duration = Duration::from_millis(100);
        const IDLE: f64 = 2.0;
        let deadline = Instant::now() + Duration::from_secs(3);
        while let Some(before) = self.agent_cpu()? {
            rest(PAUSE);
            let quiet = self.agent_cpu()?.is_none_or(|now| now - before < IDLE);
            if quiet || Instant::now() > deadline {
                break;
            }
        }
        Ok(())
    }
}

/// Starts a lab whose agents log as much as in production.
pub fn start_lab(topology: Topology) -> Lab {
    start_lab_with(topology, &[])
}

/// Like [`start_lab`], with further lines of the agents' configuration.
pub fn start_lab_with(topology: Topology, lines: &[&str]) -> Lab {
    let mut lab = Lab::build(topology);
    lab.keep_failed = false;
    for worker in &mut lab.workers {
        lines.iter().for_each(|line| worker.configure_also(line));
        worker.configure_also(&format!("ipam.cooldown_seconds = {}", COOLDOWN.as_secs()));
        worker.variables.push(("RUST_LOG".to_owned(), "info".to_owned()));
    }
    lab.start_agents();
    lab
}

/// Ten host ports of the pod with that number: TCP and UDP ports that no other pod has at the same time.
fn ports_of(pod: u32) -> Vec<Value> {
    let port = |number: u32| {
        let protocol = if number.is_multiple_of(2) { "tcp" } else { "udp" };
        let host = 10_000 + (pod % 5_000) * 10 + number;
        json!({ "hostPort": host, "containerPort": 80 + number, "protocol": protocol })
    };
    (0..10).map(port).collect()
}

/// Processor time of a process since its start, also of its threads that have ended, in milliseconds.
pub fn processor_time(pid: Pid) -> anyhow::Result<f64> {
    let time = clock_gettime(clock_getcpuclockid(pid)?)?;
    Ok(Duration::from(time).as_secs_f64() * 1e3)
}

/// Does nothing for that time.
#[expect(clippy::disallowed_methods, reason = "the time itself is what is needed: others get to work in it")]
pub fn rest(time: Duration) {
    std::thread::sleep(time);
}
