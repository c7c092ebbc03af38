//! One configuration for many nodes and clusters: variables of the environment beside the file.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use polder_tests::matrix::assert_flat;
use polder_tests::{Lab, Topology};

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
