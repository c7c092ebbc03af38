//! One configuration file for many nodes and clusters, with environment variables for the differences.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::process::Command;

use polder_tests::agent::{Worker, dist};
use polder_tests::matrix::assert_flat;
use polder_tests::{Lab, Topology, node, wait};

/// Variables that Kubernetes sets in pods if a Service named polder-etcd exists.
const INJECTED: [(&str, &str); 2] =
    [("POLDER_ETCD_PORT", "tcp://10.96.0.7:2379"), ("POLDER_ETCD_SERVICE_HOST", "10.96.0.7")];

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn the_help_of_the_agent_explains_the_names_of_variables() {
    let help = node::output(Command::new(dist().join("polder-agent")).arg("--help"));
    assert!(help.starts_with("Polder node agent") && help.contains("POLDER__UNDERLAY__INTERFACE"), "{help}");
    assert!(help.contains("install-plugins") && help.contains("--print-config"), "{help}");
}

#[test]
fn all_nodes_share_one_file_and_differ_by_environment_variables() {
    let mut lab = Lab::build(Topology::one_segment(2));
    let endpoints = format!("{:?}", lab.etcd.endpoints());
    for worker in &mut lab.workers {
        worker.configure("node = \"everybody\"\ncni_conf_dir = \"/run/cni/net.d\"\n[etcd]\nendpoints = []\n");
        let node = worker.name().to_owned();
        let own = [
            ("POLDER__NODE", node.as_str()),
            ("POLDER__ETCD__ENDPOINTS", &endpoints),
            ("POLDER__BOOTSTRAP__POOLS", "[\"10.244.0.0/16\"]"),
        ];
        worker.variables = variables(&[&own[..], &INJECTED].concat());
    }
    lab.start_agents();
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("pod")).collect();
    assert_flat(&pods, 1450);

    // A restart with a variable that names no key.
    let worker = &mut lab.workers[0];
    assert!(worker.stop());
    worker.variables.push(("POLDER__ETCD__ENDPOINT".to_owned(), "[]".to_owned()));
    let length_before = worker.log().len();
    worker.start();
    let (code, message) = worker.wait_until_ended();
    assert_eq!(code, Some(78), "{message}");
    let message = &message[length_before..];
    assert!(
        message.contains("environment variable POLDER__ETCD__ENDPOINT: unknown field `endpoint`"),
        "{message}"
    );
    assert_eq!(message.trim().lines().count(), 1, "one clear error: {message}");
}

#[test]
fn two_clusters_with_the_same_names_and_ranges_share_an_etcd() {
    const PREFIXES: [&str; 2] = ["/polder/blue/", "/polder/green/"];
    let mut lab = Lab::build(Topology::one_segment(2));
    for (worker, prefix) in lab.workers.iter_mut().zip(PREFIXES) {
        worker.variables = variables(&[("POLDER__NODE", "same"), ("POLDER__ETCD__PREFIX", prefix)]);
        worker.start_and_wait();
        worker.pod("pod");
    }
    let keys = |prefix: &str| lab.etcd.keys(prefix);
    for (worker, prefix) in lab.workers.iter().zip(PREFIXES) {
        assert_eq!(keys(&format!("{prefix}nodes/")), [format!("{prefix}nodes/same")]);
        assert_eq!(keys(&format!("{prefix}blocks/")).len(), 1);
        wait::until_true("etcd to be told", || !keys(&format!("{prefix}addresses/")).is_empty());
        assert_eq!(worker.ctl(&["node", "list"]).as_array().unwrap().len(), 1);
        assert!(worker.ctl_verdict(&["ipam", "check"]).0, "something deviates");
    }
    let cluster = |worker: &Worker| worker.status()["cluster"]["id"].clone();
    assert_ne!(cluster(&lab.workers[0]), cluster(&lab.workers[1]));
    assert_eq!(keys("/polder/v1/"), Vec::<String>::new());

    // A problem in one cluster is reported only there, with the record's key in etcd.
    let evil = format!("{}pools/evil", PREFIXES[1]);
    lab.etcd.ctl(&["put", &evil, "{}"]);
    let problems = |worker: &Worker| worker.status()["problems"].to_string();
    wait::until_true("the record to be named", || problems(&lab.workers[1]).contains(&evil));
    assert!(!problems(&lab.workers[0]).contains("evil"));
}

#[test]
fn a_name_for_all_etcd_members_is_resolved_again_after_a_disconnection() {
    let mut lab = Lab::build(Topology { etcd_members: 3, ..Topology::one_segment(1) });
    let hosts = |lab: &Lab, members: &[u8]| {
        let lines: Vec<_> =
            members.iter().map(|number| format!("10.10.1.{} etcd.test\n", 200 + number)).collect();
        lab.workers[0].node.write("/etc/hosts", &lines.concat());
    };
    hosts(&lab, &[0]);
    let endpoint = "[\"http://etcd.test:2379\"]";
    lab.workers[0].variables = variables(&[("POLDER__ETCD__ENDPOINTS", endpoint)]);
    lab.workers[0].start_and_wait();

    // The first member is disconnected from the others, and still accepts connections of clients.
    hosts(&lab, &[0, 1, 2]);
    for direction in ["input", "output"] {
        let rules = format!(
            "add table inet cut; add chain inet cut {direction} {{ type filter hook {direction} priority 0; }}; \
             add rule inet cut {direction} tcp dport 2380 drop; add rule inet cut {direction} tcp sport 2380 drop"
        );
        lab.etcd.machine(0).run("nft", &[&rules]);
    }
    let worker = &lab.workers[0];
    wait::until("a pool to be added", || worker.try_ctl(&["pool", "add", "more", "10.245.0.0/16"]));
    worker.wait_for_status("the store to be heard", |status| {
        status["store"].to_string().contains("revision").then_some(())
    });
    worker.wait_for_status("no problem", |status| status["problems"].as_array()?.is_empty().then_some(()));
}
