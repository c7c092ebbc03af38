//! Another release of the agent runs on a node, and then this one again. Its pods communicate meanwhile.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::Path;

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat;
use polder_tests::traffic::without_packet_loss;
use polder_tests::{Lab, Pod, Topology};
use rusqlite::Connection;
use serde_json::json;
use tempfile::TempDir;

fn lab() -> (Lab, Vec<Pod>) {
    let lab = Lab::start(Topology::two_segments().families(Families::DUAL));
    let pods = lab.workers.iter().map(|worker| worker.pod("old")).collect();
    (lab, pods)
}

const LEDGER: &str = "/var/lib/polder/ledger.db";

/// A copy of a node's ledger. SQLite cannot open files in another mount namespace.
fn copy(worker: &Worker) -> (TempDir, Connection) {
    let folder = tempfile::tempdir().unwrap();
    for beside in ["", "-wal"] {
        let file = worker.node.path_on_host(Path::new(&format!("{LEDGER}{beside}")));
        if file.exists() {
            fs::copy(file, folder.path().join(format!("ledger.db{beside}"))).unwrap();
        }
    }
    let ledger = Connection::open(folder.path().join("ledger.db")).unwrap();
    (folder, ledger)
}

/// Changes the ledger of a node whose agent does not run.
fn change_ledger(worker: &Worker, sql: &str) {
    let (folder, ledger) = copy(worker);
    ledger.execute_batch(sql).unwrap();
    ledger.close().unwrap();
    worker.node.shell(&format!("rm {LEDGER}*"));
    fs::copy(folder.path().join("ledger.db"), worker.node.path_on_host(Path::new(LEDGER))).unwrap();
}

/// The layout version of the ledger.
fn layout(worker: &Worker) -> u32 {
    let (_folder, ledger) = copy(worker);
    ledger.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
}

/// Stops all agents, lets `leave` change each node to the state that another release would leave, and starts the agents
/// again.
fn take_over(lab: &mut Lab, pods: &[Pod], leave: impl Fn(&Worker)) {
    without_packet_loss(pods, || {
        for worker in &mut lab.workers {
            assert!(worker.stop());
            leave(worker);
        }
        for worker in &mut lab.workers {
            worker.start_and_wait();
            worker.wait_for_status("nothing to do", |status| {
                (status["last_pass"]["writes"] == 0 && status["problems"] == json!([])).then_some(())
            });
        }
    });
}

fn assert_all_is_well(lab: &Lab, pods: &[Pod], round: &str) {
    let new: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod(round)).collect();
    assert_flat(&[pods, &new].concat(), 1450);
    let (is_clean, found) = lab.workers[0].ctl_verdict(&["ipam", "check"]);
    assert!(is_clean, "{found}");
    lab.workers.iter().zip(&new).for_each(|(worker, pod)| worker.delete(pod));
}

#[test]
fn an_upgrade_from_the_previous_release_loses_no_packet() {
    let (mut lab, pods) = lab();
    let known = layout(&lab.workers[0]);
    take_over(&mut lab, &pods, |worker| {
        change_ledger(
            worker,
            "DROP TABLE readable;
             ALTER TABLE identity DROP COLUMN removed;
             ALTER TABLE blocks DROP COLUMN leaving;
             ALTER TABLE attachments DROP COLUMN gateways;
             ALTER TABLE attachments DROP COLUMN ports;
             PRAGMA user_version = 2;",
        );
        // The earlier release had fewer filter rules.
        worker.node.shell("nft delete table arp polder; nft flush chain inet polder tunnels");
    });
    assert!(lab.workers.iter().all(|worker| layout(worker) == known));
    assert_all_is_well(&lab, &pods, "after");
}

#[test]
fn a_downgrade_from_a_later_release_loses_no_packet() {
    let (mut lab, pods) = lab();
    let known = layout(&lab.workers[0]);
    take_over(&mut lab, &pods, |worker| {
        change_ledger(
            worker,
            &format!(
                "ALTER TABLE attachments ADD COLUMN colour TEXT NOT NULL DEFAULT 'none';
                 CREATE TABLE moods (node TEXT PRIMARY KEY) STRICT;
                 PRAGMA user_version = {};",
                known + 1
            ),
        );
        worker.node.shell(
            "nft 'add chain inet polder later { type filter hook forward priority 0; }; \
             add rule inet polder later counter comment later; add rule inet polder from_pods counter comment later'",
        );
    });
    assert!(
        lab.workers.iter().all(|worker| layout(worker) == known + 1),
        "the later release has to find its own"
    );
    let rules = lab.workers[0].node.shell("nft list ruleset");
    assert!(!rules.contains("later"), "{rules}");
    assert_all_is_well(&lab, &pods, "back");
}

#[test]
fn an_agent_refuses_a_newer_ledger_and_pods_stay_connected() {
    let (mut lab, pods) = lab();
    let known = layout(&lab.workers[0]);
    assert!(lab.workers[0].stop());
    let change = format!("UPDATE readable SET since = {0}; PRAGMA user_version = {0}", known + 1);
    change_ledger(&lab.workers[0], &change);
    without_packet_loss(&pods, || {
        lab.workers[0].start();
        let (code, message) = lab.workers[0].wait_until_ended();
        let expected = format!("ledger.db has layout {}, but this release supports {known}", known + 1);
        assert!(code != Some(0) && message.contains(&expected), "{message}");
    });
    change_ledger(
        &lab.workers[0],
        &format!("UPDATE readable SET since = {known}; PRAGMA user_version = {known}"),
    );
    without_packet_loss(&pods, || lab.workers[0].start_and_wait());
    assert_all_is_well(&lab, &pods, "again");
}
