//! Input from runtimes, and the answers of the plugins: codes, names, one JSON object or nothing. Except for the last
//! test, no call here changes anything on the node, which is also tested.
//!
//! The cases are those in which the reference plugins differ from the specification, as far as they concern the
//! protocol; those about attachments are in `attachments.rs`, `check.rs`, `collection.rs`, `contract.rs`,
//! `delegation.rs` and `crashes.rs`. Not covered, because they test options of the reference `bridge` plugin that
//! `polder` does not have: hairpin and promiscuous mode, VLANs, MAC spoofing checks as an option (they are always on),
//! several subnets in one pool.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::process::Output;

use polder_tests::agent::Worker;
use polder_tests::cni::VERSIONS;
use polder_tests::{Lab, Topology};
use serde_json::{Value, json};

const PLUGINS: [&str; 2] = ["polder", "polder-ipam"];

/// A call that is valid except for its namespace: the path does not exist.
const CALL: [(&str, &str); 4] = [
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/run/netns/nobody"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/opt/cni/bin"),
];

/// Prints the state that a call could change. A bridge has no carrier until its first port is up, which can take a
/// moment.
const STATE: &str = "ip -o link | wc -l; ip route | sed 's/ linkdown//'; ls /run/polder";

struct Case<'a> {
    worker: &'a Worker,
    plugin: &'static str,
    version: &'static str,
}

impl Case<'_> {
    fn conf(&self) -> Value {
        json!({ "cniVersion": self.version, "name": "n", "type": self.plugin, "ipam": { "type": "polder-ipam" } })
    }

    fn run(&self, verb: &str, without: &[&str], with: &[(&str, &str)], input: &str) -> Output {
        let mut variables: Vec<(&str, &str)> = vec![("CNI_COMMAND", verb)];
        variables.extend(CALL.iter().filter(|(name, _)| !without.contains(name)));
        variables.retain(|(name, _)| with.iter().all(|(other, _)| other != name));
        variables.extend(with);
        self.worker.any_plugin(self.plugin, &variables, input)
    }

    /// The code and the message of an error that is reported in the correct form.
    fn refused(&self, verb: &str, without: &[&str], with: &[(&str, &str)], input: &Value) -> (u64, String) {
        let output = self.run(verb, without, with, &input.to_string());
        self.error(&output)
    }

    fn error(&self, output: &Output) -> (u64, String) {
        assert!(!output.status.success(), "{} {}: {output:?}", self.plugin, self.version);
        assert!(output.stderr.is_empty(), "{output:?}");
        let error: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        assert!(error["cniVersion"].is_string(), "{error}");
        (error["code"].as_u64().unwrap(), error["msg"].as_str().unwrap().to_owned())
    }
}

/// Tests every plugin with every version. Afterwards the node must be unchanged.
fn every(test: impl Fn(&Case<'_>)) {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let before = worker.node.shell(STATE);
    for plugin in PLUGINS {
        for version in VERSIONS {
            test(&Case { worker, plugin, version });
        }
    }
    assert_eq!(worker.node.shell(STATE), before);
    assert_eq!(worker.status()["pods"], 0);
}

/// The configuration for the plugin: `polder` gets no `ipam`, `polder-ipam` accepts only its keys in `ipam`.
fn own(case: &Case<'_>) -> Value {
    let mut conf = case.conf();
    if case.plugin == "polder" {
        conf.as_object_mut().unwrap().remove("ipam");
    }
    conf
}

#[test]
fn version_lists_all_versions_without_waiting_for_input() {
    every(|case| {
        for plugin in PLUGINS {
            let output = case.worker.any_plugin(plugin, &[("CNI_COMMAND", "VERSION")], "");
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(answer["supportedVersions"], json!(VERSIONS));
        }
    });
}

#[test]
fn without_a_command_the_plugin_describes_itself_on_standard_error_only() {
    every(|case| {
        let output = case.worker.any_plugin(case.plugin, &[], "");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        assert!(message.contains(case.plugin) && message.contains(case.version), "{message}");
    });
}

#[test]
fn one_error_names_all_missing_environment_variables() {
    every(|case| {
        for (verb, required) in [
            ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"][..]),
            ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
            ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            ("GC", &["CNI_PATH"]),
        ] {
            for name in required {
                let (code, message) = case.refused(verb, &[name], &[], &own(case));
                assert!(code == 4 && message.contains(name), "{verb} without {name}: {code} {message}");
            }
            let (_, message) = case.refused(verb, required, &[], &own(case));
            assert!(required.iter().all(|name| message.contains(name)), "{verb}: {message}");
        }
        let (code, message) = case.refused("JUMP", &[], &[], &own(case));
        assert!(code == 4 && message.contains("CNI_COMMAND"), "{message}");
    });
}

#[test]
fn invalid_names_are_refused_with_the_name_of_their_variable() {
    every(|case| {
        for (name, values) in [
            ("CNI_CONTAINERID", &["some-%%id", "-x", "a/b"][..]),
            ("CNI_IFNAME", &["sixteen-bytes-xx", ".", "..", "a/b", "a:b", "a b"]),
        ] {
            for value in values {
                let (code, message) = case.refused("ADD", &[], &[(name, value)], &own(case));
                assert!(code == 4 && message.contains(name), "{name}={value}: {code} {message}");
            }
        }
        for (arguments, expected) in [("FOO=BAR", "FOO"), ("K8S_POD_UID=a=b", "K8S_POD_UID=a=b")] {
            let (code, message) = case.refused("ADD", &[], &[("CNI_ARGS", arguments)], &own(case));
            assert!(code == 4 && message.contains(expected), "{message}");
        }
        // With `IgnoreUnknown`, unknown keys are ignored: the error is about the namespace.
        let ignored = [("CNI_ARGS", "IgnoreUnknown=1;FOO=BAR")];
        if case.plugin == "polder" {
            let (code, message) = case.refused("ADD", &[], &ignored, &own(case));
            assert!(code == 4 && message.contains("CNI_NETNS /run/netns/nobody"), "{message}");
        }
    });
}

#[test]
fn an_invalid_configuration_is_refused_with_its_code_and_key() {
    every(|case| {
        let with = |key: &str, value: Value| {
            let mut conf = own(case);
            conf[key] = value;
            conf
        };
        for (conf, code, expected) in [
            (with("cniVersion", json!("9.9.9")), 1, "9.9.9"),
            (with("name", json!("a b")), 7, "name"),
            (with("name", Value::Null), 7, "name is missing"),
            (
                with("ipam", json!({ "type": "../../bin/sh" })),
                if case.plugin == "polder" { 7 } else { 0 },
                "ipam.type",
            ),
            (
                with("ipam", json!({ "type": "x", "subnet": "10.0.0.0/8" })),
                if case.plugin == "polder" { 0 } else { 2 },
                "subnet",
            ),
            (with("vlan", json!(7)), if case.plugin == "polder" { 2 } else { 0 }, "\"vlan\" with value 7"),
        ] {
            if code > 0 {
                let (found, message) = case.refused("ADD", &[], &[], &conf);
                assert!(found == code && message.contains(expected), "{conf}: {found} {message}");
            }
        }
        for input in ["", "{", "[]", "null", "7"] {
            let (code, _) = case.error(&case.run("ADD", &[], &[], input));
            assert_eq!(code, 6, "{input:?}");
        }
    });
    every(|case| {
        // A configuration without a version has version 0.1.0, which has no CHECK.
        let mut conf = own(case);
        conf.as_object_mut().unwrap().remove("cniVersion");
        let (code, message) = case.refused("CHECK", &[], &[], &conf);
        assert!(code == 1 && message.contains("CNI 0.1.0 has no CHECK"), "{message}");
    });
}

#[test]
fn a_verb_that_the_version_does_not_support_is_refused() {
    every(|case| {
        for (verb, since) in [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")] {
            if case.version < since {
                let (code, message) = case.refused(verb, &[], &[], &own(case));
                assert!(
                    code == 1 && message.contains(&format!("CNI {} has no {verb}", case.version)),
                    "{message}"
                );
            }
        }
    });
}

#[test]
fn an_unknown_container_is_reported_as_unknown() {
    every(|case| {
        if case.version >= "0.4.0" {
            let (code, message) = case.refused("CHECK", &[], &[], &own(case));
            assert!(code == 3 && message.contains("n/c1/eth0"), "{code} {message}");
        }
    });
}

#[test]
fn a_del_succeeds_with_an_invalid_previous_result() {
    every(|case| {
        let mut conf = own(case);
        for garbage in [json!("garbage"), json!({ "ips": 7 }), json!([]), Value::Null] {
            conf["prevResult"] = garbage.clone();
            conf["runtimeConfig"] = json!({ "ips": garbage });
            let output = case.run("DEL", &["CNI_NETNS"], &[], &conf.to_string());
            assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        }
    });
}

#[test]
fn the_host_network_namespace_is_refused_without_the_override() {
    every(|case| {
        // `polder-ipam` only allocates an address, and does not use the namespace.
        if case.plugin == "polder" {
            let host = [("CNI_NETNS", "/proc/1/ns/net")];
            let (code, message) = case.refused("ADD", &[], &host, &own(case));
            assert!(code == 4 && message.contains("refusing to change the host's network"), "{message}");
            // With the override it is a namespace like any other. It already has an interface of that name.
            let demanded = [host[0], ("CNI_NETNS_OVERRIDE", "1")];
            let (code, message) = case.refused("ADD", &[], &demanded, &own(case));
            assert!(code == 102 && message.contains("eth0"), "{message}");
        }
    });
}

#[test]
fn a_call_can_be_found_in_the_agents_log_by_its_trace() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let case = Case { worker, plugin: "polder", version: "1.1.0" };
    worker.namespace("traced");
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let with = [
        ("CNI_NETNS", "/run/netns/traced"),
        ("TRACEPARENT", trace),
        ("TRACESTATE", "vendor=1"),
        ("BAGGAGE", "pod=traced"),
    ];
    assert!(case.run("ADD", &[], &with, &own(&case).to_string()).status.success());
    let log = worker.log();
    let line = log.lines().find(|line| line.contains("added attachment=")).unwrap();
    assert!(line.contains(&format!("{trace} tracestate=vendor=1 baggage=pod=traced")), "{line}");
}
