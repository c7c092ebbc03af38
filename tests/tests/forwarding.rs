//! Peers are probed with packets that both hosts forward like packets of pods.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::time::Duration;

use polder_tests::agent::{CNI_CONF, Worker};
use polder_tests::fabric::Families;
use polder_tests::traces::endpoint;
use polder_tests::{Lab, Topology, wait};
use serde_json::Value;

/// Longer than several rounds of probes, and than the lease of an agent.
const LONG: Duration = Duration::from_secs(90);

/// Probes of an endpoint without a reply before the agent reports it: two in each of the 8 rounds of
/// `ENDPOINT_FAILURES`.
const MISSED: u64 = 16;

const DROPPED: &str = "packets forwarded to its";

/// Nodes on one segment that probe each other every second. No agent runs.
fn lab(topology: Topology) -> Lab {
    let lab = Lab::build(topology);
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab
}

/// Makes a node drop echo packets that it forwards between the underlay and its pods, in a table of another program.
/// Probes of the node's own address are not forwarded.
fn drop_forwarded(worker: &Worker) {
    worker.node.shell(
        "nft 'add table inet x; add chain inet x forward { type filter hook forward priority 0; }; \
         add rule inet x forward icmp type { echo-request, echo-reply } drop; \
         add rule inet x forward icmpv6 type { echo-request, echo-reply } drop'",
    );
}

fn forward_again(worker: &Worker) {
    worker.node.shell("nft delete table inet x");
}

/// The verdict of a node's probes of node `other`, for each family.
fn probed(worker: &Worker, other: &str) -> Vec<String> {
    let nodes = worker.ctl(&["node", "list"]);
    let node = nodes.as_array().unwrap().iter().find(|node| node["name"] == other).unwrap().clone();
    let paths = node["paths"].as_array().unwrap().iter();
    paths.map(|path| path["probe"].as_str().unwrap().to_owned()).collect()
}

fn wait_until_probed(worker: &Worker, other: &str, word: &str) {
    let what = format!("{} to report {other} as {word}", worker.name());
    wait::within(LONG, &what, || {
        let found = probed(worker, other);
        if found.iter().all(|found| found == word) { Ok(()) } else { Err(format!("{found:?}")) }
    });
}

/// Waits for a problem of that node that contains `words`, and returns it.
fn problem(worker: &Worker, words: &str) -> String {
    wait::within(LONG, &format!("a problem with {words:?}"), || {
        let status = worker.try_status()?;
        let problems = status["problems"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let found = problems.map(str::to_owned).find(|problem| problem.contains(words));
        found.ok_or_else(|| status["problems"].to_string())
    })
}

/// Counts the probes that a node forwards to `address`. Replies to its own probes pass the same hook, but are not
/// counted.
fn count_forwarded(worker: &Worker, address: &str) -> impl Fn() -> u64 {
    let (ip, icmp, chain) =
        if address.contains(':') { ("ip6", "icmpv6", "six") } else { ("ip", "icmp", "four") };
    worker.node.shell(&format!(
        "nft 'add table inet counted; add chain inet counted {chain} {{ type filter hook forward priority 10; }}; \
         add rule inet counted {chain} {ip} daddr {address} {icmp} type echo-request counter'"
    ));
    let node = &worker.node;
    move || {
        let listed = node.shell(&format!("nft list chain inet counted {chain}"));
        listed.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    }
}

fn assert_probes_are_answered_by_forwarded_packets(backend: &str, attach: &str) {
    let bootstrap = format!("backend = \"{backend}\"\nattach = \"{attach}\"");
    let mut lab = lab(Topology::one_segment(2).families(Families::DUAL).bootstrap(&bootstrap));
    lab.start_agents();
    let [first, second] = &lab.workers[..] else { panic!("two nodes") };
    wait_until_probed(first, "n2", "answers");
    wait_until_probed(second, "n1", "answers");
    let addresses = endpoint(&lab, &lab.workers[1]);
    assert_eq!(addresses.len(), 2, "one address of each family: {addresses:?}");
    for address in addresses {
        let requests = count_forwarded(second, &address);
        let before = requests();
        wait::until_true("the peer's probes to be forwarded", || requests() > before);
        let shown = first.ctl(&["ipam", "show", &address]);
        assert!(shown.to_string().contains("probe endpoint of node n2"), "{shown}");
        let shown = second.ctl(&["ipam", "show", &address]);
        assert!(shown.to_string().contains("this node's probe endpoint"), "{shown}");
    }
    for worker in &lab.workers {
        let status = worker.status();
        assert_eq!((&status["pods"], &status["blocks"][0]["used"]), (&0.into(), &1.into()), "{status}");
        assert_eq!(status["problems"], serde_json::json!([]));
        let checked = worker.ctl(&["ipam", "check"]);
        assert_eq!(checked["deviations"], serde_json::json!([]), "{checked}");
    }
}

#[test]
fn probes_are_answered_by_forwarded_packets_with_bridge_and_direct() {
    assert_probes_are_answered_by_forwarded_packets("direct", "bridge");
}

#[test]
fn probes_are_answered_by_forwarded_packets_with_bridge_and_vxlan() {
    assert_probes_are_answered_by_forwarded_packets("vxlan", "bridge");
}

#[test]
fn probes_are_answered_by_forwarded_packets_with_routed_and_direct() {
    assert_probes_are_answered_by_forwarded_packets("direct", "routed");
}

#[test]
fn probes_are_answered_by_forwarded_packets_with_routed_and_vxlan() {
    assert_probes_are_answered_by_forwarded_packets("vxlan", "routed");
}

#[test]
fn a_peer_that_drops_forwarded_packets_is_reported_until_it_forwards_again() {
    let mut lab = lab(Topology::one_segment(3).families(Families::DUAL));
    lab.start_agents();
    wait_until_probed(&lab.workers[0], "n2", "answers");
    drop_forwarded(&lab.workers[1]);
    wait_until_probed(&lab.workers[0], "n2", "dropped");
    let message = problem(&lab.workers[0], DROPPED);
    assert!(message.contains("node n2 answers") && message.contains("both nodes"), "{message}");
    assert!(lab.workers[0].log().contains("are dropped"), "the log does not say it");
    // The node itself reports it for all its peers; the path between the other nodes is not affected.
    wait_until_probed(&lab.workers[1], "n1", "dropped");
    wait_until_probed(&lab.workers[1], "n3", "dropped");
    wait_until_probed(&lab.workers[0], "n3", "answers");
    forward_again(&lab.workers[1]);
    wait_until_probed(&lab.workers[0], "n2", "answers");
    wait_until_probed(&lab.workers[1], "n3", "answers");
}

#[test]
fn a_node_that_drops_forwarded_packets_is_not_ready_and_reports_the_reason() {
    let mut lab = lab(Topology::one_segment(2));
    lab.workers[0].start_and_wait();
    drop_forwarded(&lab.workers[1]);
    lab.workers[1].start();
    let newcomer = &lab.workers[1];
    wait::within(LONG, "a reason", || {
        let status = newcomer.try_status()?;
        let reasons = status["reasons"].to_string();
        let is_reported = status["ready"] == false
            && reasons.contains("forwarded like those of pods")
            && reasons.contains("n1");
        if is_reported { Ok(()) } else { Err(status.to_string()) }
    });
    assert!(
        newcomer.node.read(CNI_CONF).is_err(),
        "the CNI configuration exists although the node is not ready"
    );
    forward_again(newcomer);
    newcomer.wait_until_ready();
}

#[test]
fn a_restarted_or_stopped_agent_is_not_reported_as_dropped_packets() {
    let mut lab = lab(Topology::one_segment(2));
    lab.start_agents();
    wait_until_probed(&lab.workers[0], "n2", "answers");
    let before = endpoint(&lab, &lab.workers[1]);
    for _ in 0..3 {
        lab.workers[1].kill();
        lab.workers[1].start_and_wait();
    }
    assert_eq!(endpoint(&lab, &lab.workers[1]), before, "the endpoint keeps its address");
    wait_until_probed(&lab.workers[0], "n2", "answers");
    lab.workers[1].kill();
    let probes = count_forwarded(&lab.workers[1], &before[0]);
    wait::within(LONG, "the lease to run out", || {
        let nodes = lab.workers[0].ctl(&["node", "list"]);
        let node = nodes.as_array().unwrap().iter().find(|node| node["name"] == "n2").unwrap().clone();
        if node["alive"] == false { Ok(()) } else { Err(node.to_string()) }
    });
    // After this number of probes without a reply, a host that does not forward would have been reported.
    wait::within(LONG, "probes to go on", || match probes() {
        sent if sent >= MISSED => Ok(()),
        sent => Err(format!("{sent} probes")),
    });
    drop(probes);
    assert!(!lab.workers[0].log().contains("are dropped"), "{}", lab.workers[0].log());
    let status = lab.workers[0].status();
    assert!(!status["problems"].to_string().contains(DROPPED), "{status}");
    // Its pods are still reachable, and its host answers.
    assert_eq!(probed(&lab.workers[0], "n2"), ["answers"]);
    // A starting node does not wait for an endpoint whose agent does not run.
    assert!(lab.workers[0].stop());
    lab.workers[0].start();
    wait::within(LONG, "n1 to be ready", || {
        let status = lab.workers[0].try_status()?;
        if status["ready"] == true { Ok(()) } else { Err(status["reasons"].to_string()) }
    });
}

#[test]
fn a_probe_endpoint_is_recreated_if_its_interface_is_deleted() {
    let mut lab = lab(Topology::one_segment(2));
    lab.start_agents();
    wait_until_probed(&lab.workers[0], "n2", "answers");
    let index = || lab.workers[1].node.shell("cat /sys/class/net/polder.probe/ifindex 2>/dev/null || true");
    let before = index();
    assert!(!before.is_empty(), "there is no endpoint");
    lab.workers[1].node.run("ip", &["link", "delete", "polder.probe"]);
    wait::until_true("another endpoint", || !index().is_empty() && index() != before);
    wait_until_probed(&lab.workers[0], "n2", "answers");
    wait_until_probed(&lab.workers[1], "n1", "answers");
}

#[test]
fn strict_rp_filter_is_reported_if_two_nodes_may_use_different_paths() {
    let mut lab = lab(Topology::one_segment(1));
    lab.start_agents();
    let worker = &lab.workers[0];
    worker.node.shell("sysctl -qw net.ipv4.conf.eth0.rp_filter=1");
    let message = problem(worker, "rp_filter of eth0 is 1");
    assert!(message.contains("sysctl -w net/ipv4/conf/eth0/rp_filter=2"), "{message}");
    worker.node.shell("sysctl -qw net/ipv4/conf/eth0/rp_filter=2");
    wait_for_no_problem(worker);
    worker.node.shell("sysctl -qw net.ipv4.conf.eth0.rp_filter=1");
    problem(worker, "rp_filter of eth0 is 1");
    worker.ctl(&["cluster", "set", "--backend", "vxlan"]);
    wait_for_no_problem(worker);
}

fn wait_for_no_problem(worker: &Worker) {
    worker.wait_for_status("no problem", |status| {
        status["problems"].as_array().is_some_and(Vec::is_empty).then_some(())
    });
}
