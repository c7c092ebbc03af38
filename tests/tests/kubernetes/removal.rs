//! A node whose Node object is deleted is offered for removal, or removed by one of the agents.

use std::time::Duration;

use polder_tests::agent::Worker;
use polder_tests::{Topology, wait};
use serde_json::json;

use super::site::Site;

/// Longer than a lease, the time that a Node must be missing, and the interval of the lists.
const MAX_WAIT: Duration = Duration::from_secs(240);

const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

fn site(nodes: usize, mode: &str) -> Site {
    let site = Site::build(Topology::one_segment(nodes));
    for worker in &site.lab.workers {
        worker.configure(&format!("{}remove_nodes = \"{mode}\"\n", worker.configuration()));
    }
    site
}

fn started(nodes: usize, mode: &str) -> Site {
    let mut site = site(nodes, mode);
    site.lab.start_agents();
    site.lab.workers.iter().for_each(|worker| site.wait_until_available(worker.name()));
    site
}

fn record(site: &Site, name: &str) -> String {
    site.lab.etcd.ctl(&["get", "--print-value-only", &format!("/polder/v1/nodes/{name}")])
}

fn fences(site: &Site, name: &str) -> String {
    let key = format!("/polder/v1/fences/{name}/");
    site.lab.etcd.ctl(&["get", "--print-value-only", "--prefix", &key])
}

fn claims_of(site: &Site, name: &str) -> usize {
    let claims = site.lab.etcd.ctl(&["get", "--print-value-only", "--prefix", "/polder/v1/blocks/"]);
    claims.matches(&format!("\"node\":\"{name}\"")).count()
}

/// Stops a machine for good, and waits until its lease has expired.
fn power_off(site: &mut Site, number: usize) {
    let name = site.lab.workers[number].name().to_owned();
    site.lab.workers[number].kill();
    site.lab.etcd.ctl(&["del", &format!("/polder/v1/alive/{name}")]);
}

fn wait_for_problem(worker: &Worker, words: &[&str]) {
    wait::within(MAX_WAIT, &format!("a problem with {words:?}"), || {
        let problems = worker.status()["problems"].to_string();
        if words.iter().all(|word| problems.contains(word)) { Ok(()) } else { Err(problems) }
    });
}

#[test]
fn a_node_whose_node_object_is_deleted_is_offered_for_removal() {
    let mut site = started(3, "manual");
    power_off(&mut site, 2);
    site.api.delete_node("n3");
    wait_for_problem(&site.lab.workers[0], &["n3", "node remove n3"]);
    wait_for_problem(&site.lab.workers[1], &["n3", "node remove n3"]);
    assert!(!record(&site, "n3").is_empty(), "nobody has removed it");
    assert_eq!(claims_of(&site, "n3"), 1);
}

#[test]
fn a_dead_node_whose_node_object_is_deleted_is_removed_and_its_blocks_wait_for_it() {
    let mut site = started(3, "automatic");
    let pod = site.lab.workers[2].pod("a");
    power_off(&mut site, 2);
    site.api.delete_node("n3");
    wait::within(MAX_WAIT, "the node to be removed", || {
        let record = record(&site, "n3");
        if record.is_empty() { Ok(()) } else { Err(record) }
    });
    assert_eq!(claims_of(&site, "n3"), 1, "its pods may live: {}", fences(&site, "n3"));

    // It comes back under its name, without help.
    site.api.add_node("n3");
    site.lab.workers[2].start();
    wait::within(MAX_WAIT, "the old incarnation to confirm", || {
        let fences = fences(&site, "n3");
        if fences.contains("confirmed") { Ok(()) } else { Err(fences) }
    });
    drop(pod);
    wait::within(MAX_WAIT, "the node to be a member again", || {
        let (record, status) = (record(&site, "n3"), site.lab.workers[2].status());
        if !record.is_empty() && status["ready"] == true { Ok(()) } else { Err(status.to_string()) }
    });
}

#[test]
fn a_node_that_is_out_of_service_is_removed_with_its_blocks() {
    let mut site = started(3, "automatic");
    site.lab.workers[2].pod("a");
    power_off(&mut site, 2);
    site.api.taint("n3", OUT_OF_SERVICE, "NoExecute");
    let ready =
        json!([{ "type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "" }]);
    site.api.change("n3", &json!({ "status": { "conditions": ready } }));
    wait::within(MAX_WAIT, "the leader to see the taint", || {
        let lists = site.api.requests().iter().filter(|request| request.node().is_none()).count();
        if lists >= 4 { Ok(()) } else { Err(format!("{lists} lists")) }
    });
    site.api.delete_node("n3");
    wait::within(MAX_WAIT, "the blocks to be released", || {
        let claims = claims_of(&site, "n3");
        if claims == 0 { Ok(()) } else { Err(format!("{claims} claims, {}", fences(&site, "n3"))) }
    });
}

#[test]
fn a_node_whose_agent_is_alive_is_not_removed() {
    let site = started(3, "automatic");
    let pod = site.lab.workers[2].pod("a");
    site.api.delete_node("n3");
    wait_for_problem(&site.lab.workers[0], &["n3"]);
    assert!(!record(&site, "n3").is_empty());
    assert_eq!(claims_of(&site, "n3"), 1);
    polder_tests::matrix::assert_flat(&[site.lab.workers[0].pod("b"), pod], 1450);
}

#[test]
fn another_agent_takes_over_when_the_leader_dies() {
    let mut site = started(3, "automatic");
    let leader = |site: &Site| {
        wait::within(MAX_WAIT, "a leader", || {
            let lists: Vec<_> =
                site.lab.etcd.keys("/polder/v1/").into_iter().filter(|key| key.contains("leader")).collect();
            let value = lists.first().map(|key| site.lab.etcd.ctl(&["get", "--print-value-only", key]));
            let value: serde_json::Value =
                serde_json::from_str(value.unwrap_or_default().trim()).map_err(|error| error.to_string())?;
            value["node"].as_str().map(str::to_owned).ok_or_else(|| value.to_string())
        })
    };
    let first = leader(&site);
    let number = site.lab.workers.iter().position(|worker| worker.name() == first).unwrap();
    site.lab.workers[number].kill();
    wait::within(MAX_WAIT, "another leader", || {
        let next = leader(&site);
        if next == first { Err(next) } else { Ok(()) }
    });
    // Its own Node, and that of a further node, are deleted: the new leader acts.
    site.lab.etcd.ctl(&["del", &format!("/polder/v1/alive/{first}")]);
    site.api.delete_node(&first);
    wait::within(MAX_WAIT, "the old leader to be removed", || {
        let record = record(&site, &first);
        if record.is_empty() { Ok(()) } else { Err(record) }
    });
}
