//! The CNI specification, from outside: every verb in every version, what a pod may ask for, plugins in a row, plugins
//! behind plugins.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::IpAddr;

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, assert_flat_over};
use polder_tests::probe::{self, Echo};
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

fn node() -> Lab {
    Lab::start(Topology::one_segment(1).families(Families::DUAL))
}

/// The configuration of `polder`, with more in it.
fn conf(version: &str, more: &Value) -> Value {
    let mut conf = Worker::netconf(version);
    more.as_object().unwrap().iter().for_each(|(key, value)| conf[key] = value.clone());
    conf
}

fn code(outcome: Result<Value, Value>) -> u64 {
    outcome.expect_err("it should have failed")["code"].as_u64().unwrap()
}

fn message(outcome: Result<Value, Value>) -> String {
    outcome.expect_err("it should have failed")["msg"].as_str().unwrap().to_owned()
}

/// GC with these valid attachments, or without a list.
fn gc(worker: &Worker, network: &str, valid: Option<&[&Pod]>) -> Result<Value, Value> {
    let mut conf = conf("1.1.0", &json!({ "name": network }));
    if let Some(valid) = valid {
        let valid = valid.iter().map(|pod| json!({ "containerID": pod.name(), "ifname": "eth0" }));
        conf["cni.dev/valid-attachments"] = valid.collect();
    }
    worker.cni("GC", "", "", &conf)
}

#[test]
fn every_version_adds_checks_and_deletes_in_its_own_shape() {
    let lab = node();
    let worker = &lab.workers[0];
    for version in VERSIONS {
        let name = format!("v{}", version.replace('.', "-"));
        let pod = worker.pod_with(&name, &conf(version, &json!({})));
        let result = pod.result();
        assert_eq!(result["cniVersion"], version);
        if version < "0.3.0" {
            assert!(result["ip4"]["ip"].is_string() && result["ip6"]["ip"].is_string(), "{result}");
            assert!(result.get("ips").is_none() && result.get("interfaces").is_none(), "{result}");
        } else {
            assert_eq!(
                (result["ips"].as_array().unwrap().len(), result["interfaces"].as_array().unwrap().len()),
                (2, 3)
            );
            assert_eq!(result["ips"][0].get("version").is_some(), version < "1.0.0", "{result}");
            assert_eq!(result["routes"][0].get("mtu").is_some(), version == "1.1.0", "{result}");
        }
        let check = worker.cni("CHECK", &name, pod.netns(), &conf(version, &json!({ "prevResult": result })));
        if version < "0.4.0" {
            assert_eq!(code(check), 7);
        } else {
            assert_eq!(check, Ok(Value::Null));
        }
        for verb in ["GC", "STATUS"] {
            let outcome =
                worker.cni(verb, "", "", &conf(version, &json!({ "cni.dev/valid-attachments": null })));
            if version < "1.1.0" {
                assert_eq!(code(outcome), 7, "{verb}");
            } else {
                assert_eq!(outcome, Ok(Value::Null));
            }
        }
        worker.delete(&pod);
    }
    assert_eq!(worker.status()["pods"], 0);
}

#[test]
fn gc_takes_away_what_the_runtime_does_not_know_and_nothing_else() {
    let lab = node();
    let worker = &lab.workers[0];
    let (kept, stale) = (worker.pod("kept"), worker.pod("stale"));
    let other = worker.pod_with("other", &conf("1.1.0", &json!({ "name": "other-network" })));
    assert_eq!(gc(worker, "polder", None), Ok(Value::Null), "no list is no knowledge");
    assert_eq!(worker.status()["pods"], 3);
    assert_eq!(gc(worker, "polder", Some(&[&kept])), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 2);
    assert!(!worker.node.run("ip", &["-o", "link"]).contains(stale.host_interface()));
    assert_flat_over(Families::DUAL, &[kept, other.clone()], 1450);
    assert_eq!(gc(worker, "polder", Some(&[])), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 1, "the other network's is left");
    probe::ping(worker.node.command("ping"), other.v4(), 56).unwrap();
}

#[test]
fn gc_spares_what_was_added_after_it_began() {
    let lab = node();
    let worker = &lab.workers[0];
    let _old = worker.pod("old");
    let path = Worker::cni_path();
    // The runtime has made its list, and started the plugin, which does not have it yet.
    let plugin = worker.pending(&[("CNI_COMMAND", "GC"), ("CNI_PATH", &path)]);
    let new = worker.pod("new");
    assert!(plugin.finish(&conf("1.1.0", &json!({ "cni.dev/valid-attachments": [] })).to_string()));
    assert_eq!(worker.status()["pods"], 1, "the old one went, and the new one did not");
    probe::ping(worker.node.command("ping"), new.v4(), 56).unwrap();
}

#[test]
fn status_says_what_stands_in_the_way_of_an_add() {
    let mut lab = Lab::start(Topology { pools: vec!["10.244.0.0/26"], ..Topology::one_segment(1) });
    let status = |worker: &Worker| worker.cni("STATUS", "", "", &conf("1.1.0", &json!({})));
    assert_eq!(status(&lab.workers[0]), Ok(Value::Null));
    // With etcd frozen nobody waits for it: longer than the agent has to answer would be a failure.
    lab.etcd.freeze(true);
    assert_eq!(status(&lab.workers[0]), Ok(Value::Null));
    lab.etcd.freeze(false);
    let worker = &lab.workers[0];
    let pods: Vec<Pod> = (0..61).map(|number| worker.pod(&format!("p{number}"))).collect();
    let error = status(worker).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    assert!(
        error["msg"].as_str().unwrap().contains("pool ipv4 (10.244.0.0/26) has no free block"),
        "{error}"
    );
    drop(pods);
    lab.workers[0].kill();
    let error = status(&lab.workers[0]).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("/run/polder/agent.sock"), "{error}");
}

#[test]
fn status_says_that_running_pods_may_be_cut_off() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let key = lab.etcd.keys("/polder/v1/blocks/").remove(0);
    let claim = lab.etcd.ctl(&["get", "--print-value-only", &key]);
    lab.etcd.ctl(&["put", &key, &claim.trim().replace("\"n1\"", "\"n9\"")]);
    wait::until("the loss of the block to be told", || {
        let status = worker.cni("STATUS", "", "", &conf("1.1.0", &json!({})));
        match status {
            Err(error) if error["code"] == 51 && error["msg"].to_string().contains("claimed by node n9") => {
                Ok(())
            }
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn a_pod_gets_the_addresses_the_mac_address_and_the_pool_that_it_asks_for() {
    let lab = node();
    let worker = &lab.workers[0];
    let block = worker.status()["blocks"][0]["block"].as_str().unwrap().to_owned();
    let first: std::net::Ipv4Addr = block.split('/').next().unwrap().parse().unwrap();
    let nth = |n: u32| IpAddr::from(std::net::Ipv4Addr::from_bits(first.to_bits() + n));
    let asking = |runtime: Value| conf("1.1.0", &json!({ "runtimeConfig": runtime }));

    let pod = worker
        .pod_with("a", &asking(json!({ "ips": [format!("{}/26", nth(40))], "mac": "02:00:00:00:00:07" })));
    assert_eq!(pod.v4(), nth(40));
    assert_eq!(pod.addresses().len(), 2, "the other family has an address of the agent's choice");
    assert!(pod.run("ip", &["link", "show", "eth0"]).contains("02:00:00:00:00:07"));
    let annotated = json!({ "io.kubernetes.cri.pod-annotations": { "polder.dev/address": nth(41).to_string(), "polder.dev/pool": "ipv4" } });
    let other = worker.pod_with("b", &asking(annotated));
    assert_eq!(other.addresses(), [nth(41)], "one pool is one family");
    probe::ping(pod.command("ping"), other.v4(), 56).unwrap();

    let refused = |name: &str, runtime: Value| {
        let netns = worker.namespace(name);
        worker.cni("ADD", name, &netns, &asking(runtime))
    };
    let taken = refused("c", json!({ "ips": [nth(40).to_string()] })).unwrap_err();
    assert!(taken["code"] == 101 && taken["msg"].as_str().unwrap().contains("polder/a/eth0"), "{taken}");
    assert_eq!(code(refused("d", json!({ "ips": [nth(0).to_string()] }))), 101, "the gateway's");
    assert_eq!(code(refused("e", json!({ "ips": ["192.0.2.9"] }))), 7, "in no pool");
    assert_eq!(code(refused("f", json!({ "mac": "02:00:00:00:00:07" }))), 101);
    worker.delete(&pod);
    assert_eq!(code(refused("g", json!({ "ips": [nth(40).to_string()] }))), 11, "it rests");
    assert_eq!(worker.status()["pods"], 1, "a refusal leaves nothing");
}

#[test]
fn an_address_in_a_block_that_nobody_owns_is_claimed_and_one_of_another_node_is_refused() {
    let lab = Lab::start(Topology::one_segment(2));
    let asking = |address: &str| conf("1.1.0", &json!({ "runtimeConfig": { "ips": [address] } }));
    let pod = lab.workers[0].pod_with("a", &asking("10.244.255.77"));
    let other = lab.workers[1].pod("b");
    wait::until_true("the way to the block", || {
        lab.workers[1].node.run("ip", &["route"]).contains("10.244.255.64/26")
    });
    assert_flat(&[pod, other], 1450);
    lab.workers[1].namespace("c");
    let refused = message(lab.workers[1].cni("ADD", "c", "/run/netns/c", &asking("10.244.255.78")));
    assert!(refused.contains("in block 10.244.255.64/26 of node n1"), "{refused}");
}

#[test]
fn another_ipam_plugin_gives_the_addresses_and_takes_them_back() {
    let lab = node();
    let worker = &lab.workers[0];
    let ipam = json!({
        "type": "host-local", "dataDir": "/run/host-local",
        "ranges": [[{ "subnet": "192.168.77.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }],
    });
    let with_ipam = |ipam: &Value| conf("1.0.0", &json!({ "ipam": ipam }));
    let given = || {
        worker.node.shell("ls /run/host-local/polder 2>/dev/null | grep -c ^192 || true").trim().to_owned()
    };
    let (a, b) = (worker.pod_with("a", &with_ipam(&ipam)), worker.pod_with("b", &with_ipam(&ipam)));
    let own = worker.pod("own");
    assert!(a.v4().to_string().starts_with("192.168.77."), "{}", a.v4());
    assert_eq!(given(), "2");
    for (from, to) in [(&a, &b), (&b, &a), (&a, &own), (&own, &a)] {
        let _echo = to.within(|| Echo::start(to.v4()));
        assert_eq!(from.within(|| probe::udp(from.v4(), to.v4(), 100)).unwrap().0, from.v4());
    }
    let check = |conf: &Value| worker.cni("CHECK", "a", a.netns(), conf);
    let mut checked = with_ipam(&ipam);
    checked["prevResult"] = a.result().clone();
    assert_eq!(check(&checked), Ok(Value::Null));

    // What fails behind the plugin is undone before it.
    worker.namespace("c");
    let missing = worker.cni("ADD", "c", "/run/netns/c", &with_ipam(&json!({ "type": "nobody" })));
    assert!(message(missing).contains("there is no plugin nobody"));
    let within = json!({ "type": "host-local", "dataDir": "/run/host-local", "ranges": [[{ "subnet": "10.244.7.0/24" }]] });
    let refused = message(worker.cni("ADD", "c", "/run/netns/c", &with_ipam(&within)));
    assert!(refused.contains("is of pool ipv4, which Polder hands out itself"), "{refused}");
    let full = json!({ "type": "host-local", "dataDir": "/run/full", "ranges": [[{ "subnet": "192.168.78.0/30", "rangeStart": "192.168.78.2", "rangeEnd": "192.168.78.2" }]] });
    let only = worker.pod_with("only", &with_ipam(&full));
    let none = message(worker.cni("ADD", "c", "/run/netns/c", &with_ipam(&full)));
    assert!(none.contains("host-local: ") && none.contains("no IP addresses available"), "{none}");
    assert_eq!(worker.node.shell("ls /run/host-local/polder | grep -c ^10.244 || true").trim(), "0");

    // Without its namespace, and without the agent.
    worker.node.run("ip", &["netns", "delete", "b"]);
    assert_eq!(worker.cni("DEL", "b", "", b.conf()), Ok(Value::Null));
    worker.delete(&a);
    worker.delete(&only);
    assert_eq!((given().as_str(), worker.status()["pods"].as_u64()), ("0", Some(1)));
    assert!(!worker.node.run("ip", &["route"]).contains("192.168.7"), "a route is left");
}

#[test]
fn other_plugins_get_addresses_of_our_pools() {
    let lab = Lab::start(Topology::one_segment(2));
    let ipam = json!({ "type": "polder-ipam" });
    for (number, worker) in lab.workers.iter().enumerate() {
        worker.node.shell("ip link add uplink0 type veth peer name uplink1; ip link set uplink0 up");
        let block = worker.status()["blocks"][0]["block"].as_str().unwrap().to_owned();
        let three: String = block.rsplit_once('.').unwrap().0.to_owned();
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "other", "ipam": ipam });
        for (plugin, more) in [
            ("ptp", json!({})),
            ("bridge", json!({ "bridge": "cni0", "isDefaultGateway": true })),
            ("macvlan", json!({ "master": "uplink0" })),
        ] {
            conf["type"] = plugin.into();
            let mut this = conf.clone();
            more.as_object().unwrap().iter().for_each(|(key, value)| this[key] = value.clone());
            let pod = worker.pod_with(&format!("{plugin}{number}"), &this);
            assert!(pod.v4().to_string().starts_with(&three), "{plugin} got {}", pod.v4());
            this["prevResult"] = pod.result().clone();
            assert_eq!(worker.cni("CHECK", pod.name(), pod.netns(), &this), Ok(Value::Null), "{plugin}");
            worker.delete(&pod);
        }
        // Not every kernel has ipvlan: its plugin would ask with this.
        let variables = |verb| {
            [
                ("CNI_COMMAND", verb),
                ("CNI_CONTAINERID", "i"),
                ("CNI_NETNS", "/run/netns/i"),
                ("CNI_IFNAME", "eth0"),
            ]
        };
        conf["type"] = "ipvlan".into();
        let given = worker.any_plugin("polder-ipam", &variables("ADD"), &conf.to_string());
        let given: Value = serde_json::from_slice(&given.stdout).unwrap();
        assert!(given["ips"][0]["address"].as_str().unwrap().starts_with(&three), "{given}");
        assert!(given.get("interfaces").is_none(), "{given}");
        assert!(worker.any_plugin("polder-ipam", &variables("DEL"), &conf.to_string()).status.success());
        assert_eq!(worker.status()["pods"], 0);
    }
    // Pods of the point-to-point plugin are part of the flat network.
    let conf = json!({ "cniVersion": "1.0.0", "name": "other", "type": "ptp", "ipam": ipam });
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod_with("x", &conf)).collect();
    assert_flat(&pods, 1450);
}

#[test]
fn a_pod_whose_namespace_is_gone_gives_leased_addresses_back_without_a_del() {
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
fn a_pod_with_an_address_that_another_had_is_reached_at_once_and_gets_nothing_of_the_others() {
    let lab = Lab::start(Topology::two_segments());
    let others: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("other")).collect();
    let worker = &lab.workers[0];
    // Connections are followed only where a rule needs it.
    worker.node.shell("nft 'add table ip followed; add chain ip followed every { type filter hook prerouting priority 0; }; add rule ip followed every ct state new counter'");
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

/// Calls the plugins of a list as a runtime does: each gets the result of the one before; a DEL goes backwards.
fn chain(worker: &Worker, verb: &str, name: &str, plugins: &[Value], last: &Value) -> Result<Value, Value> {
    let (netns, mut result) = (format!("/run/netns/{name}"), last.clone());
    let mut order: Vec<&Value> = plugins.iter().collect();
    if verb == "DEL" {
        order.reverse();
    }
    for plugin in order {
        let mut conf = plugin.clone();
        conf["cniVersion"] = "1.0.0".into();
        conf["name"] = "polder".into();
        if !result.is_null() {
            conf["prevResult"] = result.clone();
        }
        let said = worker.cni(verb, name, &netns, &conf)?;
        if verb == "ADD" {
            result = said;
        }
    }
    Ok(result)
}

#[test]
fn plugins_behind_polder_do_their_work_and_a_host_port_answers_the_world() {
    let lab = Lab::start(Topology::two_segments());
    let worker = &lab.workers[0];
    let plugins = [
        json!({ "type": "polder" }),
        json!({ "type": "portmap", "snat": false, "runtimeConfig": { "portMappings": [
            { "hostPort": 8088, "containerPort": probe::PORT, "protocol": "tcp" },
        ] } }),
        json!({ "type": "bandwidth", "runtimeConfig": { "bandwidth": {
            "ingressRate": 1_000_000_000, "ingressBurst": 1_000_000_000, "egressRate": 1_000_000_000, "egressBurst": 1_000_000_000,
        } } }),
        json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } }),
        json!({ "type": "firewall" }),
    ];
    let netns = worker.namespace("a");
    let result = chain(worker, "ADD", "a", &plugins, &Value::Null).unwrap();
    let pod = Pod::new(&worker.node, "a", &netns, json!({ "type": "polder" }), result.clone());
    // After all that the others have done, what is ours is as it was made.
    assert_eq!(chain(worker, "CHECK", "a", &plugins[..1], &result), Ok(result.clone()));
    assert_eq!(pod.run("cat", &["/proc/sys/net/core/somaxconn"]).trim(), "500");
    assert!(worker.node.run("tc", &["qdisc"]).contains("tbf"), "bandwidth is not limited");

    let world = lab.world.as_ref().unwrap();
    let echo = pod.within(|| Echo::start(pod.v4()));
    let seen = world.within(|| probe::tcp_at(lab.underlay(0, false), 8088, 1000)).unwrap();
    assert_eq!(seen, Lab::world_address(false), "the pod sees who it is");
    drop(echo);
    assert_flat(&[pod, lab.workers[2].pod("b")], 1450);

    assert!(chain(worker, "DEL", "a", &plugins, &result).is_ok());
    assert_eq!(worker.status()["pods"], 0);
    // A plugin before ours: what it did is passed on.
    let before = json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "x0", "sandbox": "/run/netns/b" }], "ips": [{ "interface": 0, "address": "192.0.2.5/24" }] });
    worker.namespace("b");
    let behind = chain(worker, "ADD", "b", &plugins[..1], &before).unwrap();
    assert_eq!((&behind["interfaces"][0], &behind["ips"][0]), (&before["interfaces"][0], &before["ips"][0]));
    assert_eq!(behind["ips"][1]["interface"], 3);
}

/// An IPAM plugin that writes down what it is asked, and answers what it is told to.
fn fake_ipam(worker: &Worker) {
    worker.node.write(
        "/run/fake/fake-ipam",
        "#!/bin/sh\necho $CNI_COMMAND >> /run/fake/asked\nif [ -e /run/fake/fails ]; then cat /run/fake/fails; exit 1; fi\n\
         if [ $CNI_COMMAND = ADD ]; then echo '{\"ips\":[{\"address\":\"192.168.7.7/24\"}]}'; fi\n",
    );
    worker.node.shell("chmod +x /run/fake/fake-ipam");
}

#[test]
fn every_verb_goes_on_to_the_ipam_plugin_and_what_it_says_comes_back() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    fake_ipam(worker);
    worker.namespace("a");
    let input = conf("1.1.0", &json!({ "ipam": { "type": "fake-ipam" }, "cni.dev/valid-attachments": [] }));
    let call = |verb: &str, more: &Value| {
        let variables = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "a"),
            ("CNI_NETNS", "/run/netns/a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/nowhere:/run/fake"),
            ("PATH", "/usr/bin:/bin"),
        ];
        let mut input = input.clone();
        more.as_object().unwrap().iter().for_each(|(key, value)| input[key] = value.clone());
        let output = worker.plugin(&variables, &input.to_string());
        let said = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        if output.status.success() { Ok(said) } else { Err(said) }
    };
    let asked =
        || worker.node.shell("cat /run/fake/asked; rm /run/fake/asked").replace('\n', " ").trim().to_owned();
    let result = call("ADD", &json!({})).unwrap();
    assert_eq!(result["ips"][0]["address"], "192.168.7.7/32");
    call("CHECK", &json!({ "prevResult": result })).unwrap();
    call("STATUS", &json!({})).unwrap();
    call("GC", &json!({})).unwrap();
    assert_eq!(worker.status()["pods"], 0, "GC without a valid attachment");
    call("DEL", &json!({})).unwrap();
    assert_eq!(asked(), "ADD CHECK STATUS GC DEL");

    // Several addresses of a family, where the result has room for them.
    let many = "#!/bin/sh\necho $CNI_COMMAND >> /run/fake/asked\n\
                echo '{\"ips\":[{\"address\":\"192.168.7.8/24\"},{\"address\":\"192.168.8.8/24\"}]}'\n";
    let one = worker.node.read("/run/fake/fake-ipam").unwrap();
    worker.node.write("/run/fake/fake-ipam", many);
    let result = call("ADD", &json!({})).unwrap();
    assert_eq!((result["ips"].as_array().unwrap().len(), result["routes"].as_array().unwrap().len()), (2, 1));
    for address in ["192.168.7.8", "192.168.8.8"] {
        probe::ping(worker.node.command("ping"), address.parse().unwrap(), 56).unwrap();
    }
    call("DEL", &json!({})).unwrap();
    let old = message(call("ADD", &json!({ "cniVersion": "0.2.0" })));
    assert!(old.contains("more than one IPv4 address"), "{old}");
    assert_eq!(asked(), "ADD DEL ADD DEL");
    worker.node.write("/run/fake/fake-ipam", &one);

    worker.node.write("/run/fake/fails", r#"{"code": 50, "msg": "no more", "details": "at all"}"#);
    for verb in ["ADD", "STATUS", "GC", "DEL"] {
        let error = call(verb, &json!({})).expect_err(verb);
        assert_eq!(
            (&error["code"], error["msg"].as_str()),
            (&json!(50), Some("polder: fake-ipam: no more: at all")),
            "{verb}"
        );
    }
    assert_eq!(asked(), "ADD DEL STATUS GC DEL", "a failed ADD is undone");
    worker.node.write("/run/fake/fails", "Segmentation fault");
    assert!(message(call("STATUS", &json!({}))).contains("said \"Segmentation fault\""));
}
