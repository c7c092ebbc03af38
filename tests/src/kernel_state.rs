//! The state of a node's kernel, as reported by other programs than Polder's.

use crate::agent::Worker;

/// The kernel release: its first two numbers.
pub fn release() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers =
        release.split(|other: char| !other.is_ascii_digit()).map_while(|part| part.parse().ok());
    numbers.next().zip(numbers.next()).expect("two numbers")
}

/// Polder's complete state in a node's kernel, without counters, ages and values that depend on when a device was
/// created, and without the interface of the probe endpoint, which ends with its agent.
pub fn kernel_state(worker: &Worker) -> Vec<String> {
    let state = worker.node.shell(
        "{ ip -o -d link show; ip -o address; ip route show table all; ip -6 route show table all; \
         ip neigh show nud permanent; bridge fdb; bridge -o -d link; nft --stateless list ruleset; \
         sysctl -a 2>/dev/null | grep -E 'forwarding|_redirects|rp_filter|bridge-nf-call-ip'; } | \
         grep -vE 'polder[./]probe|pldprobe' | tr '\\\\' '\\n' | \
         sed -E 's/ (port_id|port_no|designated_port) [^ ]+//g'",
    );
    let mut lines: Vec<String> = state.lines().map(lasting).collect();
    lines.sort();
    lines
}

/// The line without timers and without the index of a device. The carrier of a bridge changes shortly after its first
/// port was added or its last port was removed.
fn lasting(line: &str) -> String {
    let line = line.find("_timer").map_or(line, |at| &line[..at]);
    let name = line.split_once(": ").filter(|(number, _)| number.bytes().all(|byte| byte.is_ascii_digit()));
    name.map_or(line, |(_, rest)| rest).replace(" linkdown", "")
}

/// The differences from the earlier state, as text.
pub fn difference(worker: &Worker, before: &[String]) -> Option<String> {
    let now = kernel_state(worker);
    let gone: Vec<_> = before.iter().filter(|line| !now.contains(line)).collect();
    let new: Vec<_> = now.iter().filter(|line| !before.contains(line)).collect();
    let is_same = gone.is_empty() && new.is_empty();
    (!is_same).then(|| format!("the kernel of {} lost {gone:#?} and got {new:#?}", worker.name()))
}

/// Fails if the state has changed.
#[track_caller]
pub fn assert_unchanged(worker: &Worker, before: &[String]) {
    if let Some(difference) = difference(worker, before) {
        panic!("{difference}");
    }
}
