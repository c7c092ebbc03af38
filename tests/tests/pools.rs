//! Pools that are added, chosen, drained, removed and exhausted while the cluster runs.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, assert_flat_over};
use polder_tests::pod::Pod;
use polder_tests::routes::wait_for_routes;
use polder_tests::traffic::without_packet_loss;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Topology, wait};
use serde_json::{Value, json};

/// The shortest cool-down that the configuration accepts.
const SHORT_COOL_DOWN: &str = "[ipam]\ncooldown_seconds = 10\n";

/// Adds tables to the agent's configuration.
fn configure(worker: &Worker, tables: &str) {
    worker.configure(&format!("{}{tables}", worker.configuration()));
}

/// The pool of that name in the output of `polderctl pool list`; null if it is missing.
fn pool(worker: &Worker, name: &str) -> Value {
    let pools = worker.ctl(&["pool", "list"]);
    pools.as_array().unwrap().iter().find(|pool| pool["name"] == name).cloned().unwrap_or_default()
}

/// A network configuration that requests addresses from this pool.
fn of_pool(name: &str) -> Value {
    let mut conf = Worker::netconf("1.1.0");
    conf["pool"] = json!(name);
    conf
}

/// The error message of a `polderctl` command that must fail.
fn refused(worker: &Worker, arguments: &[&str]) -> String {
    worker.try_ctl(arguments).expect_err(&format!("{arguments:?} was done"))
}

/// Waits until the node knows the pool.
fn wait_for_pool(worker: &Worker, name: &str) {
    wait::until_true("the pool to be known", || pool(worker, name) != Value::Null);
}

fn is_in(address: IpAddr, prefix: &str) -> bool {
    address.to_string().starts_with(prefix)
}

/// Calls STATUS with this network configuration.
fn plugin_status(worker: &Worker, conf: &Value) -> Result<(), Value> {
    let variables = [("CNI_COMMAND", "STATUS"), ("CNI_PATH", &Worker::cni_path())];
    let output = worker.plugin(&variables, &conf.to_string());
    if output.status.success() { Ok(()) } else { Err(serde_json::from_slice(&output.stdout).unwrap()) }
}

#[test]
fn a_cluster_with_an_exhausted_pool_continues_with_a_second_pool() {
    // Two blocks for three nodes.
    let topology = Topology { pools: vec!["10.244.0.0/25"], ..Topology::one_segment(2) };
    let mut lab = Lab::start(topology);
    let mut pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("old")).collect();
    lab.add_worker(1).start();
    without_packet_loss(&pods.clone(), || {
        let newcomer = &lab.workers[2];
        let reasons = newcomer.wait_for_status("the reason for not being ready", |status| {
            let reasons = status["reasons"].to_string();
            reasons.contains("has no free block").then_some(reasons)
        });
        assert!(reasons.contains("claimed 2 of 2") && reasons.contains(": 1"), "{reasons}");
        let done = lab.workers[0].ctl(&["pool", "add", "second", "10.245.0.0/24"]);
        assert!(done.as_str().unwrap().contains("10.245.0.0/24 in blocks of /26, for all nodes"), "{done}");
        newcomer.wait_until_ready();
        let pod = newcomer.pod("new");
        assert!(is_in(pod.v4(), "10.245.0."), "{}", pod.v4());
        pods.push(pod);
        pods.push(lab.workers[1].pod_with("newer", &of_pool("second")));
    });
    assert_flat(&pods, 1450);
    let second = pool(&lab.workers[1], "second");
    assert_eq!((&second["blocks_owned"], &second["blocks_total"]), (&json!(2), &json!(4)));
    let blocks = lab.workers[0].ctl(&["block", "list"]);
    assert_eq!(blocks.as_array().unwrap().len(), 4, "{blocks}");
    assert!(blocks.as_array().unwrap().iter().all(|block| block["standing"] == "owned"), "{blocks}");
}

#[test]
fn nodes_use_the_pools_for_their_labels_and_pods_the_pools_that_they_name() {
    let mut lab = Lab::build(Topology::one_segment(3));
    for (worker, zone) in lab.workers.iter().zip(["a", "b", "a"]) {
        configure(worker, &format!("[labels]\nzone = \"{zone}\"\n"));
    }
    lab.workers[..2].iter_mut().for_each(Worker::start_and_wait);
    let [first, second, _] = lab.workers.as_slice() else { panic!("three nodes") };
    first.ctl(&["pool", "add", "zone-a", "10.245.0.0/24", "--block-length", "28", "--nodes", "zone=a"]);
    lab.workers[..2].iter().for_each(|worker| wait_for_pool(worker, "zone-a"));
    let named = first.pod_with("named", &of_pool("zone-a"));
    assert!(is_in(named.v4(), "10.245.0."), "{}", named.v4());
    let mut annotated = Worker::netconf("1.1.0");
    annotated["runtimeConfig"] =
        json!({ "io.kubernetes.cri.pod-annotations": { "polder.dev/pool": "zone-a" } });
    let annotated = first.pod_with("annotated", &annotated);
    assert!(is_in(annotated.v4(), "10.245.0."), "{}", annotated.v4());
    let error = second.try_pod("other", &of_pool("zone-a")).unwrap_err();
    let message = error["msg"].as_str().unwrap();
    for expected in ["pool zone-a is for nodes with the labels zone=a", "labels of this node: zone=b"] {
        assert!(message.contains(expected), "{expected} in {message}");
    }
    let claims = first.ctl(&["block", "list"]);
    let claims: Vec<&Value> =
        claims.as_array().unwrap().iter().filter(|claim| claim["pool"] == "zone-a").collect();
    assert!(claims.len() == 1 && claims[0]["block"].as_str().unwrap().ends_with("/28"), "{claims:?}");
    assert_eq!(claims[0]["node"], "n1");
    // A node prefers pools whose labels match its own.
    lab.workers[2].start_and_wait();
    let unasked = lab.workers[2].pod("unasked");
    assert!(is_in(unasked.v4(), "10.245.0."), "{}", unasked.v4());
    let other = lab.workers[1].pod("another");
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&[named, annotated, unasked, other], 1450);
}

#[test]
fn a_conflicting_pool_is_refused_and_adding_the_same_pool_twice_succeeds() {
    let lab = Lab::start(Topology::one_segment(2).families(Families::DUAL));
    let worker = &lab.workers[0];
    for (arguments, expected) in [
        (["p", "10.244.128.0/17"], "10.244.128.0/17 overlaps pool ipv4 (10.244.0.0/16)"),
        (["p", "10.0.0.0/8"], "10.0.0.0/8 overlaps pool ipv4 (10.244.0.0/16)"),
        (["p", "fd00:244:0:8::/64"], "overlaps pool ipv6 (fd00:244::/56)"),
        (["p", "10.10.0.0/16"], "10.10.1.1, this node's own address, is inside"),
        (["p", "10.245.0.0/28"], "at least 28 (--block-length)"),
        (["p", "10.245.0.1/24"], "did you mean 10.245.0.0/24?"),
        (["ipv4", "10.245.0.0/16"], "pool ipv4 already exists as 10.244.0.0/16 in blocks of /26"),
    ] {
        let message = refused(worker, &["pool", "add", arguments[0], arguments[1]]);
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
    let add = ["pool", "add", "p", "10.245.0.0/28", "--block-length", "28"];
    for expected in ["pool p is added", "pool p already exists"] {
        assert!(worker.ctl(&add).as_str().unwrap().contains(expected));
    }
    wait_for_pool(worker, "p");
    for (verb, expected) in [
        ("drain", "pool p is drained: "),
        ("drain", "pool p is already drained"),
        ("remove", "pool p is removed"),
    ] {
        let done = worker.ctl(&["pool", verb, "p"]);
        assert!(done.as_str().unwrap().contains(expected), "{verb}: {done}");
    }
    for verb in ["drain", "remove"] {
        let message = refused(worker, &["pool", verb, "p"]);
        assert!(message.contains("there is no pool p: see polderctl pool list"), "{verb}: {message}");
    }
    assert!(refused(worker, &["pool", "remove", "ipv4"]).contains("2 blocks are claimed (n1: 1, n2: 1)"));
}

#[test]
fn exactly_one_of_two_overlapping_pools_is_added_concurrently() {
    let lab = Lab::start(Topology::one_segment(2));
    for round in 0..20 {
        let wide = ["pool".to_owned(), "add".into(), format!("wide-{round}"), format!("10.{round}.0.0/16")];
        let narrow =
            ["pool".to_owned(), "add".into(), format!("narrow-{round}"), format!("10.{round}.128.0/17")];
        // 10.10.0.0/16 is the underlay.
        if round == 10 {
            continue;
        }
        let outcomes: Vec<Result<Value, String>> = std::thread::scope(|scope| {
            let calls: Vec<_> = lab
                .workers
                .iter()
                .zip([&wide, &narrow])
                .map(|(worker, words)| {
                    let words: Vec<&str> = words.iter().map(String::as_str).collect();
                    scope.spawn(move || worker.try_ctl(&words))
                })
                .collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        let lost: Vec<&String> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        assert!(lost.len() == 1 && lost[0].contains("overlaps pool"), "round {round}: {outcomes:?}");
        assert_eq!(lab.etcd.keys("/polder/v1/pools/").len(), round + if round < 10 { 2 } else { 1 });
    }
}

#[test]
fn a_pool_is_drained_while_its_pods_run_and_removed_when_they_are_gone() {
    let mut lab = Lab::build(Topology::one_segment(2));
    lab.workers.iter().for_each(|worker| configure(worker, SHORT_COOL_DOWN));
    lab.start_agents();
    let worker = &lab.workers[0];
    let old: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("old")).collect();
    worker.ctl(&["pool", "add", "next", "10.245.0.0/16"]);
    lab.workers.iter().for_each(|worker| wait_for_pool(worker, "next"));
    let mut new: Vec<Pod> = Vec::new();
    without_packet_loss(&old, || {
        let done = worker.ctl(&["pool", "drain", "ipv4"]);
        assert!(
            done.as_str().unwrap().contains("2 blocks and 0 reserved addresses are still in use"),
            "{done}"
        );
        for worker in &lab.workers {
            wait::until_true("the drain to be known", || pool(worker, "ipv4")["state"] == "draining");
            // New blocks come from the other pool. Free addresses of the old pool are not allocated.
            let pod = wait::until("a pod of the other pool", || {
                match worker.try_pod("new", &Worker::netconf("1.1.0")) {
                    Ok(pod) if is_in(pod.v4(), "10.245.") => Ok(pod),
                    // The agent closes its blocks a moment later.
                    other => Err(undo(worker, "new", other)),
                }
            });
            new.push(pod);
        }
        let message = refused(worker, &["pool", "remove", "ipv4"]);
        assert!(
            message.contains("2 blocks are claimed") && message.contains("blocks are released when"),
            "{message}"
        );
    });
    assert_flat(&[old.clone(), new.clone()].concat(), 1450);
    without_packet_loss(&new, || {
        lab.workers.iter().zip(&old).for_each(|(worker, pod)| worker.delete(pod));
        wait::within(TIMEOUT * 3, "all blocks to go back", || {
            let pool = pool(worker, "ipv4");
            if pool["blocks_owned"] == 0 { Ok(()) } else { Err(pool.to_string()) }
        });
        let nodes = worker.ctl(&["node", "list"]);
        for node in nodes.as_array().unwrap() {
            let gateways = node["gateways"].to_string();
            assert!(gateways.contains("10.245.") && !gateways.contains("10.244."), "{gateways}");
        }
        let done = worker.ctl(&["pool", "remove", "ipv4"]);
        assert!(done.as_str().unwrap().contains("10.244.0.0/16 is free for other uses"), "{done}");
        for worker in &lab.workers {
            wait::until_true("the pool to be gone", || pool(worker, "ipv4") == Value::Null);
            wait::until_true("its route to be gone", || {
                !worker.node.run("ip", &["route"]).contains("unreachable 10.244.0.0/16")
            });
        }
    });
    new.push(worker.pod("newer"));
    assert_flat(&new, 1450);
}

/// Cleans up after an unexpected ADD: deletes the pod, or its network namespace. Returns the reason.
fn undo(worker: &Worker, name: &str, pod: Result<Pod, Value>) -> String {
    match pod {
        Ok(pod) => {
            worker.delete(&pod);
            format!("{} went out", pod.v4())
        }
        Err(error) => {
            worker.node.run("ip", &["netns", "delete", name]);
            error.to_string()
        }
    }
}

#[test]
fn a_pool_that_was_drained_by_mistake_is_active_again_when_it_is_added_again() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let add = ["pool", "add", "p", "10.245.0.0/24", "--block-length", "28"];
    worker.ctl(&add);
    wait_for_pool(worker, "p");
    let before = worker.pod_with("before", &of_pool("p"));
    worker.ctl(&["pool", "drain", "p"]);
    wait::until("nothing of it to go out", || match worker.try_pod("refused", &of_pool("p")) {
        Err(error) if error["msg"].as_str().unwrap().contains("pool p (10.245.0.0/24) is draining") => Ok(()),
        // The agent may not know of the drain yet.
        other => Err(undo(worker, "refused", other)),
    });
    assert!(worker.ctl(&add).as_str().unwrap().contains("pool p is active again"));
    let after = worker.pod_within(TIMEOUT, "after", &of_pool("p"));
    assert_flat(&[before, after], 1450);
}

#[test]
fn a_cluster_changes_from_two_families_to_one_without_disconnecting_pods() {
    let mut lab = Lab::build(Topology::one_segment(2).families(Families::DUAL));
    lab.workers.iter().for_each(|worker| configure(worker, SHORT_COOL_DOWN));
    lab.start_agents();
    let worker = &lab.workers[0];
    let dual = worker.pod("dual");
    let message = worker.ctl(&["pool", "drain", "ipv6"]);
    assert!(message.to_string().contains("new pods get no IPv6 address"), "{message}");
    let pods: Vec<Pod> = lab
        .workers
        .iter()
        .map(|worker| {
            wait::until("a pod without IPv6", || {
                let pod = worker.pod("single");
                if pod.addresses().len() == 1 {
                    return Ok(pod);
                }
                worker.delete(&pod);
                Err("it has IPv6".to_owned())
            })
        })
        .collect();
    assert_flat_over(Families::V4, &[dual.clone(), pods[0].clone(), pods[1].clone()], 1450);
    let used = refused(worker, &["pool", "remove", "ipv6"]);
    assert!(used.contains("blocks are claimed"), "{used}");
    // The gateway of the pod with IPv6 stays until the pod is deleted.
    let gateway = dual.gateway(dual.address_of(polder_api::Family::V6)).to_string();
    assert!(worker.node.run("ip", &["address", "show", "dev", "polder0"]).contains(&gateway));
    worker.delete(&dual);
    wait::until("the pool to be empty", || worker.try_ctl(&["pool", "remove", "ipv6"]));
    assert!(lab.workers.iter().all(|worker| worker.status()["ready"] == true));
    assert!(!worker.node.run("ip", &["-6", "address", "show", "dev", "polder0"]).contains("fd00:244"));
    assert!(worker.ctl_verdict(&["ipam", "check"]).0, "something deviates");
    assert_flat(&pods, 1450);
}

#[test]
fn a_shortage_of_addresses_is_announced_and_reported_until_a_del() {
    let mut lab = Lab::build(Topology::one_segment(1));
    configure(&lab.workers[0], SHORT_COOL_DOWN);
    lab.start_agents();
    let worker = &lab.workers[0];
    // Eight blocks of four addresses. Not for pods: one address per block, for a gateway, and both ends of the pool.
    worker.ctl(&["pool", "add", "tiny", "10.245.0.0/27", "--block-length", "30"]);
    wait_for_pool(worker, "tiny");
    let metric = |name: &str| {
        let (_, text) = worker.http("/metrics");
        let line = text.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        let value = line.as_deref().and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        value.unwrap_or_else(|| panic!("{name} is not in {text}"))
    };
    let problems = || worker.status()["problems"].to_string();
    let conf = of_pool("tiny");
    let mut pods = Vec::new();
    let mut announced = Vec::new();
    for number in 0..22 {
        pods.push(worker.pod_with(&format!("p{number}"), &conf));
        // The claim is visible when the ADD has returned.
        let claimed = pool(worker, "tiny")["blocks_owned"].as_f64().unwrap() / 8.0;
        assert!((metric("polder_pool_used_ratio{pool=\"tiny\"}") - claimed).abs() < 1e-9);
        let level =
            ["80 %", "95 %"].iter().rposition(|level| problems().contains(&format!("at least {level}")));
        assert_eq!(level, [0.8, 0.95].iter().rposition(|level| claimed >= *level), "{}", problems());
        announced.extend(level);
    }
    announced.dedup();
    assert_eq!(announced, [0, 1], "it is announced in two steps");
    assert!(problems().contains("pool tiny (10.245.0.0/27): 8 of 8 blocks are claimed"), "{}", problems());
    for (state, number) in [("owned", 8.0), ("free", 0.0)] {
        let found = metric(&format!("polder_pool_blocks{{pool=\"tiny\",state=\"{state}\"}}"));
        assert!((found - number).abs() < 1e-9, "{found} blocks are {state}");
    }
    let error = worker.try_pod("one-too-many", &conf).unwrap_err();
    worker.node.run("ip", &["netns", "delete", "one-too-many"]);
    assert_eq!(error["code"], 100, "{error}");
    let message = error["msg"].as_str().unwrap();
    for expected in [
        "this node is available (total 32: 22 used, 0 in cool-down, 10 excluded, 0 free)",
        "pool tiny (10.245.0.0/27) has no free block (claimed 8 of 8; n1: 8)",
        "Add a pool with polderctl pool add",
    ] {
        assert!(message.contains(expected), "{expected} in {message}");
    }
    assert_eq!(plugin_status(worker, &Worker::netconf("1.1.0")), Ok(()), "another pool has addresses");
    assert_eq!(plugin_status(worker, &conf), Ok(()), "its pods would be evicted");
    let freed = pods.pop().unwrap();
    worker.delete(&freed);
    // The address is in cool-down first.
    let next = worker.pod_within(TIMEOUT * 2, "next", &conf);
    assert_eq!(next.v4(), freed.v4());
    pods.push(next);
    let addresses: BTreeSet<IpAddr> = pods.iter().map(Pod::v4).collect();
    assert_eq!(addresses.len(), 22);
    assert_flat(&pods[18..], 1450);
}
