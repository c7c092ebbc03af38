//! The tables at the end.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{Table, presets};

use super::bars::{Bar, short};
use super::results::{Key, Results, Series};
use super::statistics::{Spread, Statistic};

/// The contestants that all others of a part are compared with.
fn references(part: &str) -> &'static [&'static str] {
    match part {
        "pods" => &["bridge"],
        "data" => &["bridge", "node"],
        _ => &[],
    }
}

/// Measurements that are part of another one: only the JSON has them.
pub(crate) const DETAILS: [&str; 3] = ["add_cpu_plugin", "del_cpu_plugin", "memory_anonymous"];

/// All results, as tables in Markdown.
pub fn all(results: &Results, bars: &[Bar]) -> String {
    let mut text = String::new();
    for part in results.parts() {
        text += &format!("\n## {part}\n\n{}\n", values(results, part));
        for reference in references(part) {
            let ratios = ratios(results, part, reference);
            text += &format!(
                "\nRatio to {reference}: median over the rounds [smallest - largest], of the medians of a round\n\n\
                 {ratios}\n"
            );
        }
    }
    if !bars.is_empty() {
        text += &format!("\n## Bars\n\n{}\n", of_bars(bars));
    }
    text
}

/// The largest number of columns for contestants.
const FEW: usize = 5;

fn new(header: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table
}

/// The tables of a part: measurements with the same kinds of conditions share one.
fn table(results: &Results, part: &str, cell: impl Fn(&Key, &Series) -> Option<String>) -> String {
    let all = results.all().filter(|(key, _)| key.part == part && !DETAILS.contains(&key.what));
    let of_part: Vec<_> = all.collect();
    let kinds: BTreeSet<Vec<&str>> = of_part.iter().map(|(key, _)| names(key)).collect();
    let of_kind = |kind: Vec<&'static str>| {
        let mut cells: Vec<Cell<'_>> = of_part
            .iter()
            .filter(|(key, _)| names(key) == kind)
            .filter_map(|(key, series)| Some((*key, series.unit, cell(key, series)?)))
            .collect();
        cells.sort_by_key(|(key, ..)| (sortable(key), key.contestant, key.what));
        (!cells.is_empty()).then(|| lay_out(&kind, &cells).to_string())
    };
    kinds.into_iter().filter_map(of_kind).collect::<Vec<_>>().join("\n\n")
}

/// What was measured, its unit, and the text of the cell.
type Cell<'a> = (&'a Key, &'static str, String);

/// A row for each contestant and condition and a column for each measurement; or the other way round, if there are few
/// contestants.
fn lay_out(kind: &[&'static str], cells: &[Cell<'_>]) -> Table {
    let measurements: BTreeMap<&str, &str> = cells.iter().map(|(key, unit, _)| (key.what, *unit)).collect();
    let mut subjects: Vec<(Vec<String>, &str)> = Vec::new();
    for (key, ..) in cells {
        let values = key.conditions.iter().map(|(_, value)| value.clone()).collect();
        if !subjects.contains(&(values, key.contestant)) {
            subjects.push((key.conditions.iter().map(|(_, value)| value.clone()).collect(), key.contestant));
        }
    }
    let text = |subject: &(Vec<String>, &str), what: &str| {
        let found = cells.iter().find(|(key, ..)| {
            let values = key.conditions.iter().map(|(_, value)| value);
            key.what == what && key.contestant == subject.1 && values.eq(&subject.0)
        });
        found.map(|(_, _, text)| text.clone()).unwrap_or_default()
    };
    let names = measurements.iter().map(|(what, unit)| (*what, format!("{what}, {unit}")));
    if subjects.len() < measurements.len() && subjects.len() <= FEW {
        let header = subjects.iter().map(|(values, contestant)| {
            let conditions = kind.iter().zip(values).map(|(name, value)| format!("{name} {value}, "));
            format!("{}{contestant}", conditions.collect::<String>())
        });
        let mut table = new(std::iter::once(String::new()).chain(header).collect());
        for (what, name) in names {
            let row = subjects.iter().map(|subject| text(subject, what));
            table.add_row(std::iter::once(name).chain(row));
        }
        return table;
    }
    let header = kind.iter().map(|name| (*name).to_owned()).chain(["contestant".to_owned()]);
    let mut table = new(header.chain(names.map(|(_, name)| name)).collect());
    for subject in &subjects {
        let row = measurements.keys().map(|what| text(subject, what));
        let head = subject.0.iter().cloned().chain([subject.1.to_owned()]);
        table.add_row(head.chain(row));
    }
    table
}

fn names(key: &Key) -> Vec<&'static str> {
    key.conditions.iter().map(|(name, _)| *name).collect()
}

/// The conditions in an order in which 500 comes before 1000.
fn sortable(key: &Key) -> Vec<String> {
    key.conditions.iter().map(|(_, value)| format!("{value:>12}")).collect()
}

/// Median, and p99 where there are several values in a round.
fn values(results: &Results, part: &str) -> String {
    table(results, part, |_, series| {
        let median = short(series.whole(Statistic::Median)?);
        let several = series.rounds.values().any(|values| values.len() > 2);
        Some(match series.whole(Statistic::P99) {
            Some(p99) if several => format!("{median} / {}", short(p99)),
            _ => median,
        })
    })
}

fn ratios(results: &Results, part: &str, reference: &'static str) -> String {
    table(results, part, |key, _| {
        let ratio = results.ratio(key, &key.of(reference), Statistic::Median)?;
        (key.contestant != reference).then(|| spread(ratio))
    })
}

/// A spread as text.
pub fn spread(spread: Spread) -> String {
    let [median, min, max] = [spread.median, spread.min, spread.max].map(short);
    format!("{median} [{min}-{max}]")
}

fn of_bars(bars: &[Bar]) -> Table {
    let header = ["what", "measured [rounds]", "unit", "bar"];
    let mut table = new(header.map(str::to_owned).to_vec());
    for bar in bars {
        table.add_row(vec![bar.text.clone(), spread(bar.measured), bar.unit.to_owned(), bar.wanted()]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_row_for_each_condition_and_contestant_and_ratios_beside() {
        let mut results = Results::default();
        for (contestant, time) in [("bridge", 8.0), ("polder", 2.0)] {
            for pods in [1000, 500] {
                let key = Key::new("pods", contestant, "add").when("pods", pods);
                results.add(key, "ms", 0, [time, time + 1.0, time + 2.0]);
            }
        }
        let text = all(&results, &[]);
        let rows: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with("| ") && !line.contains("contestant"))
            .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
            .collect();
        assert_eq!(
            rows,
            [
                vec!["500", "bridge", "9.00 / 10.0"],
                vec!["500", "polder", "3.00 / 4.00"],
                vec!["1000", "bridge", "9.00 / 10.0"],
                vec!["1000", "polder", "3.00 / 4.00"],
                vec!["500", "polder", "0.333 [0.333-0.333]"],
                vec!["1000", "polder", "0.333 [0.333-0.333]"],
            ]
        );
    }
}
