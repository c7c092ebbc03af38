//! Measures the costs of a large cluster for one node: a real agent and a real etcd with the records of thousands of
//! peers.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use polder_api::{Mac, NodeName};
use polder_ipam::Block;
use polder_ipam::ids::{BootId, Incarnation, MachineId, Nonce};
use polder_ipam::key::Key;
use polder_ipam::record::{BlockRecord, NodeRecord, encode};
use polder_ipam::store::{Outcome, Txn, Write};
use polder_store::Store;
use polder_store::etcd::Etcd;
use polder_store::etcd::config::EtcdConfig;
use polder_tests::agent::Worker;
use polder_tests::{Lab, Topology, wait};

/// Measures cold load, restart, changes and memory of one agent.
#[derive(Debug, Parser)]
struct Arguments {
    /// Peers, each with a block, behind tunnels
    #[arg(long, default_value_t = 5_000)]
    peers: u32,
    /// Blocks that move from one peer to another in a second
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Duration of these moves, in seconds
    #[arg(long, default_value_t = 10)]
    seconds: u32,
}

/// A pool for 16,384 blocks of the default size.
const POOL: &str = "10.128.0.0/12";

/// The first address of the pool, and of the peers' underlay.
const FIRST: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(10, 128, 0, 0), Ipv4Addr::new(172, 16, 0, 0));

/// Number of addresses in a block.
const BLOCK: u32 = 64;

/// Number of peers per transaction.
const AT_ONCE: usize = 60;

/// Longer than any measured operation takes.
const TIMEOUT: Duration = Duration::from_secs(120);

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.peers <= 16_000, "--peers: the pool has room for 16000");
    let topology = Topology { pools: vec![POOL], router: true, ..Topology::one_segment(1) };
    let mut lab = Lab::start(topology);
    let own = lab.workers[0].ctl(&["block", "list"])[0]["block"].as_str().context("a block")?.to_owned();
    ensure!(lab.workers[0].stop(), "the agent ends well");
    let peers: Vec<Peer> = (0..)
        .map(Peer)
        .filter(|peer| peer.block().to_string() != own)
        .take(arguments.peers as usize)
        .collect();
    let endpoints = lab.etcd.endpoints();
    lab.workers[0].node.within(|| write_all(&endpoints, &peers))?;
    let routes = peers.len() + 2;

    lab.workers[0].node.shell("rm -f /var/lib/polder/cluster.json");
    measure_start(&mut lab.workers[0], routes, "cold load from etcd");
    wait::within(TIMEOUT, "the records to be written down", || {
        let written = lab.workers[0].node.read("/var/lib/polder/cluster.json").unwrap_or_default();
        let blocks = written.matches("/blocks/").count();
        if blocks > peers.len() { Ok(()) } else { Err(format!("{blocks} blocks")) }
    });
    memory(&lab.workers[0], "after the cold load");
    churn(&lab, &peers, &arguments)?;
    memory(&lab.workers[0], "after the changes");

    // An empty kernel and the saved snapshot: the same state as after a boot without etcd.
    ensure!(lab.workers[0].stop(), "the agent ends well");
    lab.etcd.kill();
    lab.workers[0].node.shell("ip link delete polder.vx");
    lab.workers[0].flush_routes();
    measure_start(&mut lab.workers[0], routes, "restart from the snapshot, with 1 s of waiting for etcd");
    memory(&lab.workers[0], "after the restart");
    Ok(())
}

/// A peer that exists only as records.
#[derive(Debug, Clone, Copy)]
struct Peer(u32);

impl Peer {
    fn name(self) -> NodeName {
        format!("peer-{}", self.0).parse().expect("a name")
    }

    fn block(self) -> Block {
        let first = Ipv4Addr::from(u32::from(FIRST.0) + self.0 * BLOCK);
        Block::new(format!("{first}/26").parse().expect("a range"))
    }

    fn gateway(self) -> IpAddr {
        Ipv4Addr::from(u32::from(FIRST.0) + self.0 * BLOCK + 1).into()
    }

    fn probe(self) -> IpAddr {
        Ipv4Addr::from(u32::from(FIRST.0) + self.0 * BLOCK + 2).into()
    }

    fn incarnation(self) -> Incarnation {
        Incarnation::new(format!("incarnation-{}", self.0))
    }

    fn node(self) -> Write {
        let [a, b, c, d] = self.0.to_be_bytes();
        let record = NodeRecord {
            incarnation: self.incarnation(),
            machine_id: MachineId::new(format!("{:032x}", self.0)),
            boot_id: BootId::new(format!("00000000-0000-0000-0000-{:012x}", self.0)),
            underlay: vec![Ipv4Addr::from(u32::from(FIRST.1) + self.0 + 1).into()],
            gateways: vec![self.gateway()],
            probes: vec![self.probe()],
            vtep_mac: Mac([2, 0x84, a, b, c, d]),
            mtu: 1450,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        Write::Put { key: Key::Node(self.name()).to_string(), value: encode(&record) }
    }

    /// The claim of a block by this peer.
    fn claims(self, block: Block) -> Write {
        let record = BlockRecord {
            node: self.name(),
            incarnation: self.incarnation(),
            pool: "ipv4".parse().expect("a name"),
            nonce: Nonce::new(format!("nonce-{}", self.0)),
        };
        Write::Put { key: Key::Block(block).to_string(), value: encode(&record) }
    }
}

/// Runs a job with a connection to etcd.
fn with_store<T>(
    endpoints: &[String],
    job: impl AsyncFnOnce(Store) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = EtcdConfig { endpoints: endpoints.to_vec(), ..EtcdConfig::default() };
        job(Store::Etcd(Etcd::new(&config).await?)).await
    })
}

async fn commit(store: &Store, writes: Vec<Write>) -> anyhow::Result<()> {
    let outcome = store.transact(&Txn { compares: Vec::new(), writes }).await?;
    ensure!(matches!(outcome, Outcome::Applied { .. }), "etcd refuses what has no condition");
    Ok(())
}

fn write_all(endpoints: &[String], peers: &[Peer]) -> anyhow::Result<()> {
    with_store(endpoints, async |store| {
        for some in peers.chunks(AT_ONCE) {
            let records = some.iter().flat_map(|peer| [peer.node(), peer.claims(peer.block())]);
            commit(&store, records.collect()).await?;
        }
        Ok(())
    })
}

fn own_routes(worker: &Worker) -> usize {
    worker.node.shell("ip -o route show proto 84 | wc -l").trim().parse().unwrap_or(0)
}

/// Starts the agent, and prints the time until the kernel has all routes, and the duration of a pass without changes.
fn measure_start(worker: &mut Worker, routes: usize, what: &str) {
    let begin = Instant::now();
    worker.start();
    wait::within(TIMEOUT, "all routes to be in the kernel", || {
        let found = own_routes(worker);
        if found >= routes { Ok(()) } else { Err(format!("{found} of {routes} routes")) }
    });
    let in_kernel = begin.elapsed();
    let pass = worker.wait_for_status("a pass that finds nothing", |status| {
        let pass = &status["last_pass"];
        let is_done = pass["writes"] == 0 && pass["written"].as_u64()? >= routes as u64;
        is_done.then(|| pass["took_us"].as_f64())
    });
    let cpu = worker.node.shell("cat /proc/$(pidof polder-agent)/stat");
    let ticks: Vec<f64> = cpu.split(' ').skip(13).take(2).filter_map(|ticks| ticks.parse().ok()).collect();
    println!(
        "{what}: {routes} routes in the kernel after {:.2} s, of which the agent computed {:.2} s and its kernel \
         {:.2} s; \
         a pass that finds nothing takes {:.0} ms",
        in_kernel.as_secs_f64(),
        ticks[0] / 100.0,
        ticks[1] / 100.0,
        pass.unwrap_or_default() / 1000.0
    );
}

fn memory(worker: &Worker, when: &str) {
    let status = worker.node.shell("cat /proc/$(pidof polder-agent)/status");
    let of = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or_default() / 1024.0
    };
    println!(
        "memory {when}: {:.1} MiB resident, {:.1} at most; {:.1} of it are no part of a file",
        of("VmRSS"),
        of("VmHWM"),
        of("RssAnon")
    );
}

/// Moves blocks between peers, and prints how fast the kernel follows.
fn churn(lab: &Lab, peers: &[Peer], arguments: &Arguments) -> anyhow::Result<()> {
    let worker = &lab.workers[0];
    let (endpoints, changes) = (lab.etcd.endpoints(), arguments.rate * arguments.seconds);
    let (moved, seen) = mpsc::channel();
    let latencies = std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            worker.node.within(|| {
                with_store(&endpoints, async |store| {
                    let mut due = tokio::time::interval(Duration::from_secs(1) / arguments.rate);
                    for number in 0..changes as usize {
                        due.tick().await;
                        let (from, to) =
                            (peers[number % peers.len()], peers[(number + peers.len() / 2) % peers.len()]);
                        commit(&store, vec![to.claims(from.block())]).await?;
                        moved.send((Instant::now(), from.block(), to.gateway())).context("somebody looks")?;
                    }
                    Ok(())
                })
            })
        });
        let mut latencies: Vec<f64> = Vec::new();
        // Only the newest change is checked, so that the checks keep up.
        while let Ok(mut newest) = seen.recv() {
            while let Ok(newer) = seen.try_recv() {
                newest = newer;
            }
            let (at, block, gateway) = newest;
            wait::within(TIMEOUT, "the kernel to follow", || {
                let route = worker.node.run("ip", &["route", "show", &block.to_string()]);
                if route.contains(&format!("via {gateway} ")) { Ok(()) } else { Err(route) }
            });
            latencies.push(at.elapsed().as_secs_f64());
        }
        writer.join().map_err(|_| anyhow::anyhow!("the writer has panicked"))??;
        anyhow::Ok(latencies)
    });
    let mut latencies = latencies?;
    latencies.sort_by(f64::total_cmp);
    let (median, last) = (latencies[latencies.len() / 2], latencies[latencies.len() - 1]);
    println!(
        "{} blocks a second moved for {} s: the kernel followed after {:.2} s (median of {}), {:.2} s at most",
        arguments.rate,
        arguments.seconds,
        median,
        latencies.len(),
        last
    );
    Ok(())
}
