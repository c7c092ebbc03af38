//! Simulates thousands of clusters, each with its own random sequence of faults.

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

/// Number of seeds in a test run; `scripts/simulate` runs any number.
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
    // Printed also if the test passes: the test harness hides only the output of the print macros.
    let _ = writeln!(std::io::stdout().lock(), "{SEEDS} seeds hold: {total}");
}
