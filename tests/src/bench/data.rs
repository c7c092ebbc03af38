//! Part `data`: throughput, round trip and packets per second between pods.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::contestant::rest;
use super::progress::Progress;
use super::results::{Key, Results};
use super::rounds::order;
use super::services;
use super::setups::{PodPath, Setup};
use super::traffic::{self, Endpoint, Packets};

/// Name of this part.
pub const PART: &str = "data";

/// Extent of the measurement.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Number of rounds without and with kube-proxy's rules.
    pub rounds: u32,
    /// Numbers of TCP connections at once.
    pub streams: &'static [u32],
    /// Duration of one TCP measurement, in seconds.
    pub seconds: u32,
    /// Duration of the other measurements.
    pub short: Duration,
    /// Whether routed pods are also measured through VXLAN.
    pub routed_vxlan: bool,
    /// The rules with which TCP is also measured in packets of wire size.
    pub wire_size: &'static [&'static str],
}

impl Extent {
    /// The whole measurement: about 12 minutes.
    pub const FULL: Self = Self {
        rounds: 6,
        streams: &[1, 4],
        seconds: 2,
        short: Duration::from_secs(1),
        routed_vxlan: true,
        wire_size: &RULES,
    };
    /// About one and a half minutes.
    pub const QUICK: Self = Self {
        rounds: 2,
        streams: &[1],
        seconds: 1,
        short: Duration::from_millis(300),
        routed_vxlan: false,
        wire_size: &[RULES[0]],
    };
}

/// Time after the change of rules in which agents react.
const REACTION: Duration = Duration::from_secs(2);

/// The conditions of measurements without and with kube-proxy's rules.
const RULES: [&str; 2] = ["none", "kube-proxy"];

/// One measured pair.
struct Pair<'a> {
    contestant: &'static str,
    path: PodPath,
    from: &'a Endpoint,
    to: &'a Endpoint,
    /// The nodes, if the packets leave the first one.
    hosts: Option<&'a [Endpoint; 2]>,
}

/// Runs the part.
pub fn run(
    extent: &Extent,
    folder: &Path,
    results: &mut Results,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let mut setups = Vec::new();
    progress.step("data: preparing nodes");
    for (contestant, attach, fastpath) in [
        ("polder", "bridge", "auto"),
        ("polder-routed", "routed", "auto"),
        ("polder-normal", "bridge", "off"),
    ] {
        setups.push(Setup::polder(contestant, attach, fastpath, PodPath::Direct)?);
        if attach == "bridge" || extent.routed_vxlan {
            setups.push(Setup::polder(contestant, attach, fastpath, PodPath::Vxlan)?);
        }
    }
    for path in [PodPath::Direct, PodPath::Vxlan] {
        setups.push(Setup::bridge(folder, path)?);
    }
    let reference = setups.last().context("a set-up")?;
    let lo = Endpoint { address: Ipv4Addr::LOCALHOST.into(), ..reference.hosts[0].clone() };
    let pairs = pairs(&setups, &lo, reference);
    for rules in RULES {
        for setup in &setups {
            for node in setup.nodes() {
                match rules {
                    "none" if !setup.has_agent() => services::calls(node, false),
                    "none" => {}
                    _ => services::load(node),
                }
            }
        }
        rest(REACTION);
        for round in 0..extent.rounds {
            for at in order(pairs.len(), round) {
                let pair = &pairs[at];
                let path = pair.path.name();
                progress.step(&format!(
                    "data: rules {rules}, round {} of {}: {path}, {}",
                    round + 1,
                    extent.rounds,
                    pair.contestant
                ));
                measure(extent, pair, rules, round, results)
                    .with_context(|| format!("{} ({path}, rules {rules})", pair.contestant))?;
            }
        }
    }
    progress.step("data: removing the nodes");
    Ok(())
}

fn pairs<'a>(setups: &'a [Setup], lo: &'a Endpoint, reference: &'a Setup) -> Vec<Pair<'a>> {
    let hosts = &reference.hosts;
    let mut pairs = vec![
        Pair { contestant: "loopback", path: PodPath::SameNode, from: lo, to: lo, hosts: None },
        Pair {
            contestant: "node",
            path: PodPath::Direct,
            from: &hosts[0],
            to: &hosts[1],
            hosts: Some(hosts),
        },
    ];
    for Setup { contestant, path, pods: [a, b, c], hosts, .. } in setups {
        // Pods of one node do not use the path to the other node.
        if *path == PodPath::Direct {
            pairs.push(Pair { contestant, path: PodPath::SameNode, from: a, to: b, hosts: None });
        }
        pairs.push(Pair { contestant, path: *path, from: a, to: c, hosts: Some(hosts) });
    }
    pairs
}

fn measure(
    extent: &Extent,
    pair: &Pair<'_>,
    rules: &'static str,
    round: u32,
    results: &mut Results,
) -> anyhow::Result<()> {
    let Pair { contestant, from, to, .. } = *pair;
    let mut add = |what: &'static str, unit: &'static str, value: f64| {
        let key =
            |path: PodPath| Key::new(PART, contestant, what).when("path", path.name()).when("rules", rules);
        results.add(key(pair.path), unit, round, [value]);
        if contestant == "node" {
            // The same packets are the reference for tunnels.
            results.add(key(PodPath::Vxlan), unit, round, [value]);
        }
    };
    for streams in extent.streams {
        let throughput = traffic::tcp(from, to, *streams, extent.seconds)?;
        let (what, cpu) = if *streams == 1 { ("tcp_1", "tcp_1_cpu") } else { ("tcp_4", "tcp_4_cpu") };
        add(what, "Gbit/s", throughput.gigabits);
        add(cpu, "s/GB", throughput.cpu);
    }
    if let Some(hosts) = pair.hosts
        && extent.wire_size.contains(&rules)
    {
        traffic::set_packets(hosts, Packets::WireSize)?;
        let throughput = traffic::tcp(from, to, 1, extent.seconds);
        traffic::set_packets(hosts, Packets::Whole)?;
        let throughput = throughput?;
        add("tcp_wire", "Gbit/s", throughput.gigabits);
        add("tcp_wire_cpu", "s/GB", throughput.cpu);
    }
    add("round_trip", "us", traffic::round_trip(from, to, extent.short)?);
    add("datagrams", "1000/s", traffic::datagrams(from, to, extent.short)?);
    Ok(())
}
