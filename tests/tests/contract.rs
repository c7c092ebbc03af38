//! The CNI specification, tested from outside: every verb in every version, requested addresses, MAC address and pool,
//! and chained plugins. STATUS exists only in 1.1.0; blocks of other owners and addresses of earlier pods do not depend
//! on the version.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::net::{IpAddr, Ipv4Addr};

use polder_tests::agent::Worker;
use polder_tests::cni::{VERSIONS, WITH_CHECK, WITH_GC, WITH_RESULTS, code, conf, message, since};
use polder_tests::matrix::assert_flat;
use polder_tests::probe::{self, Echo};
use polder_tests::routes::wait_for_routes;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

#[test]
fn add_check_and_del_use_the_result_format_of_every_version() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    for version in VERSIONS {
        let name = format!("v{}", version.replace('.', "-"));
        let pod = worker.pod_with(&name, &Worker::netconf(version));
        let result = pod.result();
        assert_eq!(result["cniVersion"], version);
        if version < WITH_RESULTS {
            assert!(result["ip4"]["ip"].is_string() && result["ip6"]["ip"].is_string(), "{result}");
            assert!(result.get("ips").is_none() && result.get("interfaces").is_none(), "{result}");
        } else {
            assert_eq!(
                (result["ips"].as_array().unwrap().len(), result["interfaces"].as_array().unwrap().len()),
                (2, 3)
            );
            assert_eq!(result["ips"][0].get("version").is_some(), version < "1.0.0", "{result}");
            assert_eq!(result["interfaces"][1].get("mtu").is_some(), version >= "1.1.0", "{result}");
            assert_eq!(result["routes"][0].get("mtu").is_some(), version >= "1.1.0", "{result}");
        }
        let check = worker.cni("CHECK", &name, pod.netns(), &pod.later_conf());
        if version < WITH_CHECK {
            assert_eq!(code(check), 1);
        } else {
            assert_eq!(check, Ok(Value::Null));
        }
        for verb in ["GC", "STATUS"] {
            let outcome =
                worker.cni(verb, "", "", &conf(version, &json!({ "cni.dev/valid-attachments": null })));
            if version < WITH_GC {
                assert_eq!(code(outcome), 1, "{verb}");
            } else {
                assert_eq!(outcome, Ok(Value::Null));
            }
        }
        worker.delete(&pod);
    }
    assert_eq!(worker.status()["pods"], 0);
}

#[test]
fn status_is_answered_while_etcd_hangs() {
    let lab = Lab::start(Topology::one_segment(1));
    let status = || lab.workers[0].cni("STATUS", "", "", &conf("1.1.0", &json!({})));
    assert_eq!(status(), Ok(Value::Null));
    // The test fails if the answer takes longer than the agent's time limit.
    lab.etcd.freeze(true);
    assert_eq!(status(), Ok(Value::Null));
    lab.etcd.freeze(false);
}

/// The address of that number in the node's first IPv4 block.
fn nth(worker: &Worker, number: u32) -> IpAddr {
    let block = worker.status()["blocks"][0]["block"].as_str().unwrap().to_owned();
    let first: Ipv4Addr = block.split('/').next().unwrap().parse().unwrap();
    Ipv4Addr::from_bits(first.to_bits() + number).into()
}

#[test]
fn a_pod_gets_the_requested_addresses_mac_address_and_pool() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let elsewhere = worker.namespace("elsewhere");
    // Released addresses are in cool-down: each version requests other addresses.
    for (number, version) in (10..).step_by(5).zip(VERSIONS) {
        let (first, second, third) = (nth(worker, number), nth(worker, number + 1), nth(worker, number + 2));
        let mac = format!("02:00:00:00:00:{number}");
        let asking = |runtime: Value| conf(version, &json!({ "runtimeConfig": runtime }));

        let wished = asking(json!({ "ips": [format!("{first}/26")], "mac": mac }));
        let pod = worker.pod_with(&format!("a{version}"), &wished);
        assert_eq!(pod.v4(), first);
        assert_eq!(pod.addresses().len(), 2, "the other family has an address of the agent's choice");
        assert!(pod.run("ip", &["link", "show", "eth0"]).contains(&mac));
        let annotations = json!({ "polder.dev/address": second.to_string(), "polder.dev/pool": "ipv4" });
        let annotated = asking(json!({ "io.kubernetes.cri.pod-annotations": annotations }));
        let other = worker.pod_with(&format!("b{version}"), &annotated);
        assert_eq!(other.addresses(), [second], "one pool is one family");
        probe::ping(pod.command("ping"), second, 56).unwrap();

        let refused = |runtime: Value| worker.cni("ADD", "c", &elsewhere, &asking(runtime));
        let taken = refused(json!({ "ips": [first.to_string()] })).unwrap_err();
        assert!(taken["code"] == 101 && taken["msg"].to_string().contains(pod.name()), "{taken}");
        assert_eq!(code(refused(json!({ "ips": [nth(worker, 0).to_string()] }))), 101, "the gateway's");
        assert_eq!(code(refused(json!({ "ips": ["192.0.2.9"] }))), 7, "in no pool");
        assert_eq!(code(refused(json!({ "mac": mac }))), 101);
        let v6 = pod.addresses().into_iter().find(IpAddr::is_ipv6).unwrap();
        assert_eq!(code(refused(json!({ "ips": [third.to_string(), v6.to_string()] }))), 101, "one of two");
        assert_eq!(worker.status()["pods"], 2, "a refusal leaves nothing");
        let free = worker.pod_with(&format!("d{version}"), &asking(json!({ "ips": [third.to_string()] })));
        assert_eq!(free.v4(), third, "the one of the two that was free still is");
        worker.delete(&pod);
        assert_eq!(code(refused(json!({ "ips": [first.to_string()] }))), 11, "it rests");
        [free, other].iter().for_each(|pod| worker.delete(pod));
    }
    assert_eq!(worker.status()["pods"], 0);
}

#[test]
fn runtime_config_overrides_args_in_the_configuration_and_these_override_cni_args() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    worker.namespace("a");
    let [runtime, args, last] = [1, 2, 3].map(|number| format!("02:00:00:00:00:0{number}"));
    for version in VERSIONS {
        let call = |verb: &str, more: &Value| {
            let arguments = format!("MAC={last}");
            let variables = [
                ("CNI_COMMAND", verb),
                ("CNI_CONTAINERID", "a"),
                ("CNI_NETNS", "/run/netns/a"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_ARGS", &arguments),
            ];
            let output = worker.plugin(&variables, &conf(version, more).to_string());
            assert!(output.status.success(), "{verb}: {output:?}");
        };
        let (capability, cni) =
            (json!({ "runtimeConfig": { "mac": runtime } }), json!({ "args": { "cni": { "mac": args } } }));
        let mut both = capability.clone();
        both["args"] = cni["args"].clone();
        for (more, mac) in [(&both, &runtime), (&capability, &runtime), (&cni, &args), (&json!({}), &last)] {
            call("ADD", more);
            let link = worker.node.run("ip", &["-n", "a", "link", "show", "eth0"]);
            assert!(link.contains(mac), "{more}: {link}");
            call("DEL", more);
        }
    }
}

#[test]
fn an_address_is_granted_in_an_unclaimed_block_and_refused_in_a_claimed_one() {
    let lab = Lab::start(Topology::one_segment(2));
    let asking = |address: &str| conf("1.1.0", &json!({ "runtimeConfig": { "ips": [address] } }));
    let pod = lab.workers[0].pod_with("a", &asking("10.244.255.77"));
    let other = lab.workers[1].pod("b");
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&[pod, other], 1450);
    lab.workers[1].namespace("c");
    let refused = message(lab.workers[1].cni("ADD", "c", "/run/netns/c", &asking("10.244.255.78")));
    assert!(refused.contains("in block 10.244.255.64/26 of node n1"), "{refused}");
}

#[test]
fn a_reused_address_is_reachable_at_once_and_gets_no_old_connections() {
    let lab = Lab::start(Topology::two_segments());
    let others: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("other")).collect();
    let worker = &lab.workers[0];
    // The kernel tracks connections only if a rule needs it.
    worker.node.shell(
        "nft 'add table ip followed; add chain ip followed every { type filter hook prerouting \
                       priority 0; }; add rule ip followed every ct state new counter'",
    );
    let first = worker.pod("first");
    let address = first.v4();
    {
        let _echo = first.within(|| Echo::start(address));
        for other in &others {
            other.within(|| probe::udp(other.v4(), address, 100)).unwrap();
            other.within(|| probe::tcp(address, 1000)).unwrap();
        }
    }
    let followed = || worker.node.run("conntrack", &["--dump"]);
    assert!(followed().contains(&address.to_string()), "{}", followed());
    worker.delete(&first);
    wait::until("the connections to be forgotten", || {
        let left = followed();
        if left.contains(&address.to_string()) { Err(left) } else { Ok(()) }
    });
    let asking = conf("1.1.0", &json!({ "runtimeConfig": { "ips": [address.to_string()] } }));
    let netns = worker.namespace("second");
    let result = wait::until("the address to have rested", || {
        worker.cni("ADD", "second", &netns, &asking).map_err(|error| error.to_string())
    });
    let second = Pod::new(&worker.node, "second", &netns, asking, result);
    assert_eq!(second.v4(), address);
    let _echo = second.within(|| Echo::start(address));
    for other in &others {
        assert_eq!(other.within(|| probe::udp(other.v4(), address, 100)).unwrap().0, other.v4());
    }
    probe::ping(worker.node.command("ping"), address, 56).unwrap();
}

/// Calls the plugins of a list as a runtime does: each gets the previous result, and DEL uses the reverse order.
fn chain(worker: &Worker, verb: &str, name: &str, plugins: &[Value], last: &Value) -> Result<Value, Value> {
    let (netns, mut result) = (format!("/run/netns/{name}"), last.clone());
    let mut order: Vec<&Value> = plugins.iter().collect();
    if verb == "DEL" {
        order.reverse();
    }
    for plugin in order {
        let mut conf = plugin.clone();
        if !result.is_null() {
            conf["prevResult"] = result.clone();
        }
        let reply = worker.cni(verb, name, &netns, &conf)?;
        if verb == "ADD" {
            result = reply;
        }
    }
    Ok(result)
}

/// `polder`, and the plugins that usually follow it.
fn usual_plugins(version: &str) -> Vec<Value> {
    let fast = 1_000_000_000;
    let mut plugins = vec![
        json!({ "type": "polder" }),
        json!({ "type": "portmap", "snat": false, "runtimeConfig": { "portMappings": [
            { "hostPort": 8088, "containerPort": probe::PORT, "protocol": "tcp" },
        ] } }),
        json!({ "type": "bandwidth", "runtimeConfig": { "bandwidth": {
            "ingressRate": fast, "ingressBurst": fast, "egressRate": fast, "egressBurst": fast,
        } } }),
        json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } }),
    ];
    // Debian's plugin `firewall` does not support older versions.
    if version >= "0.4.0" {
        plugins.push(json!({ "type": "firewall" }));
    }
    for plugin in &mut plugins {
        plugin["cniVersion"] = version.into();
        plugin["name"] = "polder".into();
    }
    plugins
}

#[test]
fn plugins_after_polder_work_and_a_host_port_is_reachable_from_outside() {
    let lab = Lab::start(Topology::two_segments());
    let worker = &lab.workers[0];
    let other = lab.workers[2].pod("b");
    for version in since(WITH_RESULTS).filter(|version| *version < WITH_GC) {
        let plugins = usual_plugins(version);
        let netns = worker.namespace(version);
        let result = chain(worker, "ADD", version, &plugins, &Value::Null).unwrap();
        let pod = Pod::new(&worker.node, version, &netns, plugins[0].clone(), result.clone());
        if version >= WITH_CHECK {
            // After the changes of all other plugins, a CHECK of `polder` succeeds.
            assert_eq!(chain(worker, "CHECK", version, &plugins[..1], &result), Ok(result.clone()));
        }
        assert_eq!(pod.run("cat", &["/proc/sys/net/core/somaxconn"]).trim(), "500");
        assert!(worker.node.run("tc", &["qdisc"]).contains("tbf"), "bandwidth is not limited");

        let echo = pod.within(|| Echo::start(pod.v4()));
        let world = lab.world.as_ref().unwrap();
        let seen = world.within(|| probe::tcp_at(lab.underlay(0, false), 8088, 1000)).unwrap();
        assert_eq!(seen, Lab::world_address(false), "the pod sees who it is");
        drop(echo);
        assert_flat(&[pod, other.clone()], 1450);

        assert!(chain(worker, "DEL", version, &plugins, &result).is_ok());
        assert_eq!(worker.status()["pods"], 0);
    }
}

#[test]
fn results_of_plugins_before_polder_are_passed_on() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    for version in since(WITH_RESULTS) {
        let mut before = json!({
            "cniVersion": version,
            "interfaces": [{ "name": "x0", "sandbox": "/run/netns/b" }],
            "ips": [{ "interface": 0, "address": "192.0.2.5/24" }],
            "routes": [{ "dst": "198.51.100.0/24" }],
            "dns": { "nameservers": ["192.0.2.1"] },
        });
        if version < "1.0.0" {
            before["ips"][0]["version"] = "4".into();
        }
        let pod = worker.pod_with(version, &conf(version, &json!({ "prevResult": before })));
        let behind = pod.result();
        for list in ["interfaces", "ips", "routes"] {
            assert_eq!(behind[list][0], before[list][0], "{behind}");
        }
        assert_eq!(behind["dns"], before["dns"]);
        assert_eq!(
            (&behind["ips"][1]["interface"], &behind["interfaces"][3]["name"]),
            (&json!(3), &json!("eth0"))
        );
        if version >= WITH_CHECK {
            assert_eq!(worker.cni("CHECK", version, pod.netns(), &pod.later_conf()), Ok(Value::Null));
        }
        worker.delete(&pod);
    }
    assert_eq!(worker.status()["pods"], 0);
}
