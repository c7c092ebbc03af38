//! An etcd with users and passwords.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::{Lab, Topology, wait};
use serde_json::{Value, json};

const ROOT: &str = "root:root-password";
const PASSWORD_FILE: &str = "/etc/polder/etcd-password";

/// Adds a pool, and waits until the agent lists it: etcd must accept the agent's writes.
fn add_pool(worker: &Worker, name: &str, cidr: &str) -> Result<(), String> {
    worker.try_ctl(&["pool", "add", name, cidr])?;
    wait::until_true("the pool to be known", || worker.ctl(&["pool", "list"]).to_string().contains(name));
    Ok(())
}

fn wait_until_ready_without_problems(worker: &Worker) {
    worker.wait_for_status("no problem", |status| {
        let is_connected = status["store"].to_string().contains("revision");
        (status["problems"] == json!([]) && status["ready"] == json!(true) && is_connected).then_some(())
    });
}

fn users(lab: &Lab, password: &str) {
    for arguments in [
        &["user", "add", ROOT][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "polder"],
        &["role", "grant-permission", "polder", "--prefix=true", "readwrite", "/polder/v1/"],
        &["user", "add", &format!("polder:{password}")],
        &["user", "grant-role", "polder", "polder"],
    ] {
        lab.etcd.change_users(arguments);
    }
}

/// Number of refused logins in the logs of all etcd members.
fn refused_logins(lab: &Lab) -> usize {
    let logs = lab.etcd.nodes().map(|node| node.log("etcd.log"));
    logs.map(|log| log.lines().filter(|line| line.contains("invalid password")).count()).sum()
}

#[test]
fn an_agent_with_a_password_survives_changes_of_authentication_and_member_restarts() {
    let mut lab = Lab::build(Topology { etcd_members: 3, ..Topology::one_segment(1) });
    let user = format!("[etcd]\nuser = \"polder\"\npassword_file = \"{PASSWORD_FILE}\"\n");
    lab.workers[0].configure(&lab.workers[0].configuration().replace("[etcd]\n", &user));
    lab.workers[0].node.write(PASSWORD_FILE, "first\n");

    // One member does not run, and the others have no authentication yet.
    lab.etcd.kill_member(0);
    lab.workers[0].start_and_wait();
    wait_until_ready_without_problems(&lab.workers[0]);
    add_pool(&lab.workers[0], "before", "10.245.0.0/16").unwrap();
    lab.etcd.start_member(0);

    // Authentication is enabled while the agent runs.
    users(&lab, "first");
    lab.etcd.change_users(&["auth", "enable"]);
    lab.etcd.log_in(Some(ROOT));
    let add = |lab: &Lab, name: &str, cidr: &str| {
        wait::until(&format!("pool {name} to be added"), || add_pool(&lab.workers[0], name, cidr));
        wait_until_ready_without_problems(&lab.workers[0]);
    };
    add(&lab, "enabled", "10.246.0.0/16");

    // The user of polderctl replaces the agent's user, only for that command.
    lab.etcd.change_users(&["role", "add", "reader"]);
    lab.etcd.change_users(&["role", "grant-permission", "reader", "--prefix=true", "read", "/polder/v1/"]);
    lab.etcd.change_users(&["user", "add", "reader:reader-password"]);
    lab.etcd.change_users(&["user", "grant-role", "reader", "reader"]);
    let drain = ["--etcd-user", "reader", "pool", "drain", "enabled"];
    let message = lab.workers[0].try_ctl_with(&[("POLDERCTL_ETCD_PASSWORD", "reader-password")], &drain);
    let message = message.expect_err("a user that may only read has changed a pool");
    assert!(
        message.contains("permission denied") && message.contains("the etcd user of polderctl"),
        "{message}"
    );
    lab.workers[0].ctl(&["pool", "drain", "enabled"]);
    let remove = ["--etcd-user", "polder", "pool", "remove", "enabled"];
    let message = lab.workers[0].try_ctl_with(&[("POLDERCTL_ETCD_PASSWORD", "first")], &remove).unwrap();
    assert!(message.to_string().contains("sent to etcd without encryption"), "{message}");
    assert!(lab.workers[0].log().contains("the password of etcd user polder is sent unencrypted"));

    // Restarted members know no token.
    for number in 0..3 {
        lab.etcd.kill_member(number);
        add(&lab, &format!("without{number}"), &format!("10.247.{number}.0/24"));
        lab.etcd.start_member(number);
        add(&lab, &format!("with{number}"), &format!("10.248.{number}.0/24"));
    }
    assert_eq!(refused_logins(&lab), 0);

    // Another password: the agent reports it, and retries rarely until the file has the new password.
    lab.etcd.change_users(&["user", "delete", "polder"]);
    lab.etcd.change_users(&["user", "add", "polder:second"]);
    lab.etcd.change_users(&["user", "grant-role", "polder", "polder"]);
    let message = add_pool(&lab.workers[0], "refused", "10.249.0.0/16").unwrap_err();
    assert!(message.contains("authentication failed") && message.contains("etcd.password_file"), "{message}");
    lab.workers[0].kill();
    lab.workers[0].start();
    let named = |status: &Value| status["store"].to_string().contains("etcd.password_file").then_some(());
    lab.workers[0].wait_for_status("the password to be named", named);
    for _ in 0..50 {
        assert!(add_pool(&lab.workers[0], "refused", "10.249.0.0/16").is_err());
    }
    assert!((1..15).contains(&refused_logins(&lab)), "{} logins", refused_logins(&lab));
    lab.workers[0].node.write(PASSWORD_FILE, "second\n");
    add(&lab, "second", "10.250.0.0/16");

    // Authentication is disabled while the agent runs.
    lab.etcd.change_users(&["auth", "disable"]);
    lab.etcd.log_in(None);
    add(&lab, "disabled", "10.251.0.0/16");
}
