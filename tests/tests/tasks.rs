//! The tasks of `docs/tasks.md`, run from its text.
//!
//! The fenced blocks of a section are commands (`tasks/document.rs` reads them). A block `sh` runs as it is on a machine
//! of the lab, after the replacement of example names and addresses: `sudo` and `scp` are scripts of the test. The text
//! before the block must name the machine, like "On any node:". A block `text` is the output of the block before it;
//! `...` is any text. A test does the work of `kubectl`, `systemctl` and `yaml` blocks in another way (`in_another_way`):
//! CNI calls instead of deleted pods, a restarted etcd instead of a restarted service. Each block must be used, in the
//! order of the text; only those after "To go back" may come earlier.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod tasks {
    mod certificates;
    pub(crate) mod document;
    mod restore;
}

use std::net::IpAddr;

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, assert_flat_over};
use polder_tests::routes::wait_for_routes;
use polder_tests::traffic::without_packet_loss;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Node, Pod, Topology, wait};
use serde_json::{Value, json};
use tasks::document::Task;

/// The namespace of the lab's pods, and names of the text.
const NAMES: [(&str, &str); 5] =
    [("NAMESPACE", "lab"), ("etcd1", "etcd0"), ("node1", "n1"), ("node2", "n2"), ("node3", "n3")];

/// A lab with the shortest cool-down that the configuration accepts.
fn lab(topology: Topology) -> Lab {
    let mut lab = Lab::build(topology);
    lab.workers.iter().for_each(shorten_cool_down);
    lab.start_agents();
    lab
}

fn shorten_cool_down(worker: &Worker) {
    worker.configure(&format!("{}[ipam]\ncooldown_seconds = 10\n", worker.configuration()));
}

/// A pod on each node.
fn pods(lab: &Lab, name: &str) -> Vec<Pod> {
    lab.workers.iter().map(|worker| worker.pod(name)).collect()
}

fn has_prefix(pod: &Pod, prefix: &str) -> bool {
    pod.addresses().iter().any(|address| address.to_string().starts_with(prefix))
}

/// A pod for which `accept` returns true. Other pods are deleted: agents follow changes a moment later.
fn pod_like(worker: &Worker, name: &str, accept: impl Fn(&Pod) -> bool) -> Pod {
    wait::until("a pod with other addresses", || {
        let pod = worker.pod(name);
        if accept(&pod) {
            return Ok(pod);
        }
        worker.delete(&pod);
        Err(format!("{:?}", pod.addresses()))
    })
}

/// Deletes the pods, and creates as many under another name, like `kubectl rollout restart`.
fn recreate(lab: &Lab, pods: &[Pod], name: &str, accept: impl Fn(&Pod) -> bool) -> Vec<Pod> {
    let recreate = |(worker, pod): (&Worker, &Pod)| {
        worker.delete(pod);
        pod_like(worker, name, &accept)
    };
    lab.workers.iter().zip(pods).map(recreate).collect()
}

#[test]
fn the_pod_range_is_changed() {
    let lab = lab(Topology::one_segment(2));
    let task = Task::read("1. Change the pod range", &NAMES);
    let any: (&str, &Node) = ("any node", &lab.workers[0].node);
    let (old, kept) = (pods(&lab, "old"), pods(&lab, "kept"));
    let mut new = Vec::new();
    without_packet_loss(&kept, || {
        task.run(any, "pool add second");
        task.run(any, "pool drain ipv4");
        let other = pod_like(&lab.workers[1], "other", |pod| has_prefix(pod, "10.245."));
        // Back, and forth again.
        task.run(any, "pool add ipv4");
        let another = pod_like(&lab.workers[1], "another", |pod| has_prefix(pod, "10.244."));
        [other, another].iter().for_each(|pod| lab.workers[1].delete(pod));
        lab.workers[0].ctl(&["pool", "add", "second", "10.245.0.0/16"]);
        task.run(any, "pool drain ipv4");
        task.in_another_way("rollout restart");
        new = recreate(&lab, &old, "new", |pod| has_prefix(pod, "10.245."));
    });
    task.in_another_way("get pods --all-namespaces");
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&[kept.clone(), new.clone()].concat(), 1450);
    without_packet_loss(&new, || {
        recreate(&lab, &kept, "newer", |pod| has_prefix(pod, "10.245."));
        task.look(any, "pool list");
        task.run(any, "pool remove ipv4");
    });
    task.run(any, "ipam check");
    assert_flat(&new, 1450);
    task.finish();
}

#[test]
fn ipv6_is_added_and_removed() {
    for underlay in [Families::V4, Families::DUAL] {
        let lab = lab(Topology { underlay, ..Topology::one_segment(2) });
        let pod = format!("{}/POD", "NAMESPACE");
        let replacements = [&[(pod.as_str(), "lab/dual")], &NAMES[..]].concat();
        let task = Task::read("2. Add IPv6, and remove it", &replacements);
        let any: (&str, &Node) = ("any node", &lab.workers[0].node);
        let (old, kept) = (pods(&lab, "old"), pods(&lab, "kept"));
        let mut dual = Vec::new();
        without_packet_loss(&kept, || {
            task.run(any, "pool add ipv6");
            task.look(any, "node list");
            task.in_another_way("rollout restart");
            dual = recreate(&lab, &old, "dual", |pod| pod.addresses().len() == 2);
            task.run(("its node", &lab.workers[1].node), "ipam show pod");
        });
        wait_for_routes(&lab, TIMEOUT);
        assert_flat_over(Families::DUAL, &dual, 1450);
        let mut single = Vec::new();
        without_packet_loss(&kept, || {
            task.run(any, "pool drain ipv6");
            task.run_refused(any, "pool remove ipv6", "2 blocks are claimed");
            single = recreate(&lab, &dual, "single", |pod| pod.addresses().len() == 1);
            task.look(any, "pool remove ipv6");
        });
        assert_flat(&[kept, single].concat(), 1450);
        assert!(lab.workers[0].ctl_verdict(&["ipam", "check"]).0);
        task.finish();
    }
}

#[test]
fn pods_of_a_stateful_set_have_fixed_addresses() {
    let lab = lab(Topology::two_segments());
    let fixed = "10.246.0.1".parse::<IpAddr>().unwrap();
    let task = Task::read("3. Fixed addresses for a StatefulSet", &NAMES);
    let any: (&str, &Node) = ("any node", &lab.workers[2].node);
    let others = pods(&lab, "other");
    task.run(any, "pool add fixed");
    let set: Value = serde_saphyr::from_str(&task.in_another_way("kind: StatefulSet")).unwrap();
    let template = &set["spec"]["template"]["metadata"];
    let mut conf = Worker::netconf("1.1.0");
    conf["runtimeConfig"] = json!({ "io.kubernetes.cri.pod-annotations": template["annotations"] });
    task.in_another_way("rollout status");
    let pod = lab.workers[0].pod_within(TIMEOUT, "web-0", &conf);
    assert_eq!(pod.v4(), fixed);
    task.look(any, "ipam show pool fixed");
    task.in_another_way("delete pod web-0");
    lab.workers[0].delete(&pod);
    let pod = lab.workers[1].pod_within(TIMEOUT, "web-0", &conf);
    assert_eq!(pod.v4(), fixed);
    for worker in &lab.workers {
        let leads = |route: &str| {
            worker.name() == "n2" || route.contains("via 10.10.") || route.contains("polder.vx")
        };
        wait::until_true("a route to the address", || {
            leads(&worker.node.shell(&format!("ip route get {fixed} 2>&1 || true")))
        });
    }
    assert_flat(&[&others[..], std::slice::from_ref(&pod)].concat(), 1450);
    task.run(any, "pool drain fixed");
    task.run_refused(any, "ipam release", "is held by polder/web-0/eth0 on node n2");
    lab.workers[1].delete(&pod);
    wait::until_true("the pod to be gone", || {
        lab.workers[2].ctl(&["ipam", "show", "10.246.0.1"]).to_string().contains("not in use")
    });
    task.run(any, "ipam release");
    task.finish();
}

#[test]
fn nodes_are_removed_and_replaced() {
    let mut lab = lab(Topology::one_segment(3));
    let task = Task::read("4. Remove and replace a node", &NAMES);
    let other = |lab: &Lab, words: &str| {
        task.look(("any other node", &lab.workers[0].node), words);
    };
    let old = pods(&lab, "daemon");
    let moved = lab.workers[1].pod("moved");
    task.in_another_way("kubectl drain node2");
    lab.workers[1].delete(&moved);
    wait::until_true("the addresses to be published", || {
        lab.etcd.keys("/polder/v1/addresses/n2/").len() == 1
    });
    task.run_refused(("any other node", &lab.workers[0].node), "node remove node2\n", "Drain the node");
    task.run(("any other node", &lab.workers[0].node), "--disconnect-pods 1");
    other(&lab, "grep -c");
    task.in_another_way("delete node node2");

    lab.workers[2].kill();
    lab.workers[2].node.run("ip", &["link", "set", "eth0", "down"]);
    other(&lab, "node remove node3 --dead");
    task.in_another_way("delete node node3");
    lab.workers[2].node.run("ip", &["link", "set", "eth0", "up"]);
    lab.workers[2].start();
    lab.workers[2].wait_for_status("that it was removed", |status| {
        status["reasons"].to_string().contains("was removed from the cluster").then_some(())
    });

    // The replacement has the old disk.
    lab.workers[1].kill();
    lab.workers[1].node.write("/etc/machine-id", "00000000000000000000000000000002\n");
    lab.reboot(1);
    task.run(("the new machine", &lab.workers[1].node), "rm -rf");
    lab.workers[1].start_and_wait();
    let new = lab.workers[1].pod("new");
    other(&lab, "polderctl node list\n");
    other(&lab, "ipam check");
    assert_flat(&[old[0].clone(), new], 1450);
    task.finish();
}
