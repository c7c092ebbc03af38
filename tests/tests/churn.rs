//! Pods are added and deleted while the agent repairs; and on three nodes with three etcd members during all kinds of
//! faults.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polder_tests::agent::Worker;
use polder_tests::caller::Caller;
use polder_tests::churn::census::Census;
use polder_tests::churn::pace::{Pace, StopOnPanic};
use polder_tests::churn::runtime::{Common, Running, Runtime};
use polder_tests::churn::script::{Edge, Event, Fault, Saboteur, script};
use polder_tests::churn::site::Site;
use polder_tests::churn::tally::Tally;
use polder_tests::churn::truth::Truth;
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, assert_reachable};
use polder_tests::random::{Random, announced_seed};
use polder_tests::routes::wait_for_routes;
use polder_tests::{Lab, Pod, Topology, wait};

/// Steps of all runtimes together until the end of the random faults, and those after them without a quorum.
const STEPS: usize = 900;
const WITHOUT_QUORUM: usize = 90;

/// Runtimes on each node.
const RUNTIMES: usize = 3;

/// The nodes' disks, in MiB.
const DISK: u32 = 16;

/// Longest time until all counts are exact: lost DELs are detected, and connections to disconnected members time out.
const TIMEOUT: Duration = Duration::from_secs(90);

fn lab() -> Lab {
    let families = Topology::one_segment(3).families(Families::DUAL);
    let mut lab = Lab::build(Topology { etcd_members: 3, disk: Some(DISK), ..families });
    // Small blocks, so that nodes claim several.
    for (name, pool) in [("ipv4", ("10.244.0.0/22", 28)), ("ipv6", ("fd00:244::/116", 124))] {
        let record = serde_json::json!({ "cidr": pool.0, "block_length": pool.1, "state": "active" });
        lab.etcd.ctl(&["put", &format!("/polder/v1/pools/{name}"), &record.to_string()]);
    }
    for worker in &lab.workers {
        worker.configure_also("ipam.grace_seconds = 1\nipam.cooldown_seconds = 10");
    }
    lab.start_agents();
    lab
}

/// Waits until all counts equal those of the test. Returns the time that it took.
fn assert_exact(lab: &Lab, truth: &Truth, when: &str) -> Duration {
    let begin = Instant::now();
    wait::within(TIMEOUT, "etcd to be healthy", || {
        if lab.etcd.is_healthy() { Ok(()) } else { Err("it is not".to_owned()) }
    });
    wait::within(TIMEOUT, &format!("all counts to be exact {when}"), || {
        let differences = Census::take(lab)?.differences(&truth.live());
        if differences.is_empty() { Ok(()) } else { Err(format!("{differences:#?}")) }
    });
    begin.elapsed()
}

fn assert_nothing_wrong(truth: &Truth) {
    let wrong = truth.wrong();
    assert!(wrong.is_empty(), "{} times something was that must never be: {wrong:#?}", wrong.len());
}

/// Lets the runtimes work during the faults, and finally without a quorum. Returns the pods that run at the end, and
/// the time without a quorum.
fn churn(
    lab: &mut Lab,
    sites: &[Site],
    truth: &Truth,
    tally: &Tally,
    mut random: Random,
) -> (Vec<Running>, Duration) {
    let pace = Pace::new(STEPS + WITHOUT_QUORUM);
    let common = Common { truth, pace: &pace, tally };
    let events = script(&mut random, STEPS);
    std::thread::scope(|scope| {
        let _guard = StopOnPanic(&pace);
        let mut runtimes = Vec::new();
        for site in sites {
            for number in 0..RUNTIMES {
                let runtime = Runtime::new(&common, site, &format!("c{number}"), random.branch());
                runtimes.push(scope.spawn(|| runtime.work()));
            }
        }
        let mut saboteur = Saboteur { lab, sites, truth, tally };
        let last =
            Event { step: STEPS, fault: Fault::QuorumKilled, target: random.below(3), edge: Edge::Begins };
        for (number, event) in events.iter().chain([&last]).enumerate() {
            pace.go_on_to(event.step);
            assert_nothing_wrong(truth);
            // During the fault, the runtimes continue up to the next event.
            pace.allow(events.get(number + 1).map_or(STEPS, |next| next.step));
            saboteur.act(event);
        }
        let begin = Instant::now();
        saboteur.expect_agents();
        pace.allow(STEPS + WITHOUT_QUORUM);
        let pods =
            runtimes.into_iter().flat_map(|runtime| runtime.join().expect("a runtime failed")).collect();
        let without_quorum = begin.elapsed();
        saboteur.act(&Event { edge: Edge::Ends, ..last });
        (pods, without_quorum)
    })
}

#[test]
fn every_used_address_has_exactly_one_live_interface_after_random_faults() {
    let seed = announced_seed();
    let mut lab = lab();
    let (truth, tally) = (Truth::default(), Tally::default());
    let sites: Vec<_> =
        lab.workers.iter().map(|worker| Site::new(worker.name(), Caller::of(&worker.node))).collect();
    let begin = Instant::now();
    let (running, without_quorum) = churn(&mut lab, &sites, &truth, &tally, Random::new(seed));
    let churned = begin.elapsed();
    assert_nothing_wrong(&truth);
    let repaired = assert_exact(&lab, &truth, "after the last fault");

    let pods: Vec<Pod> = running.iter().map(|pod| pod_of(&lab, pod)).collect();
    wait_for_routes(&lab, TIMEOUT);
    assert_reachable(&pods, Families::DUAL);
    // The node may need a new block, and may detect only then that its connection to the datastore is dead.
    let last = |worker: &Worker| worker.pod_within(TIMEOUT, "last", &Worker::netconf("1.1.0"));
    let one_each: Vec<Pod> = lab.workers.iter().map(last).collect();
    // The pods may have needed new blocks, which the other nodes learn a moment later.
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&one_each, 1450);
    for pod in pods.iter().chain(&one_each) {
        let worker = lab.workers.iter().find(|worker| worker.name() == pod.node()).unwrap();
        worker.delete(pod);
    }
    let emptied = assert_exact(&lab, &Truth::default(), "after the last DEL");
    println!("{tally}");
    println!(
        "{} steps in {churned:?}, the last ones {without_quorum:?} without a quorum",
        STEPS + WITHOUT_QUORUM
    );
    println!("{} pods left; all exact {repaired:?} after the quorum's return", pods.len());
    println!("all empty {emptied:?} after the last DEL");
}

fn pod_of(lab: &Lab, running: &Running) -> Pod {
    let Running { node, container, result } = running;
    let worker = lab.workers.iter().find(|worker| worker.name() == node).unwrap();
    let netns = format!("/run/netns/{container}");
    Pod::new(&worker.node, container, &netns, Worker::netconf("1.1.0"), result.clone())
}

/// Pods that each thread adds one after the other, and the number of threads.
const ROUNDS: usize = 15;
const THREADS: usize = 6;

#[test]
fn concurrent_repairs_do_not_affect_the_results_of_adds() {
    let lab = Lab::start(Topology::one_segment(1).families(Families::DUAL));
    let worker = &lab.workers[0];
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let adding: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let pod = worker.pod(&format!("p{thread}-{round}"));
                        let mut conf = pod.conf().clone();
                        conf["prevResult"] = pod.result().clone();
                        let check = worker.cni("CHECK", pod.name(), pod.netns(), &conf);
                        assert!(check.is_ok(), "{} is not as it was made: {check:?}", pod.name());
                        worker.delete(&pod);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while busy.load(Ordering::Relaxed) {
                // A neighbour entry of no pod, so that the agent has something to repair.
                worker
                    .node
                    .shell("ip neigh replace 10.244.0.1 lladdr 02:00:00:00:00:01 dev polder0 nud permanent");
            }
        });
        let failed: Vec<_> = adding.into_iter().filter_map(|thread| thread.join().err()).collect();
        busy.store(false, Ordering::Relaxed);
        assert!(failed.is_empty(), "{} of {THREADS} threads failed", failed.len());
    });
}
