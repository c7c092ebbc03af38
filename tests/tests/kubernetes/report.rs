//! What the agent writes: the condition, the taint, and Events.

use polder_tests::api_server::MAX_DELAY;
use polder_tests::{Topology, wait};
use serde_json::{Value, json};

use super::site::{CONDITION, STARTUP_TAINT, Site, problem, writes};

#[test]
fn the_condition_of_a_node_repeats_the_reasons_of_readyz() {
    let mut site = Site::build(Topology::one_segment(1));
    let worker = &mut site.lab.workers[0];
    worker.configure_also("resync_seconds = 1");
    // Without its datastore, a new node cannot become ready.
    site.lab.etcd.kill();
    worker.start();
    let condition = site.api.wait_for_condition("n1", CONDITION, |condition| {
        let reasons = worker.try_status().map(|status| status["reasons"].clone()).unwrap_or_default();
        let message = condition["message"].as_str().unwrap_or_default();
        let reasons = reasons.as_array().cloned().unwrap_or_default();
        condition["status"] == "True"
            && !reasons.is_empty()
            && reasons.iter().all(|reason| message.contains(reason.as_str().unwrap()))
    });
    assert!(condition["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{condition}");
    let unavailable_since = condition["lastTransitionTime"].clone();

    site.lab.etcd.start_again();
    site.lab.workers[0].wait_until_ready();
    site.wait_until_available("n1");
    let condition = site.api.condition("n1", CONDITION).unwrap();
    assert_ne!(condition["lastTransitionTime"], Value::Null, "{condition}");
    assert!(condition["lastTransitionTime"].as_str() >= unavailable_since.as_str(), "{condition}");
    let others: Vec<_> = site.api.node("n1")["status"]["conditions"].as_array().unwrap().clone();
    assert!(others.len() > 1, "the conditions of the kubelet are kept: {others:?}");
}

#[test]
fn a_node_without_news_writes_nothing() {
    let site = Site::start(Topology::one_segment(2));
    site.wait_until_quiet();
    let before = site.api.requests().len();
    for images in 0..3 {
        // The kubelet changes its Node all the time.
        let images: Vec<_> = (0..images).map(|number| json!({ "sizeBytes": number })).collect();
        site.lab.workers.iter().for_each(|worker| {
            site.api.change(worker.name(), &json!({ "status": { "images": images } }));
        });
        let opened = || site.api.requests().iter().filter(|request| request.is_watch()).count();
        let ended = opened();
        site.api.end_watches();
        wait::until_true("both agents to watch again", || opened() >= ended + 2 && site.api.watches() == 2);
    }
    site.wait_until_quiet();
    let requests = site.api.requests().split_off(before);
    assert!(!requests.is_empty() && writes(&requests).is_empty(), "{requests:?}");
}

#[test]
fn each_agent_watches_only_its_own_node() {
    let site = Site::start(Topology::one_segment(2));
    site.wait_until_quiet();
    let requests = site.api.requests();
    let watches: Vec<_> = requests.iter().filter(|request| request.is_watch()).collect();
    assert!(watches.len() >= 2 && watches.iter().all(|watch| watch.node().is_some()), "{watches:?}");
    // One agent, the leader, lists all Nodes once in a while.
    let lists = requests.iter().filter(|request| request.path == "/api/v1/nodes" && request.node().is_none());
    assert!(lists.count() <= 1, "{requests:?}");
}

#[test]
fn a_damaged_condition_is_repaired() {
    let site = Site::start(Topology::one_segment(1));
    let damaged = json!([{ "type": CONDITION, "status": "True", "reason": "NoRouteCreated", "message": "" }]);
    site.api.change("n1", &json!({ "status": { "conditions": damaged } }));
    site.wait_until_available("n1");
}

#[test]
fn the_startup_taint_is_removed_when_the_node_is_ready_and_not_before() {
    let mut site = Site::build(Topology::one_segment(1));
    site.api.taint("n1", "example.org/kept", "NoSchedule");
    site.api.taint("n1", STARTUP_TAINT, "NoSchedule");
    site.api.taint("n1", "example.org/kept-too", "NoExecute");
    site.lab.etcd.kill();
    site.lab.workers[0].start();
    site.api.wait_for_condition("n1", CONDITION, |condition| condition["status"] == "True");
    site.wait_until_quiet();
    assert_eq!(site.api.taints("n1").len(), 3);

    site.lab.etcd.start_again();
    site.lab.workers[0].wait_until_ready();
    let is_tainted = || site.api.taints("n1").iter().any(|taint| taint["key"] == STARTUP_TAINT);
    wait::until_true("the taint to be removed", || !is_tainted());
    let keys: Vec<_> = site.api.taints("n1").iter().map(|taint| taint["key"].clone()).collect();
    assert_eq!(keys, ["example.org/kept", "example.org/kept-too"]);

    // A Node that was created again for the same machine has the taint again.
    site.api.taint("n1", STARTUP_TAINT, "NoSchedule");
    wait::until_true("the taint to be removed again", || !is_tainted());
}

#[test]
fn a_problem_becomes_one_event_on_the_node() {
    let mut site = Site::start(Topology::one_segment(1));
    let worker = &site.lab.workers[0];
    site.wait_until_quiet();
    site.lab.etcd.ctl(&["put", "/polder/v1/nodes/evil", "{}"]);
    let text = problem(worker, "evil");
    let event = wait_for_event(&site, "evil");
    assert_eq!(event["message"], text);
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["involvedObject"]["uid"], site.api.node("n1")["metadata"]["uid"]);
    let about = &event["involvedObject"];
    assert_eq!((&about["kind"], &about["name"]), (&json!("Node"), &json!("n1")), "{event}");

    // It ends and comes back, and another one appears, which is reported.
    site.lab.etcd.ctl(&["del", "/polder/v1/nodes/evil"]);
    worker.wait_for_status("no problem", |status| {
        (!status["problems"].to_string().contains("evil")).then_some(())
    });
    site.lab.etcd.ctl(&["put", "/polder/v1/nodes/evil", "{}"]);
    site.lab.etcd.ctl(&["put", "/polder/v1/nodes/wicked", "{}"]);
    problem(worker, "evil");
    wait_for_event(&site, "wicked");
    let all = site.api.events();
    let of_evil: Vec<_> = all.iter().filter(|event| event.to_string().contains("evil")).collect();
    assert!(of_evil.len() == 1 && of_evil[0]["count"] == 1, "{all:?}");

    // An agent that starts again counts the Event on.
    let name = event["metadata"]["name"].clone();
    site.lab.workers[0].stop();
    site.lab.workers[0].start_and_wait();
    wait::within(2 * MAX_DELAY, "the Event to be sent again", || {
        let all = site.api.events();
        let again = all.iter().filter(|event| event["metadata"]["name"] == name).count();
        let requests = site.api.requests();
        let patches =
            requests.iter().filter(|request| request.method == "PATCH" && request.path.contains("/events/"));
        if again == 1 && patches.count() > 0 { Ok(()) } else { Err(format!("{all:?}")) }
    });
}

/// Waits for the Event about a problem that contains this text.
fn wait_for_event(site: &Site, text: &str) -> Value {
    wait::within(2 * MAX_DELAY, &format!("an Event about {text}"), || {
        let events = site.api.events();
        let of = |event: &&Value| event.to_string().contains(text);
        events.iter().find(of).cloned().ok_or_else(|| format!("{events:?}"))
    })
}
