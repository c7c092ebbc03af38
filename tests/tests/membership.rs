//! Nodes join and leave, and paths change.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, assert_flat_over};
use polder_tests::{Lab, Topology, wait};

/// No pass is triggered by the clock: all changes follow from events.
const WITHOUT_PERIODIC_PASS: &str = "resync_seconds = 3600";

fn start(lab: &mut Lab) {
    lab.workers.iter().for_each(|worker| worker.configure_also(WITHOUT_PERIODIC_PASS));
    lab.start_agents();
}

/// The blocks that a node owns.
fn blocks(worker: &Worker) -> Vec<String> {
    let status = worker.status();
    let blocks = status["blocks"].as_array().unwrap();
    blocks.iter().map(|block| block["block"].as_str().unwrap().to_owned()).collect()
}

fn routes(worker: &Worker) -> String {
    worker.node.shell("ip route show proto 84; ip -6 route show proto 84")
}

#[test]
fn a_new_node_is_reachable_from_all_others_without_a_periodic_pass() {
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL));
    start(&mut lab);
    let mut pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("old")).collect();
    for segment in [1, 2] {
        let worker = lab.add_worker(segment);
        worker.configure_also(WITHOUT_PERIODIC_PASS);
        worker.start_and_wait();
        pods.push(worker.pod("new"));
        let new = blocks(lab.workers.last().unwrap());
        for worker in &lab.workers {
            for block in &new {
                wait::until_true("the route to the new node", || routes(worker).contains(block));
            }
        }
    }
    assert_flat_over(Families::DUAL, &pods, 1450);
}

#[test]
fn a_removed_node_leaves_nothing_on_the_other_nodes() {
    // One node on the same link, and one behind the router.
    for number in [1, 2] {
        assert_forgotten(number);
    }
}

/// Whether the text contains the address or network as a word.
fn names(text: &str, address: &str) -> bool {
    text.split(|c: char| !c.is_ascii_hexdigit() && !".:/".contains(c)).any(|word| word == address)
}

fn assert_forgotten(number: usize) {
    let mut lab = Lab::build(Topology::two_segments().families(Families::DUAL));
    start(&mut lab);
    let gone = lab.workers.remove(number);
    let blocks = blocks(&gone);
    let nodes = lab.workers[0].ctl(&["node", "list"]);
    let record = nodes.as_array().unwrap().iter().find(|node| node["name"] == gone.name()).unwrap().clone();
    let addresses = |field: &str| -> Vec<String> {
        let addresses = record[field].as_array().unwrap().iter();
        addresses.map(|address| address.as_str().unwrap().to_owned()).collect()
    };
    // Only a tunnel uses the gateway address; a path on the same link does not.
    let known = [blocks, addresses("underlay")].concat();
    let traces = [known.clone(), addresses("gateways")].concat();
    let everything = |worker: &Worker| {
        worker.node.shell(
            "ip route; ip -6 route; ip neigh show nud permanent; bridge fdb show dev polder.vx; nft list table inet \
             polder",
        )
    };
    for worker in &lab.workers {
        wait::until(&format!("all of the node to be known on {}", worker.name()), || {
            let now = everything(worker);
            match known.iter().find(|trace| !names(&now, trace)) {
                Some(trace) => Err(format!("{trace} is not in {now}")),
                None => Ok(()),
            }
        });
    }
    let name = gone.name().to_owned();
    drop(gone);
    lab.etcd.ctl(&["del", &format!("/polder/v1/nodes/{name}")]);
    let claims = lab.etcd.ctl(&["get", "--prefix", "/polder/v1/blocks/"]);
    let keys: Vec<&str> = claims.lines().collect();
    for pair in keys.chunks(2).filter(|pair| pair[1].contains(&format!("{name:?}"))) {
        lab.etcd.ctl(&["del", pair[0]]);
    }
    for worker in &lab.workers {
        wait::until(&format!("the removed node to be forgotten on {}", worker.name()), || {
            let now = everything(worker);
            match traces.iter().find(|trace| names(&now, trace)) {
                Some(trace) => Err(format!("{trace} is still in {now}")),
                None => Ok(()),
            }
        });
    }
}

#[test]
fn auto_chooses_again_when_a_route_to_a_peer_changes() {
    let mut lab = Lab::build(Topology { nodes: vec![1, 1], router: true, ..Topology::default() });
    start(&mut lab);
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    let (worker, peer) = (&lab.workers[0], lab.underlay(1, false).to_string());
    let path = |wanted: &str| {
        wait::until(&format!("the path to be {wanted}"), || {
            let path = worker.path_to("n2", "ipv4");
            if path == wanted { Ok(()) } else { Err(path) }
        });
    };
    path("direct");
    worker.node.run("ip", &["route", "add", &format!("{peer}/32"), "via", "10.10.1.254"]);
    path("vxlan");
    // The other node still sends directly: both paths are always accepted.
    assert_eq!(lab.workers[1].path_to("n1", "ipv4"), "direct");
    assert_flat(&pods, 1450);
    worker.node.run("ip", &["route", "del", &format!("{peer}/32")]);
    path("direct");
    assert_flat(&pods, 1450);
}

#[test]
fn an_unreachable_peer_is_reported_and_reconnects_by_itself() {
    let mut lab = Lab::build(Topology { nodes: vec![1, 2], router: true, ..Topology::default() });
    start(&mut lab);
    let worker = &lab.workers[0];
    worker.node.run("ip", &["route", "del", "default"]);
    // etcd stays reachable: it is on the same segment.
    let problem = worker.wait_for_status("the unreachable peer to be named", |status| {
        let problems = status["problems"].as_array()?;
        problems
            .iter()
            .find_map(|problem| Some(problem.as_str()?.to_owned()).filter(|p| p.contains("unreachable")))
    });
    assert!(problem.contains("n2") && problem.contains("there is no route to 10.10.2.2"), "{problem}");
    lab.fabric.default_route(&worker.node, 1);
    worker.wait_for_status("the problem to be gone", |status| {
        status["problems"].as_array()?.is_empty().then_some(())
    });
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
}
