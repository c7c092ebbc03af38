//! The machine and the versions, for the header of the results.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value};

use crate::agent::dist;

/// Names and values, in the order in which they are shown.
pub fn describe() -> Vec<(&'static str, String)> {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = file("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = file("/proc/meminfo");
    let memory = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default();
    let memory: u64 = memory.parse().unwrap_or_default();
    vec![
        ("date", run("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        ("commit", commit()),
        ("command", std::env::args().skip(1).collect::<Vec<_>>().join(" ")),
        ("kernel", file("/proc/sys/kernel/osrelease")),
        ("processor", format!("{processors} x {}", model.trim_start_matches([' ', '\t', ':']))),
        ("memory", format!("{} MiB", memory / 1024)),
        ("load", file("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ")),
        ("preemption", preemption()),
        ("nf_conntrack_buckets", file("/proc/sys/net/netfilter/nf_conntrack_buckets")),
        ("nf_conntrack_max", file("/proc/sys/net/netfilter/nf_conntrack_max")),
        ("tcp_congestion_control", file("/proc/sys/net/ipv4/tcp_congestion_control")),
        ("polder", run(&dist().join("polder-agent").to_string_lossy(), &["--version"])),
        ("containernetworking-plugins", package("containernetworking-plugins")),
        ("etcd", package("etcd-server")),
        ("iperf3", package("iperf3")),
        ("iptables", run("iptables", &["--version"])),
    ]
}

/// The average number of processes that could run, in the last minute.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default()
}

/// The description for `--json`.
pub fn to_json(machine: &[(&'static str, String)]) -> Value {
    let pairs = machine.iter().map(|(name, value)| ((*name).to_owned(), value.as_str().into()));
    Value::Object(pairs.collect::<Map<_, _>>())
}

/// The first line of a program's output; empty if it fails.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

fn package(name: &str) -> String {
    run("dpkg-query", &["-W", "-f", "${Version}", name])
}

/// The commit of the checkout, and whether it has changes.
fn commit() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).to_string_lossy().into_owned();
    // The checkout belongs to the user who calls sudo.
    let trusted = format!("safe.directory={}", folder.trim_end_matches("/tests"));
    let git = |arguments: &[&str]| run("git", &[&["-c", &trusted, "-C", &folder], arguments].concat());
    let changed =
        if git(&["status", "--porcelain", "--untracked-files=no"]).is_empty() { "" } else { ", changed" };
    format!("{}{changed}", git(&["rev-parse", "--short", "HEAD"]))
}

/// The preemption model that the kernel was built with.
fn preemption() -> String {
    let version = fs::read_to_string("/proc/sys/kernel/version").unwrap_or_default();
    let model = version.split_whitespace().find(|word| word.starts_with("PREEMPT"));
    model.unwrap_or("none").to_owned()
}
