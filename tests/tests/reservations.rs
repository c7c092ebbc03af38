//! Addresses that are reserved for workloads by name, on any node.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::net::IpAddr;

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat_over;
use polder_tests::probe::{self, Echo};
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Three nodes, with a pool for reservations.
fn lab() -> Lab {
    let lab = Lab::start(Topology::two_segments().families(Families::DUAL));
    let pool = r#"{"cidr":"10.99.0.0/24","block_length":26,"state":"active","purpose":"reservations"}"#;
    lab.etcd.ctl(&["put", "/polder/v1/pools/static", pool]);
    for worker in &lab.workers {
        wait::until_true("the pool to be known", || {
            worker.node.run("ip", &["route", "show", "proto", "84"]).contains("10.99.0.0/24")
        });
    }
    lab
}

fn asking(annotations: Value) -> Value {
    let mut conf = Worker::netconf("1.1.0");
    conf["runtimeConfig"] = json!({ ANNOTATIONS: annotations });
    conf
}

fn by_name() -> Value {
    asking(json!({ "polder.dev/pool": "static" }))
}

fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 99, 0, last])
}

/// Calls the plugin for another sandbox of a pod.
fn add_sandbox(
    worker: &Worker,
    pod: &str,
    container: &str,
    verb: &str,
    conf: &Value,
) -> Result<Value, Value> {
    if verb == "ADD" {
        worker.namespace(container);
    }
    let variables = [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", container),
        ("CNI_NETNS", &format!("/run/netns/{container}")),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", &Worker::cni_path()),
        ("CNI_ARGS", &format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=lab;K8S_POD_NAME={pod}")),
    ];
    let output = worker.plugin(&variables, &conf.to_string());
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    if output.status.success() { Ok(json) } else { Err(json) }
}

fn assert_reachable(from: &Pod, to: &Pod) {
    let _echo = to.within(|| Echo::start(to.v4()));
    let seen =
        wait::until("the address to be reached", || from.within(|| probe::udp(from.v4(), to.v4(), 100)));
    assert_eq!(seen.0, from.v4(), "the workload sees who calls");
}

fn holder(lab: &Lab, address: IpAddr) -> Value {
    let key = format!("/polder/v1/reservations/{address}");
    serde_json::from_str(lab.etcd.ctl(&["get", "--print-value-only", &key]).trim()).unwrap_or_default()
}

#[test]
fn a_workload_keeps_its_address_on_every_node() {
    let lab = lab();
    let (here, there) = (&lab.workers[0], &lab.workers[1]);
    let others = [here.pod("other"), there.pod("another")];
    let pod = here.pod_with("web-0", &by_name());
    let own = pod.v4();
    assert_eq!(own, address(1));
    others.iter().for_each(|other| assert_reachable(other, &pod));
    assert_eq!(here.pod_with("web-1", &by_name()).v4(), address(2), "another workload has another");

    here.delete(&pod);
    wait::until_true("the address to be let go", || holder(&lab, own)["holder"].is_null());
    assert_eq!(holder(&lab, own)["owner"], "lab/web-0", "the workload keeps it");
    // The other node may not know of the release yet.
    let pod = there.pod_within(TIMEOUT, "web-0", &by_name());
    assert_eq!(pod.v4(), own);
    others.iter().for_each(|other| assert_reachable(other, &pod));

    // A late DEL from the runtime of the old sandbox changes nothing.
    for _ in 0..2 {
        assert!(here.cni("DEL", "web-0", "", &by_name()).is_ok());
    }
    assert_eq!(holder(&lab, own)["holder"]["node"], "n2");
    others.iter().for_each(|other| assert_reachable(other, &pod));
}

#[test]
fn a_requested_address_is_reserved_and_comes_with_one_of_the_other_family() {
    let lab = lab();
    let pod =
        lab.workers[0].pod_with("db-0", &asking(json!({ "polder.dev/address": address(40).to_string() })));
    assert_eq!((pod.v4(), pod.addresses().len()), (address(40), 2));
    let other = lab.workers[1].pod("b");
    assert_reachable(&other, &pod);
    assert_flat_over(Families::DUAL, &[pod, other, lab.workers[0].pod("c")], 1450);
    let wanted = asking(json!({ "polder.dev/address": address(40).to_string() }));
    let error = lab.workers[1].try_pod("db-1", &wanted).unwrap_err();
    assert!(error["code"] == 101, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("10.99.0.40 is reserved for lab/db-0"), "{error}");
}

#[test]
fn an_add_waits_for_a_holder_that_is_being_deleted() {
    let lab = lab();
    let worker = &lab.workers[0];
    let own = worker.pod_with("web-0", &by_name()).v4();
    // As for a pod of a StatefulSet that is deleted by force: the DEL comes after the ADD of the next pod.
    std::thread::scope(|scope| {
        let add = scope.spawn(|| add_sandbox(worker, "web-0", "next", "ADD", &by_name()));
        wait::until_true("the ADD to be refused once", || worker.log().contains("no reserved address"));
        assert!(worker.cni("DEL", "web-0", "", &by_name()).is_ok());
        let result = add.join().unwrap().unwrap();
        assert!(result.to_string().contains(&own.to_string()), "{result}");
    });
}

#[test]
fn an_address_is_not_handed_over_while_its_holder_may_be_running() {
    let mut lab = lab();
    let pod = lab.workers[0].pod_with("web-0", &by_name());
    let own = pod.v4();
    let refused = |worker: &Worker, container: &str| {
        let error = add_sandbox(worker, "web-0", container, "ADD", &by_name()).unwrap_err();
        assert_eq!(error["code"], 11, "{error}");
        error["msg"].as_str().unwrap().to_owned()
    };
    let message = refused(&lab.workers[1], "again");
    assert!(message.contains("still held by polder/web-0/eth0 on node n1"), "{message}");
    let message = refused(&lab.workers[0], "again");
    assert!(
        message.contains("assigned again when that pod is gone") && !message.contains("node remove"),
        "{message}"
    );
    // An unreachable node may still run its pods.
    lab.workers[0].kill();
    lab.etcd.ctl(&["del", "/polder/v1/alive/n1"]);
    refused(&lab.workers[1], "still");
    lab.workers[1].ctl(&["node", "remove", "n1"]);
    let message = refused(&lab.workers[1], "and-still");
    assert!(message.contains("has not confirmed"), "{message}");
    // The node comes back, disconnects the pod and confirms that.
    lab.workers[0].start();
    let there = &lab.workers[1];
    let result = wait::until("the address to be handed over", || add_sandbox_again(there, "web-0", "retry"));
    assert_eq!(result["ips"][0]["address"], format!("{own}/32"));
}

fn add_sandbox_again(worker: &Worker, pod: &str, container: &str) -> Result<Value, String> {
    worker.node.shell(&format!("ip netns del {container} 2>/dev/null || true"));
    add_sandbox(worker, pod, container, "ADD", &by_name()).map_err(|error| error.to_string())
}

#[test]
fn after_a_reboot_of_its_node_an_address_can_be_handed_over() {
    let mut lab = lab();
    let pod = lab.workers[0].pod_with("web-0", &by_name());
    lab.reboot(0);
    lab.workers[0].start_and_wait();
    let there = &lab.workers[1];
    let result = wait::until("the address to be handed over", || add_sandbox_again(there, "web-0", "retry"));
    assert_eq!(result["ips"][0]["address"], format!("{}/32", pod.v4()));
}

#[test]
fn reservations_in_use_are_restored_to_an_emptied_datastore() {
    let lab = lab();
    let pod = lab.workers[0].pod_with("web-0", &by_name());
    lab.etcd.ctl(&["del", "--prefix", "/polder/v1/"]);
    wait::until_true("the reservation to be back", || {
        holder(&lab, pod.v4())["holder"]["attachment"]["container"] == "web-0"
    });
    assert_eq!(holder(&lab, pod.v4())["owner"], "lab/web-0");
    assert_reachable(&lab.workers[1].pod("b"), &pod);
}

#[test]
fn a_reservation_is_refused_for_a_pod_without_a_name() {
    let lab = lab();
    let worker = &lab.workers[0];
    worker.namespace("x");
    let variables = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "x"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", &Worker::cni_path()),
    ];
    let output = worker.plugin(&variables, &by_name().to_string());
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        error["code"] == 7 && error["msg"].as_str().unwrap().contains("needs the name of the pod"),
        "{error}"
    );
}
