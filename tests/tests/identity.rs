//! Identity of a node: the evidence of machine id, boot id and ledger, also where they contradict each other.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;

use polder_tests::agent::Worker;
use polder_tests::{Lab, Topology, wait};
use serde_json::Value;

/// The shortest cool-down that is permitted, 10 s, for tests that wait until it ends.
const SHORT_COOL_DOWN: &str = "[ipam]\ncooldown_seconds = 10";

/// The boot id that containers of one host share.
const HOST_BOOT: &str = "0b007000-0000-4000-8000-000000000001\n";

/// A lab whose agents are not started.
fn lab(nodes: usize) -> Lab {
    let lab = Lab::build(Topology { pools: vec!["10.244.0.0/24"], ..Topology::one_segment(nodes) });
    for worker in &lab.workers {
        worker.configure(&format!("{}{SHORT_COOL_DOWN}\n", worker.configuration()));
    }
    lab
}

fn share_kernel(worker: &Worker) {
    worker.node.write("/run/boot-id", HOST_BOOT);
}

/// Gives a node the name of another.
fn rename(worker: &Worker, name: &str) {
    let own = format!("node = {:?}", worker.name());
    worker.configure(&worker.configuration().replace(&own, &format!("node = {name:?}")));
}

fn set_machine_id(worker: &Worker, digit: char) {
    worker.node.write("/etc/machine-id", &format!("{}\n", digit.to_string().repeat(32)));
}

/// Copies the ledger of a node whose agent does not run.
fn copy_ledger(from: &Worker, to: &Worker) {
    to.node.shell("mkdir -p /var/lib/polder; rm -f /var/lib/polder/ledger.db*");
    for file in ["ledger.db", "ledger.db-wal"] {
        let path = Path::new("/var/lib/polder").join(file);
        if from.node.path_on_host(&path).exists() {
            std::fs::copy(from.node.path_on_host(&path), to.node.path_on_host(&path)).unwrap();
        }
    }
}

fn pod_interfaces(worker: &Worker) -> usize {
    worker.node.run("ip", &["-o", "link"]).matches(": pld").count()
}

/// Waits until the node is not ready with a reason that contains `expected`. A runtime must get the same reason.
/// Returns the reasons.
fn reason(worker: &Worker, expected: &str) -> String {
    let message = worker.wait_for_status(&format!("a reason with {expected:?}"), |status| {
        let reasons = status["reasons"].to_string();
        (status["ready"] == false && reasons.contains(expected)).then_some(reasons)
    });
    let error = worker.try_pod("refused", &Worker::netconf("1.1.0")).unwrap_err();
    worker.node.run("ip", &["netns", "delete", "refused"]);
    assert!(error["msg"].as_str().unwrap().contains(expected), "{error} does not say {expected:?}");
    message
}

/// The field `pods` of each fence of that node name: whether its pods are known to be gone.
fn fences(lab: &Lab, name: &str) -> Vec<String> {
    let pods = |key: &String| {
        let record: Value =
            serde_json::from_str(lab.etcd.ctl(&["get", "--print-value-only", key]).trim()).unwrap();
        record["pods"].as_str().unwrap().to_owned()
    };
    lab.etcd.keys(&format!("/polder/v1/fences/{name}/")).iter().map(pods).collect()
}

fn machine_of(lab: &Lab, name: &str) -> String {
    let key = format!("/polder/v1/nodes/{name}");
    let record: Value =
        serde_json::from_str(lab.etcd.ctl(&["get", "--print-value-only", &key]).trim()).unwrap();
    record["machine_id"].as_str().unwrap().to_owned()
}

fn block_of(worker: &Worker) -> Value {
    worker.status()["blocks"][0]["block"].clone()
}

#[test]
fn a_shared_boot_id_is_no_proof_that_the_removed_machine_is_gone() {
    let mut lab = lab(3);
    lab.workers.iter().for_each(share_kernel);
    rename(&lab.workers[2], "n2");
    lab.workers[0].start_and_wait();
    lab.workers[1].start_and_wait();
    let pod = lab.workers[1].pod("a");
    let block = block_of(&lab.workers[1]);
    lab.workers[1].kill();
    lab.workers[2].start();
    let message = reason(&lab.workers[2], "is registered as another machine");
    assert!(message.contains("polderctl node remove n2 --dead"), "{message}");

    // Its lease may still be valid.
    lab.workers[0].remove_node("n2", 1);
    lab.workers[2].wait_until_ready();
    assert_eq!(fences(&lab, "n2"), ["unknown"], "nobody has confirmed, for the first machine is away");
    assert_ne!(block_of(&lab.workers[2]), block, "its block rests");
    assert_eq!(pod_interfaces(&lab.workers[1]), 1);
    let own = lab.workers[2].pod("b");
    assert_ne!(own.addresses(), pod.addresses());

    // `--dead` for the first machine must not affect the second.
    wait::until_true("the lease of the second", || !lab.etcd.keys("/polder/v1/alive/n2").is_empty());
    let nodes = lab.workers[0].ctl(&["node", "list"]).to_string();
    assert!(nodes.contains("polderctl node remove n2 --dead --earlier"), "{nodes}");
    let error = lab.workers[0].try_ctl(&["node", "remove", "n2", "--dead"]).unwrap_err();
    assert!(error.contains("is alive") && error.contains("add --earlier"), "{error}");

    // The first machine comes back: it disconnects its pods, confirms, and does not affect the second.
    lab.workers[1].start();
    let message = reason(&lab.workers[1], "was removed from the cluster");
    assert!(
        message.contains("The name n2 now belongs to another machine")
            && message.contains("do not change that machine"),
        "{message}"
    );
    assert!(!message.contains("node remove"), "{message}");
    assert_eq!(pod_interfaces(&lab.workers[1]), 0);
    wait::until_true("the first to confirm", || fences(&lab, "n2") == ["confirmed"]);
    assert_eq!(lab.workers[2].status()["ready"], true);
    assert_eq!(pod_interfaces(&lab.workers[2]), 1);
}

#[test]
fn an_operator_can_confirm_a_dead_machine_although_another_has_its_name() {
    let mut lab = lab(3);
    lab.workers.iter().for_each(share_kernel);
    rename(&lab.workers[2], "n2");
    lab.workers[0].start_and_wait();
    lab.workers[1].start_and_wait();
    lab.workers[1].kill();
    lab.workers[1].node.halt();
    lab.workers[0].ctl(&["node", "remove", "n2"]);
    lab.workers[2].start_and_wait();
    lab.workers[0].ctl(&["node", "remove", "n2", "--dead", "--earlier"]);
    assert_eq!(fences(&lab, "n2"), ["vouched"]);
    wait::until_true("one block of n2 to be left", || {
        let blocks = lab.workers[0].ctl(&["block", "list"]).to_string();
        blocks.matches("\"n2\"").count() == 1
    });
    assert_eq!(lab.workers[2].status()["ready"], true);
}

#[test]
fn a_restarted_container_with_another_machine_id_stays_the_node_of_its_ledger() {
    let mut lab = lab(2);
    lab.workers.iter().for_each(share_kernel);
    lab.start_agents();
    let block = block_of(&lab.workers[1]);
    lab.reboot(1);
    share_kernel(&lab.workers[1]);
    set_machine_id(&lab.workers[1], 'e');
    lab.workers[1].start_and_wait();
    assert_eq!(block_of(&lab.workers[1]), block);
    assert_eq!(machine_of(&lab, "n2"), "e".repeat(32));
    lab.workers[1].pod("a");
}

#[test]
fn a_copied_ledger_takes_over_a_node_only_with_an_operators_confirmation() {
    let mut lab = lab(2);
    lab.workers[0].start_and_wait();
    let _pod = lab.workers[0].pod("a");
    let block = block_of(&lab.workers[0]);
    lab.workers[0].kill();
    rename(&lab.workers[1], "n1");
    copy_ledger(&lab.workers[0], &lab.workers[1]);
    lab.workers[1].start();
    let message = reason(&lab.workers[1], "machine id and boot id both differ");
    for expected in ["polderctl node adopt n1", "identity = \\\"ledger\\\"", "--node"] {
        assert!(message.contains(expected), "{message} does not say {expected}");
    }
    let original = lab.workers[0].node.read("/etc/machine-id").unwrap();
    assert_eq!(machine_of(&lab, "n1"), original.trim());

    let error = lab.workers[1].try_ctl(&["node", "adopt", "n7"]).unwrap_err();
    assert!(error.contains("configured as node n1, not n7"), "{error}");
    let message = lab.workers[1].ctl(&["node", "adopt", "n1"]).to_string();
    assert!(message.contains(original.trim()), "{message}");
    lab.workers[1].wait_until_ready();
    assert_eq!(block_of(&lab.workers[1]), block);
    assert_eq!(lab.workers[1].ctl(&["node", "adopt", "n1"]), "this machine is already node n1");

    // The original machine starts again. It is no longer the node.
    lab.workers[0].start();
    let message = reason(&lab.workers[0], "node n1 is alive as another machine");
    assert!(message.contains("has replaced this one"), "{message}");
    let copy = lab.workers[1].node.read("/etc/machine-id").unwrap();
    assert_eq!(machine_of(&lab, "n1"), copy.trim());
}

#[test]
fn a_copy_of_a_removed_nodes_ledger_does_not_confirm_the_removal() {
    let mut lab = lab(3);
    lab.workers[0].start_and_wait();
    lab.workers[1].start_and_wait();
    let _pod = lab.workers[1].pod("a");
    lab.workers[1].kill();
    rename(&lab.workers[2], "n2");
    copy_ledger(&lab.workers[1], &lab.workers[2]);
    lab.workers[2].start();
    reason(&lab.workers[2], "machine id and boot id both differ");
    lab.workers[0].ctl(&["node", "remove", "n2"]);
    reason(&lab.workers[2], "cannot confirm that the pods of the removed machine");
    assert_eq!(fences(&lab, "n2"), ["unknown"]);
    lab.workers[1].start();
    wait::until_true("the original to confirm", || fences(&lab, "n2") == ["confirmed"]);
    assert_eq!(pod_interfaces(&lab.workers[1]), 0);
}

#[test]
fn with_ledger_identity_a_node_keeps_its_identity_when_both_ids_change() {
    let mut lab = lab(2);
    lab.workers[1].configure_also("identity = \"ledger\"");
    lab.start_agents();
    let block = block_of(&lab.workers[1]);
    lab.reboot(1);
    set_machine_id(&lab.workers[1], 'f');
    lab.workers[1].start_and_wait();
    assert_eq!(block_of(&lab.workers[1]), block);
    assert_eq!(machine_of(&lab, "n2"), "f".repeat(32));
}

#[test]
fn a_reinstalled_machine_reports_how_it_can_join() {
    let mut lab = lab(2);
    lab.start_agents();
    lab.reboot(1);
    lab.workers[1].node.shell("rm -r /var/lib/polder");
    set_machine_id(&lab.workers[1], 'a');
    lab.workers[1].start();
    let message = reason(&lab.workers[1], "node n2 is registered as another machine");
    for expected in
        ["has no ledger of node n2", "polderctl node remove n2 --dead", "or on this machine", "--node"]
    {
        assert!(message.contains(expected), "{message} does not say {expected}");
    }
    let error = lab.workers[1].try_ctl(&["node", "adopt", "n2"]).unwrap_err();
    assert!(error.contains("no ledger of the registered node n2"), "{error}");
    // Follows the instruction. The old machine counts as alive until its lease has expired.
    wait::until("the node to be removed", || lab.workers[1].try_ctl(&["node", "remove", "n2", "--dead"]));
    lab.workers[1].wait_until_ready();
    lab.workers[1].pod("a");
}

#[test]
fn an_uninitialized_machine_id_is_refused() {
    let mut lab = lab(1);
    lab.workers[0].node.write("/etc/machine-id", "uninitialized\n");
    lab.workers[0].start();
    let (code, log) = lab.workers[0].wait_until_ended();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("uninitialized") && log.contains("systemd-machine-id-setup"), "{log}");
}
