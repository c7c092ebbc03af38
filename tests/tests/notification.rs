//! Messages of the agent to systemd (`sd_notify(3)`).

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::time::Duration;

use polder_tests::agent::Worker;
use polder_tests::service_manager::ServiceManager;
use polder_tests::{Lab, Topology};

const READY: &str = "READY=1";
const WATCHDOG: &str = "WATCHDOG=1";

/// Shorter than any operator would configure. The agent sends three watchdog messages per timeout.
const WATCHDOG_TIME: Duration = Duration::from_millis(1500);

#[test]
fn an_agent_without_etcd_notifies_systemd_of_its_start_and_the_reason() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.etcd.kill();
    let worker = &mut lab.workers[0];
    let mut systemd = ServiceManager::of(worker, WATCHDOG_TIME);
    worker.start();
    systemd.wait_for(READY);
    // The agent answers services that are ordered after it, even if only with a reason.
    assert_eq!(worker.try_status().unwrap()["ready"], false);
    systemd.wait_for_status("not ready: ");
    systemd.forget();
    systemd.wait_for(WATCHDOG);

    lab.etcd.start_again();
    systemd.wait_for("STATUS=ready");
    lab.workers[0].wait_until_ready();
    assert_eq!(systemd.count(READY), 0, "it has started once");
    assert!(lab.workers[0].stop());
    systemd.wait_for("STOPPING=1");
}

#[test]
fn the_watchdog_gets_no_message_while_an_agent_thread_is_stuck() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let mut systemd = ServiceManager::of(&mut lab.workers[0], WATCHDOG_TIME);
    lab.start_agents();
    let worker: &Worker = &lab.workers[0];
    for thread in ["ledger", "kernel", "pods"] {
        systemd.forget();
        systemd.wait_for(WATCHDOG);
        worker.with_stopped_thread(thread, || {
            systemd.wait_for_status(&format!("thread {thread} has made no progress"));
            systemd.forget();
            // `/livez` answers after 3 s. Without the same check for the watchdog, six messages would be sent
            // meanwhile.
            assert_eq!(worker.http("/livez").0, 503);
            assert_eq!(systemd.count(WATCHDOG), 0, "{:?}", systemd.received());
        });
        systemd.wait_for(WATCHDOG);
        systemd.wait_for("STATUS=ready");
    }
}

#[test]
fn an_agent_that_cannot_start_notifies_the_reason_and_never_readiness() {
    let mut lab = Lab::build(Topology::one_segment(1));
    let worker = &mut lab.workers[0];
    let mut systemd = ServiceManager::of(worker, WATCHDOG_TIME);
    let configuration = worker.configuration();
    worker.configure("resync_seconds = 0");
    worker.start();
    assert_eq!(worker.wait_until_ended().0, Some(78), "a restart does not help");
    systemd.wait_for_status("journalctl -u polder-agent");

    worker.configure(&format!("proc_sys_net = \"/nowhere\"\n{configuration}"));
    worker.start();
    assert_eq!(worker.wait_until_ended().0, Some(1));
    systemd.wait_for_status("/nowhere");
    assert_eq!(systemd.count(READY), 0);
}
