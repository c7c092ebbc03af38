//! A user of etcd for each node: what it may write, and what it may not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};

use polder_tests::agent::Worker;
use polder_tests::matrix::assert_flat;
use polder_tests::tls::Authority;
use polder_tests::{Lab, Topology, wait};
use serde_json::json;

type Certificate = (PathBuf, PathBuf);

/// Lets the agent show that certificate from its next start on.
fn identify(worker: &Worker, authority: &Authority, (cert, key): &Certificate) {
    let [ca, cert, key] = [&authority.ca(), cert, key].map(|path| path.display().to_string());
    let lines = worker.configuration();
    let others =
        lines.lines().filter(|line| !["ca =", "cert =", "key ="].iter().any(|key| line.starts_with(key)));
    let config = others.collect::<Vec<_>>().join("\n");
    let tls = format!("[etcd]\nca = \"{ca}\"\ncert = \"{cert}\"\nkey = \"{key}\"\n");
    worker.configure(&config.replace("[etcd]\n", &tls));
}

#[test]
fn a_node_with_its_own_user_does_its_work_and_cannot_write_what_is_another_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "polder-lab");
    let mut lab =
        Lab::build_with_tls(Topology::one_segment(2), |addresses| Some(authority.for_etcd(addresses)));
    let [root, admin, n1, n2] = ["root", "admin", "n1", "n2"].map(|name| authority.sign(name, &[]));
    lab.etcd.identify(&root.0, &root.1);
    for (worker, certificate) in lab.workers.iter().zip([&n1, &n2]) {
        identify(worker, &authority, certificate);
    }
    // Somebody has to write the first settings.
    lab.start_agents();
    let roles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/etcd-roles");
    for _ in 0..2 {
        // The second time, all is there.
        let arguments = [roles.to_str().unwrap(), "--operator", "admin", "n1", "n2"];
        wait::until("etcd to have its roles", || lab.etcd.run("bash", &arguments));
    }
    for arguments in
        [&["user", "add", "root:secret"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]]
    {
        lab.etcd.change_users(arguments);
    }

    // What it may not write is refused, and what is its own is not.
    lab.etcd.identify(&n1.0, &n1.1);
    let put = |key: &str| lab.etcd.try_ctl(&["put", &format!("/polder/v1/{key}"), "{}"]);
    for of_others in [
        "nodes/n2",
        "nodes/n11",
        "alive/n2",
        "answers/n2",
        "addresses/n2/10.244.0.9",
        "fences/n2/x",
        "cluster",
        "pools/ipv4",
        "inspection",
    ] {
        let said = put(of_others).expect_err(of_others);
        assert!(said.contains("permission denied"), "{of_others}: {said}");
    }
    for own in ["addresses/n1/10.244.0.9", "answers/n1"] {
        put(own).unwrap();
        lab.etcd.ctl(&["del", &format!("/polder/v1/{own}")]);
    }
    lab.etcd.identify(&root.0, &root.1);

    // All that a node does by itself, from its start on.
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

    // What is an operator's is refused at once, and not left open.
    let said = lab.workers[0].try_ctl(&["pool", "add", "more", "10.245.0.0/16"]).unwrap_err();
    assert!(said.contains("permission denied") && !said.contains("known"), "{said}");
    // With the operator's certificate it is done; the node confirms its removal with its own.
    identify(&lab.workers[0], &authority, &admin);
    assert!(lab.workers[0].stop());
    lab.workers[0].start_and_wait();
    lab.workers[0].ctl(&["pool", "add", "more", "10.245.0.0/16"]);
    lab.workers[0].remove_node("n2", 1);
    let fence = || lab.etcd.ctl(&["get", "--prefix", "--print-value-only", "/polder/v1/fences/n2/"]);
    wait::until_true("n2 to confirm its removal", || fence().contains("confirmed"));
}
