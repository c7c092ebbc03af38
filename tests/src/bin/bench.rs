//! The benchmark of `scripts/bench`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use polder_tests::bench::contestant::Kind;
use polder_tests::bench::progress::Progress;
use polder_tests::bench::results::Results;
use polder_tests::bench::{bars, data, machine, peers, plot, pods, runtime, table};
use serde_json::json;

/// Measures Polder beside other plugins. Prints figures only; nothing passes or fails.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Mode>,
    /// Measure only this part; can be repeated
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Measure only this contestant of part `pods`; can be repeated
    #[arg(long, value_enum)]
    contestant: Vec<Kind>,
    /// Number of peers in part `peers`; can be repeated [default: 10, 1000, 5000 and 16000; 1000 with --quick]
    #[arg(long)]
    peers: Vec<u32>,
    /// Blocks that move from one peer to another in part `peers`, per second
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// Duration of these moves, in seconds [default: 20; 5 with --quick]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Measure less, in less than five minutes
    #[arg(long)]
    quick: bool,
    /// Write all results to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write charts into this folder
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// Call plugins in a node: used by the benchmark itself
    #[command(hide = true)]
    Runtime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Duration and processor time of ADD and DEL
    Pods,
    /// The agent with thousands of peers
    Peers,
    /// Traffic between pods
    Data,
}

/// Load from which on the figures are noisy, in processes that could run.
const BUSY: f64 = 0.5;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Mode::Runtime) = arguments.command {
        return runtime::serve();
    }
    ensure!(nix::unistd::geteuid().is_root(), "the benchmark needs root: run sudo scripts/bench");
    let machine = machine::describe();
    for (name, value) in &machine {
        println!("{name}: {value}");
    }
    if machine::load() > BUSY {
        eprintln!(
            "other programs run (load {}): the figures are noisy, calls one at a time most of all",
            machine::load()
        );
    }
    let folder = tempfile::Builder::new().prefix("polder-bench-").tempdir()?;
    let mut results = Results::default();
    let mut progress = Progress::start();
    let is_wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    if is_wanted(Part::Pods) {
        let extent = if arguments.quick { pods::Extent::QUICK } else { pods::Extent::FULL };
        let all = Kind::ALL.to_vec();
        let kinds = if arguments.contestant.is_empty() { &all } else { &arguments.contestant };
        pods::run(kinds, &extent, folder.path(), &mut results, &mut progress)?;
    }
    if is_wanted(Part::Peers) {
        peers::run(&peers_extent(&arguments), &mut results, &mut progress)?;
    }
    if is_wanted(Part::Data) {
        let extent = if arguments.quick { data::Extent::QUICK } else { data::Extent::FULL };
        data::run(&extent, folder.path(), &mut results, &mut progress)?;
    }
    progress.clear();
    let bars = bars::all(&results);
    println!("{}", table::all(&results, &bars));
    println!("measured in {} s", progress.elapsed().as_secs());
    if let Some(path) = &arguments.json {
        let bars: Vec<_> = bars.iter().map(bars::Bar::to_json).collect();
        let all = json!({
            "schema": 1,
            "machine": machine::to_json(&machine),
            "seconds": progress.elapsed().as_secs(),
            "results": results.to_json(),
            "bars": bars,
        });
        fs::write(path, format!("{all:#}\n")).with_context(|| format!("write {}", path.display()))?;
    }
    if let Some(folder) = &arguments.svg {
        plot::write(&results, folder)?;
    }
    Ok(())
}

fn peers_extent(arguments: &Arguments) -> peers::Extent {
    let (numbers, seconds, idle) =
        if arguments.quick { (vec![1_000], 5, 5) } else { (vec![10, 1_000, 5_000, 16_000], 20, 60) };
    peers::Extent {
        peers: if arguments.peers.is_empty() { numbers } else { arguments.peers.clone() },
        rate: arguments.rate,
        duration: Duration::from_secs(arguments.seconds.unwrap_or(seconds)),
        idle: Duration::from_secs(idle),
        starts: if arguments.quick { 1 } else { 3 },
        lives: 50,
    }
}
