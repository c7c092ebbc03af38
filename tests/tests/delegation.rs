//! Delegation in both directions: `polder` calls other IPAM plugins, and other plugins call `polder-ipam`. Debian's
//! reference plugins do not support 1.1.0: a scripted plugin is used for it.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::cni::{VERSIONS, WITH_CHECK, WITH_GC, WITH_RESULTS, conf, message, since};
use polder_tests::matrix::assert_flat;
use polder_tests::probe::{self, Echo};
use polder_tests::scripted::ScriptedIpam;
use polder_tests::{Lab, Pod, Topology};
use serde_json::{Value, json};

/// The versions that the reference plugins support.
fn versions_of_other_plugins() -> impl Iterator<Item = &'static str> {
    VERSIONS.into_iter().filter(|version| *version < WITH_GC)
}

/// `polder` with addresses of `host-local` from `range`.
fn host_local(version: &str, range: &Value) -> Value {
    let ipam = json!({
        "type": "host-local", "dataDir": "/run/host-local",
        "ranges": [[range]], "routes": [{ "dst": "0.0.0.0/0" }],
    });
    conf(version, &json!({ "ipam": ipam }))
}

#[test]
fn another_ipam_plugin_allocates_and_releases_the_addresses() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let own = worker.pod("own");
    let given = || {
        worker.node.shell("ls /run/host-local/polder 2>/dev/null | grep -c ^192 || true").trim().to_owned()
    };
    for version in versions_of_other_plugins() {
        let conf = host_local(version, &json!({ "subnet": "192.168.77.0/24" }));
        let [a, b] = ["a", "b"].map(|name| worker.pod_with(name, &conf));
        assert!(a.v4().to_string().starts_with("192.168.77."), "{}", a.v4());
        assert_eq!(given(), "2");
        // A second ADD must not release the addresses of the running pod.
        let again = message(worker.cni("ADD", "a", a.netns(), &conf));
        assert!(again.contains("eth0"), "{again}");
        assert_eq!(given(), "2");
        for (from, to) in [(&a, &b), (&b, &a), (&a, &own), (&own, &a)] {
            let _echo = to.within(|| Echo::start(to.v4()));
            assert_eq!(from.within(|| probe::udp(from.v4(), to.v4(), 100)).unwrap().0, from.v4());
        }
        if version >= WITH_CHECK {
            assert_eq!(worker.cni("CHECK", "a", a.netns(), &a.later_conf()), Ok(Value::Null));
        }
        // A DEL without the namespace.
        worker.node.run("ip", &["netns", "delete", "b"]);
        assert_eq!(worker.cni("DEL", "b", "", &b.later_conf()), Ok(Value::Null));
        worker.delete(&a);
        assert_eq!((given().as_str(), worker.status()["pods"].as_u64()), ("0", Some(1)));
        assert!(!worker.node.run("ip", &["route"]).contains("192.168.7"), "a route is left");
    }
}

#[test]
fn an_add_is_undone_if_the_ipam_plugin_fails() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let netns = worker.namespace("c");
    for version in versions_of_other_plugins() {
        let refused = |conf: &Value| message(worker.cni("ADD", "c", &netns, conf));
        let missing = refused(&conf(version, &json!({ "ipam": { "type": "nobody" } })));
        assert!(missing.contains("plugin nobody not found"), "{missing}");
        let within = refused(&host_local(version, &json!({ "subnet": "10.244.7.0/24" })));
        assert!(within.contains("is in pool ipv4, which Polder manages"), "{within}");
        let one =
            json!({ "subnet": "192.168.78.0/30", "rangeStart": "192.168.78.2", "rangeEnd": "192.168.78.2" });
        let full = host_local(version, &one);
        let only = worker.pod_with("only", &full);
        let none = refused(&full);
        assert!(none.contains("host-local: ") && none.contains("no IP addresses available"), "{none}");
        worker.delete(&only);
        assert_eq!(worker.node.shell("ls /run/host-local/polder | grep -c '^1[09]' || true").trim(), "0");
        assert_eq!(worker.status()["pods"], 0);
        assert!(!worker.node.run("ip", &["-o", "link"]).contains("pld"));
    }
}

#[test]
fn other_plugins_get_addresses_of_our_pools() {
    let lab = Lab::start(Topology::one_segment(2));
    let worker = &lab.workers[0];
    worker.node.shell("ip link add uplink0 type veth peer name uplink1; ip link set uplink0 up");
    let three = first_three(worker);
    for version in versions_of_other_plugins() {
        for (plugin, more) in [
            ("ptp", json!({})),
            ("bridge", json!({ "bridge": "cni0", "isDefaultGateway": true })),
            ("macvlan", json!({ "master": "uplink0" })),
        ] {
            let mut conf = conf(version, &more);
            conf["type"] = plugin.into();
            conf["ipam"] = json!({ "type": "polder-ipam" });
            let pod = worker.pod_with(&format!("{plugin}-{version}"), &conf);
            assert!(pod.v4().to_string().starts_with(&three), "{plugin} got {}", pod.v4());
            if version >= WITH_CHECK {
                let check = worker.cni("CHECK", pod.name(), pod.netns(), &pod.later_conf());
                assert_eq!(check, Ok(Value::Null), "{plugin} {version}");
            }
            worker.delete(&pod);
            assert_eq!(worker.status()["pods"], 0);
        }
    }
    // Pods of the plugin `ptp` are part of the flat network.
    let conf =
        json!({ "cniVersion": "1.0.0", "name": "other", "type": "ptp", "ipam": { "type": "polder-ipam" } });
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod_with("x", &conf)).collect();
    assert_flat(&pods, 1450);
}

/// The first three octets of the node's first block and a period: all its addresses start with them.
fn first_three(worker: &Worker) -> String {
    let block = worker.status()["blocks"][0]["block"].as_str().unwrap().to_owned();
    format!("{}.", block.rsplit_once('.').unwrap().0)
}

/// Makes the call of an ipvlan plugin: not every kernel has ipvlan, and no plugin of Debian supports 1.1.0.
#[test]
fn polder_ipam_returns_addresses_in_the_format_of_the_callers_version() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let three = first_three(worker);
    for version in VERSIONS {
        let call = |verb: &str, more: &Value| {
            let variables = [
                ("CNI_COMMAND", verb),
                ("CNI_CONTAINERID", "i"),
                ("CNI_NETNS", "/run/netns/i"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_PATH", "/nowhere"),
            ];
            let mut conf = conf(version, more);
            conf["type"] = "ipvlan".into();
            conf["ipam"] = json!({ "type": "polder-ipam" });
            let output = worker.any_plugin("polder-ipam", &variables, &conf.to_string());
            assert!(output.status.success(), "{verb} {version}: {output:?}");
            serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
        };
        let given = call("ADD", &json!({}));
        let address = if version < WITH_RESULTS { &given["ip4"]["ip"] } else { &given["ips"][0]["address"] };
        assert!(address.as_str().unwrap().starts_with(&three), "{given}");
        assert_eq!((&given["cniVersion"], given.get("interfaces")), (&json!(version), None), "{given}");
        if version >= WITH_CHECK {
            call("CHECK", &json!({ "prevResult": given }));
        }
        if version >= WITH_GC {
            call("STATUS", &json!({}));
            call("GC", &json!({ "cni.dev/valid-attachments": [] }));
            assert_eq!(worker.status()["pods"], 0);
        }
        call("DEL", &json!({ "prevResult": given }));
        assert_eq!(worker.status()["pods"], 0);
    }
}

#[test]
fn leased_addresses_are_released_without_a_del_if_the_namespace_is_gone() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.workers[0].configure_also("ipam.grace_seconds = 1");
    lab.start_agents();
    let worker = &lab.workers[0];
    let conf =
        json!({ "cniVersion": "1.0.0", "name": "other", "type": "ptp", "ipam": { "type": "polder-ipam" } });
    let (_gone, _pod) = (worker.pod_with("a", &conf), worker.pod("b"));
    worker.node.shell("ip netns delete a; ip netns delete b");
    worker.wait_for_status("the addresses to be free", |status| (status["pods"] == 0).then_some(()));
}

#[test]
fn every_verb_is_forwarded_to_the_ipam_plugin_and_its_reply_is_returned() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let scripted = ScriptedIpam::new(&worker.node);
    let netns = worker.namespace("a");
    for version in VERSIONS {
        let conf = conf(version, &ScriptedIpam::conf());
        let call = |verb: &str, more: &Value| {
            let mut conf = conf.clone();
            more.as_object().unwrap().iter().for_each(|(key, value)| conf[key] = value.clone());
            worker.cni(verb, "a", &netns, &conf)
        };
        scripted.gives(version, &["192.168.7.7/24"]);
        let result = call("ADD", &json!({})).unwrap();
        let pod = Pod::new(&worker.node, "a", &netns, conf.clone(), result.clone());
        assert_eq!(pod.v4().to_string(), "192.168.7.7");
        let mut expected = vec!["ADD"];
        if version >= WITH_CHECK {
            call("CHECK", &json!({ "prevResult": result })).unwrap();
            expected.push("CHECK");
        }
        if version >= WITH_GC {
            call("STATUS", &json!({})).unwrap();
            call("GC", &json!({ "cni.dev/valid-attachments": [] })).unwrap();
            assert_eq!(worker.status()["pods"], 0, "GC without a valid attachment");
            expected.extend(["STATUS", "GC"]);
        }
        call("DEL", &json!({ "prevResult": result })).unwrap();
        expected.push("DEL");
        assert_eq!(scripted.take_calls(), expected.join(" "));

        scripted.fails(r#"{"code": 50, "msg": "no more", "details": "at all"}"#);
        let mut verbs = vec!["ADD", "DEL"];
        verbs.extend((version >= WITH_GC).then_some(["STATUS", "GC"]).into_iter().flatten());
        for verb in &verbs {
            let error = call(verb, &json!({})).expect_err(verb);
            assert_eq!(
                (&error["code"], error["msg"].as_str()),
                (&json!(50), Some("polder: scripted-ipam: no more: at all")),
                "{verb}"
            );
        }
        // A failed ADD is undone.
        assert_eq!(scripted.take_calls(), format!("ADD DEL {}", verbs[1..].join(" ")));
        scripted.fails("Segmentation fault");
        assert!(message(call("ADD", &json!({}))).contains("printed \"Segmentation fault\""));
        assert_eq!(scripted.take_calls(), "ADD DEL");
        scripted.recovers();
        assert_eq!(worker.status()["pods"], 0);
    }
}

#[test]
fn several_addresses_of_a_family_are_refused_in_old_result_formats() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let scripted = ScriptedIpam::new(&worker.node);
    let netns = worker.namespace("old");
    for version in VERSIONS.into_iter().filter(|version| *version < WITH_RESULTS) {
        // The scripted plugin replies in another version than the requested one.
        scripted.gives(WITH_GC, &["192.168.7.8/24", "192.168.8.8/24"]);
        let old = message(worker.cni("ADD", "old", &netns, &conf(version, &ScriptedIpam::conf())));
        assert!(old.contains("more than one IPv4 address"), "{old}");
        assert_eq!(scripted.take_calls(), "ADD DEL");
    }
    for version in since(WITH_RESULTS) {
        scripted.gives(version, &["192.168.7.8/24", "192.168.8.8/24"]);
        let pod = worker.pod_with(version, &conf(version, &ScriptedIpam::conf()));
        let result = pod.result();
        assert_eq!((pod.addresses().len(), result["routes"].as_array().unwrap().len()), (2, 1), "{result}");
        for address in pod.addresses() {
            probe::ping(worker.node.command("ping"), address, 56).unwrap();
        }
        worker.delete(&pod);
        assert_eq!(scripted.take_calls(), "ADD DEL");
    }
    assert_eq!(worker.status()["pods"], 0);
}
