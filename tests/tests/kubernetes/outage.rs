//! The API server is away, slow or wrong: no packet is lost, and no ADD waits.

use std::time::Duration;

use polder_tests::api_server::{Behaviour, MAX_DELAY};
use polder_tests::traffic::without_packet_loss;
use polder_tests::{Pod, Topology, wait};

use super::site::{STARTUP_TAINT, Site, problems};

/// Requests per agent that are no storm, in a fault of a few seconds.
const FEW: usize = 20;

/// Runs a fault: pods on both nodes ping each other, and ADDs are served. Returns the number of requests.
fn during(
    site: &Site,
    begin: impl FnOnce(&Site),
    check: impl FnOnce(&Site),
    end: impl FnOnce(&Site),
) -> usize {
    let pods: Vec<Pod> = site.lab.workers.iter().map(|worker| worker.pod("a")).collect();
    let before = site.api.requests().len();
    without_packet_loss(&pods, || {
        begin(site);
        for worker in &site.lab.workers {
            let new = worker.pod("during");
            worker.delete(&new);
        }
        check(site);
        site.lab.workers.iter().for_each(|worker| {
            let new = worker.pod("later");
            worker.delete(&new);
            let status = worker.status();
            assert_eq!(status["ready"], true, "{status}");
            assert_eq!(worker.http("/readyz").0, 200);
        });
        end(site);
    });
    site.lab.workers.iter().zip(&pods).for_each(|(worker, pod)| worker.delete(pod));
    site.api.requests().len() - before
}

/// Waits until both agents report a problem with these words.
fn wait_for_problems(site: &Site, words: &str) {
    for worker in &site.lab.workers {
        wait::within(2 * MAX_DELAY, &format!("a problem with {words:?} on {}", worker.name()), || {
            let problems = problems(&worker.status());
            let is_named = problems.iter().any(|problem| problem.contains(words));
            if is_named { Ok(()) } else { Err(format!("{problems:?}")) }
        });
    }
}

/// Waits until the agents report no problem and watch again.
fn wait_for_recovery(site: &Site) {
    for worker in &site.lab.workers {
        wait::within(2 * MAX_DELAY, "no problem", || {
            let problems = problems(&worker.status());
            if problems.is_empty() { Ok(()) } else { Err(format!("{problems:?}")) }
        });
    }
    wait::within(2 * MAX_DELAY, "both agents to watch again", || {
        let watches = site.api.watches();
        if watches == site.lab.workers.len() { Ok(()) } else { Err(format!("{watches} watches")) }
    });
    // What they see through the new watch counts.
    for worker in &site.lab.workers {
        site.api.taint(worker.name(), STARTUP_TAINT, "NoSchedule");
    }
    for worker in &site.lab.workers {
        wait::until_true("the taint to be removed", || site.api.taints(worker.name()).is_empty());
    }
}

/// Runs a fault in a lab of its own: the pauses of an agent grow with the faults that follow each other.
fn assert_harmless(begin: impl FnOnce(&Site), reported: Option<&str>, end: impl FnOnce(&Site)) {
    let site = Site::start(Topology::one_segment(2));
    site.wait_until_quiet();
    let check = |site: &Site| {
        if let Some(words) = reported {
            wait_for_problems(site, words);
        }
    };
    let requests = during(&site, begin, check, end);
    assert!(requests <= FEW * site.lab.workers.len(), "{requests} requests");
    wait_for_recovery(&site);
}

/// Like [`assert_harmless`], for an API server that behaves like this.
fn assert_behaviour_is_harmless(behaviour: Behaviour, reported: Option<&str>) {
    let begin = |site: &Site| site.api.behave(behaviour);
    assert_harmless(begin, reported, |site| site.api.behave(Behaviour::Serving));
}

#[test]
fn refused_credentials_cost_no_packet_and_no_add() {
    assert_behaviour_is_harmless(Behaviour::Failing(401), Some("refuses the agent's credentials"));
}

#[test]
fn a_missing_role_costs_no_packet_and_no_add() {
    assert_behaviour_is_harmless(Behaviour::Failing(403), Some("forbids the agent to list nodes"));
}

#[test]
fn an_overloaded_api_server_costs_no_packet_and_no_add() {
    assert_behaviour_is_harmless(Behaviour::Failing(429), Some("429"));
}

#[test]
fn errors_of_the_api_server_cost_no_packet_and_no_add() {
    assert_behaviour_is_harmless(Behaviour::Failing(500), Some("500"));
}

#[test]
fn answers_that_are_no_json_cost_no_packet_and_no_add() {
    assert_behaviour_is_harmless(Behaviour::Garbage, Some("is not understood"));
}

#[test]
fn a_slow_api_server_costs_no_packet_and_no_add() {
    assert_behaviour_is_harmless(Behaviour::Slow(Duration::from_secs(1)), None);
}

#[test]
fn a_stale_watch_costs_no_packet_and_no_add() {
    assert_behaviour_is_harmless(Behaviour::Stale, None);
}

#[test]
fn an_absent_api_server_costs_no_packet_and_no_add() {
    assert_harmless(|site| site.api.stop(), Some("is unreachable"), |site| site.api.start_again());
}

#[test]
fn a_frozen_api_server_costs_no_packet_and_no_add() {
    let begin = |site: &Site| {
        // The agents begin to write something, and get no answer.
        for worker in &site.lab.workers {
            site.api.taint(worker.name(), STARTUP_TAINT, "NoSchedule");
        }
        site.api.behave(Behaviour::Frozen);
    };
    assert_harmless(begin, None, |site| site.api.behave(Behaviour::Serving));
}

#[test]
fn an_agent_starts_and_becomes_ready_without_the_api_server() {
    let mut site = Site::build(Topology::one_segment(2));
    site.api.stop();
    site.lab.start_agents();
    wait_for_problems(&site, "is unreachable");
    let pods: Vec<Pod> = site.lab.workers.iter().map(|worker| worker.pod("a")).collect();
    polder_tests::matrix::assert_flat(&pods, 1450);
    site.api.start_again();
    site.lab.workers.iter().for_each(|worker| site.wait_until_available(worker.name()));
    wait_for_recovery(&site);
}
