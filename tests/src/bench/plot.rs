//! Bar charts in SVG.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Context;

use super::bars::short;
use super::results::{Key, Results, Series};
use super::statistics::Statistic;
use super::table::DETAILS;

/// Width of a chart, of its names and of its bars, in pixels.
const WIDTH: f64 = 700.0;
const NAMES: f64 = 120.0;
const BARS: f64 = 430.0;
/// Height of a bar with its gap, of the title, and of the gap between two groups.
const BAR: f64 = 18.0;
const TITLE: f64 = 50.0;
const GAP: f64 = 10.0;

/// Writes a chart for each measurement of each part: `PART-WHAT.svg`.
pub fn write(results: &Results, folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let all = results.all().filter(|(key, _)| !DETAILS.contains(&key.what));
    let charts: BTreeSet<_> = all.map(|(key, _)| (key.part, key.what)).collect();
    for (part, what) in charts {
        let mut bars: Vec<_> =
            results.all().filter(|(key, _)| (key.part, key.what) == (part, what)).collect();
        bars.sort_by_key(|(key, _)| {
            key.conditions.iter().map(|(_, value)| format!("{value:>12}")).collect::<Vec<_>>()
        });
        let path = folder.join(format!("{part}-{}.svg", what.replace('_', "-")));
        fs::write(&path, chart(&format!("{part}: {what}"), &bars))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// One chart: a bar up to the median, and a line up to the 99th percentile, for each contestant. Each group has its own
/// scale, which begins at 0.
fn chart(title: &str, bars: &[(&Key, &Series)]) -> String {
    let unit = bars.first().map(|(_, series)| series.unit).unwrap_or_default();
    let several = bars.iter().any(|(_, series)| series.rounds.values().any(|values| values.len() > 2));
    let end = if several { Statistic::P99 } else { Statistic::Median };
    let (mut body, mut y) = (String::new(), TITLE);
    for group in bars.chunk_by(|(one, _), (other, _)| one.conditions == other.conditions) {
        let circumstances = group.first().map(|(key, _)| key.circumstances()).unwrap_or_default();
        y += GAP + BAR;
        body += &format!(
            "<text x=\"10\" y=\"{:.0}\" font-weight=\"bold\">{}</text>\n",
            y - 5.0,
            escaped(&circumstances)
        );
        let ends = group.iter().map(|(_, series)| series.whole(end).unwrap_or_default());
        let largest = ends.fold(f64::MIN_POSITIVE, f64::max);
        for (key, series) in group {
            body += &bar(key.contestant, series, end, largest, y);
            y += BAR;
        }
    }
    let legend = if several {
        "bar: median, line: p99; each group has its own scale"
    } else {
        "median; each group has its own scale"
    };
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"16\">{}, {}</text>\n\
         <text x=\"10\" y=\"40\" fill=\"#555\">{legend}</text>\n{body}</svg>\n",
        y + GAP,
        escaped(title),
        escaped(unit)
    )
}

/// The bar of a contestant at height `y`. A value of `largest` fills the width.
fn bar(contestant: &str, series: &Series, end: Statistic, largest: f64, y: f64) -> String {
    let of = |statistic| series.whole(statistic).unwrap_or_default();
    let (median, high) = (of(Statistic::Median), of(end));
    let (bar, line) = (median / largest * BARS, high / largest * BARS);
    let colour = if contestant.starts_with("polder") { "#1f6f8b" } else { "#9aa5ab" };
    let label = match end {
        Statistic::P99 => format!("{} / {}", short(median), short(high)),
        Statistic::Median => short(median),
    };
    let (middle, text) = (y + BAR / 2.0 - 1.0, y + BAR - 5.0);
    format!(
        "<text x=\"{:.0}\" y=\"{text:.0}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{NAMES}\" y=\"{y:.0}\" width=\"{bar:.1}\" height=\"{:.0}\" fill=\"{colour}\"/>\
         <line x1=\"{NAMES}\" x2=\"{:.1}\" y1=\"{middle:.0}\" y2=\"{middle:.0}\" stroke=\"#333\"/>\
         <text x=\"{:.1}\" y=\"{text:.0}\">{label}</text>\n",
        NAMES - 6.0,
        escaped(contestant),
        BAR - 3.0,
        NAMES + line,
        NAMES + bar.max(line) + 6.0,
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fills_the_chart_and_texts_are_escaped() {
        let mut results = Results::default();
        results.add(Key::new("pods", "<a>", "add"), "ms", 0, [1.0]);
        results.add(Key::new("pods", "b", "add"), "ms", 0, [2.0]);
        let folder = tempfile::tempdir().unwrap();
        write(&results, folder.path()).unwrap();
        let svg = fs::read_to_string(folder.path().join("pods-add.svg")).unwrap();
        assert!(svg.contains("width=\"430.0\"") && svg.contains("width=\"215.0\""), "{svg}");
        assert!(svg.contains("&lt;a&gt;") && !svg.contains("<a>"), "{svg}");
    }
}
