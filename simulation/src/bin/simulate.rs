//! Runs seeds, and stops at the first that fails.

use std::process::ExitCode;
use std::time::Instant;

use polder_simulation::run::{Report, run_seed, run_seed_with};
use polder_simulation::world::Record;

const USAGE: &str = "usage: simulate --seeds N [--from S] | --seed N";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().ok();
    match words.as_slice() {
        ["--seed", seed] => number(seed).map(replay),
        ["--seeds", seeds] => number(seeds).map(|seeds| run(0, seeds)),
        ["--seeds", seeds, "--from", from] | ["--from", from, "--seeds", seeds] => {
            number(seeds).zip(number(from)).map(|(seeds, from)| run(from, seeds))
        }
        _ => None,
    }
    .unwrap_or_else(|| {
        eprintln!("{USAGE}");
        ExitCode::from(2)
    })
}

/// Runs one seed, and prints every step.
fn replay(seed: u64) -> ExitCode {
    match run_seed_with(seed, Record::Printed) {
        Ok(report) => {
            println!("seed {seed} holds: {report}");
            ExitCode::SUCCESS
        }
        Err(mut failure) => {
            failure.log.clear();
            println!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `seeds` seeds, from `from` on.
fn run(from: u64, seeds: u64) -> ExitCode {
    let began = Instant::now();
    let mut total = Report::default();
    for seed in from..from.saturating_add(seeds) {
        match run_seed(seed) {
            Ok(report) => total.add(&report),
            Err(failure) => {
                println!("{failure}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{seeds} seeds from {from} hold, in {:.1} s: {total}", began.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
