//! Explores the model of the cluster completely, and checks that it detects each deliberate defect.

use std::io::Write as _;

use polder_simulation::model::{Flaw, HAPPENINGS, Happening, Report, Space};

/// Prints the line, also if the test passes: the test harness hides only the output of the print macros.
fn say(line: impl std::fmt::Display) {
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "{line}");
}

fn missing(report: &Report, expected: &[Happening]) -> Vec<&'static str> {
    let never =
        |(happening, _): &&(Happening, _)| expected.contains(happening) && report.tally.of(*happening) == 0;
    HAPPENINGS.iter().filter(never).map(|(_, words)| *words).collect()
}

#[test]
fn nothing_breaks_in_any_order_of_things() {
    let (mut states, mut generated, mut failed) = (0, 0, Vec::new());
    for (space, expected) in Space::all() {
        let report = space.explore();
        say(&report);
        states += report.states;
        generated += report.generated;
        let missing = missing(&report, &expected);
        if !missing.is_empty() || !report.broken.is_empty() {
            failed.push((report.name, missing));
        }
    }
    say(format!("all spaces: {states} states, {generated} generated"));
    assert!(failed.is_empty(), "broken, or never seen: {failed:?}");
}

#[test]
fn every_flaw_breaks_what_it_should() {
    let mut unseen = Vec::new();
    for flaw in Flaw::ALL {
        let (space, property) = Space::against(flaw);
        let report = space.explore();
        say(format!("{flaw:?}: {report}"));
        if !report.broken.contains_key(property) {
            unseen.push((flaw, property));
        }
    }
    assert!(unseen.is_empty(), "not broken, though they should be: {unseen:?}");
}

#[test]
fn where_a_flaw_is_found_nothing_is_found_without_it() {
    for flaw in Flaw::ALL {
        let (space, _) = Space::against(flaw);
        let report = Space { flaw: None, ..space }.explore();
        assert!(report.broken.is_empty(), "{report}");
    }
}
