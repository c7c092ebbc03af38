//! All measured values, by round, and the ratios between them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::statistics::{Spread, Statistic};

/// What was measured: see `docs/performance.md` for the names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The part of the benchmark.
    pub part: &'static str,
    /// The circumstances, such as `("pods", "500")`, in the order in which tables show them.
    pub conditions: Vec<(&'static str, String)>,
    /// Who was measured.
    pub contestant: &'static str,
    /// The measurement.
    pub what: &'static str,
}

impl Key {
    /// A key without conditions.
    pub fn new(part: &'static str, contestant: &'static str, what: &'static str) -> Self {
        Self { part, conditions: Vec::new(), contestant, what }
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, name: &'static str, value: impl ToString) -> Self {
        self.conditions.push((name, value.to_string()));
        self
    }

    /// The same measurement of another contestant.
    #[must_use]
    pub fn of(&self, contestant: &'static str) -> Self {
        Self { contestant, ..self.clone() }
    }

    /// The conditions as text.
    pub fn circumstances(&self) -> String {
        let pairs: Vec<_> = self.conditions.iter().map(|(name, value)| format!("{name} {value}")).collect();
        pairs.join(", ")
    }
}

/// The values of one measurement.
#[derive(Debug, Clone, Default)]
pub struct Series {
    /// Unit of the values.
    pub unit: &'static str,
    /// The values of each round.
    pub rounds: BTreeMap<u32, Vec<f64>>,
}

impl Series {
    /// The statistic over the values of all rounds.
    pub fn whole(&self, statistic: Statistic) -> Option<f64> {
        let all: Vec<f64> = self.rounds.values().flatten().copied().collect();
        statistic.of(&all)
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.rounds.values().map(Vec::len).sum()
    }

    fn by_round(&self, statistic: Statistic) -> BTreeMap<u32, f64> {
        let of = |(round, values): (&u32, &Vec<f64>)| Some((*round, statistic.of(values)?));
        self.rounds.iter().filter_map(of).collect()
    }
}

/// All results.
#[derive(Debug, Default)]
pub struct Results {
    series: BTreeMap<Key, Series>,
}

impl Results {
    /// Adds values of a round.
    pub fn add(&mut self, key: Key, unit: &'static str, round: u32, values: impl IntoIterator<Item = f64>) {
        let series = self.series.entry(key).or_default();
        series.unit = unit;
        series.rounds.entry(round).or_default().extend(values);
    }

    /// The values of a measurement.
    pub fn get(&self, key: &Key) -> Option<&Series> {
        self.series.get(key)
    }

    /// All measurements.
    pub fn all(&self) -> impl Iterator<Item = (&Key, &Series)> {
        self.series.iter()
    }

    /// The parts that have results.
    pub fn parts(&self) -> BTreeSet<&'static str> {
        self.series.keys().map(|key| key.part).collect()
    }

    /// The ratio of two measurements: computed in each round that has both, then the spread over the rounds.
    pub fn ratio(&self, of: &Key, to: &Key, statistic: Statistic) -> Option<Spread> {
        let (of, to) = (self.get(of)?.by_round(statistic), self.get(to)?.by_round(statistic));
        let of_round = |(round, value): (&u32, &f64)| {
            let to = to.get(round).filter(|to| **to > 0.0)?;
            Some(value / to)
        };
        Spread::of(&of.iter().filter_map(of_round).collect::<Vec<_>>())
    }

    /// All measurements for `--json`.
    pub fn to_json(&self) -> Value {
        let one = |(key, series): (&Key, &Series)| {
            let mut object = Map::new();
            object.insert("part".to_owned(), key.part.into());
            object.insert("what".to_owned(), key.what.into());
            object.insert("contestant".to_owned(), key.contestant.into());
            let conditions =
                key.conditions.iter().map(|(name, value)| ((*name).to_owned(), number_or_text(value)));
            object.insert("conditions".to_owned(), Value::Object(conditions.collect()));
            object.insert("unit".to_owned(), series.unit.into());
            object.insert("count".to_owned(), series.count().into());
            for statistic in [Statistic::Median, Statistic::P99] {
                object.insert(statistic.name().to_owned(), json!(series.whole(statistic)));
            }
            let rounds: Vec<_> = series
                .rounds
                .values()
                .map(|values| {
                    json!({
                        "median": Statistic::Median.of(values),
                        "p99": Statistic::P99.of(values),
                        "count": values.len(),
                    })
                })
                .collect();
            object.insert("rounds".to_owned(), rounds.into());
            Value::Object(object)
        };
        self.series.iter().map(one).collect()
    }
}

fn number_or_text(value: &str) -> Value {
    value.parse::<u64>().map_or_else(|_| value.into(), Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(contestant: &'static str) -> Key {
        Key::new("pods", contestant, "add").when("at_once", 1).when("rules", "none")
    }

    fn results() -> Results {
        let mut results = Results::default();
        // The machine is twice as slow in the second round.
        for (round, slowness) in [(0, 1.0), (1, 2.0)] {
            results.add(key("slow"), "ms", round, [8.0, 9.0, 10.0].map(|value| value * slowness));
            results.add(key("quick"), "ms", round, [2.0, 3.0, 4.0].map(|value| value * slowness));
        }
        results.add(key("quick"), "ms", 2, [100.0]);
        results
    }

    #[test]
    fn a_ratio_is_computed_within_each_round_that_has_both() {
        let ratio = results().ratio(&key("quick"), &key("slow"), Statistic::Median).unwrap();
        assert_eq!(ratio, Spread { median: 3.0 / 9.0, min: 3.0 / 9.0, max: 3.0 / 9.0 });
        assert_eq!(results().ratio(&key("quick"), &key("nobody"), Statistic::Median), None);
    }

    #[test]
    fn a_ratio_to_nothing_is_left_out() {
        let mut results = results();
        results.add(key("free"), "ms", 0, [0.0]);
        assert_eq!(results.ratio(&key("quick"), &key("free"), Statistic::Median), None);
    }

    #[test]
    fn the_json_has_the_documented_keys() {
        let json = results().to_json();
        let quick = &json[0];
        assert_eq!(
            *quick,
            json!({
                "part": "pods", "what": "add", "contestant": "quick", "unit": "ms",
                "conditions": { "at_once": 1, "rules": "none" },
                "count": 7, "median": 4.0, "p99": 100.0,
                "rounds": [
                    { "median": 3.0, "p99": 4.0, "count": 3 },
                    { "median": 6.0, "p99": 8.0, "count": 3 },
                    { "median": 100.0, "p99": 100.0, "count": 1 },
                ],
            })
        );
        assert_eq!(json.as_array().map(Vec::len), Some(2));
    }
}
