//! Thousands of clusters, each played through other faults than all the others.

use std::io::Write as _;

use polder_simulation::agent::host::IMPATIENT;
use polder_simulation::agent::publisher::CANCELLED;
use polder_simulation::fault::Fault;
use polder_simulation::faults::{COPY_OF_SILENT, CRASHED_OVER_A_FILE, RIVAL_OF_SILENT};
use polder_simulation::heal::EMPTIED;
use polder_simulation::operator::OUTCOMES;
use polder_simulation::play::{Report, play};
use polder_simulation::runtime::LATE_INTERFACE;
use polder_simulation::schedule::HUNG;

/// How many are played with every test; `scripts/simulate` plays as many as one likes.
const SEEDS: u64 = 2_000;

#[test]
fn whatever_fails_at_whatever_step_no_invariant_is_broken() {
    let mut total = Report::default();
    for seed in 0..SEEDS {
        match play(seed) {
            Ok(report) => total.add(&report),
            Err(failure) => panic!("{failure}"),
        }
    }
    let besides = [RIVAL_OF_SILENT, COPY_OF_SILENT, HUNG, IMPATIENT, LATE_INTERFACE, CANCELLED];
    let of_operators = OUTCOMES.into_iter().chain([EMPTIED, CRASHED_OVER_A_FILE]);
    for played in Fault::ALL.map(Fault::name).into_iter().chain(besides).chain(of_operators) {
        assert!(total.counts.contains_key(played), "in none of {SEEDS} seeds: {played}");
    }
    // Said even where the output of a test that passes is not shown.
    let _ = writeln!(std::io::stdout().lock(), "{SEEDS} seeds hold: {total}");
}
