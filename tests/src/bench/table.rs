//! The tables at the end.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{Table, presets};

use super::bars::{Bar, short};
use super::results::{Key, Results, Series};
use super::statistics::{Spread, Statistic};

/// The contestant that others are compared with, and who is compared with whom in a part.
pub fn reference(part: &str) -> Option<&'static str> {
    match part {
        "pods" | "data" => Some("bridge"),
        _ => None,
    }
}

/// All results, as tables in Markdown.
pub fn all(results: &Results, bars: &[Bar]) -> String {
    let mut text = String::new();
    for part in results.parts() {
        text += &format!("\n## {part}\n\n{}\n", values(results, part));
        if let Some(reference) = reference(part) {
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

fn new(header: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table
}

/// The rows of a part: circumstances and contestant, with the measurements.
type Rows<'a> = BTreeMap<(usize, &'static str), BTreeMap<&'static str, (&'a Key, &'a Series)>>;

/// A table of a part: a row for each contestant and condition, a column for each measurement.
fn table(results: &Results, part: &str, cell: impl Fn(&Key, &Series) -> Option<String>) -> String {
    let of_part: Vec<_> = results.all().filter(|(key, _)| key.part == part).collect();
    let mut text = String::new();
    // Measurements with the same kinds of conditions share a table.
    let kinds: BTreeSet<Vec<&str>> = of_part.iter().map(|(key, _)| names(key)).collect();
    for kind in kinds {
        let of_kind: Vec<_> = of_part.iter().filter(|(key, _)| names(key) == kind).collect();
        let mut circumstances: Vec<Vec<String>> = of_kind.iter().map(|(key, _)| sortable(key)).collect();
        circumstances.sort();
        circumstances.dedup();
        let mut rows = Rows::new();
        for (key, series) in &of_kind {
            let at = circumstances.binary_search(&sortable(key)).unwrap_or_default();
            rows.entry((at, key.contestant)).or_default().insert(key.what, (key, series));
        }
        let columns: BTreeMap<&str, &str> =
            of_kind.iter().map(|(key, series)| (key.what, series.unit)).collect();
        let mut header: Vec<String> = kind.iter().map(|name| (*name).to_owned()).collect();
        header.push("contestant".to_owned());
        header.extend(columns.iter().map(|(what, unit)| format!("{what}, {unit}")));
        let mut table = new(header);
        let mut filled = 0;
        for ((_, contestant), row) in &rows {
            let some = row.values().next().map(|(key, _)| *key);
            let mut line: Vec<String> = some
                .into_iter()
                .flat_map(|key| key.conditions.iter().map(|(_, value)| value.clone()))
                .collect();
            line.push((*contestant).to_owned());
            let cells: Vec<_> = columns
                .keys()
                .map(|what| row.get(what).and_then(|(key, series)| cell(key, series)))
                .collect();
            if cells.iter().any(Option::is_some) {
                filled += 1;
                line.extend(cells.into_iter().map(Option::unwrap_or_default));
                table.add_row(line);
            }
        }
        if filled > 0 {
            text += &format!("{table}\n\n");
        }
    }
    text.trim_end().to_owned()
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
