//! What a pod costs the agent of its node: the same on an empty node and on a full one. Counts work, not time.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use polder_tests::agent::Worker;
use polder_tests::{Lab, Topology, wait};

/// Pods that are added and deleted while the agent's work is counted.
const MEASURED: u32 = 5;

/// The work of the agent for [`MEASURED`] pods.
#[derive(Debug)]
struct Work {
    system_calls: usize,
    /// Bytes that it received, most of them from the kernel's netlink sockets.
    received: u64,
    /// Passes over the complete state.
    passes: u64,
}

/// Counts the work of the agent for pods that are added and deleted one by one.
fn work(worker: &Worker, trace: &Path) -> Work {
    let passes = || worker.status()["last_pass"]["count"].as_u64().expect("a number of passes");
    let agent = worker.agent_id().to_string();
    let before = passes();
    let mut strace = Command::new("strace")
        .args(["--follow-forks", "--attach", &agent, "--output"])
        .arg(trace)
        .stderr(Stdio::null())
        .spawn()
        .expect("strace is installed");
    wait::until_true("strace to trace every thread", || {
        let threads = fs::read_dir(format!("/proc/{agent}/task")).expect("the agent runs");
        threads.flatten().all(|thread| {
            let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            status.contains(&format!("TracerPid:\t{}\n", strace.id()))
        })
    });
    for number in 0..MEASURED {
        let pod = worker.pod(&format!("measured{number}"));
        worker.delete(&pod);
    }
    let id = Pid::from_raw(strace.id().try_into().expect("a process id"));
    kill(id, Signal::SIGINT).expect("strace runs");
    strace.wait().expect("strace ends");
    let trace = fs::read_to_string(trace).expect("the calls");
    let received = trace.lines().filter(|line| line.contains("recv"));
    let length = |line: &str| line.rsplit_once(" = ")?.1.parse::<u64>().ok();
    Work {
        system_calls: trace.lines().count(),
        received: received.filter_map(length).sum(),
        passes: passes() - before,
    }
}

#[test]
fn a_pod_costs_the_agent_no_more_work_on_a_node_with_300_pods() {
    let mut lab = Lab::build(Topology::one_segment(1));
    // No periodic work while the calls are counted.
    lab.workers[0].configure_also("resync_seconds = 3600\nprobe_peers = false\nipam.grace_seconds = 3600");
    lab.start_agents();
    let worker = &lab.workers[0];
    let folder = tempfile::tempdir().expect("a folder");
    let add =
        |numbers: std::ops::Range<u32>| numbers.for_each(|number| drop(worker.pod(&format!("p{number}"))));
    add(0..10);
    let trace = folder.path().join("trace");
    // A block that is claimed meanwhile causes a pass, and the host is checked every 30 s: the least of several counts
    // has neither.
    let least = || {
        let counts = (0..5).map(|_| work(worker, &trace));
        counts.min_by_key(|work| (work.passes, work.received)).expect("five counts")
    };
    let few = least();
    add(10..300);
    let many = least();
    assert_eq!(many.passes, 0, "{few:?}, {many:?}");
    assert!(many.received < 2 * few.received, "{few:?}, {many:?}");
    assert!(2 * many.system_calls < 3 * few.system_calls, "{few:?}, {many:?}");
}
