//! One etcd user per node: the writes that etcd permits, and those that it refuses.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::{Path, PathBuf};

use polder_tests::agent::Worker;
use polder_tests::matrix::assert_flat;
use polder_tests::tls::Authority;
use polder_tests::{Lab, Topology, wait};
use serde_json::json;

type Certificate = (PathBuf, PathBuf);

/// Configures the agent's etcd certificate, from its next start on.
fn identify(worker: &Worker, authority: &Authority, (cert, key): &Certificate) {
    let [ca, cert, key] = [&authority.ca(), cert, key].map(|path| path.display().to_string());
    let lines = worker.configuration();
    let others =
        lines.lines().filter(|line| !["ca =", "cert =", "key ="].iter().any(|key| line.starts_with(key)));
    let config = others.collect::<Vec<_>>().join("\n");
    let tls = format!("[etcd]\nca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"\n");
    worker.configure(&config.replace("[etcd]\n", &tls));
}

/// Commands of an operator are refused, with the remedy.
fn assert_commands_refused(worker: &Worker) {
    for command in [
        &["pool", "add", "more", "10.245.0.0/16"][..],
        &["pool", "drain", "ipv4"],
        &["cluster", "set", "--backend", "vxlan"],
        &["node", "remove", "n2", "--disconnect-pods", "1"],
        &["ipam", "check"],
    ] {
        let message = worker.try_ctl(command).expect_err("it was done");
        assert!(
            message.contains("permission denied") && !message.contains("known"),
            "{command:?}: {message}"
        );
        assert!(message.contains("--etcd-cert FILE --etcd-key FILE"), "{command:?}: {message}");
    }
}

/// Uses an operator's user and password, which is not among the arguments: pool `more` is drained and removed.
fn change_pools_with_a_password(lab: &Lab, folder: &Path) {
    let worker = &lab.workers[0];
    lab.etcd.change_users(&["user", "add", "boss:boss-password"]);
    lab.etcd.change_users(&["user", "grant-role", "boss", "/polder/v1/operator"]);
    let password = folder.join("password");
    std::fs::write(&password, "boss-password\n").unwrap();
    let password = password.display().to_string();
    let boss = ["--etcd-user", "boss"];
    let in_file = [&boss[..], &["--etcd-password-file", &password, "pool", "drain", "more"]].concat();
    worker.ctl(&in_file);
    let remove = [&boss[..], &["pool", "remove", "more"]].concat();
    let message =
        worker.try_ctl_with(&[("POLDERCTL_ETCD_PASSWORD", "wrong")], &remove).expect_err("it was taken");
    assert!(
        message.contains("authentication failed") && message.contains("--etcd-password-file"),
        "{message}"
    );
    worker.try_ctl_with(&[("POLDERCTL_ETCD_PASSWORD", "boss-password")], &remove).unwrap();
}

#[test]
fn a_node_with_its_own_user_works_and_cannot_write_another_nodes_records() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "polder-lab");
    let mut lab =
        Lab::build_with_tls(Topology::one_segment(2), |addresses| Some(authority.for_etcd(addresses)));
    let [root, admin, n1, n2] = ["root", "admin", "n1", "n2"].map(|name| authority.sign(name, &[]));
    lab.etcd.identify(&root.0, &root.1);
    for (worker, certificate) in lab.workers.iter().zip([&n1, &n2]) {
        identify(worker, &authority, certificate);
    }
    // The agents write the first settings before etcd checks permissions.
    lab.start_agents();
    let roles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/etcd-roles");
    for _ in 0..2 {
        // The second run finds everything in place.
        let arguments = [roles.to_str().unwrap(), "--operator", "admin", "n1", "--leader", "n2"];
        wait::until("etcd to have its roles", || lab.etcd.run("bash", &arguments));
    }
    for arguments in
        [&["user", "add", "root:secret"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]]
    {
        lab.etcd.change_users(arguments);
    }

    // Writes to other keys are refused, writes to the node's own keys are not.
    lab.etcd.identify(&n1.0, &n1.1);
    let put = |lab: &Lab, key: &str| lab.etcd.try_ctl(&["put", &format!("/polder/v1/{key}"), "{}"]);
    for foreign_key in [
        "nodes/n2",
        "nodes/n11",
        "alive/n2",
        "answers/n2",
        "addresses/n2/10.244.0.9",
        "fences/n2/x",
        "cluster",
        "pools/ipv4",
        "inspection",
        "leader",
    ] {
        let message = put(&lab, foreign_key).expect_err(foreign_key);
        assert!(message.contains("permission denied"), "{foreign_key}: {message}");
    }
    for own in ["addresses/n1/10.244.0.9", "answers/n1"] {
        put(&lab, own).unwrap();
        lab.etcd.ctl(&["del", &format!("/polder/v1/{own}")]);
    }
    // A node that may be the leader can remove nodes, and change no settings.
    lab.etcd.identify(&n2.0, &n2.1);
    for right in ["leader", "fences/n3/x", "nodes/n3"] {
        put(&lab, right).unwrap();
        lab.etcd.ctl(&["del", &format!("/polder/v1/{right}")]);
    }
    for foreign_key in ["cluster", "pools/ipv4", "inspection", "alive/n1"] {
        let message = put(&lab, foreign_key).expect_err(foreign_key);
        assert!(message.contains("permission denied"), "{foreign_key}: {message}");
    }
    lab.etcd.identify(&root.0, &root.1);

    // Everything that a node does by itself, from its start on.
    for worker in &mut lab.workers {
        assert!(worker.stop());
        worker.start_and_wait();
    }
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("pod")).collect();
    assert_flat(&pods, 1450);
    for worker in &lab.workers {
        let own = format!("/polder/v1/addresses/{}/", worker.name());
        wait::until_true("etcd to be told", || !lab.etcd.keys(&own).is_empty());
        assert_eq!(worker.status()["problems"], json!([]));
    }

    // Operator commands are refused at once, with the remedy and a known outcome. The node has no problem.
    let worker = &lab.workers[0];
    assert_commands_refused(worker);
    assert_eq!(worker.status()["problems"], json!([]));

    // With an operator's certificate the commands succeed, and the agent continues with its own.
    let path = |path: &PathBuf| path.display().to_string();
    let [cert, key] = [path(&admin.0), path(&admin.1)];
    let certificate = ["--etcd-cert", &cert, "--etcd-key", &key];
    worker.ctl(&[&certificate[..], &["pool", "add", "more", "10.245.0.0/16"]].concat());
    let variables = [("POLDERCTL_ETCD_CERT", cert.as_str()), ("POLDERCTL_ETCD_KEY", &key)];
    worker.try_ctl_with(&variables, &["cluster", "set", "--backend", "vxlan"]).unwrap();
    let checked = worker.try_ctl_with(&variables, &["ipam", "check"]).unwrap();
    assert_eq!(checked["nodes"].as_array().map(Vec::len), Some(2), "{checked}");
    assert_eq!(checked["deviations"], json!([]), "{checked}");
    let message = worker.try_ctl(&["pool", "drain", "more"]).expect_err("the agent has kept the credentials");
    assert!(message.contains("permission denied"), "{message}");

    // The same with a user and a password.
    change_pools_with_a_password(&lab, folder.path());

    // A certificate of an unknown user, or of another node, is refused too.
    let nobody = authority.sign("nobody", &[]);
    for shown in [&nobody, &n2] {
        let [cert, key] = [path(&shown.0), path(&shown.1)];
        let add = ["--etcd-cert", &cert, "--etcd-key", &key, "pool", "add", "more", "10.245.0.0/16"];
        let message = worker.try_ctl(&add).expect_err("it was done");
        assert!(
            message.contains("permission denied") && message.contains("the common name of --etcd-cert"),
            "{message}"
        );
    }
    let log = worker.log();
    assert!(log.contains("etcd user boss") && !log.contains("boss-password"), "{log}");

    // The removed node confirms with its own certificate.
    wait::until("n2 to be removed", || {
        worker.try_ctl_with(&variables, &["node", "remove", "n2", "--disconnect-pods", "1"])
    });
    let fence = || lab.etcd.ctl(&["get", "--prefix", "--print-value-only", "/polder/v1/fences/n2/"]);
    wait::until_true("n2 to confirm its removal", || fence().contains("confirmed"));
}
