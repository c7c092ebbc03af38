//! Rare actions of runtimes, other plugins and operators that must not cause failures.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::{Pending, Worker};
use polder_tests::cni::code;
use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat_over;
use polder_tests::traces::assert_nothing_left;
use polder_tests::{Lab, Pod, wait};
use serde_json::{Value, json};

#[test]
fn only_the_same_container_can_reuse_a_released_address_at_once() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    let own = pod.v4().to_string();
    // As podman's `network reload` requests it: twice.
    let mut conf = Worker::netconf("1.0.0");
    conf["runtimeConfig"] = json!({ "ips": [own, own] });
    worker.del("a", pod.netns(), &pod.later_conf());
    let again = worker.cni("ADD", "a", pod.netns(), &conf).unwrap();
    assert!(again["ips"].to_string().contains(&own), "{again}");
    let netns = worker.namespace("b");
    worker.del("a", pod.netns(), &conf);
    assert_eq!(code(worker.cni("ADD", "b", &netns, &conf)), 11);
}

#[test]
fn a_pod_with_the_longest_names_is_attached() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let (container, long) = ("c".repeat(64), |length: usize| "x".repeat(length));
    for (namespace, name) in [(63, 253), (63, 113), (63, 114), (7, 173), (7, 253)] {
        let arguments = format!("K8S_POD_NAMESPACE={};K8S_POD_NAME={}", long(namespace), long(name));
        let netns = worker.namespace(&format!("p{namespace}-{name}"));
        let variables = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", container.as_str()),
            ("CNI_NETNS", netns.as_str()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", &Worker::cni_path()),
            ("CNI_ARGS", &arguments),
        ];
        let conf = Worker::netconf("1.1.0");
        let output = worker.plugin(&variables, &conf.to_string());
        let message = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{namespace} and {name}: {message}");
        worker.del(&container, &netns, &conf);
    }
}

#[test]
fn a_pod_whose_namespace_has_no_ipv6_by_default_gets_it_on_its_interface() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    worker.node.shell(
        "nsenter --net=/run/netns/a sysctl -qw net.ipv6.conf.all.disable_ipv6=1 \
                       net.ipv6.conf.default.disable_ipv6=1",
    );
    let conf = Worker::netconf("1.1.0");
    let result = worker.cni("ADD", "a", &netns, &conf).unwrap();
    let pod = Pod::new(&worker.node, "a", &netns, conf, result);
    assert_flat_over(Families::DUAL, &[pod, worker.pod("b")], 1450);
}

#[test]
fn del_and_check_ignore_invalid_options_of_the_configuration() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    let mut conf = pod.later_conf();
    conf["isGateway"] = json!(true);
    conf["mtu"] = json!("large");
    assert_eq!(worker.cni("CHECK", "a", pod.netns(), &conf), Ok(Value::Null));
    let netns = worker.namespace("b");
    assert_eq!(code(worker.cni("ADD", "b", &netns, &conf)), 2);
    worker.del("a", pod.netns(), &conf);
    assert_nothing_left(&lab, worker);
}

#[test]
fn an_add_waits_for_a_restarting_agent_and_a_check_needs_no_agent() {
    let mut lab = Lab::start_node();
    let pod = lab.workers[0].pod("a");
    assert!(lab.workers[0].stop());
    let worker = &lab.workers[0];
    assert!(worker.node.read("/run/polder/agent.sock").is_err(), "the socket is gone with the agent");
    assert_eq!(worker.cni("CHECK", "a", pod.netns(), &pod.later_conf()), Ok(Value::Null));
    worker.node.shell(&format!("ip link set {} down", pod.host_interface()));
    assert_eq!(code(worker.cni("CHECK", "a", pod.netns(), &pod.later_conf())), 110);
    let pending = pending_add(worker);
    let conf = Worker::netconf("1.1.0").to_string();
    let add = std::thread::spawn(move || pending.finish(&conf));
    wait_for_an_attempt(worker);
    lab.workers[0].start_and_wait();
    assert!(add.join().unwrap(), "the ADD failed although the agent came");
}

#[test]
fn an_add_that_waits_for_the_agent_ends_with_its_caller_and_attaches_nothing() {
    let mut lab = Lab::start_node();
    assert!(lab.workers[0].stop());
    let worker = &lab.workers[0];
    let mut pending = pending_add(worker);
    pending.go_on(&Worker::netconf("1.1.0").to_string());
    wait_for_an_attempt(worker);
    pending.kill_caller();
    lab.workers[0].start_and_wait();
    let worker = &lab.workers[0];
    wait::until_true("the plugin to end", || worker.node.shell("pgrep -x polder || true").is_empty());
    assert_nothing_left(&lab, worker);
}

/// An ADD for a new container `b` that waits for its configuration.
fn pending_add(worker: &Worker) -> Pending {
    let netns = worker.namespace("b");
    worker.pending(&[
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "b"),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", &Worker::cni_path()),
    ])
}

/// Waits until the plugin pauses between two attempts.
fn wait_for_an_attempt(worker: &Worker) {
    wait::until_true("the plugin to have found no agent", || {
        worker.node.shell("cat /proc/$(pgrep -x polder)/wchan || true").contains("nanosleep")
    });
}
