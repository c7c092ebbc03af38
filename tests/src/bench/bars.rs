//! The bars: what the project wants to reach. They are shown beside the results; nothing passes or fails.

use serde_json::{Value, json};

use super::results::{Key, Results};
use super::setups::PodPath;
use super::statistics::{Spread, Statistic};

/// A bar, with what was measured.
#[derive(Debug, Clone)]
pub struct Bar {
    /// What is compared, as text.
    pub text: String,
    /// The value or the ratio: spread over the rounds.
    pub measured: Spread,
    /// Unit of the value; `x` for a ratio.
    pub unit: &'static str,
    /// The bar.
    pub bar: f64,
    /// Whether lower is better.
    pub lower: bool,
}

impl Bar {
    /// The bar as text.
    pub fn wanted(&self) -> String {
        let sign = if self.lower { "<=" } else { ">=" };
        format!("{sign} {}", short(self.bar))
    }

    /// For `--json`.
    pub fn to_json(&self) -> Value {
        let Spread { median, min, max } = self.measured;
        json!({
            "text": self.text, "median": median, "min": min, "max": max, "unit": self.unit,
            "bar": self.bar, "lower_is_better": self.lower,
        })
    }
}

/// A number with about three digits.
pub fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn pods(contestant: &'static str, what: &'static str, pods: u32, at_once: u32) -> Key {
    Key::new("pods", contestant, what).when("pods", pods).when("at_once", at_once)
}

fn node(contestant: &'static str, what: &'static str, pods: u32) -> Key {
    Key::new("pods", contestant, what).when("pods", pods)
}

fn peers(what: &'static str, peers: u32) -> Key {
    Key::new("peers", "polder", what).when("peers", peers)
}

/// All bars for which there are results.
pub fn all(results: &Results) -> Vec<Bar> {
    let mut bars = ratios(results);
    bars.extend(values(results));
    bars
}

fn data(contestant: &'static str, what: &'static str, path: PodPath, rules: &'static str) -> Key {
    Key::new("data", contestant, what).when("path", path.name()).when("rules", rules)
}

/// A wanted ratio: text, measurement, reference, statistic, bar.
type Wanted = (&'static str, Key, Key, Statistic, f64);

fn ratios(results: &Results) -> Vec<Bar> {
    let (slower, faster) = wanted_of_packets();
    let lower =
        wanted_of_calls().into_iter().chain(wanted_of_loads()).chain(slower).map(|wanted| (wanted, true));
    let rate = |text, what, bar| {
        (text, pods("polder", what, 0, 50), pods("bridge", what, 0, 50), Statistic::Median, bar)
    };
    let higher = [
        rate("ADDs per second, 50 at once: polder / bridge", "add_rate", 6.0),
        rate("DELs per second, 50 at once: polder / bridge", "del_rate", 3.0),
    ];
    let all = lower.chain(higher.into_iter().chain(faster).map(|wanted| (wanted, false)));
    all.filter_map(|((text, of, to, statistic, bar), lower)| {
        let measured = results.ratio(&of, &to, statistic)?;
        Some(Bar { text: text.to_owned(), measured, unit: "x", bar, lower })
    })
    .collect()
}

fn wanted_of_calls() -> Vec<Wanted> {
    use Statistic::{Median, P99};
    let to = |text, what, at_once, to, statistic, bar| {
        (text, pods("polder", what, 0, at_once), pods(to, what, 0, at_once), statistic, bar)
    };
    let with_ports =
        |text, what| (text, pods("polder-ports", what, 0, 1), pods("polder", what, 0, 1), Median, 1.2);
    vec![
        to("ADD, median: polder / bridge", "add", 1, "bridge", Median, 1.0 / 7.0),
        to("ADD, p99: polder / bridge", "add", 1, "bridge", P99, 1.0 / 8.0),
        to("ADD, median: polder / floor", "add", 1, "floor", Median, 1.4),
        to("DEL, median: polder / bridge", "del", 1, "bridge", Median, 1.0 / 15.0),
        to("DEL, p99: polder / bridge", "del", 1, "bridge", P99, 1.0 / 10.0),
        to("DEL, median: polder / floor", "del", 1, "floor", Median, 1.8),
        to("ADD, p99, 50 at once: polder / bridge", "add", 50, "bridge", P99, 1.0 / 8.0),
        to("DEL, p99, 50 at once: polder / bridge", "del", 50, "bridge", P99, 1.0 / 4.0),
        with_ports("ADD, median: ten host ports / none", "add"),
        with_ports("DEL, median: ten host ports / none", "del"),
    ]
}

/// Bars of the data path: those where lower is better, and the others.
fn wanted_of_packets() -> (Vec<Wanted>, Vec<Wanted>) {
    use PodPath::{Direct, SameNode, Vxlan};
    let to = |text, what, path, rules, to, bar| {
        (text, data("polder", what, path, rules), data(to, what, path, rules), Statistic::Median, bar)
    };
    let (none, kube_proxy) = ("none", "kube-proxy");
    let lower = vec![
        to(
            "round trip, same node, kube-proxy: polder / bridge",
            "round_trip",
            SameNode,
            kube_proxy,
            "bridge",
            0.75,
        ),
        to("round trip, same node: polder / bridge", "round_trip", SameNode, none, "bridge", 0.95),
        to("round trip, direct: polder / node", "round_trip", Direct, none, "node", 1.4),
        to("round trip, direct: polder / bridge", "round_trip", Direct, none, "bridge", 0.9),
        to("round trip, VXLAN, kube-proxy: polder / bridge", "round_trip", Vxlan, kube_proxy, "bridge", 0.65),
        to("round trip, VXLAN: polder / bridge", "round_trip", Vxlan, none, "bridge", 0.8),
    ];
    let higher = vec![
        to("TCP, same node, kube-proxy: polder / bridge", "tcp_1", SameNode, kube_proxy, "bridge", 1.25),
        to(
            "datagrams, same node, kube-proxy: polder / bridge",
            "datagrams",
            SameNode,
            kube_proxy,
            "bridge",
            1.3,
        ),
        to("TCP, same node: polder / bridge", "tcp_1", SameNode, none, "bridge", 1.05),
        to("TCP, direct: polder / node", "tcp_1", Direct, none, "node", 0.78),
        to("TCP in packets of wire size, direct: polder / node", "tcp_wire", Direct, none, "node", 0.95),
        to("TCP, direct: polder / bridge", "tcp_1", Direct, none, "bridge", 1.05),
        to("TCP, VXLAN, kube-proxy: polder / bridge", "tcp_1", Vxlan, kube_proxy, "bridge", 1.25),
        to("TCP, VXLAN: polder / bridge", "tcp_1", Vxlan, none, "bridge", 1.0),
    ];
    (lower, higher)
}

fn wanted_of_loads() -> Vec<Wanted> {
    use Statistic::Median;
    vec![
        (
            "processor time of a life: polder / bridge",
            node("polder", "life_cpu", 0),
            node("bridge", "life_cpu", 0),
            Median,
            1.0 / 5.0,
        ),
        (
            "processor time of a life: 500 pods / none",
            node("polder", "life_cpu", 500),
            node("polder", "life_cpu", 0),
            Median,
            1.25,
        ),
        (
            "processor time of a life: 5000 peers / 10",
            peers("life_cpu", 5000),
            peers("life_cpu", 10),
            Median,
            1.25,
        ),
        (
            "ADD, median: 500 pods / none",
            pods("polder", "add", 500, 1),
            pods("polder", "add", 0, 1),
            Median,
            1.6,
        ),
        (
            "ADD, median, routed: 500 pods / none",
            pods("polder-routed", "add", 500, 1),
            pods("polder-routed", "add", 0, 1),
            Median,
            1.4,
        ),
        (
            "ADD, median, 500 pods: polder / bridge",
            pods("polder", "add", 500, 1),
            pods("bridge", "add", 500, 1),
            Median,
            1.0 / 8.0,
        ),
    ]
}

fn values(results: &Results) -> Vec<Bar> {
    let bars = [
        ("processor time, 1000 foreign interfaces in a minute", node("polder", "foreign_cpu", 100), 2.0),
        ("idle with 100 pods: processor time", node("polder", "idle_cpu", 100), 0.1),
        ("idle with 100 pods: writes to etcd", node("polder", "idle_writes", 100), 0.0),
        ("idle with 100 pods: memory", node("polder", "memory", 100), 12.0),
        ("5000 peers: cold start", peers("cold_start", 5000), 0.5),
        ("5000 peers: change at 100/s, longest", peers("change_longest", 5000), 0.3),
        ("5000 peers: memory, highest", peers("memory_highest", 5000), 30.0),
        ("16000 peers: cold start", peers("cold_start", 16_000), 2.0),
        ("16000 peers: change at 100/s, longest", peers("change_longest", 16_000), 1.0),
        ("16000 peers: memory, highest", peers("memory_highest", 16_000), 70.0),
    ];
    let bar = |(text, key, bar): (&str, Key, f64)| {
        let series = results.get(&key)?;
        let all: Vec<f64> = series.rounds.values().flatten().copied().collect();
        let measured = Spread::of(&all)?;
        Some(Bar { text: text.to_owned(), measured, unit: series.unit, bar, lower: true })
    };
    bars.into_iter().filter_map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bars_with_results_are_shown() {
        let mut results = Results::default();
        results.add(peers("cold_start", 5000), "s", 0, [0.25]);
        results.add(pods("polder", "add_rate", 0, 50), "calls/s", 0, [600.0]);
        results.add(pods("bridge", "add_rate", 0, 50), "calls/s", 0, [100.0]);
        let bars = all(&results);
        let shown: Vec<_> =
            bars.iter().map(|bar| (bar.text.as_str(), bar.measured.median, bar.wanted())).collect();
        assert_eq!(
            shown,
            [
                ("ADDs per second, 50 at once: polder / bridge", 6.0, ">= 6.00".to_owned()),
                ("5000 peers: cold start", 0.25, "<= 0.500".to_owned()),
            ]
        );
        assert_eq!(bars[1].to_json()["lower_is_better"], true);
    }
}
