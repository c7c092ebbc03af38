//! STATUS of the plugins. Kubernetes evicts the running pods of a node whose STATUS fails: it must not fail while pods
//! that were connected since the machine booted are running, even if an ADD would fail.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::cni::{conf, message};
use polder_tests::probe;
use polder_tests::scripted::ScriptedIpam;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

const STATUS_OK: Result<Value, Value> = Ok(Value::Null);

fn status(worker: &Worker) -> Result<Value, Value> {
    worker.cni("STATUS", "", "", &Worker::netconf("1.1.0"))
}

/// Calls STATUS of `polder-ipam`, as a plugin that delegates IPAM to it does.
fn ipam_status(worker: &Worker) -> Result<(), Value> {
    let variables = [("CNI_COMMAND", "STATUS"), ("CNI_PATH", &Worker::cni_path())];
    let output = worker.any_plugin("polder-ipam", &variables, &ipam_conf().to_string());
    if output.status.success() { Ok(()) } else { Err(serde_json::from_slice(&output.stdout).unwrap()) }
}

fn ipam_conf() -> Value {
    json!({ "cniVersion": "1.1.0", "name": "other", "type": "macvlan", "ipam": { "type": "polder-ipam" } })
}

/// Allocates addresses for an interface of another plugin.
fn allocate(worker: &Worker, name: &str) {
    let netns = worker.namespace(name);
    let variables = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", name),
        ("CNI_NETNS", netns.as_str()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/nowhere"),
    ];
    let added = worker.any_plugin("polder-ipam", &variables, &ipam_conf().to_string());
    assert!(added.status.success(), "{added:?}");
}

/// Waits until the node reports a problem that contains these words. Returns its text.
fn wait_for_problem(worker: &Worker, words: &str) -> String {
    worker.wait_for_status(&format!("a problem with {words:?}"), |status| {
        let problems = status["problems"].as_array()?.iter().filter_map(Value::as_str);
        problems.map(str::to_owned).find(|problem| problem.contains(words))
    })
}

fn assert_pod_answers_ping(worker: &Worker, pod: &Pod) {
    probe::ping(worker.node.command("ping"), pod.v4(), 56).unwrap();
}

/// Waits until STATUS succeeds on a node without pods. The timeout for the agent's answer is 500 ms, which is not
/// always enough on a busy machine. With pods, STATUS succeeds even after that timeout.
fn wait_until_status_succeeds(worker: &Worker) {
    wait::until("STATUS to succeed", || status(worker).map_err(|error| error.to_string()));
}

/// Waits until STATUS fails on a node without pods, with this error code and these words.
fn wait_until_fails(ask: impl Fn() -> Result<Value, Value>, code: u64, words: &str) {
    wait::until(&format!("STATUS to fail with {code} and {words:?}"), || match ask() {
        Err(error) if error["code"] == code && error["msg"].to_string().contains(words) => Ok(()),
        message => Err(format!("{message:?}")),
    });
}

/// Asserts that STATUS failed with this error code and these words.
fn assert_failed(outcome: Result<Value, Value>, code: u64, words: &str) {
    let error = outcome.unwrap_err();
    assert!(error["code"] == code && error["msg"].to_string().contains(words), "{error}");
}

#[test]
fn status_succeeds_on_a_node_with_pods_although_no_address_is_left() {
    let lab = Lab::start(Topology { pools: vec!["10.244.0.0/26"], ..Topology::one_segment(1) });
    let worker = &lab.workers[0];
    wait_until_status_succeeds(worker);
    let (mut pods, mut refused) = (Vec::new(), None);
    while refused.is_none() {
        assert!(pods.len() < 64, "64 pods got an address from a pool of 64 addresses (expected fewer)");
        match worker.try_pod(&format!("p{}", pods.len()), &Worker::netconf("1.1.0")) {
            Ok(pod) => pods.push(pod),
            Err(error) => refused = Some(error),
        }
    }
    assert!(refused.as_ref().is_some_and(|error| error["code"] == 100) && !pods.is_empty(), "{refused:?}");
    assert_eq!(status(worker), STATUS_OK);
    let problem = wait_for_problem(worker, "new pods get no address");
    assert!(problem.contains("pool ipv4 (10.244.0.0/26) has no free block"), "{problem}");
    assert_eq!(worker.status()["ready"], true);
    assert_pod_answers_ping(worker, &pods[0]);
}

#[test]
fn status_fails_for_a_drained_pool_only_on_a_node_without_pods() {
    let lab = Lab::start(Topology::one_segment(2));
    let [with_pod, without_pod] = lab.workers.as_slice() else { panic!("two nodes") };
    let pod = with_pod.pod("a");
    with_pod.ctl(&["pool", "drain", "ipv4"]);
    for worker in [with_pod, without_pod] {
        wait_for_problem(worker, "new pods get no address");
    }
    assert_eq!(status(with_pod), STATUS_OK);
    wait_until_fails(|| status(without_pod), 50, "drain");
    assert_eq!(with_pod.try_pod("b", &Worker::netconf("1.1.0")).unwrap_err()["code"], 100);
    assert_pod_answers_ping(with_pod, &pod);
    with_pod.ctl(&["pool", "add", "next", "10.245.0.0/24"]);
    wait::until("an ADD to be possible again", || status(without_pod).map_err(|error| error.to_string()));
}

/// Freezes, then kills the agents of two nodes: STATUS still succeeds on the node with a pod, not on the other.
fn assert_status_without_an_agent(attach: &str) {
    let mut lab = Lab::start(Topology::one_segment(2).bootstrap(&format!("attach = \"{attach}\"")));
    let pod = lab.workers[0].pod("a");
    for worker in &lab.workers {
        worker.freeze(true);
    }
    assert_eq!(status(&lab.workers[0]), STATUS_OK, "{attach}: the agent hangs");
    assert_failed(status(&lab.workers[1]), 50, "/run/polder/agent.sock did not answer");
    lab.workers.iter_mut().for_each(Worker::kill);
    assert_eq!(status(&lab.workers[0]), STATUS_OK, "{attach}: the agent was killed");
    // This node has no pods to evict, and new pods could not start on it.
    assert_failed(status(&lab.workers[1]), 50, "/run/polder/agent.sock");
    assert_pod_answers_ping(&lab.workers[0], &pod);

    // STATUS fails if the pods' kernel state is missing.
    let worker = &mut lab.workers[0];
    worker.flush_routes();
    assert_failed(status(worker), 51, "1 pods have no route");
    worker.reboot();
    assert_failed(status(worker), 50, "has not been set up since it was booted");
}

#[test]
fn status_needs_no_agent_while_pods_connected_since_boot_use_the_bridge() {
    assert_status_without_an_agent("bridge");
}

#[test]
fn status_needs_no_agent_while_pods_connected_since_boot_use_routes() {
    assert_status_without_an_agent("routed");
}

#[test]
fn status_does_not_depend_on_peers() {
    let mut lab = Lab::build(Topology::one_segment(2));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let (node_with_pod, peer) = (0, 1);
    let pod = lab.workers[node_with_pod].pod("a");
    // A firewall drops ICMP.
    lab.fabric.node().shell(
        "nft 'add table bridge f; add chain bridge f c { type filter hook forward priority 0; }; \
         add rule bridge f c ip protocol icmp drop'",
    );
    wait_for_problem(&lab.workers[node_with_pod], "does not answer");
    assert_eq!(status(&lab.workers[node_with_pod]), STATUS_OK);
    wait_until_status_succeeds(&lab.workers[peer]);
    lab.fabric.node().shell("nft delete table bridge f");

    // The peer fails. Then the last pod of the other node is deleted, too.
    lab.workers[peer].kill();
    lab.workers[peer].node.run("ip", &["link", "set", "eth0", "down"]);
    let worker = &lab.workers[node_with_pod];
    wait_for_problem(worker, "does not answer");
    assert_eq!(status(worker), STATUS_OK);
    worker.delete(&pod);
    wait_until_status_succeeds(worker);
    worker.pod("b");
}

#[test]
fn status_of_a_node_whose_block_another_node_claimed_fails_only_without_pods() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    let key = lab.etcd.keys("/polder/v1/blocks/").remove(0);
    let claim = lab.etcd.ctl(&["get", "--print-value-only", &key]);
    lab.etcd.ctl(&["put", &key, &claim.trim().replace("\"n1\"", "\"n9\"")]);
    worker.wait_for_status("the loss of the block", |status| {
        let reasons = status["reasons"].to_string();
        let remedy = format!("delete the claim with etcdctl del {key}");
        (reasons.contains("which node n9 has claimed") && reasons.contains(&remedy)).then_some(())
    });
    assert_eq!(status(worker), STATUS_OK, "its pod is connected");
    assert!(message(worker.try_pod("b", &Worker::netconf("1.1.0")).map(|_| Value::Null)).contains("node n9"));
    worker.delete(&pod);
    wait_until_fails(|| status(worker), 51, "which node n9 has claimed");
}

#[test]
fn failure_of_the_ipam_status_is_reported_only_on_a_node_without_pods() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let scripted = ScriptedIpam::new(&worker.node);
    let delegating = conf("1.1.0", &ScriptedIpam::conf());
    scripted.gives("1.1.0", &["192.168.7.7/24"]);
    let pod = worker.pod_with("a", &delegating);
    scripted.fails(r#"{"code": 50, "msg": "no more"}"#);
    // Clears the recorded calls.
    scripted.take_calls();
    assert_eq!(worker.cni("STATUS", "", "", &delegating), STATUS_OK);
    assert_eq!(scripted.take_calls(), "STATUS");
    scripted.recovers();
    worker.delete(&pod);
    scripted.fails(r#"{"code": 50, "msg": "no more"}"#);
    wait_until_fails(|| worker.cni("STATUS", "", "", &delegating), 50, "no more");
}

#[test]
fn status_of_polder_ipam_succeeds_while_an_allocated_address_may_be_in_use() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let [with_pod, without_pod] = lab.workers.as_slice() else { panic!("two nodes") };
    allocate(with_pod, "allocated");
    with_pod.ctl(&["pool", "drain", "ipv4"]);
    for worker in [with_pod, without_pod] {
        wait_for_problem(worker, "new pods get no address");
    }
    assert_eq!(ipam_status(with_pod), Ok(()), "a pod has an address");
    wait_until_fails(|| ipam_status(without_pod).map(|()| Value::Null), 50, "drain");

    // Without the agent, polder-ipam cannot check whether an address is in use, and assumes that it is.
    let worker = &mut lab.workers[0];
    worker.kill();
    assert_eq!(ipam_status(worker), Ok(()));
    worker.reboot();
    let error = ipam_status(worker).unwrap_err();
    assert!(error["code"] == 50 && error["msg"].to_string().contains("since it was booted"), "{error}");
}
