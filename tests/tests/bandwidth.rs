//! Bandwidth limits of pods: the capability `bandwidth`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use polder_api::Family;
use polder_tests::agent::Worker;
use polder_tests::cni::{code, conf, message};
use polder_tests::fabric::Families;
use polder_tests::traces::assert_nothing_left;
use polder_tests::{Lab, Pod, Topology};
use serde_json::{Value, json};

/// The limit, in bits per second and bytes per second.
const BITS: u64 = 20_000_000;
const BYTES: u64 = BITS / 8;

/// The bucket without a requested burst, and the queue: the bucket and 25 ms.
const BUCKET: u64 = 128 << 10;
const QUEUE: u64 = BUCKET + BYTES / 40;

/// The number of bytes of one transfer: 0.8 s at the limit.
const AMOUNT: usize = 2 << 20;

/// How many times longer a limited transfer takes, at least. On an idle machine it takes 100 times as long.
const RATIO: u32 = 3;

const TIMEOUT: Duration = Duration::from_secs(60);

/// The configuration with this value of the capability.
fn limited(bandwidth: &Value) -> Value {
    conf("1.1.0", &json!({ "runtimeConfig": { "bandwidth": bandwidth } }))
}

/// Sends `AMOUNT` bytes from one pod to the other. Returns the time until the last one arrived.
fn transfer(from: &Pod, to: &Pod, family: Family) -> Duration {
    let address = to.address_of(family);
    let listener = to.within(|| TcpListener::bind((address, 0))).unwrap();
    let mut sender = from.within(|| TcpStream::connect(listener.local_addr().unwrap())).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    sender.set_write_timeout(Some(TIMEOUT)).unwrap();
    receiver.set_read_timeout(Some(TIMEOUT)).unwrap();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sender.write_all(&vec![b'.'; AMOUNT]).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut bytes = Vec::new();
        receiver.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), AMOUNT);
    });
    start.elapsed()
}

/// The root queueing discipline of the interface, as `tc` shows it: `command` runs `tc` in its namespace.
fn queueing(run: impl Fn(&str, &[&str]) -> String, interface: &str) -> Value {
    let shown = run("tc", &["-j", "-s", "-r", "qdisc", "show", "dev", interface]);
    let mut found: Vec<Value> = serde_json::from_str(&shown).unwrap();
    // The fast path has one beside it, which only holds its programs.
    found.retain(|found| found["kind"] != "clsact");
    assert_eq!(found.len(), 1, "{shown}");
    found.remove(0)
}

fn on_the_host(worker: &Worker, pod: &Pod) -> Value {
    queueing(|program, arguments| worker.node.run(program, arguments), &pod.host_interface())
}

fn in_the_pod(pod: &Pod) -> Value {
    queueing(|program, arguments| pod.run(program, arguments), "eth0")
}

/// Checks that the filter has the limit, and the bucket and queue of a burst that is not given.
fn assert_limits(found: &Value) {
    assert_eq!(found["kind"], "tbf", "{found}");
    let options = &found["options"];
    assert_eq!((&options["rate"], &options["limit"]), (&json!(BYTES), &json!(QUEUE)), "{found}");
    // `tc` computes it from whole microseconds.
    let bucket = options["burst"].as_u64().unwrap();
    assert!((BUCKET - 4..=BUCKET).contains(&bucket), "{found}");
}

fn assert_unlimited(found: &Value) {
    assert_eq!(found["kind"], "noqueue", "{found}");
}

/// How many bytes have passed.
fn passed(found: &Value) -> usize {
    usize::try_from(found["bytes"].as_u64().unwrap()).unwrap()
}

#[test]
fn a_bridged_pod_is_limited_in_each_direction() {
    assert_limited_in_each_direction("bridge");
}

#[test]
fn a_routed_pod_is_limited_in_each_direction() {
    assert_limited_in_each_direction("routed");
}

fn assert_limited_in_each_direction(attach: &str) {
    let topology = Topology::one_segment(1).families(Families::DUAL);
    let lab = Lab::start(topology.bootstrap(&format!("attach = {attach:?}")));
    let worker = &lab.workers[0];
    let [one, other] = ["one", "other"].map(|name| worker.pod(name));
    let both = worker.pod_with("both", &limited(&json!({ "ingressRate": BITS, "egressRate": BITS })));
    // What containerd sends for a pod with only one annotation.
    let in_go = json!({ "IngressRate": BITS, "IngressBurst": u32::MAX, "EgressRate": 0, "EgressBurst": 0 });
    let ingress = worker.pod_with("ingress", &limited(&in_go));
    [on_the_host(worker, &one), in_the_pod(&one), in_the_pod(&ingress)].iter().for_each(assert_unlimited);
    [on_the_host(worker, &both), in_the_pod(&both), on_the_host(worker, &ingress)]
        .iter()
        .for_each(assert_limits);
    for family in Family::BOTH {
        let unlimited = transfer(&one, &other, family);
        for (from, to) in [(&one, &both), (&both, &one), (&one, &ingress)] {
            let before = [on_the_host(worker, to), in_the_pod(from)].map(|found| passed(&found));
            let took = transfer(from, to, family);
            let names = format!("{family} from {} to {}, {attach}", from.name(), to.name());
            println!("{names}: {took:?} instead of {unlimited:?}");
            assert!(took > unlimited * RATIO, "{names}: {took:?}, unlimited {unlimited:?}");
            let after = [on_the_host(worker, to), in_the_pod(from)].map(|found| passed(&found));
            // An interface without a queue counts nothing.
            let counted = after[0] - before[0] >= AMOUNT || after[1] - before[1] >= AMOUNT;
            assert!(counted, "{names}: {before:?}, {after:?}");
        }
        let (slow, fast) = (transfer(&one, &ingress, family), transfer(&ingress, &one, family));
        assert!(slow > fast * RATIO, "{family}, {attach}: {slow:?} to the pod, {fast:?} from it");
    }
    [&one, &other, &both, &ingress].iter().for_each(|pod| worker.delete(pod));
    let left = worker.node.run("tc", &["qdisc", "show"]);
    assert!(!left.contains("tbf"), "{left}");
}

#[test]
fn a_given_burst_is_the_size_of_the_bucket() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let pod = worker.pod_with("a", &limited(&json!({ "ingressRate": BITS, "ingressBurst": 4_000_000 })));
    let found = on_the_host(worker, &pod);
    assert_eq!(found["options"]["limit"], 500_000 + BYTES / 40, "{found}");
    // A bucket below the size of a packet would drop all full packets.
    let small = worker.pod_with("b", &limited(&json!({ "ingressRate": BITS, "ingressBurst": 80 })));
    transfer(&pod, &small, Family::V4);
}

#[test]
fn an_invalid_limit_is_refused_before_anything_is_created() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    for bandwidth in
        [json!({ "ingressRate": -1 }), json!({ "EgressBurst": 8000 }), json!({ "egressRate": "1M" })]
    {
        assert_eq!(code(worker.cni("ADD", "a", &netns, &limited(&bandwidth))), 7, "{bandwidth}");
    }
    assert_nothing_left(&lab, worker);
}

#[test]
fn check_finds_a_limit_that_was_changed_if_the_runtime_passes_it() {
    let mut lab = Lab::start_node();
    let pod =
        lab.workers[0].pod_with("a", &limited(&json!({ "IngressRate": BITS, "IngressBurst": u32::MAX })));
    let host = pod.host_interface();
    // With the agent, and without it.
    for _ in 0..2 {
        let worker = &lab.workers[0];
        let check = |more: &Value| {
            let mut asked = pod.later_conf();
            asked["runtimeConfig"] = more.clone();
            worker.cni("CHECK", pod.name(), pod.netns(), &asked)
        };
        let passed = &pod.conf()["runtimeConfig"];
        assert_eq!(check(passed), Ok(Value::Null));
        worker.node.run("tc", &["qdisc", "del", "dev", &host, "root"]);
        assert_eq!(check(passed), Ok(Value::Null), "an earlier release may have attached it");
        for other in [json!({}), json!({ "bandwidth": { "ingressRate": -1 } }), json!({ "bandwidth": 1 })] {
            assert_eq!(check(&other), Ok(Value::Null), "{other}");
        }
        let words = "qdisc add dev HOST root tbf rate 10mbit burst 128kb limit 200000".replace("HOST", &host);
        worker.node.run("tc", &words.split(' ').collect::<Vec<_>>());
        let found = message(check(passed));
        let expected = "limits the bandwidth to the pod to 1250000 instead of 2500000 byte/s";
        assert!(found.contains(expected), "{found}");
        let words = words.replace("add", "change").replace("10mbit", "20mbit");
        worker.node.run("tc", &words.split(' ').collect::<Vec<_>>());
        lab.workers[0].kill();
    }
}
