//! One configuration for many nodes and clusters: variables of the environment beside the file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use polder_tests::agent::Worker;
use polder_tests::matrix::assert_flat;
use polder_tests::{Lab, Topology, wait};

/// What Kubernetes gives every pod beside a Service named polder-etcd.
const INJECTED: [(&str, &str); 2] =
    [("POLDER_ETCD_PORT", "tcp://10.96.0.7:2379"), ("POLDER_ETCD_SERVICE_HOST", "10.96.0.7")];

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn all_nodes_have_one_file_and_variables_make_the_difference() {
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

    // Another start, with a variable that is no key.
    let worker = &mut lab.workers[0];
    assert!(worker.stop());
    worker.variables.push(("POLDER__ETCD__ENDPOINT".to_owned(), "[]".to_owned()));
    let said_before = worker.log().len();
    worker.start();
    let (code, said) = worker.wait_until_ended();
    assert_eq!(code, Some(78), "{said}");
    let said = &said[said_before..];
    assert!(said.contains("environment variable POLDER__ETCD__ENDPOINT: unknown field `endpoint`"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "one clear error: {said}");
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

    // What is wrong in one of them is named there, by the key that it has in etcd.
    let evil = format!("{}pools/evil", PREFIXES[1]);
    lab.etcd.ctl(&["put", &evil, "{}"]);
    let problems = |worker: &Worker| worker.status()["problems"].to_string();
    wait::until_true("the record to be named", || problems(&lab.workers[1]).contains(&evil));
    assert!(!problems(&lab.workers[0]).contains("evil"));
}
