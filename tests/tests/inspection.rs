//! Shows the owner of each address, checks all records, and releases addresses.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use polder_api::Attachment;
use polder_tests::agent::Worker;
use polder_tests::matrix::assert_flat;
use polder_tests::pod::Pod;
use polder_tests::{Lab, Topology, probe, wait};
use serde_json::{Value, json};

/// The record of an address of that container.
fn record(container: &str) -> String {
    json!({ "attachment": { "network": "polder", "container": container, "interface": "eth0" } }).to_string()
}

fn key(node: &str, address: IpAddr) -> String {
    format!("/polder/v1/addresses/{node}/{address}")
}

/// An unused address in the block of a pod.
fn beside(pod: &Pod) -> IpAddr {
    let IpAddr::V4(own) = pod.v4() else { panic!("IPv4") };
    Ipv4Addr::from_bits((own.to_bits() | 0x3f) - 3).into()
}

/// Waits until the IPv4 addresses of all pods are in the datastore.
fn wait_until_published(lab: &Lab, pods: &[&Pod]) {
    for pod in pods {
        let key = key(pod.node(), pod.v4());
        wait::until_true(&format!("{key} to be published"), || lab.etcd.keys(&key) == [key.as_str()]);
    }
}

/// The deviations that a check found, one line each: node and text.
fn findings(checked: &Value) -> Vec<String> {
    let found = checked["deviations"].as_array().unwrap().iter();
    found.map(|found| format!("{} {}", found["node"], found["what"].as_str().unwrap())).collect()
}

/// Whether one of the lines contains all signs.
fn any_line_contains(lines: &[String], parts: &[&str]) -> bool {
    lines.iter().any(|line| parts.iter().all(|part| line.contains(part)))
}

fn assert_clean(worker: &Worker) {
    let (clean, checked) = worker.ctl_verdict(&["ipam", "check"]);
    assert!(clean && checked["deviations"] == json!([]) && checked["silent"] == json!([]), "{checked}");
}

#[test]
fn deviations_in_the_records_and_on_nodes_are_reported_and_repaired() {
    let lab = Lab::start(Topology::one_segment(2));
    let [first, second] = lab.workers.as_slice() else { panic!("two nodes") };
    let pods = [first.pod("a"), first.pod("b"), first.pod("gone"), second.pod("c")];
    wait_until_published(&lab, &pods.iter().collect::<Vec<_>>());
    assert_clean(first);
    let ghost = beside(&pods[0]);
    let invented = beside(&pods[3]);
    lab.etcd.ctl(&["put", &key("n1", ghost), &record("ghost")]);
    lab.etcd.ctl(&["put", &key("n2", invented), "{}"]);
    lab.etcd.ctl(&["put", &key("n2", pods[0].v4()), &record("twice")]);
    lab.etcd.ctl(&["put", &key("n9", pods[0].v4()), &record("nowhere")]);
    lab.etcd.ctl(&["del", &key("n1", pods[1].v4())]);
    // Without a DEL, and long before the orphan collector treats the pod as gone.
    first.end_without_del(&pods[2]);
    let twice = pods[0].v4().to_string();
    let expected: Vec<Vec<String>> = [
        vec!["n1", "polder/ghost/eth0", "which does not have it"],
        vec!["n2", "cannot be read", &key("n2", invented)],
        vec!["n2", "polder/twice/eth0", &twice],
        vec!["n9", "polder/nowhere/eth0", &twice],
        vec!["n1", "the datastore has no record that polder/b/eth0"],
        vec!["n1", "polder/gone/eth0", "no interface"],
    ]
    .into_iter()
    .map(|parts| parts.into_iter().map(str::to_owned).collect())
    .collect();
    let all_told = |checked: &Value| {
        let lines = findings(checked);
        for parts in &expected {
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            assert!(any_line_contains(&lines, &parts), "{parts:?} is not in {lines:#?}");
        }
        assert_eq!(lines.len(), expected.len(), "{lines:#?}");
    };
    let (clean, checked) = second.ctl_verdict(&["ipam", "check"]);
    assert!(!clean);
    all_told(&checked);
    assert!(checked["deviations"].as_array().unwrap().iter().all(|found| found["repaired"] == false));
    let (clean, checked) = second.ctl_verdict(&["ipam", "check", "--repair"]);
    all_told(&checked);
    assert!(clean && checked["deviations"].as_array().unwrap().iter().all(|found| found["repaired"] == true));
    assert_clean(first);
    assert_eq!(first.status()["pods"], 2);
    wait_until_published(&lab, &[&pods[0], &pods[1], &pods[3]]);
    assert_eq!(lab.etcd.keys("/polder/v1/addresses/").len(), 3);
    for left in ["/polder/v1/inspection", "/polder/v1/answers/"] {
        assert_eq!(lab.etcd.keys(left), [] as [&str; 0]);
    }
    assert_flat(&[pods[0].clone(), pods[1].clone(), pods[3].clone()], 1450);
}

/// Creates a pod with that address, without an agent and without a ledger. No agent deletes its interface: after a loss
/// of records in the datastore, nothing is collected for a while.
fn create_by_hand(lab: &Lab, worker: &Worker, address: IpAddr, neighbour: &Pod) -> Attachment {
    lab.etcd.ctl(&["del", "/polder/v1/cluster"]);
    wait::until_true("the loss to be seen", || {
        worker.log().contains("keeping routes and tunnels to the affected nodes")
    });
    wait::until_true("the settings to be back", || lab.etcd.keys("/polder/v1/cluster").len() == 1);
    let attachment: Attachment = "polder/by-hand/eth0".parse().unwrap();
    worker.namespace("by-hand");
    let gateway = neighbour.gateway(neighbour.v4());
    let bridge = neighbour.result()["interfaces"][0]["mac"].as_str().unwrap();
    worker.node.shell(&format!(
        "ip link add {0} type veth peer name eth0 netns by-hand; ip link set {0} alias polder/by-hand/eth0; \
         ip -n by-hand address add {address}/32 dev eth0; ip -n by-hand link set eth0 up; ip link set {0} up; \
         ip -n by-hand neigh add {gateway} lladdr {bridge} dev eth0 nud permanent; \
         ip -n by-hand route add default via {gateway} dev eth0 onlink",
        attachment.host_interface()
    ));
    attachment
}

#[test]
fn a_running_pod_that_is_missing_in_the_ledger_is_added_and_reachable_again() {
    let lab = Lab::start(Topology::one_segment(2));
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    let address = beside(&pod);
    create_by_hand(&lab, worker, address, &pod);
    let (clean, checked) = worker.ctl_verdict(&["ipam", "check"]);
    let lines = findings(&checked);
    let parts = ["n1", "polder/by-hand/eth0 runs on n1", &address.to_string(), "is not in the ledger"];
    assert!(!clean && any_line_contains(&lines, &parts), "{lines:#?}");
    let (clean, checked) = worker.ctl_verdict(&["ipam", "check", "--repair"]);
    assert!(clean && any_line_contains(&findings(&checked), &parts), "{checked:#}");
    assert_eq!(worker.status()["pods"], 2);
    wait::until("the pod to answer", || probe::ping(worker.node.command("ping"), address, 56));
    let shown = worker.ctl(&["ipam", "show", &address.to_string()]);
    assert_eq!(shown["addresses"][0]["attachment"]["container"], "by-hand", "{shown}");
    // Its address is not allocated to other pods, and a DEL works as usual.
    let mut wish = Worker::netconf("1.1.0");
    wish["runtimeConfig"] = json!({ "ips": [address] });
    wish["capabilities"] = json!({ "ips": true });
    let error = worker.try_pod("greedy", &wish).unwrap_err();
    assert_eq!(error["code"], 101, "{error}");
    worker.cni("DEL", "by-hand", "/run/netns/by-hand", &Worker::netconf("1.1.0")).unwrap();
    assert_eq!(worker.status()["pods"], 1);
}

#[test]
fn an_overlapping_claim_is_reported_and_neither_owner_loses_its_block() {
    let lab = Lab::start(Topology::one_segment(2));
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    let node = lab.etcd.ctl(&["get", "--print-value-only", "/polder/v1/nodes/n2"]);
    let node: Value = serde_json::from_str(node.trim()).unwrap();
    let blocks = lab.workers[0].ctl(&["block", "list"]);
    let own = blocks.as_array().unwrap().iter().find(|block| block["node"] == "n1").unwrap();
    let base: IpAddr = own["block"].as_str().unwrap().split('/').next().unwrap().parse().unwrap();
    let IpAddr::V4(base) = base else { panic!("IPv4") };
    let claim =
        json!({ "node": "n2", "incarnation": node["incarnation"], "pool": "ipv4", "nonce": "by-hand" });
    let by_hand = format!("/polder/v1/blocks/4-{:08x}-28", base.to_bits());
    lab.etcd.ctl(&["put", &by_hand, &claim.to_string()]);
    for arguments in [&["ipam", "check"][..], &["ipam", "check", "--repair"]] {
        let (clean, checked) = lab.workers[1].ctl_verdict(arguments);
        let lines = findings(&checked);
        assert!(!clean && any_line_contains(&lines, &[&by_hand, "overlaps"]), "{lines:#?}");
    }
    assert_flat(&pods, 1450);
    lab.etcd.ctl(&["del", &by_hand]);
    lab.workers[0].wait_until_ready();
    assert_clean(&lab.workers[0]);
}

#[test]
fn an_address_in_use_twice_is_reported_and_not_added_to_the_ledger() {
    let lab = Lab::start(Topology::one_segment(2));
    let pod = lab.workers[0].pod("a");
    let worker = &lab.workers[1];
    let attachment = create_by_hand(&lab, worker, pod.v4(), &pod);
    let address = pod.v4().to_string();
    for arguments in [&["ipam", "check"][..], &["ipam", "check", "--repair"]] {
        let (clean, checked) = lab.workers[0].ctl_verdict(arguments);
        let lines = findings(&checked);
        let parts = ["n2", "polder/by-hand/eth0 runs on n2", &address, "is not in the ledger"];
        assert!(!clean && any_line_contains(&lines, &parts), "{lines:#?}");
        assert!(checked.to_string().contains("delete the pod"), "{checked}");
    }
    assert_eq!(worker.status()["pods"], 0);
    worker.node.run("ip", &["link", "del", attachment.host_interface().as_str()]);
    assert_clean(worker);
}

#[test]
fn a_check_of_a_healthy_cluster_with_changing_pods_finds_nothing() {
    let lab = Lab::start(Topology::one_segment(3));
    std::thread::scope(|scope| {
        // Dropped at the end of the checks, also if one of them fails.
        let checking = Arc::new(());
        for worker in &lab.workers {
            let checking = Arc::downgrade(&checking);
            scope.spawn(move || {
                let kept = worker.pod("kept");
                for round in 0.. {
                    if checking.strong_count() == 0 {
                        break;
                    }
                    let pods: Vec<Pod> =
                        (0..3).map(|number| worker.pod(&format!("p{round}-{number}"))).collect();
                    pods.iter().for_each(|pod| worker.delete(pod));
                }
                worker.delete(&kept);
            });
        }
        let checks: Vec<(bool, Value)> =
            (0..8).map(|round| lab.workers[round % 3].ctl_verdict(&["ipam", "check", "--repair"])).collect();
        drop(checking);
        for (clean, checked) in checks {
            assert!(clean && checked["deviations"] == json!([]), "{checked:#}");
            assert_eq!(checked["nodes"].as_array().unwrap().len(), 3, "{checked:#}");
        }
    });
    assert_clean(&lab.workers[0]);
}

#[test]
fn a_silent_node_is_reported_and_leftovers_of_a_dead_check_are_deleted() {
    let mut lab = Lab::start(Topology::one_segment(3));
    lab.etcd.ctl(&["put", "/polder/v1/inspection", r#"{"id":"dead","repairs":"none"}"#]);
    wait::until_true("the answers to nobody", || lab.etcd.keys("/polder/v1/answers/").len() == 3);
    lab.workers[1].freeze(true);
    let (clean, checked) = lab.workers[0].ctl_verdict(&["ipam", "check"]);
    assert!(!clean, "{checked}");
    assert_eq!((&checked["silent"], &checked["absent"]), (&json!(["n2"]), &json!([])), "{checked}");
    assert_eq!(checked["nodes"].as_array().unwrap().len(), 2, "{checked}");
    for left in ["/polder/v1/inspection", "/polder/v1/answers/"] {
        assert_eq!(lab.etcd.keys(left), [] as [&str; 0]);
    }
    lab.workers[1].freeze(false);
    lab.workers[1].kill();
    wait::until_true("the lease to run out", || lab.etcd.keys("/polder/v1/alive/n2").is_empty());
    let (clean, checked) = lab.workers[0].ctl_verdict(&["ipam", "check"]);
    assert!(!clean && checked["absent"] == json!(["n2"]), "{checked}");
    let table = lab.workers[0].program("polderctl", &["ipam", "check"]);
    let text = String::from_utf8_lossy(&table.stdout);
    assert_eq!(table.status.code(), Some(3), "{text}");
    assert!(text.contains("2 of 3 nodes checked") && text.contains("no deviations on these\n"), "{text}");
    assert!(text.contains("n2 is not alive: its pods were not checked"), "{text}");
    lab.workers[1].start_and_wait();
    assert_clean(&lab.workers[0]);
}

#[test]
fn ipam_show_names_the_owner_of_an_address_on_every_node() {
    let lab = Lab::start(Topology::one_segment(2));
    let [first, second] = lab.workers.as_slice() else { panic!("two nodes") };
    let (pod, freed) = (first.pod("web-0"), first.pod("freed"));
    wait_until_published(&lab, &[&pod, &freed]);
    first.delete(&freed);
    let address = |worker: &Worker, address: IpAddr| {
        worker.ctl(&["ipam", "show", &address.to_string()])["addresses"][0].clone()
    };
    for worker in [first, second] {
        let shown = address(worker, pod.v4());
        assert_eq!((&shown["standing"], &shown["node"]), (&json!("used"), &json!("n1")), "{shown}");
        assert_eq!((&shown["pod"], &shown["pool"]), (&json!("lab/web-0"), &json!("ipv4")), "{shown}");
        assert_eq!(shown["attachment"]["container"], "web-0", "{shown}");
        let by_pod = worker.ctl(&["ipam", "show", "pod", "lab/web-0"]);
        assert_eq!(by_pod["addresses"][0]["address"], json!(pod.v4()), "{by_pod}");
        let gateway = address(worker, pod.gateway(pod.v4()));
        assert_eq!((&gateway["standing"], &gateway["node"]), (&json!("gateway"), &json!("n1")), "{gateway}");
    }
    assert!(address(first, pod.v4())["since"].as_str().unwrap().ends_with("s ago"));
    assert!(address(second, pod.v4())["since"].as_str().unwrap().starts_with("store revision"));
    assert_eq!(address(first, freed.v4())["standing"], "resting");
    assert_eq!(address(first, "10.244.0.0".parse().unwrap())["standing"], "excluded");
    assert_eq!(address(first, "192.0.2.1".parse().unwrap())["standing"], "foreign");
    assert_eq!(address(second, beside(&pod))["node"], "n1");
    let node = second.ctl(&["ipam", "show", "node", "n1"]);
    assert_eq!(
        (node["blocks"].as_array().unwrap().len(), &node["nodes"][0]["name"]),
        (1, &json!("n1")),
        "{node}"
    );
    let block = node["blocks"][0]["block"].as_str().unwrap();
    let block = first.ctl(&["ipam", "show", "block", block]);
    assert!(block["remarks"].to_string().contains("2 used, 1 in cool-down"), "{block}");
    assert_eq!(block["addresses"][0]["pod"], "lab/web-0", "{block}");
    let pool = second.ctl(&["ipam", "show", "pool", "ipv4"]);
    assert_eq!(pool["blocks"].as_array().unwrap().len(), 2, "{pool}");
    let cluster = first.ctl(&["ipam", "show"]);
    assert_eq!(
        (cluster["nodes"].as_array().unwrap().len(), &cluster["pools"][0]["name"]),
        (2, &json!("ipv4"))
    );
    let table =
        first.node.run(polder_tests::agent::dist().join("polderctl").to_str().unwrap(), &["ipam", "show"]);
    assert!(table.contains("BLOCKS CLAIMED") && table.contains("2 of 1024"), "{table}");
    for (words, expected) in [
        (&["ipam", "show", "node", "n9"][..], "there is no node n9"),
        (&["ipam", "show", "pool", "p9"], "there is no pool p9"),
        (&["ipam", "show", "pod", "lab/never"], "no address is known of pod lab/never"),
        (&["ipam", "show", "something"], "cannot be shown"),
    ] {
        let message = first.try_ctl(words).unwrap_err();
        assert!(message.contains(expected), "{words:?}: {message}");
    }
}

#[test]
fn without_the_datastore_another_nodes_address_is_never_shown_as_free() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let pod = lab.workers[0].pod("a");
    wait_until_published(&lab, &[&pod]);
    lab.etcd.kill();
    let second = &lab.workers[1];
    second.wait_for_status("the loss", |status| (status["store"]["state"] == "disconnected").then_some(()));
    for address in [pod.v4(), beside(&pod)] {
        let output = second.program("polderctl", &["-o", "json", "ipam", "show", &address.to_string()]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
        let shown = &shown["addresses"][0];
        assert_eq!((&shown["standing"], &shown["node"]), (&json!("unknown"), &json!("n1")), "{shown}");
    }
    // The node that owns the block does not need the datastore to answer.
    let first = &lab.workers[0];
    let shown = first.ctl(&["ipam", "show", &pod.v4().to_string()]);
    assert_eq!(shown["addresses"][0]["standing"], "used", "{shown}");
}

#[test]
fn an_address_is_released_only_if_no_running_pod_has_it() {
    let lab = Lab::start(Topology::one_segment(2));
    let [first, second] = lab.workers.as_slice() else { panic!("two nodes") };
    let (pod, gone) = (first.pod("a"), first.pod("gone"));
    let release = |worker: &Worker, address: IpAddr, more: &[&str]| {
        worker.try_ctl(&[&["ipam", "release", &address.to_string()], more].concat())
    };
    let refused = release(first, pod.v4(), &["--dead"]).unwrap_err();
    assert!(refused.contains("polder/a/eth0, which is running: delete the pod"), "{refused}");
    assert!(
        release(first, pod.gateway(pod.v4()), &[]).unwrap_err().contains("the gateway address of this node")
    );
    assert!(release(second, pod.v4(), &[]).unwrap_err().contains("of node n1: run this on that node"));
    first.end_without_del(&gone);
    release(first, gone.v4(), &[]).unwrap();
    assert_eq!(first.status()["pods"], 1);
    let again = release(first, gone.v4(), &[]).unwrap();
    assert!(again.as_str().unwrap().contains("there is nothing to release"), "{again}");
    // A reserved address belongs to the pod's name, also when the pod is gone. It cannot be released while the pod
    // runs.
    second.ctl(&["pool", "add", "static", "10.250.0.0/28", "--reservations"]);
    wait::until_true("the pool to be known", || first.ctl(&["pool", "list"]).to_string().contains("static"));
    let mut conf = Worker::netconf("1.1.0");
    conf["pool"] = json!("static");
    let named = first.pod_with("named", &conf);
    for (worker, expected) in [(first, "its interface exists"), (second, "that node is alive and reports it")]
    {
        wait_until_published(&lab, &[&named]);
        for more in [&[][..], &["--dead"]] {
            let message = release(worker, named.v4(), more).unwrap_err();
            assert!(message.contains("held by polder/named/eth0 on node n1"), "{message}");
            assert!(message.contains(expected), "{message}");
        }
    }
    let shown = second.ctl(&["ipam", "show", "pod", "lab/named"])["addresses"][0].clone();
    assert_eq!((&shown["standing"], &shown["node"]), (&json!("reserved"), &json!("n1")), "{shown}");
    first.delete(&named);
    wait::until("the reservation to be given up", || release(second, named.v4(), &[]));
    // A reservation that a pod holds on a node that no longer exists.
    let node = lab.etcd.ctl(&["get", "--print-value-only", "/polder/v1/nodes/n1"]);
    let node: Value = serde_json::from_str(node.trim()).unwrap();
    let attachment = json!({ "network": "polder", "container": "db", "interface": "eth0" });
    let holder = |node: &str, incarnation: &Value, boot: &Value| {
        json!({ "owner": "default/db-0", "generation": 3, "holder": {
            "node": node, "incarnation": incarnation, "boot_id": boot, "attachment": attachment } })
        .to_string()
    };
    let reserved: IpAddr = "10.250.0.5".parse().unwrap();
    let key = format!("/polder/v1/reservations/{reserved}");
    lab.etcd.ctl(&["put", &key, &holder("n9", &json!("i9"), &node["boot_id"])]);
    let message = release(first, reserved, &[]).unwrap_err();
    assert!(
        message.contains("held by polder/db/eth0 on node n9") && message.contains("add --dead"),
        "{message}"
    );
    assert!(second.try_ctl(&["pool", "remove", "static"]).unwrap_err().contains("e.g. 10.250.0.5"));
    let done = release(first, reserved, &["--dead"]).unwrap();
    assert!(done.as_str().unwrap().contains("for default/db-0 is deleted"), "{done}");
    assert_eq!(lab.etcd.keys(&key), [] as [&str; 0]);
    // A reservation without a holder.
    lab.etcd.ctl(&["put", &key, r#"{"owner":"default/db-0","generation":4}"#]);
    release(second, reserved, &[]).unwrap();
    assert_eq!(lab.etcd.keys(&key), [] as [&str; 0]);
    second.ctl(&["pool", "remove", "static"]);
}
