//! Explores the model of the cluster completely, and checks that it detects each deliberate defect.

use std::io::Write as _;

use polder_simulation::model::{Flaw, OCCURRENCES, Occurrence, Report, Space};

/// Prints the line, also if the test passes: the test harness hides only the output of the print macros.
fn print_line(line: impl std::fmt::Display) {
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "{line}");
}

fn missing(report: &Report, expected: &[Occurrence]) -> Vec<&'static str> {
    let never = |(occurrence, _): &&(Occurrence, _)| {
        expected.contains(occurrence) && report.tally.of(*occurrence) == 0
    };
    OCCURRENCES.iter().filter(never).map(|(_, words)| *words).collect()
}

#[test]
fn properties_hold_in_every_order_of_events() {
    let (mut states, mut generated, mut failed) = (0, 0, Vec::new());
    for (space, expected) in Space::all() {
        let report = space.explore();
        print_line(&report);
        states += report.states;
        generated += report.generated;
        let missing = missing(&report, &expected);
        if !missing.is_empty() || !report.violations.is_empty() {
            failed.push((report.name, missing));
        }
    }
    print_line(format!("all spaces: {states} states, {generated} generated"));
    assert!(failed.is_empty(), "broken, or never seen: {failed:?}");
}

#[test]
fn every_flaw_violates_its_property() {
    let mut unseen = Vec::new();
    for flaw in Flaw::ALL {
        let (space, property) = Space::against(flaw);
        let report = space.explore();
        print_line(format!("{flaw:?}: {report}"));
        if !report.violations.contains_key(property) {
            unseen.push((flaw, property));
        }
    }
    assert!(unseen.is_empty(), "flaws that were not detected: {unseen:?}");
}

#[test]
fn spaces_of_flaws_violate_no_property_without_the_flaw() {
    for flaw in Flaw::ALL {
        let (space, _) = Space::against(flaw);
        let report = Space { flaw: None, ..space }.explore();
        assert!(report.violations.is_empty(), "{report}");
    }
}
