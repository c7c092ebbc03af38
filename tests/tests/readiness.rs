//! A node becomes ready when a live peer answers on the pod path. It reports the probe result of each peer.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::{CNI_CONF, Worker};
use polder_tests::matrix::assert_flat;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;

/// Two nodes on one segment that probe each other every second. The agents are not started.
fn lab(backend: &str) -> Lab {
    let lab = Lab::build(Topology::one_segment(2).bootstrap(&format!("backend = \"{backend}\"")));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab
}

/// Drops packets to pods in the underlay, and nothing else.
fn close(lab: &Lab) {
    lab.fabric.node().shell(
        "nft 'add table bridge pods; add chain bridge pods c { type filter hook forward priority 0; }; \
         add rule bridge pods c ip daddr 10.244.0.0/16 drop'",
    );
}

fn open(lab: &Lab) {
    lab.fabric.node().shell("nft delete table bridge pods");
}

fn cni_status(worker: &Worker) -> Result<Value, Value> {
    worker.cni("STATUS", "", "", &Worker::netconf("1.1.0"))
}

/// Waits until the node reports a problem that contains these words. Returns its text.
fn problem(worker: &Worker, words: &str) -> String {
    worker.wait_for_status(&format!("a problem with {words:?}"), |status| {
        let problems = status["problems"].as_array()?.iter().filter_map(Value::as_str);
        problems.map(str::to_owned).find(|problem| problem.contains(words))
    })
}

fn wait_for_no_problem(worker: &Worker) {
    worker
        .wait_for_status("no problem", |status| (status["problems"] == serde_json::json!([])).then_some(()));
}

/// The result of the node's probes of the other node, on the first path.
fn probed(worker: &Worker, other: &str) -> String {
    let nodes = worker.ctl(&["node", "list"]);
    let node = nodes.as_array().unwrap().iter().find(|node| node["name"] == other).unwrap();
    node["paths"][0]["probe"].as_str().unwrap().to_owned()
}

#[test]
fn a_node_is_ready_only_when_a_live_peer_answers_on_the_pod_path() {
    let mut lab = lab("direct");
    close(&lab);
    // No peer is alive yet that could answer.
    lab.workers[0].start_and_wait();
    lab.workers[1].start();
    let newcomer = &lab.workers[1];
    let reason = newcomer.wait_for_status("a reason", |status| {
        let reasons = status["reasons"].to_string();
        (status["ready"] == false && reasons.contains("no peer answers")).then_some(reasons)
    });
    assert!(reason.contains("n1") && reason.contains("probe_peers"), "{reason}");
    let (code, text) = newcomer.http("/readyz");
    assert!(code == 503 && text.contains("no peer answers"), "{code} {text}");
    assert!(newcomer.node.read(CNI_CONF).is_err(), "a runtime is told that the node is ready");
    assert_eq!(newcomer.http("/livez").0, 200);

    open(&lab);
    newcomer.wait_until_ready();
    assert_eq!(newcomer.http("/readyz").0, 200);
    // The agent has half a second to answer, which is not always enough on a busy machine.
    wait::until("STATUS to succeed", || cni_status(newcomer).map_err(|error| error.to_string()));
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
    lab.workers.iter().for_each(wait_for_no_problem);

    // Later this is no reason to reject pods, but it is reported.
    close(&lab);
    let newcomer = &lab.workers[1];
    let silent = problem(newcomer, "does not answer");
    assert!(silent.contains("node n1") && silent.contains("directly to 10.10.1.1"), "{silent}");
    assert_eq!(cni_status(newcomer), Ok(Value::Null));
    assert_eq!((newcomer.http("/readyz").0, probed(newcomer, "n1").as_str()), (200, "silent"));
    newcomer.pod("b");
    open(&lab);
    lab.workers.iter().for_each(wait_for_no_problem);
    assert_eq!(probed(&lab.workers[1], "n1"), "answers");
}

#[test]
fn a_node_without_a_path_to_any_live_peer_is_not_ready() {
    let topology = Topology { nodes: vec![1, 2], router: true, ..Topology::default() };
    let mut lab = Lab::build(topology.bootstrap("backend = \"direct\""));
    lab.workers[0].start_and_wait();
    lab.workers[1].start();
    let newcomer = &lab.workers[1];
    newcomer.wait_for_status("a reason", |status| {
        let is_told = status["reasons"].to_string().contains("no peer answers");
        (is_told && status["problems"].to_string().contains("n1 are unreachable")).then_some(())
    });
    assert!(newcomer.node.read(CNI_CONF).is_err(), "a runtime is told that the node is ready");
    newcomer.ctl(&["cluster", "set", "--backend", "auto"]);
    newcomer.wait_until_ready();
}

#[test]
fn a_node_does_not_wait_for_dead_peers() {
    let mut lab = lab("auto");
    lab.start_agents();
    lab.workers[1].kill();
    assert!(lab.workers[0].stop());
    lab.workers[1].node.run("ip", &["link", "set", "eth0", "down"]);
    lab.workers[0].node.run("rm", &[CNI_CONF]);
    // As if the peer's lease had expired.
    lab.etcd.ctl(&["del", "/polder/v1/alive/n2"]);
    lab.workers[0].start_and_wait();
    problem(&lab.workers[0], "node n2 does not answer");
}

/// Whether the node is ready according to its status, and the HTTP status code of `/readyz`.
fn is_ready(worker: &Worker) -> (bool, u16) {
    (worker.status()["ready"] == true, worker.http("/readyz").0)
}

#[test]
fn a_node_whose_cni_configuration_cannot_be_written_is_not_ready_until_it_can() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let folder = "/run/cni/net.d";
    lab.workers[0].node.shell(&format!("mkdir -p {folder}; mount -t tmpfs -o ro tmpfs {folder}"));
    lab.workers[0].start();
    let worker = &lab.workers[0];
    let reason = worker.wait_for_status("the reason", |status| {
        let reasons = status["reasons"].to_string();
        (status["ready"] == false && reasons.contains("cannot be written")).then_some(reasons)
    });
    for expected in [CNI_CONF, "Read-only file system", "cni_conf_dir"] {
        assert!(reason.contains(expected), "{expected} in {reason}");
    }
    let (code, text) = worker.http("/readyz");
    assert!(code == 503 && text.contains(CNI_CONF), "{code} {text}");
    assert!(worker.http("/metrics").1.contains("polder_ready 0"));
    // Calls of the plugin still succeed.
    worker.pod("a");
    worker.node.run("mount", &["-o", "remount,rw", folder]);
    worker.wait_until_ready();
    assert_eq!(is_ready(worker), (true, 200));
}

#[test]
fn a_cni_configuration_that_is_deleted_or_damaged_is_written_again() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let whole = worker.node.read(CNI_CONF).unwrap();
    for damage in ["rm FILE", "echo garbage > FILE", "echo '{}' > FILE", ": > FILE"] {
        worker.node.shell(&damage.replace("FILE", CNI_CONF));
        wait::until_true(&format!("the configuration after {damage}"), || {
            worker.node.read(CNI_CONF).is_ok_and(|text| text == whole)
        });
    }
    // Entries that another program added stay.
    let more = whole.replace("\"plugins\": [", "\"plugins\": [{ \"type\": \"tuning\" },");
    worker.node.write(CNI_CONF, &more);
    let passes = worker.status()["last_pass"]["count"].as_u64();
    worker.node.shell("ip link set polder0 down");
    worker.wait_for_status("a pass", |status| (status["last_pass"]["count"].as_u64() > passes).then_some(()));
    assert_eq!(worker.node.read(CNI_CONF).unwrap(), more);
    // They also stay when the agent starts again, with another configuration.
    let mut lab = lab;
    lab.workers[0].kill();
    lab.workers[0].configure(&format!("{}\n[cni]\nversion = \"1.0.0\"\n", lab.workers[0].configuration()));
    lab.workers[0].start_and_wait();
    let worker = &lab.workers[0];
    let list: Value = serde_json::from_str(&worker.node.read(CNI_CONF).unwrap()).unwrap();
    let types: Vec<_> = list["plugins"].as_array().unwrap().iter().map(|plugin| &plugin["type"]).collect();
    assert_eq!(types, ["tuning", "polder"], "{list}");
    assert_eq!(list["cniVersion"], "1.0.0", "{list}");
    // Another file that a runtime uses instead of ours is reported.
    worker.node.write("/run/cni/net.d/05-other.conflist", "{}");
    problem(worker, "/run/cni/net.d/05-other.conflist");
    worker.node.run("rm", &["/run/cni/net.d/05-other.conflist"]);
    wait_for_no_problem(worker);

    // A node is not ready if the file is missing and cannot be written.
    worker.node.shell("rm -r /run/cni/net.d; touch /run/cni/net.d");
    let not_ready = |status: &Value| (status["ready"] == false).then(|| status["reasons"].to_string());
    let reason = worker.wait_for_status("the reason", not_ready);
    assert!(reason.contains(CNI_CONF) && reason.contains("os error"), "{reason}");
    worker.node.shell("rm /run/cni/net.d");
    worker.wait_until_ready();
}

/// The lease ID of a node's agent in hexadecimal, as `etcdctl` expects it.
fn lease_of(lab: &Lab, name: &str) -> String {
    let found = lab.etcd.ctl(&["get", "--write-out=json", &format!("/polder/v1/alive/{name}")]);
    let found: Value = serde_json::from_str(&found).unwrap();
    format!("{:x}", found["kvs"][0]["lease"].as_i64().unwrap())
}

#[test]
fn a_dead_agent_is_reported_and_counted_until_it_returns_or_is_removed() {
    let mut lab = Lab::build(Topology::one_segment(3));
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let counted = |worker: &Worker, alive: u8, not_alive: u8| {
        let text = worker.http("/metrics").1;
        text.contains(&format!("polder_nodes{{state=\"alive\"}} {alive}\n"))
            && text.contains(&format!("polder_nodes{{state=\"not_alive\"}} {not_alive}\n"))
    };
    wait::until_true("all nodes to be counted", || counted(&lab.workers[0], 3, 0));
    lab.workers[2].kill();
    for worker in &lab.workers[..2] {
        wait::within(TIMEOUT * 2, "the dead agent to be named", || {
            let problems = worker.status()["problems"].to_string();
            let parts = ["node n3: its agent is not alive", "polderctl node remove n3 --dead"];
            if parts.iter().all(|part| problems.contains(part)) { Ok(()) } else { Err(problems) }
        });
        assert!(counted(worker, 2, 1), "{}", worker.http("/metrics").1);
        assert_eq!(is_ready(worker), (true, 200), "that is nothing to turn pods away for");
    }

    // Without the datastore, no node knows which agents are alive. Right after its return, no agent is reported as
    // dead.
    lab.workers[2].start_and_wait();
    let worker = &lab.workers[0];
    wait::until_true("the agent to be alive again", || counted(worker, 3, 0));
    wait_for_no_problem(worker);
    lab.etcd.kill();
    wait::until_true("nothing to be claimed", || !worker.http("/metrics").1.contains("polder_nodes"));
    lab.etcd.start_again();
    wait::until("the nodes to be counted again", || {
        let problems = worker.status()["problems"].to_string();
        assert!(!problems.contains("not alive"), "{problems}");
        let text = worker.http("/metrics").1;
        if text.contains("polder_nodes{state=\"not_alive\"} 0\n") { Ok(()) } else { Err(text) }
    });

    // A lost lease is granted again within seconds, and the node is not reported as dead meanwhile.
    let worker = &lab.workers[0];
    lab.etcd.ctl(&["lease", "revoke", &lease_of(&lab, "n3")]);
    wait::until("the lease to be taken anew", || {
        let problems = worker.status()["problems"].to_string();
        assert!(!problems.contains("not alive"), "{problems}");
        if lab.etcd.keys("/polder/v1/alive/n3").is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
    });

    lab.workers[2].kill();
    let worker = &lab.workers[0];
    wait::within(TIMEOUT * 2, "the dead agent to be counted", || {
        if counted(worker, 2, 1) { Ok(()) } else { Err(worker.http("/metrics").1) }
    });
    worker.ctl(&["node", "remove", "n3", "--dead"]);
    wait::until_true("nothing to be left of it", || {
        counted(worker, 2, 0) && !worker.status()["problems"].to_string().contains("not alive")
    });
}

#[test]
fn a_path_that_loses_long_packets_is_reported() {
    let mut lab = lab("auto");
    lab.start_agents();
    lab.workers.iter().for_each(wait_for_no_problem);
    let port = |mtu: &str| lab.fabric.node().run("ip", &["link", "set", "n2-1", "mtu", mtu]);
    port("1400");
    let narrow = problem(&lab.workers[0], "packets of 1450 bytes do not reach");
    assert!(narrow.contains("node n2") && narrow.contains("lower mtu"), "{narrow}");
    assert_eq!(probed(&lab.workers[0], "n2"), "narrow");
    lab.workers.iter().for_each(Worker::wait_until_ready);
    port("1500");
    lab.workers.iter().for_each(wait_for_no_problem);
    assert_eq!(probed(&lab.workers[0], "n2"), "answers");

    // The remedy in the message works too.
    port("1400");
    problem(&lab.workers[0], "packets of 1450 bytes");
    for worker in &mut lab.workers {
        worker.stop();
        worker.configure_also("mtu = 1400");
        worker.start_and_wait();
    }
    lab.workers.iter().for_each(wait_for_no_problem);
    wait::until_true("the path to carry large packets", || probed(&lab.workers[0], "n2") == "answers");
}

#[test]
fn livez_fails_and_names_the_thread_that_is_stuck() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    for thread in ["ledger", "kernel"] {
        let (code, message) = worker.with_stopped_thread(thread, || worker.http("/livez"));
        assert_eq!(code, 503, "{message}");
        assert!(
            message.contains(&format!("thread {thread} has made no progress"))
                && message.lines().count() == 1,
            "{message}"
        );
        assert_eq!(worker.http("/livez"), (200, "ok\n".to_owned()), "it goes on");
    }
}
