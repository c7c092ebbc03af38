//! The benchmark of `scripts/bench`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use polder_tests::bench::progress::Progress;
use polder_tests::bench::results::Results;
use polder_tests::bench::{bars, machine, plot, pods, runtime, table};
use serde_json::json;

/// Measures Polder beside other plugins. Prints figures only; nothing passes or fails.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Mode>,
    /// Measure only this part; can be repeated
    #[arg(long, value_enum)]
    only: Vec<Part>,
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
}

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
    let folder = tempfile::Builder::new().prefix("polder-bench-").tempdir()?;
    let mut results = Results::default();
    let mut progress = Progress::start();
    let is_wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    if is_wanted(Part::Pods) {
        let extent = if arguments.quick { pods::Extent::QUICK } else { pods::Extent::FULL };
        pods::run(&extent, folder.path(), &mut results, &mut progress)?;
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
