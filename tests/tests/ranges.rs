//! Pools whose ranges the nodes need for other purposes, or that pods cannot use: rejected, reported, and removed.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::matrix::assert_flat;
use polder_tests::routes::wait_for_routes;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Topology, wait};
use serde_json::{Value, json};

const ETCD: &str = "10.10.1.200";

/// The error message of a `polderctl` command that must fail.
fn refused(worker: &Worker, arguments: &[&str]) -> String {
    worker.try_ctl(arguments).expect_err(&format!("{arguments:?} was done"))
}

/// Writes a pool's record to etcd directly, without the checks of `polderctl`.
fn write_pool(lab: &Lab, name: &str, cidr: &str, block_length: u8) {
    let record = json!({ "cidr": cidr, "block_length": block_length, "state": "active" });
    lab.etcd.ctl(&["put", &format!("/polder/v1/pools/{name}"), &record.to_string()]);
}

/// Waits until the node's status reports a problem with this pool's record. Returns its text.
fn problem(worker: &Worker, pool: &str) -> String {
    let key = format!("/polder/v1/pools/{pool} ");
    worker.wait_for_status(&format!("the record of pool {pool} to be named"), |status| {
        let problems = status["problems"].as_array()?.iter();
        problems.filter_map(Value::as_str).find(|problem| problem.contains(&key)).map(str::to_owned)
    })
}

/// Waits until the node is ready, is connected to etcd, and has no problem.
fn wait_until_ready_without_problems(worker: &Worker) {
    worker.wait_for_status("the node to be ready without problems", |status| {
        let has_no_problem = status["ready"] == true && status["problems"] == json!([]);
        (has_no_problem && status["store"]["state"] == "connected").then_some(())
    });
}

/// A lab whose agents start a pass every second.
fn busy(topology: Topology) -> Lab {
    let mut lab = Lab::build(topology);
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    lab
}

/// Waits until a pass has used the agent's current records. The pass in progress may use older ones, so it waits for
/// two.
fn wait_for_a_pass(worker: &Worker) {
    let count = |status: &Value| status["last_pass"]["count"].as_u64().unwrap_or_default();
    let before = count(&worker.status());
    worker.wait_for_status("two passes", |status| (count(status) >= before + 2).then_some(()));
}

/// The route that the node's kernel chooses.
fn route_to(worker: &Worker, address: &str) -> String {
    worker.node.shell(&format!("ip route get {address} 2>&1 || true"))
}

fn assert_reaches_etcd(worker: &Worker) {
    let route = route_to(worker, ETCD);
    assert!(route.contains("dev eth0"), "{}: {route}", worker.name());
    let own = worker.node.run("ip", &["route", "show", "proto", "84"]);
    let leads_there = |line: &str| line.trim_start_matches("unreachable ").starts_with("10.10.1.");
    assert!(!own.lines().any(leads_there), "{}: {own}", worker.name());
}

#[test]
fn a_pool_that_contains_addresses_of_the_infrastructure_is_not_added() {
    let lab = Lab::start(Topology::two_segments());
    for (worker, range, expected) in [
        (0, "10.10.1.192/26", "10.10.1.200, the address of etcd"),
        (2, "10.10.1.192/26", "10.10.1.200, the address of etcd"),
        (0, "10.10.1.128/26", "10.10.1.0/24, the network of this node's interface eth0"),
        (0, "10.10.1.0/24", "10.10.1.1, this node's own address"),
        // Only the record of node n3 shows this address here.
        (0, "10.10.2.0/26", "10.10.2.3, the underlay address of node n3"),
        (2, "10.10.2.192/26", "10.10.2.254, a gateway of this node's routes"),
    ] {
        let message = refused(&lab.workers[worker], &["pool", "add", "oops", range]);
        assert!(message.contains(expected) && message.contains("choose another"), "{range}: {message}");
    }
    assert_eq!(lab.etcd.keys("/polder/v1/pools/"), ["/polder/v1/pools/ipv4"]);
    lab.workers.iter().for_each(assert_reaches_etcd);
}

#[test]
fn etcd_stays_reachable_with_a_pool_record_that_contains_it() {
    let lab = Lab::start(Topology::two_segments());
    let before = lab.workers[0].pod("before");
    write_pool(&lab, "oops", "10.10.1.192/26", 26);
    for worker in &lab.workers {
        let message = problem(worker, "oops");
        assert!(message.contains("10.10.1.200, the address of etcd"), "{message}");
        assert!(message.contains("polderctl pool remove oops"), "{message}");
        assert_reaches_etcd(worker);
    }
    // The rest works, and the nodes still receive changes from etcd.
    let after = lab.workers[2].pod("after");
    assert_flat(&[before, after], 1450);
    let claims = lab.workers[1].ctl(&["block", "list"]).to_string();
    assert!(!claims.contains("10.10.1."), "{claims}");
    lab.workers[1].ctl(&["pool", "drain", "oops"]);
    let done = lab.workers[2].ctl(&["pool", "remove", "oops"]);
    assert!(done.as_str().unwrap().contains("pool oops is removed"), "{done}");
    for worker in &lab.workers {
        wait_until_ready_without_problems(worker);
        assert_reaches_etcd(worker);
    }
}

#[test]
fn etcd_stays_reachable_with_a_claimed_block_in_a_pool_that_contains_it() {
    let lab = busy(Topology::two_segments());
    // A pool in use is not left out like an unused one: without the check there would be routes to its blocks.
    let block = "/polder/v1/blocks/4-0a0a01c0-26";
    let claim = json!({ "node": "n9", "incarnation": "gone", "pool": "oops", "nonce": "by-hand" });
    lab.etcd.ctl(&["put", block, &claim.to_string()]);
    write_pool(&lab, "oops", "10.10.1.192/26", 26);
    for worker in &lab.workers {
        let message = problem(worker, "oops");
        assert!(message.contains("10.10.1.200, the address of etcd"), "{message}");
        assert!(message.contains("not routed to pods on this node"), "{message}");
        wait_for_a_pass(worker);
        assert_reaches_etcd(worker);
    }
    lab.etcd.ctl(&["del", block]);
    lab.workers[1].ctl(&["pool", "remove", "oops"]);
    lab.workers.iter().for_each(wait_until_ready_without_problems);
}

#[test]
fn etcd_with_a_dns_name_stays_reachable_too() {
    let mut lab = Lab::build(Topology::two_segments());
    for worker in &lab.workers {
        worker.node.shell(&format!("echo {ETCD} etcd.example >> /etc/hosts"));
        worker.configure(&worker.configuration().replace(ETCD, "etcd.example"));
    }
    lab.start_agents();
    // This node is behind a router: only the configured name shows that the address is needed.
    let worker = &lab.workers[2];
    let message = refused(worker, &["pool", "add", "oops", "10.10.1.192/26"]);
    assert!(message.contains("10.10.1.200, the address of etcd (etcd.example)"), "{message}");
    write_pool(&lab, "oops", "10.10.1.192/26", 26);
    let message = problem(worker, "oops");
    assert!(message.contains("10.10.1.200, the address of etcd"), "{message}");
    lab.workers.iter().for_each(assert_reaches_etcd);
    worker.ctl(&["pool", "remove", "oops"]);
    lab.workers.iter().for_each(wait_until_ready_without_problems);
}

#[test]
fn an_old_route_that_hides_etcd_is_deleted_at_the_start() {
    let mut lab = Lab::start(Topology::two_segments());
    // With the snapshot, and without; with the metric of this release, and with another one.
    let forgets = ["true", "rm -f /var/lib/polder/cluster.json"];
    for (forget, metric) in forgets.into_iter().flat_map(|forget| [(forget, 91), (forget, 84)]) {
        let worker = &mut lab.workers[2];
        worker.kill();
        worker
            .node
            .shell(&format!("{forget}; ip route add unreachable 10.10.1.192/26 metric {metric} proto 84"));
        assert!(!route_to(worker, ETCD).contains("dev eth0"), "etcd is not taken away");
        worker.start();
        wait_until_ready_without_problems(worker);
        assert_reaches_etcd(worker);
    }
}

#[test]
fn first_pools_that_contain_etcd_are_not_created_until_they_are_corrected() {
    let topology = Topology { pools: vec!["10.10.1.0/24"], nodes: vec![2, 2], ..Topology::two_segments() };
    let mut lab = Lab::build(topology);
    lab.workers.iter_mut().for_each(Worker::start);
    for worker in &lab.workers {
        worker.wait_for_status("the reason", |status| {
            let reasons = status["reasons"].to_string();
            let parts = ["bootstrap.pools", "10.10.1.200, the address of etcd", "10.10.1.0/24"];
            parts.iter().all(|part| reasons.contains(part)).then_some(())
        });
        assert_reaches_etcd(worker);
    }
    assert_eq!(lab.etcd.keys("/polder/v1/pools/"), Vec::<String>::new());
    for worker in &mut lab.workers {
        worker.kill();
        worker.configure(&worker.configuration().replace("\"10.10.1.0/24\"", "\"10.244.0.0/16\""));
        worker.start();
    }
    lab.workers.iter().for_each(wait_until_ready_without_problems);
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&pods, 1450);
}

#[test]
fn a_network_known_to_one_node_stays_reachable_and_the_overlap_is_reported() {
    let lab = busy(Topology::one_segment(2));
    let [first, second] = lab.workers.as_slice() else { panic!("two nodes") };
    second.node.shell(
        "ip link add other0 type bridge; ip address add 10.77.0.1/24 dev other0; ip link set other0 up",
    );
    wait::until("the network to be known", || {
        let message = second.try_ctl(&["pool", "add", "p", "10.77.0.0/24"]).err().unwrap_or_default();
        if !message.is_empty() {
            return Ok(());
        }
        second.ctl(&["pool", "remove", "p"]);
        Err("it was added".to_owned())
    });
    // Each block is narrower than that network: the kernel would prefer the route to the block.
    first.ctl(&["pool", "add", "p", "10.77.0.0/24"]);
    let message = problem(second, "p");
    assert!(message.contains("10.77.0.0/24, the network of this node's interface other0"), "{message}");
    let mut conf = Worker::netconf("1.1.0");
    conf["pool"] = json!("p");
    let pod = first.pod_with("there", &conf);
    assert!(pod.v4().to_string().starts_with("10.77.0."), "{}", pod.v4());
    wait::until_true("the block to be known", || {
        second.ctl(&["block", "list"]).to_string().contains("10.77.0.")
    });
    wait_for_a_pass(second);
    for address in [&pod.v4().to_string(), "10.77.0.2", "10.77.0.70", "10.77.0.130", "10.77.0.254"] {
        assert!(route_to(second, address).contains("dev other0"), "{address}: {}", route_to(second, address));
    }
    second.node.run("ip", &["link", "delete", "other0"]);
    wait_until_ready_without_problems(second);
    let here = second.pod_with("here", &conf);
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&[pod, here], 1450);
}

#[test]
fn a_range_that_pods_cannot_use_is_not_added() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    for (range, expected) in [
        ("ff02::/64", "multicast"),
        ("224.0.0.0/16", "multicast"),
        ("169.254.0.0/16", "169.254.0.0/16 (link-local, with the metadata addresses of clouds, RFC 3927)"),
        ("127.0.0.0/16", "loopback"),
        ("fe80::/64", "link-local"),
        ("0.0.0.0/8", "RFC 791"),
        ("::/64", "RFC 4291"),
        ("240.0.0.0/8", "reserved"),
        ("255.255.255.0/24", "reserved"),
        ("64:ff9b::/96", "NAT64"),
        ("2002::/16", "6to4"),
        ("2001:db8::/56", "documentation"),
    ] {
        let message = refused(worker, &["pool", "add", "odd", range]);
        assert!(
            message.contains(&format!("{range} cannot be a pool")) && message.contains(expected),
            "{range}: {message}"
        );
        let message = refused(worker, &["pool", "add", "odd", range, "--reservations"]);
        assert!(message.contains("cannot be a pool"), "{range}: {message}");
    }
    for (range, length) in [("10.245.0.0/24", "32"), ("10.245.0.0/24", "31"), ("fd00:9::/64", "128")] {
        let message = refused(worker, &["pool", "add", "odd", range, "--block-length", length]);
        assert!(message.contains("too small") && message.contains("--block-length"), "{range}: {message}");
    }
    assert_eq!(lab.etcd.keys("/polder/v1/pools/"), ["/polder/v1/pools/ipv4"]);
    for (range, expected) in [
        ("10.96.0.0/16", "kubeadm's default range for Services"),
        ("100.64.0.0/16", "RFC 6598"),
        ("11.1.0.0/16", "public address space"),
    ] {
        let done = worker.ctl(&["pool", "add", "doubtful", range]);
        let done = done.as_str().unwrap();
        assert!(done.contains("pool doubtful is added") && done.contains("\nwarning: "), "{done}");
        assert!(done.contains(expected), "{done}");
        worker.ctl(&["pool", "remove", "doubtful"]);
    }
}

#[test]
fn a_pool_record_that_pods_cannot_use_affects_nothing_and_can_be_removed() {
    let lab = Lab::start(Topology::one_segment(2));
    write_pool(&lab, "odd", "ff02::/64", 122);
    write_pool(&lab, "meta", "169.254.0.0/16", 26);
    write_pool(&lab, "tiny", "10.245.0.0/24", 32);
    for worker in &lab.workers {
        for (pool, expected) in [("odd", "multicast"), ("meta", "link-local"), ("tiny", "too small")] {
            let message = problem(worker, pool);
            let remedy = format!("polderctl pool remove {pool}");
            assert!(message.contains(expected) && message.contains(&remedy), "{message}");
        }
        assert_eq!(worker.status()["ready"], true);
        let route = worker.node.shell("ip route; ip -6 route");
        assert!(!route.contains("169.254.0.0/16") && !route.contains("10.245.0.0"), "{route}");
    }
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
    // Other pools can still be added.
    lab.workers[0].ctl(&["pool", "add", "more", "10.246.0.0/16"]);
    for pool in ["odd", "meta", "tiny"] {
        let done = lab.workers[0].ctl(&["pool", "remove", pool]);
        assert!(done.as_str().unwrap().contains(&format!("pool {pool} is removed")), "{done}");
    }
    lab.workers.iter().for_each(wait_until_ready_without_problems);
}

#[test]
fn a_claimed_block_without_pod_addresses_ends_the_add() {
    let lab = Lab::start(Topology::one_segment(2));
    // A node has claimed a block: the pool is in use, although its blocks are too small.
    let record = lab.etcd.ctl(&["get", "--print-value-only", "/polder/v1/nodes/n2"]);
    let record: Value = serde_json::from_str(record.trim()).unwrap();
    let claim =
        json!({ "node": "n2", "incarnation": record["incarnation"], "pool": "tiny", "nonce": "by-hand" });
    lab.etcd.ctl(&["put", "/polder/v1/blocks/4-0af50005-32", &claim.to_string()]);
    write_pool(&lab, "tiny", "10.245.0.0/24", 32);
    let worker = &lab.workers[0];
    let message = problem(worker, "tiny");
    assert!(message.contains("too small") && message.contains("polderctl pool drain tiny"), "{message}");
    let mut conf = Worker::netconf("1.1.0");
    conf["pool"] = json!("tiny");
    let error = worker.try_pod("a", &conf).unwrap_err();
    let message = error["msg"].as_str().unwrap();
    assert!(error["code"] == 100 && message.contains("has no address for pods"), "{error}");
    let claims = || lab.etcd.keys("/polder/v1/blocks/4-0af500").len();
    let after = claims();
    assert!(after <= 4, "{after} blocks");
    // No work continues in the background: another ADD succeeds, and no more blocks are claimed.
    worker.pod("b");
    assert_eq!(claims(), after);
}

/// The smallest accepted pools and blocks: each has an address for a pod.
#[test]
fn the_smallest_permitted_pools_give_addresses_to_pods() {
    for (range, length) in [("10.244.0.0/31", 31), ("10.244.0.0/30", 30), ("10.244.0.0/29", 30)] {
        let table = format!("{{ cidr = \"{range}\", block_length = {length} }}");
        let mut lab = Lab::build(Topology::one_segment(1));
        lab.workers[0].configure(&lab.workers[0].configuration().replace("\"10.244.0.0/16\"", &table));
        lab.workers[0].start_and_wait();
        lab.workers[0].pod("a");
        // When no address is left, the ADD fails with that reason, and no more blocks are claimed.
        let error = wait::until("the pool to be used up", || {
            let name = format!("more-{}", lab.workers[0].status()["pods"]);
            lab.workers[0].try_pod(&name, &Worker::netconf("1.1.0")).err().ok_or_else(|| name.clone())
        });
        assert_eq!(error["code"], 100, "{range}: {error}");
        let claims = lab.etcd.keys("/polder/v1/blocks/").len();
        assert!(claims <= 2, "{range}: {claims} blocks");
    }
}
