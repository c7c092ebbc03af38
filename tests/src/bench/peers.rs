//! Part `peers`: the load of a large cluster on one of its nodes. A real agent with a real etcd that holds the records
//! of thousands of peers.

use std::fs;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::agents;
use super::cluster::{MOST, POOL, Peer, commit, with_store, write_all};
use super::contestant::{Contestant, Kind, Place, processor_time, rest, start_lab};
use super::follow::{Follower, Pending};
use super::progress::Progress;
use super::results::{Key, Results};
use crate::agent::Worker;
use crate::{Lab, Topology, wait};

/// Name of this part.
pub const PART: &str = "peers";

/// Extent of the measurement.
#[derive(Debug, Clone)]
pub struct Extent {
    /// Numbers of peers.
    pub peers: Vec<u32>,
    /// Blocks that move from one peer to another in a second.
    pub rate: u32,
    /// Duration of these moves.
    pub duration: Duration,
    /// Duration of idleness.
    pub idle: Duration,
    /// Number of cold starts.
    pub starts: u32,
    /// Number of pods whose lives are measured.
    pub lives: usize,
}

/// Longer than any measured operation takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Time after the start in which an agent reads and writes everything once.
const AFTER_START: Duration = Duration::from_secs(4);

/// Pause between two looks at the number of routes.
const LOOK: Duration = Duration::from_millis(5);

/// Runs the part.
pub fn run(extent: &Extent, results: &mut Results, progress: &mut Progress) -> anyhow::Result<()> {
    ensure!(extent.peers.iter().all(|peers| *peers <= MOST), "--peers: at most {MOST} have room in the pool");
    ensure!(extent.peers.iter().all(|peers| *peers >= 2), "--peers: a block needs two peers to move");
    for peers in &extent.peers {
        Measurement { extent, peers: *peers, results, progress }.run()?;
    }
    Ok(())
}

struct Measurement<'a> {
    extent: &'a Extent,
    peers: u32,
    results: &'a mut Results,
    progress: &'a mut Progress,
}

impl Measurement<'_> {
    fn add(&mut self, what: &'static str, unit: &'static str, round: u32, value: f64) {
        self.results.add(key(self.peers)(what), unit, round, [value]);
    }

    fn step(&mut self, text: &str) {
        self.progress.step(&format!("peers: {}: {text}", self.peers));
    }

    fn run(&mut self) -> anyhow::Result<()> {
        self.step("writing the records");
        let mut lab = start_lab(Topology { pools: vec![POOL], router: true, ..Topology::one_segment(1) });
        let own = lab.workers[0].ctl(&["block", "list"])[0]["block"].as_str().context("a block")?.to_owned();
        ensure!(lab.workers[0].stop(), "the agent ends well");
        let peers = Peer::some(self.peers, &own);
        let endpoints = lab.etcd.endpoints();
        lab.workers[0].node.within(|| write_all(&endpoints, &peers))?;

        for round in 0..self.extent.starts {
            self.step("cold start");
            self.cold_start(&mut lab, round)?;
        }
        self.memory(&lab.workers[0], "memory_cold");
        self.step("changes");
        self.changes(&lab, &peers)?;
        self.memory(&lab.workers[0], "memory_changes");
        self.step("start without etcd");
        self.start_without_etcd(&mut lab)?;
        lab.workers[0].wait_for_status("etcd's return", |status| {
            (status["store"]["state"] == "connected").then_some(())
        });
        self.lives(lab)
    }

    /// Starts the agent without a snapshot and without anything in the kernel.
    fn cold_start(&mut self, lab: &mut Lab, round: u32) -> anyhow::Result<()> {
        empty(&mut lab.workers[0])?;
        lab.workers[0].node.shell("rm -f /var/lib/polder/cluster.json");
        let (seconds, cpu) = start(&mut lab.workers[0], self.peers)?;
        self.add("cold_start", "s", round, seconds);
        self.add("cold_start_cpu", "s", round, cpu);
        let pass = idle_pass(&lab.workers[0], self.peers);
        self.add("idle_pass", "ms", round, pass);
        wait::within(PATIENCE, "the records to be written down", || {
            let written = lab.workers[0].node.read("/var/lib/polder/cluster.json").unwrap_or_default();
            let blocks = written.matches("/blocks/").count();
            if blocks > self.peers as usize { Ok(()) } else { Err(format!("{blocks} blocks")) }
        });
        Ok(())
    }

    /// An empty kernel and the saved snapshot: the same state as after a boot without etcd.
    fn start_without_etcd(&mut self, lab: &mut Lab) -> anyhow::Result<()> {
        empty(&mut lab.workers[0])?;
        lab.etcd.kill();
        let (seconds, _) = start(&mut lab.workers[0], self.peers)?;
        self.add("start_without_etcd", "s", 0, seconds);
        lab.etcd.start_again();
        Ok(())
    }

    fn memory(&mut self, worker: &Worker, what: &'static str) {
        let memory = worker.agent_memory();
        self.add(what, "MiB", 0, memory.resident);
        if what == "memory_changes" {
            self.add("memory_highest", "MiB", 0, memory.highest);
        }
    }

    /// Moves blocks between peers, and measures how fast the kernel follows.
    fn changes(&mut self, lab: &Lab, peers: &[Peer]) -> anyhow::Result<()> {
        let worker = &lab.workers[0];
        let pid = worker.agent_pid().context("the agent runs")?;
        let follower = Follower::start(&worker.node)?;
        let (rate, duration) = (self.extent.rate, self.extent.duration);
        let (endpoints, changes) = (lab.etcd.endpoints(), u64::from(rate) * duration.as_secs());
        let (sender, moves) = channel();
        let (begin, cpu) = (Instant::now(), processor_time(pid)?);
        let mut delays = Vec::new();
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                worker.node.within(|| {
                    with_store(&endpoints, async |store| {
                        let mut due = tokio::time::interval(Duration::from_secs(1) / rate);
                        for number in 0..usize::try_from(changes)? {
                            due.tick().await;
                            let (from, to) = pair(peers, number);
                            let at = Instant::now();
                            commit(&store, vec![to.claims(from.block())]).await?;
                            sender.send((from.block().to_string(), to.gateway().to_string(), at))?;
                        }
                        Ok(())
                    })
                })
            });
            let mut pending = Pending::default();
            let mut seen_early = Vec::new();
            let deadline = begin + duration + PATIENCE;
            let mut writing = true;
            while writing || pending.count() > 0 {
                ensure!(Instant::now() < deadline, "{} changes have not arrived", pending.count());
                match moves.recv_timeout(LOOK) {
                    Ok((destination, gateway, at)) => pending.add(destination, gateway, at),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        writing = false;
                        rest(LOOK);
                    }
                }
                // The kernel may have followed before the writer had reported its move.
                seen_early.extend(follower.routes.try_iter());
                seen_early.retain(|seen| {
                    let arrived = pending.arrive(seen);
                    let keep = arrived.is_empty() && seen.at.elapsed() < Duration::from_secs(1);
                    delays.extend(arrived);
                    keep
                });
            }
            writer.join().map_err(|_| anyhow::anyhow!("the writer has panicked"))?
        })?;
        let share = (processor_time(pid)? - cpu) / begin.elapsed().as_secs_f64() / 10.0;
        self.add("change_cpu", "% of a core", 0, share);
        let longest = delays.iter().copied().fold(0.0, f64::max);
        self.results.add(key(self.peers)("change"), "s", 0, delays);
        self.add("change_longest", "s", 0, longest);
        Ok(())
    }

    /// Idleness, and the processor time of pods' lives.
    fn lives(&mut self, lab: Lab) -> anyhow::Result<()> {
        self.step("idle");
        let count = self.extent.lives;
        let mut contestants = [Contestant::on(Kind::Polder, Place::Lab(Box::new(lab)), count)?];
        contestants[0].settle()?;
        rest(AFTER_START);
        let peers = self.peers;
        let of = |_: &Contestant, what| key(peers)(what);
        agents::idle(&contestants, self.extent.idle, of, 0, self.results)?;
        self.step("processor time of lives");
        agents::lives(&mut contestants, count, of, 0, self.results)
    }
}

fn key(peers: u32) -> impl Fn(&'static str) -> Key {
    move |what| Key::new(PART, Kind::Polder.name(), what).when("peers", peers)
}

/// The peer that loses its block with that change, and the one that gets it: each change of a block has another peer.
fn pair(peers: &[Peer], number: usize) -> (Peer, Peer) {
    let (lap, at) = (number / peers.len(), number % peers.len());
    (peers[at], peers[(at + peers.len() / 2 + lap) % peers.len()])
}

/// Stops the agent and deletes all that it has in the kernel for peers.
fn empty(worker: &mut Worker) -> anyhow::Result<()> {
    ensure!(worker.stop(), "the agent ends well");
    worker.node.shell("! ip link show polder.vx >/dev/null 2>&1 || ip link delete polder.vx");
    worker.flush_routes();
    Ok(())
}

/// Starts the agent. Returns the seconds until the kernel has a route to each peer, and the agent's processor time.
fn start(worker: &mut Worker, peers: u32) -> anyhow::Result<(f64, f64)> {
    let begin = Instant::now();
    worker.start();
    let deadline = begin + PATIENCE;
    // A list of thousands of routes takes time that the agent needs: only a complete one is worth it.
    while prefixes(worker)? < peers || routes(worker) < peers + 2 {
        ensure!(Instant::now() < deadline, "the kernel has {} routes to {peers} peers", routes(worker));
        rest(LOOK);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let pid = worker.agent_pid().context("the agent runs")?;
    Ok((seconds, processor_time(pid)? / 1e3))
}

/// Number of the agent's IPv4 routes: one to each peer, and those of the own pool and block.
fn routes(worker: &Worker) -> u32 {
    worker.node.shell("ip -o route show proto 84 | wc -l").trim().parse().unwrap_or_default()
}

/// Number of routes in table main, as the kernel counts them. That of table local may be included.
fn prefixes(worker: &Worker) -> anyhow::Result<u32> {
    let statistics = fs::read_to_string(format!("/proc/{}/net/fib_triestat", worker.node.pid()))?;
    main_prefixes(&statistics).context("fib_triestat has no table main")
}

fn main_prefixes(statistics: &str) -> Option<u32> {
    let main = statistics.lines().skip_while(|line| line.trim() != "Main:");
    let mut counts = main.filter_map(|line| line.trim().strip_prefix("Prefixes:"));
    counts.next()?.trim().parse().ok()
}

/// Duration of a pass without changes, in milliseconds.
fn idle_pass(worker: &Worker, routes: u32) -> f64 {
    let pass = worker.wait_for_status("a pass that finds nothing", |status| {
        let pass = &status["last_pass"];
        let is_done = pass["writes"] == 0 && pass["written"].as_u64()? >= u64::from(routes);
        is_done.then(|| pass["took_us"].as_f64())
    });
    pass.unwrap_or_default() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_routes_of_table_main_are_counted() {
        let tables = "Basic info: size of leaf: 48 bytes\nMain:\n\tAver depth: 1\n\tPrefixes:       11\n\
                      Local:\n\tPrefixes:       5\n";
        assert_eq!(main_prefixes(tables), Some(11));
        assert_eq!(main_prefixes("Local:\n\tPrefixes:       5\n"), None);
    }

    #[test]
    fn every_change_of_a_block_gives_it_to_another_peer() {
        for count in [2, 3, 10] {
            let peers = Peer::some(count, "");
            let mut owners: Vec<_> = peers.iter().map(|peer| peer.gateway()).collect();
            for number in 0..100 {
                let (from, to) = pair(&peers, number);
                let at = number % peers.len();
                assert_eq!(from.gateway(), peers[at].gateway());
                assert!(owners[at] != to.gateway(), "{count} peers, change {number}");
                owners[at] = to.gateway();
            }
        }
    }
}
