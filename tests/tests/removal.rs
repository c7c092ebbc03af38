//! Removed nodes, nodes with the name of another node, and blocks that are released.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;

use polder_api::AddMark;
use polder_tests::agent::{CNI_CONF, Worker};
use polder_tests::etcd::Etcd;
use polder_tests::matrix::assert_flat;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

/// The shortest permitted cool-down, because some tests wait for its end: 10 s.
const SHORT_COOL_DOWN: &str = "[ipam]\ncooldown_seconds = 10";

/// A lab with this pool. The agents are not started.
fn lab(nodes: usize, pool: &'static str) -> Lab {
    let lab = Lab::build(Topology { pools: vec![pool], ..Topology::one_segment(nodes) });
    lab.workers.iter().for_each(shorten_cool_down);
    lab
}

fn shorten_cool_down(worker: &Worker) {
    worker.configure(&format!("{}{SHORT_COOL_DOWN}\n", worker.configuration()));
}

/// The claims: the key of each block, and the name of its node.
fn claims(lab: &Lab) -> Vec<(String, String)> {
    let node = |key: &String| {
        let record: Value = serde_json::from_str(lab.etcd.ctl(&["get", "--print-value-only", key]).trim())
            .unwrap_or_default();
        (key.clone(), record["node"].as_str().unwrap_or_default().to_owned())
    };
    lab.etcd.keys("/polder/v1/blocks/").iter().map(node).collect()
}

fn claims_of(lab: &Lab, name: &str) -> usize {
    claims(lab).iter().filter(|(_, node)| node == name).count()
}

fn pod_interfaces(worker: &Worker) -> usize {
    worker.node.run("ip", &["-o", "link"]).matches(": pld").count()
}

fn own_addresses(worker: &Worker) -> String {
    worker.node.shell("ip -oneline address show dev polder0 scope global")
}

fn add(worker: &Worker, name: &str) -> Result<Pod, Value> {
    worker.try_pod(name, &Worker::netconf("1.1.0"))
}

/// Waits until the node is not ready for a reason that contains this text. Returns its reasons.
fn reason(worker: &Worker, expected: &str) -> String {
    worker.wait_for_status(&format!("a reason with {expected:?}"), |status| {
        let reasons = status["reasons"].to_string();
        (status["ready"] == false && reasons.contains(expected)).then_some(reasons)
    })
}

#[test]
fn a_removed_node_disconnects_its_pods_and_its_block_is_reused_after_cool_down() {
    // Two blocks, both claimed.
    let mut lab = lab(2, "10.244.0.0/25");
    lab.start_agents();
    let kept = lab.workers[0].pod("kept");
    let pod = lab.workers[1].pod("a");
    let block = claims(&lab).into_iter().find(|(_, node)| node == "n2").unwrap().0;
    assert_ne!(own_addresses(&lab.workers[1]), "");
    let message = lab.workers[0].remove_node("n2", 1);
    // The node may have disconnected its pods before this answer was made.
    let message = message.as_str().unwrap();
    let parts = ["are held back until it has disconnected its pods", "its pods are gone"];
    assert!(parts.iter().any(|part| message.contains(part)), "{message}");

    let removed = &lab.workers[1];
    wait::until_true("the pods of the removed node to be cut off", || pod_interfaces(removed) == 0);
    wait::until_true("its own address to be gone from the bridge", || own_addresses(removed).is_empty());
    let message = reason(removed, "was removed from the cluster");
    assert!(message.contains("delete its state directory"), "{message}");
    let error = add(removed, "b").unwrap_err();
    assert!(error["code"] == 103 && error["msg"].as_str().unwrap().contains("was removed"), "{error}");
    let error = removed.cni("STATUS", "", "", &Worker::netconf("1.1.0")).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    assert_eq!(removed.cni("DEL", "a", pod.netns(), pod.conf()), Ok(Value::Null));
    wait::until_true("its addresses to be gone from etcd", || {
        lab.etcd.keys("/polder/v1/addresses/n2/").is_empty()
    });

    let newcomer = lab.add_worker(1);
    shorten_cool_down(newcomer);
    newcomer.start_and_wait();
    assert!(claims(&lab).contains(&(block, "n3".to_owned())), "the block has gone to another");
    wait::until_true("nothing to be left of it", || {
        !lab.workers[0].ctl(&["node", "list"]).to_string().contains("n2")
    });
    assert_eq!(lab.etcd.keys("/polder/v1/fences/").len(), 1, "should it come back after all");
    let new = lab.workers[2].pod("new");
    assert_flat(&[kept, new], 1450);
}

#[test]
fn a_removed_node_does_not_confirm_while_an_earlier_plugin_call_runs() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let pod = lab.workers[1].pod("a");
    lab.workers[1].kill();
    // A plugin holds this from the agent's answer until its interface is created. This plugin hangs.
    let socket = lab.workers[1].node.path_on_host(Path::new("/run/polder/agent.sock"));
    let hung = AddMark::set(&socket, &pod.attachment()).unwrap();
    lab.workers[1].start();
    lab.workers[0].remove_node("n2", 1);
    reason(&lab.workers[1], "is still running");
    let removed = || lab.etcd.ctl(&["get", "--print-value-only", "--prefix", "/polder/v1/fences/n2/"]);
    assert!(removed().contains("\"unknown\""), "{}", removed());
    drop(hung);
    wait::until_true("the removal to be confirmed", || removed().contains("\"confirmed\""));
    assert_eq!(pod_interfaces(&lab.workers[1]), 0);
}

#[test]
fn blocks_of_a_removed_node_are_held_until_the_node_or_an_operator_confirms() {
    let mut lab = lab(3, "10.244.0.0/24");
    lab.start_agents();
    let pod = lab.workers[1].pod("a");
    lab.workers[1].kill();
    lab.workers[2].kill();
    let operator = &lab.workers[0];
    // Its lease may still be valid.
    operator.remove_node("n2", 1);
    operator.ctl(&["node", "remove", "n3"]);
    let message = operator.ctl(&["node", "remove", "n3", "--dead"]);
    assert!(message.as_str().unwrap().contains("its pods are gone"), "{message}");
    wait::until_true("the block to be released after the confirmation", || claims_of(&lab, "n3") == 0);
    assert_eq!(claims_of(&lab, "n2"), 1, "the other was removed before, and still rests");
    assert_eq!(pod_interfaces(&lab.workers[1]), 1, "nobody is there to cut the pod off");
    let nodes = operator.ctl(&["node", "list"]).to_string();
    assert!(nodes.contains("1 blocks are held back until it has disconnected its pods"), "{nodes}");

    // Both start again, and detect that they are not in the cluster any more.
    for number in [1, 2] {
        lab.workers[number].start();
        reason(&lab.workers[number], "was removed from the cluster");
    }
    assert_eq!(pod_interfaces(&lab.workers[1]), 0, "the pod is cut off");
    wait::until_true("the other block to go back", || claims_of(&lab, "n2") == 0);

    // Without its ledger the machine is a new node with the old name.
    let worker = &mut lab.workers[1];
    worker.kill();
    worker.node.shell("rm -r /var/lib/polder; ip netns delete a");
    worker.start_and_wait();
    assert_ne!(worker.pod("b").netns(), pod.netns());
    assert_flat(&[lab.workers[0].pod("c"), lab.workers[1].pod("d")], 1450);
}

#[test]
fn a_removed_node_without_its_ledger_joins_again_and_confirms_nothing() {
    let mut lab = lab(2, "10.244.0.0/24");
    lab.start_agents();
    let _pod = lab.workers[1].pod("a");
    lab.workers[1].kill();
    lab.workers[0].remove_node("n2", 1);
    lab.workers[1].node.shell("rm /var/lib/polder/ledger.db*");
    lab.workers[1].start();
    // A record that was deleted while the agent did not run could be a loss: the node claims no block for 60 s.
    wait::within(TIMEOUT * 4, "the node to be ready", || match lab.workers[1].try_status()? {
        status if status["ready"] == true => Ok(()),
        status => Err(status["reasons"].to_string()),
    });
    assert_eq!(pod_interfaces(&lab.workers[1]), 0);
    assert_eq!(claims_of(&lab, "n2"), 2, "only the ledger knew that it is the one that was removed");
    lab.workers[0].ctl(&["node", "remove", "n2", "--dead", "--earlier"]);
    wait::until_true("the old block to go back", || claims_of(&lab, "n2") == 1);
    assert_eq!(lab.workers[1].status()["ready"], true);
}

#[test]
fn a_live_node_with_pods_is_removed_only_with_the_correct_pod_count() {
    let lab = Lab::start(Topology::one_segment(2));
    let [first, second] = lab.workers.as_slice() else { panic!("two nodes") };
    let pods = [second.pod("a"), second.pod("b")];
    wait::until_true("the addresses to be published", || {
        lab.etcd.keys("/polder/v1/addresses/n2/").len() == 2
    });
    for worker in [first, second] {
        for (arguments, parts) in [
            (&["n2"][..], ["is alive and has 2 pods", "--disconnect-pods 2"]),
            (&["n2", "--disconnect-pods", "1"][..], ["has 2 pods, not 1", "nothing was done"]),
            (
                &["n2", "--dead"][..],
                ["node n2 is alive", "--dead is only for a machine that is permanently gone"],
            ),
        ] {
            let arguments = [&["node", "remove"], arguments].concat();
            let message = worker.try_ctl(&arguments).unwrap_err();
            assert!(parts.iter().all(|part| message.contains(part)), "{arguments:?}: {message}");
        }
    }
    assert_eq!(pod_interfaces(second), 2, "nothing was cut off");
    assert_flat(&pods, 1450);
    assert_eq!(lab.etcd.keys("/polder/v1/nodes/").len(), 2);
    let log = first.log();
    for asked in ["node remove n2: requested by", "node remove n2 --dead: requested by", "uid 0"] {
        assert!(log.contains(asked), "{asked} in {log}");
    }
    first.ctl(&["node", "remove", "n2", "--disconnect-pods", "2"]);
    wait::until_true("the pods to be cut off", || pod_interfaces(second) == 0);
}

#[test]
fn at_a_terminal_removal_asks_for_the_pod_count_and_warns_for_the_last_node() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let _pods = [worker.pod("a"), worker.pod("b")];
    let at_a_terminal = |typed: &str| {
        let polderctl = polder_tests::agent::dist().join("polderctl");
        worker.node.shell(&format!(
            "printf '{typed}\\n' | script -qec '{} node remove n1' /dev/null || true",
            polderctl.display()
        ))
    };
    for typed in ["yes", "1", ""] {
        let message = at_a_terminal(typed);
        assert!(message.contains("It is the last node of the cluster"), "{typed:?}: {message}");
        assert_eq!((pod_interfaces(worker), worker.status()["ready"].clone()), (2, json!(true)), "{message}");
    }
    let message = at_a_terminal("2");
    assert!(message.contains("node n1 is removed"), "{message}");
    wait::until_true("the pods to be cut off", || pod_interfaces(worker) == 0);
}

#[test]
fn a_removed_node_has_no_cni_configuration_and_others_report_no_problem() {
    let mut lab = lab(3, "10.244.0.0/24");
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let [first, second, third] = lab.workers.as_slice() else { panic!("three nodes") };
    let pod = first.pod("a");
    second.remove_node("n1", 1);
    first.wait_for_status("that it was removed", |status| (status["ready"] == false).then_some(()));
    second.wait_for_status("what rests of it, and no problem", |status| {
        let rests = status["removed"][0]["standing"].as_str()?.contains("its pods are gone");
        (rests && status["removed"][0]["node"] == "n1" && status["problems"] == json!([])).then_some(())
    });
    // A runtime needs the file to delete its pods.
    assert!(first.node.read(CNI_CONF).is_ok(), "the pod cannot be deleted any more");
    first.delete(&pod);
    wait::until_true("the CNI configuration to be gone", || first.node.read(CNI_CONF).is_err());
    // A node reports a peer that stops answering only if it has answered before.
    wait::until_true("n2 to answer n3", || {
        let nodes = third.ctl(&["node", "list"]);
        let peer = nodes.as_array().into_iter().flatten().find(|node| node["name"] == "n2");
        peer.is_some_and(|peer| peer["paths"][0]["probe"] == "answers")
    });
    // The removed node reports no silent peer, whether or not a peer is silent.
    let warnings = || first.log().lines().filter(|line| line.contains("does not answer")).count();
    let before = warnings();
    second.node.run("ip", &["link", "set", "eth0", "down"]);
    wait::until_true("a member to miss it", || {
        let log = third.log();
        log.lines().any(|line| line.contains("does not answer") && line.contains("node=n2"))
    });
    assert_eq!(warnings(), before, "{}", first.log());
}

#[test]
fn removal_reports_the_problem_with_the_name() {
    let lab = Lab::start(Topology::one_segment(1));
    let error = lab.workers[0].try_ctl(&["node", "remove", "n7"]).unwrap_err();
    assert!(error.contains("there is no node n7"), "{error}");
}

#[test]
fn a_clone_of_a_live_machine_does_not_serve_and_reports_the_reason() {
    let mut lab = lab(1, "10.244.0.0/24");
    lab.start_agents();
    let pod = lab.workers[0].pod("a");
    let machine_id = lab.workers[0].node.read("/etc/machine-id").unwrap();
    // First with a name of its own, then with the same name, without and with a copy of the ledger.
    lab.add_worker(1);
    let clone = &mut lab.workers[1];
    shorten_cool_down(clone);
    clone.node.write("/etc/machine-id", &machine_id);
    clone.start();
    let message = reason(clone, "is registered as node n1");
    assert!(message.contains("systemd-machine-id-setup"), "{message}");
    clone.kill();

    clone.configure(&clone.configuration().replace("node = \"n2\"", "node = \"n1\""));
    clone.start();
    reason(clone, "node n1 is alive in another boot");
    clone.kill();
    let [original, clone] = lab.workers.as_mut_slice() else { panic!("two nodes") };
    let records =
        |etcd: &Etcd| ["nodes/n1", "alive/n1"].map(|key| etcd.ctl(&["get", &format!("/polder/v1/{key}")]));
    let before = records(&lab.etcd);
    original.freeze(true);
    clone.node.shell("rm /var/lib/polder/ledger.db*");
    for file in ["ledger.db", "ledger.db-wal"] {
        let path = Path::new("/var/lib/polder").join(file);
        std::fs::copy(original.node.path_on_host(&path), clone.node.path_on_host(&path)).unwrap();
    }
    original.freeze(false);
    clone.start();
    reason(clone, "node n1 is alive in another boot");
    assert_ne!(clone.status()["blocks"], json!([]), "it has the ledger");
    assert_eq!(add(clone, "b").unwrap_err()["code"], 11);
    // The clone receives a change, checks again, and still does not replace the records of the original.
    original.ctl(&["pool", "add", "more", "10.245.0.0/24"]);
    wait::until_true("the clone to hear of it", || clone.ctl(&["pool", "list"]).to_string().contains("more"));
    let (clean, checked) = original.ctl_verdict(&["ipam", "check", "--repair"]);
    assert!(clean && checked["deviations"] == json!([]), "{checked}");
    assert_eq!(checked["nodes"][0]["attachments"], 1, "{checked}");
    reason(clone, "node n1 is alive in another boot");
    assert_eq!(records(&lab.etcd), before);

    // When the original is permanently gone, the clone is node n1.
    assert!(lab.workers[0].stop());
    lab.workers[0].node.shell(&format!("ip link del {}", pod.host_interface()));
    // The original's lease must expire first, and then its addresses are in cool-down.
    wait::within(TIMEOUT * 2, "the second to be ready", || match lab.workers[1].try_status()? {
        status if status["ready"] == true => Ok(()),
        status => Err(status["reasons"].to_string()),
    });
}

#[test]
fn spare_blocks_are_released() {
    let mut lab = lab(2, "10.244.0.0/24");
    lab.start_agents();
    let worker = &lab.workers[0];
    // One block has 64 addresses, and the next is claimed before they are used up.
    let pods: Vec<Pod> = (0..61).map(|number| worker.pod(&format!("p{number}"))).collect();
    wait::until_true("another block", || claims_of(&lab, "n1") == 2);
    let (kept, rest) = pods.split_at(2);
    rest.iter().for_each(|pod| worker.delete(pod));
    wait::until_true("the block to go back", || claims_of(&lab, "n1") == 1);
    assert_eq!(worker.status()["blocks"].as_array().unwrap().len(), 1);
    let route = |worker: &Worker| worker.node.run("ip", &["route", "show", "proto", "84"]);
    wait::until_true("the route to it to be deleted", || {
        route(worker).matches("dev polder0").count() == 1
            && route(&lab.workers[1]).matches(" via ").count() == 1
    });
    assert_flat(&[kept, &[lab.workers[1].pod("b")]].concat(), 1450);
}
