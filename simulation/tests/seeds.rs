//! Simulates thousands of clusters, each with its own random sequence of faults.

use std::io::Write as _;

use polder_simulation::agent::host::IMPATIENT;
use polder_simulation::agent::publisher::CANCELLED;
use polder_simulation::fault::Fault;
use polder_simulation::faults::{
    CONFLICT_WITH_UNREACHABLE, COPY_OF_UNREACHABLE, CRASHED_WITH_EMBEDDED_STORE,
};
use polder_simulation::heal::EMPTIED;
use polder_simulation::operator::OUTCOMES;
use polder_simulation::run::{Report, run_seed};
use polder_simulation::runtime::LATE_INTERFACE;
use polder_simulation::schedule::HUNG;

/// Number of seeds in a test run; `scripts/simulate` runs any number.
const SEEDS: u64 = 2_000;

#[test]
fn no_invariant_is_violated_under_random_faults() {
    let mut total = Report::default();
    for seed in 0..SEEDS {
        match run_seed(seed) {
            Ok(report) => total.add(&report),
            Err(failure) => panic!("{failure}"),
        }
    }
    let besides =
        [CONFLICT_WITH_UNREACHABLE, COPY_OF_UNREACHABLE, HUNG, IMPATIENT, LATE_INTERFACE, CANCELLED];
    let of_operators = OUTCOMES.into_iter().chain([EMPTIED, CRASHED_WITH_EMBEDDED_STORE]);
    for played in Fault::ALL.map(Fault::name).into_iter().chain(besides).chain(of_operators) {
        assert!(total.counts.contains_key(played), "in none of {SEEDS} seeds: {played}");
    }
    // Printed also if the test passes: the test harness hides only the output of the print macros.
    let _ = writeln!(std::io::stdout().lock(), "{SEEDS} seeds hold: {total}");
}
