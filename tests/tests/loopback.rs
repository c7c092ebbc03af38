//! The plugin `loopback`, a link to `polder`, does the same as the reference plugin.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;

use polder_tests::agent::dist;
use polder_tests::cni::VERSIONS;
use polder_tests::{Lab, Node, Topology};
use serde_json::{Value, json};

const NETNS: &str = "/run/netns/pod";
const OWN: &str = "/run/own/loopback";
const REFERENCE: &str = "/usr/lib/cni/loopback";

/// A node with a namespace for a pod, and `polder` linked as `loopback`.
fn lab() -> Lab {
    let lab = Lab::build(Topology::one_segment(1));
    let polder = dist().join("polder");
    lab.workers[0].node.shell(&format!(
        "ip netns add pod; mkdir /run/own; ln -s {} /run/own/polder; ln -s polder {OWN}",
        polder.display()
    ));
    lab
}

fn conf(version: &str) -> Value {
    json!({ "cniVersion": version, "name": "cni-loopback", "type": "loopback" })
}

/// Calls a plugin. Returns its output if it succeeds.
fn call(node: &Node, plugin: &str, verb: &str, netns: &str, conf: &Value) -> Result<Value, String> {
    let line = format!("printf %s '{conf}' | {plugin}");
    let mut command = node.command("sh");
    command.args(["-c", &line]).env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "c1").env("CNI_IFNAME", "lo");
    let output = command.env("CNI_NETNS", netns).env("CNI_PATH", "/usr/lib/cni").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return Err(text);
    }
    Ok(if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() })
}

fn is_up(node: &Node) -> bool {
    node.run("ip", &["-n", "pod", "-o", "link", "show", "lo"]).contains(",UP")
}

#[test]
fn loopback_sets_lo_up_and_down_with_the_reference_plugins_result() {
    assert!(Path::new(REFERENCE).exists());
    let lab = lab();
    let node = &lab.workers[0].node;
    for version in VERSIONS {
        let conf = conf(version);
        let mut results = Vec::new();
        // Debian's reference plugin does not support the newest version.
        let reference = (version <= "1.0.0").then_some(REFERENCE);
        for plugin in reference.into_iter().chain([OWN]) {
            let result = call(node, plugin, "ADD", NETNS, &conf).unwrap();
            assert!(is_up(node), "{plugin} {version}");
            if version >= "0.4.0" {
                let mut later = conf.clone();
                later["prevResult"] = result.clone();
                call(node, plugin, "CHECK", NETNS, &later).unwrap();
                node.run("ip", &["-n", "pod", "link", "set", "lo", "down"]);
                assert!(
                    call(node, plugin, "CHECK", NETNS, &later).unwrap_err().contains("lo"),
                    "{plugin} {version}"
                );
            }
            call(node, plugin, "DEL", NETNS, &conf).unwrap();
            assert!(!is_up(node), "{plugin} {version}");
            results.push(result);
        }
        let own = results.pop().unwrap();
        // The reference plugin prints the format of 1.0.0, regardless of the version in its result.
        let address = |number: usize| json!([own["ips"][number]["address"], own["ips"][number]["version"]]);
        if version < "0.3.0" {
            assert_eq!((&own["ip4"]["ip"], &own["ip6"]["ip"]), (&json!("127.0.0.1/8"), &json!("::1/128")));
        } else if version < "1.0.0" {
            assert_eq!([address(0), address(1)], [json!(["127.0.0.1/8", "4"]), json!(["::1/128", "6"])]);
        } else if let Some(reference) = results.pop() {
            assert_eq!(without_nothing(&own), without_nothing(&reference), "{version}");
        } else {
            assert_eq!(own["ips"][0], json!({ "address": "127.0.0.1/8", "interface": 0 }), "{version}");
        }
    }
}

/// The result without empty values, which the reference plugin writes in some versions and omits in others.
fn without_nothing(result: &Value) -> Value {
    match result {
        Value::Object(object) => {
            let kept = object.iter().map(|(key, value)| (key.clone(), without_nothing(value)));
            Value::Object(
                kept.filter(|(_, value)| {
                    !matches!(value, Value::Null) && *value != json!({}) && *value != json!([])
                })
                .collect(),
            )
        }
        Value::Array(list) => Value::Array(list.iter().map(without_nothing).collect()),
        other => other.clone(),
    }
}

#[test]
fn loopback_passes_results_on_and_accepts_a_del_without_a_namespace() {
    let lab = lab();
    let node = &lab.workers[0].node;
    let mut later = conf("1.0.0");
    later["prevResult"] = json!({ "cniVersion": "1.0.0", "ips": [{ "address": "10.244.0.5/32" }] });
    let result = call(node, OWN, "ADD", NETNS, &later).unwrap();
    assert_eq!(result["ips"], json!([{ "address": "10.244.0.5/32" }]), "{result}");

    node.shell("touch /run/netns/stale");
    for gone in ["/run/netns/gone", "/run/netns/stale", ""] {
        assert_eq!(call(node, OWN, "DEL", gone, &conf("1.0.0")), Ok(Value::Null), "{gone:?}");
    }
    let refused = call(node, OWN, "ADD", "/run/netns/gone", &conf("1.0.0")).unwrap_err();
    assert!(refused.contains("loopback: CNI_NETNS /run/netns/gone"), "{refused}");
    for verb in ["STATUS", "GC"] {
        assert_eq!(call(node, OWN, verb, "", &conf("1.1.0")), Ok(Value::Null), "{verb}");
    }
    let version = call(node, OWN, "VERSION", "", &conf("1.1.0")).unwrap();
    assert_eq!(version["supportedVersions"].as_array().unwrap().len(), VERSIONS.len(), "{version}");
}
