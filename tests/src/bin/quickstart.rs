//! Three nodes, a real etcd, and two pods on each node: shows that the pod network is flat.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use ipnetwork::IpNetwork;
use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::{Pair, listen, pairs};
use polder_tests::{Lab, Pod, Topology};
use serde_json::Value;

/// Builds a pod network of three nodes on this machine, and shows that every pod reaches every other without NAT
#[derive(Debug, Parser)]
struct Arguments {
    /// The families of nodes and pods
    #[arg(long, value_enum, default_value = "ipv4")]
    families: Choice,
    /// Keep it running, and print how to enter a pod
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Choice {
    Ipv4,
    Ipv6,
    Both,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let families = match arguments.families {
        Choice::Ipv4 => Families::V4,
        Choice::Ipv6 => Families::V6,
        Choice::Both => Families::DUAL,
    };
    println!("Three nodes made of network namespaces: n1 and n2 share a segment, n3 is behind a router.\n");
    let mut lab = Lab::build(Topology::two_segments().families(families));
    lab.keep_failed = arguments.keep;
    println!("  etcd      serves at {}", lab.etcd.endpoints().join(", "));
    start(&mut lab);
    let pods = attach(&lab);
    let mtu = lab.workers[0].status()["mtu"].as_u64().context("the node's MTU")?;

    println!("\nEvery pod to every other: ping, UDP and TCP, up to the largest packet ({mtu} bytes):\n");
    let pairs = pairs(&pods, families);
    let problems = prove(&lab, &pods, &pairs, usize::try_from(mtu)?)?;
    println!("\nThe routes of n1, in words:\n");
    explain_routes(&lab.workers[0])?;

    let count = pairs.len();
    let works = problems.is_empty();
    if works {
        println!("\nAll {count} pairs reach each other, and each sees the other's own address.");
    } else {
        problems.iter().for_each(|problem| println!("\n{problem}"));
        println!("\n{} of {count} pairs do not reach each other at their own addresses.", problems.len());
    }
    if arguments.keep {
        println!("\nIt goes on. A pod is entered with:\n");
        pods.iter().for_each(|pod| println!("  {:8} {}", pod.name(), pod.how_to_enter()));
        println!("\nand a node with:\n\n{}", lab.how_to_enter());
        println!(
            "`sudo scripts/quickstart --shell n1` opens a shell on a node, `sudo scripts/quickstart --down` ends all."
        );
        lab.keep();
    }
    Ok(if works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts the agents, and prints the state of each node.
fn start(lab: &mut Lab) {
    lab.start_agents();
    for worker in &lab.workers {
        let status = worker.status();
        let list = |field: &str, part: &str| {
            let items = status[field].as_array().into_iter().flatten();
            items.filter_map(|item| item[part].as_str()).collect::<Vec<_>>().join(", ")
        };
        println!(
            "  {:9} is at {}, and has {}",
            worker.name(),
            list("underlay", "address"),
            list("blocks", "block")
        );
    }
    let status = lab.workers[0].status();
    for lack in status["missing_features"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        println!("  This kernel lacks something: {lack}");
    }
}

/// Attaches two pods on each node, by running the plugin as a runtime does.
fn attach(lab: &Lab) -> Vec<Pod> {
    let mut pods = Vec::new();
    for worker in &lab.workers {
        for letter in ["a", "b"] {
            let name = format!("{}-{letter}", worker.name());
            let start = Instant::now();
            let pod = worker.pod(&name);
            let took = start.elapsed().as_millis();
            let addresses: Vec<_> = pod.addresses().iter().map(ToString::to_string).collect();
            println!("  {name:9} is a pod with {}, attached in {took} ms", addresses.join(" and "));
            pods.push(pod);
        }
    }
    pods
}

/// Checks every pair and prints the table. Returns the problems.
fn prove(lab: &Lab, pods: &[Pod], pairs: &[Pair<'_>], mtu: usize) -> anyhow::Result<Vec<String>> {
    let servers = listen(pods);
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(["FROM", "TO", "PATH", "ROUND TRIP", "SOURCE AT RECEIVER", ""]);
    let mut problems = Vec::new();
    for pair in pairs {
        let (round_trip, seen, verdict) = match pair.check(mtu) {
            Ok(seen) => {
                let sources: Vec<_> = seen.sources.iter().map(ToString::to_string).collect();
                (seen.round_trip, sources.join(", "), "unchanged")
            }
            Err(problem) => {
                problems.push(problem);
                ("-".to_owned(), "-".to_owned(), "FAILED, see below")
            }
        };
        let end = |pod: &Pod, address: IpAddr| format!("{} {address}", pod.name());
        let (from, to) = (end(pair.from, pair.from_address), end(pair.to, pair.to_address));
        table.add_row([from, to, path(lab, pair)?, round_trip, seen, verdict.to_owned()]);
    }
    drop(servers);
    print_table(table);
    Ok(problems)
}

/// The path of a packet of the pair, from the sender's kernel.
fn path(lab: &Lab, pair: &Pair<'_>) -> anyhow::Result<String> {
    let worker = lab.workers.iter().find(|worker| worker.name() == pair.from.node()).context("the node")?;
    let route = worker.node.run("ip", &["-j", "route", "get", &pair.to_address.to_string()]);
    let route: Value = serde_json::from_str(&route)?;
    let device = route[0]["dev"].as_str().context("a device")?;
    Ok(match device {
        "polder0" => "same node",
        "polder.vx" | "polder.vx6" => "vxlan",
        _ => "direct",
    }
    .to_owned())
}

/// Prints an explanation of this node's routes.
fn explain_routes(worker: &Worker) -> anyhow::Result<()> {
    let mut owners: BTreeMap<IpNetwork, (String, Vec<Value>)> = BTreeMap::new();
    for node in worker.ctl(&["node", "list"]).as_array().into_iter().flatten() {
        let name = node["name"].as_str().context("a node's name")?;
        for block in node["blocks"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            owners.insert(
                block.parse()?,
                (name.to_owned(), node["paths"].as_array().cloned().unwrap_or_default()),
            );
        }
    }
    let mut table = Table::new();
    table.load_style(NOTHING);
    for family in ["-4", "-6"] {
        let routes = worker.node.run("ip", &[family, "-j", "route", "show", "proto", "84"]);
        let routes: Vec<Value> = serde_json::from_str(&routes)?;
        for route in routes {
            let destination = route["dst"].as_str().context("a destination")?;
            table.add_row([destination.to_owned(), meaning(&route, owners.get(&destination.parse()?))]);
        }
    }
    ensure!(!table.is_empty(), "the node has no routes");
    print_table(table);
    Ok(())
}

fn meaning(route: &Value, owner: Option<&(String, Vec<Value>)>) -> String {
    let field = |name: &str| route[name].as_str().unwrap_or("?");
    let Some((owner, paths)) = owner else {
        return "is the whole pod network: addresses that no node owns are unreachable, and their packets do not \
                leave the node".to_owned();
    };
    match field("dev") {
        "polder0" => "are the pods of this node: on its bridge polder0".to_owned(),
        tunnel @ ("polder.vx" | "polder.vx6") => {
            let remote =
                paths.iter().filter(|path| path["path"] == "vxlan").find_map(|path| path["via"].as_str());
            format!("are the pods of {owner}: through the tunnel {tunnel} to {}", remote.unwrap_or("?"))
        }
        uplink => format!("are the pods of {owner}: directly to {} on {uplink}", field("gateway")),
    }
}

fn print_table(mut table: Table) {
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 2));
    });
    table.trim_fmt().lines().for_each(|line| println!("  {line}"));
}
