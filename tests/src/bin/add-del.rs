//! Measures the time of sequential ADDs and DELs of pods, with the programs of `POLDER_DIST`.

use std::time::{Duration, Instant};

use clap::Parser;
use polder_tests::agent::Worker;
use polder_tests::{Lab, Topology};

/// Measures ADD and DEL on one node. Prints their p50 and p99 in microseconds, with the start of the plugin in the
/// node's namespace.
#[derive(Debug, Parser)]
struct Arguments {
    /// Pods
    #[arg(long, default_value_t = 100)]
    pods: u32,
}

/// Pods before the measurement: the first ones find cold caches, and wait for a block.
const WARM_UP: u32 = 10;

fn main() -> anyhow::Result<()> {
    let Arguments { pods } = Arguments::parse();
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.start_agents();
    let worker = &lab.workers[0];
    let conf = Worker::netconf("1.1.0");
    let (mut adds, mut dels) = (Vec::new(), Vec::new());
    for number in 0..WARM_UP + pods {
        let name = format!("p{number}");
        let netns = format!("/run/netns/{name}");
        drop(worker.namespace(&name));
        let call = |verb: &str| {
            let begin = Instant::now();
            let outcome = worker.cni(verb, &name, &netns, &conf);
            outcome.map(|_| begin.elapsed()).map_err(|error| anyhow::anyhow!("{verb} of {name}: {error}"))
        };
        let (add, del) = (call("ADD")?, call("DEL")?);
        if number >= WARM_UP {
            adds.push(add);
            dels.push(del);
        }
        worker.node.run("ip", &["netns", "delete", &name]);
    }
    for (verb, mut times) in [("ADD", adds), ("DEL", dels)] {
        times.sort_unstable();
        println!("{verb} {} {}", at(&times, 50).as_micros(), at(&times, 99).as_micros());
    }
    Ok(())
}

/// The given percentile of the times.
fn at(sorted: &[Duration], percent: usize) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or_default()
}
