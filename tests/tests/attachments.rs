//! Attachments: the calls that a runtime may make, their order, and what remains afterwards.
//!
//! Tests use all CNI versions where the version of a call could matter. One version is enough for timing, many calls at
//! once, a full pool or bridge, and the work of kernel, agent and etcd, which does not depend on the version.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::client::Client;
use polder_api::frame;
use polder_api::message::{AddRequest, AddressSource, Question, Reply, Request};
use polder_tests::agent::Worker;
use polder_tests::cni::{VERSIONS, WITH_CHECK, WITH_GC, WITH_RESULTS, code, conf, message};
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, assert_flat_over};
use polder_tests::probe::{self, Echo};
use polder_tests::traces::{assert_nothing_left, traces, used};
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

#[test]
fn an_add_creates_what_its_result_states_and_a_del_leaves_nothing() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    for version in VERSIONS {
        let pod = worker.pod_with(version, &Worker::netconf(version));
        assert_matches_result(worker, &pod);
        wait::until_true("etcd to be told", || lab.etcd.keys("/polder/v1/addresses/n1/").len() == 2);
        for (place, found) in traces(&lab, worker) {
            assert!(!found.is_empty(), "{place} is not looked at in the right place");
        }
        worker.delete(&pod);
        assert_nothing_left(&lab, worker);
    }
}

/// Compares the kernel state with the result.
fn assert_matches_result(worker: &Worker, pod: &Pod) {
    let inside = pod.run("ip", &["-o", "address", "show", "dev", "eth0"]);
    assert_eq!(pod.addresses().len(), 2, "{}", pod.result());
    for own in pod.addresses() {
        let prefix = format!("{own}/{} ", if own.is_ipv4() { 32 } else { 128 });
        assert!(inside.contains(&prefix), "{own} in {inside}");
    }
    assert!(!inside.contains("tentative") && !inside.contains("dadfailed"), "not usable yet: {inside}");
    let link = pod.run("ip", &["link", "show", "dev", "eth0"]);
    assert!(link.contains("mtu 1450") && link.contains(",UP,"), "{link}");
    let gateways: String =
        ["-4", "-6"].map(|family| pod.run("ip", &[family, "route", "show", "default"])).concat();
    for own in pod.addresses() {
        assert!(gateways.contains(&format!("via {} ", pod.gateway(own))), "{gateways}");
    }
    let host = worker.node.run("ip", &["-d", "link", "show", "dev", &pod.host_interface()]);
    let alias = format!("alias polder/{0}/eth0 lab/{0}", pod.name());
    for expected in ["master polder0", "isolated on", "learning off", "flood off", "mtu 1450", &alias] {
        assert!(host.contains(expected), "{expected} in {host}");
    }
    assert_eq!(host.contains("locked on"), worker.locks_ports(), "{host}");

    let (result, version) = (pod.result(), pod.name());
    if version < WITH_RESULTS {
        return;
    }
    let [_, outer, inner] = result["interfaces"].as_array().unwrap().as_slice() else { panic!("{result}") };
    assert_eq!(outer["name"], pod.host_interface());
    assert!(host.contains(outer["mac"].as_str().unwrap()), "{host}");
    assert!(link.contains(inner["mac"].as_str().unwrap()), "{link}");
    assert_eq!((&outer["sandbox"], &inner["sandbox"]), (&Value::Null, &json!(pod.netns())));
    for end in [outer, inner] {
        assert_eq!(end["mtu"], if version >= WITH_GC { json!(1450) } else { Value::Null }, "{result}");
    }
    for ip in result["ips"].as_array().unwrap() {
        assert_eq!(ip["interface"], 2, "{result}");
    }
}

#[test]
fn a_second_add_is_refused_and_the_first_attachment_is_unchanged() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let other = worker.pod("other");
    for (count, version) in VERSIONS.into_iter().enumerate() {
        let pod = worker.pod_with(version, &Worker::netconf(version));
        wait::until_true("etcd to be told", || {
            lab.etcd.keys("/polder/v1/addresses/").len() == 2 * (count + 2)
        });
        let before = traces(&lab, worker);
        assert_eq!(code(worker.cni("ADD", version, pod.netns(), pod.conf())), 102);
        // The same attachment for another namespace, which does not have this interface yet.
        let elsewhere = worker.namespace(&format!("not-{version}"));
        assert_eq!(code(worker.cni("ADD", version, &elsewhere, pod.conf())), 102);
        assert_eq!(traces(&lab, worker), before);
        assert_flat_over(Families::DUAL, &[pod, other.clone()], 1450);
    }
}

#[test]
fn an_add_where_the_interface_exists_is_refused_and_leaks_nothing() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    worker.node.shell("ip -n a link add eth0 type bridge");
    let theirs = worker.node.shell("ip -d -n a link show eth0");
    for version in VERSIONS {
        assert_eq!(code(worker.cni("ADD", "a", &netns, &Worker::netconf(version))), 102);
        assert_eq!(worker.node.shell("ip -d -n a link show eth0"), theirs, "it is the container's own");
        assert_nothing_left(&lab, worker);
    }
}

#[test]
fn an_add_whose_wiring_fails_is_undone() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    // New interfaces in this namespace have no IPv6, and the plugin cannot enable it.
    worker.node.shell(
        "ip netns exec a sysctl -q net.ipv6.conf.default.disable_ipv6=1; \
         mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys",
    );
    for version in VERSIONS {
        let error = worker.cni("ADD", "a", &netns, &Worker::netconf(version)).unwrap_err();
        assert_eq!(error["code"], 5, "{error}");
        assert!(error["details"].as_str().unwrap().contains("IPv6 is disabled"), "{error}");
        let inside = worker.node.run("ip", &["-n", "a", "link", "show"]);
        assert!(!inside.contains("eth0"), "{inside}");
        assert_eq!(traces(&lab, worker)["ledger"], "", "the answer came before the undoing was over");
        assert_nothing_left(&lab, worker);
    }
}

#[test]
fn an_add_is_undone_if_polder0_is_no_bridge_and_succeeds_after_the_repair() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    for version in VERSIONS {
        let conf = Worker::netconf(version);
        let add = || worker.cni("ADD", "a", &netns, &conf);
        let error = wait::until("an ADD to come before the repair", || {
            // The agent is frozen because it could repair the bridge between the two commands.
            worker.freeze(true);
            worker.node.shell("ip link del polder0; ip link add polder0 type veth peer name other0");
            worker.freeze(false);
            let early = add().map(|_| worker.del("a", &netns, &conf));
            early.err().ok_or("it came later".to_owned())
        });
        assert!([5, 11].contains(&error["code"].as_u64().unwrap()), "{error}");
        let (inside, outside) = (worker.node.shell("ip -n a link"), worker.node.shell("ip link"));
        assert!(!inside.contains("eth0") && !outside.contains("pld"), "{error}: {inside}{outside}");
        assert_eq!(worker.status()["pods"], 0, "after {error}");
        wait::until("the bridge to be one again", || add().map_err(|error| error.to_string()));
        worker.del("a", &netns, &conf);
    }
    assert_nothing_left(&lab, worker);
}

#[test]
fn exactly_one_of_two_concurrent_adds_of_the_same_attachment_succeeds() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    for version in VERSIONS {
        let (netns, conf) = (worker.namespace(version), Worker::netconf(version));
        let add = || worker.cni("ADD", version, &netns, &conf);
        let results = std::thread::scope(|scope| {
            let other = scope.spawn(add);
            [add(), other.join().unwrap()]
        });
        let (result, error) = match results {
            [Ok(result), Err(error)] | [Err(error), Ok(result)] => (result, error),
            both => panic!("{both:?}"),
        };
        assert!([11, 102].contains(&error["code"].as_u64().unwrap()), "{error}");
        let pod = Pod::new(&worker.node, version, &netns, conf, result);
        assert_matches_result(worker, &pod);
        assert_eq!(used(&worker.status()), 2 + 2, "the gateways, and one attachment");
        worker.delete(&pod);
        assert_nothing_left(&lab, worker);
    }
}

#[test]
fn two_interfaces_of_one_container_are_two_attachments_and_both_answer() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let first = worker.pod("a");
    let reached = |pod: &Pod| {
        for own in pod.addresses() {
            probe::ping(worker.node.command("ping"), own, 56).expect("the node reaches the pod");
            let gateway = pod.gateway(own);
            let _echo = worker.node.within(|| Echo::start(gateway));
            assert_eq!(pod.within(|| probe::udp(own, gateway, 100)).expect("and the pod the node").0, own);
        }
    };
    let check_first = || worker.cni("CHECK", "a", first.netns(), &first.later_conf());
    // From the second version on, the container still has what the earlier versions left in it.
    for version in VERSIONS {
        let call = |verb: &str, conf: &Value| worker.cni_for("net1", verb, "a", first.netns(), conf);
        let result = call("ADD", &Worker::netconf(version)).unwrap();
        let second = Pod::new(&worker.node, "a", first.netns(), Worker::netconf(version), result);
        assert_eq!(worker.status()["pods"], 2);
        [&first, &second].into_iter().for_each(reached);
        assert_eq!(check_first(), Ok(Value::Null));
        if version >= WITH_CHECK {
            assert_eq!(call("CHECK", &second.later_conf()), Ok(Value::Null));
            first.run("ip", &["rule", "del", "from", &second.v4().to_string()]);
            let missed = message(call("CHECK", &second.later_conf()));
            assert!(missed.contains("no default route"), "{missed}");
        }
        assert_eq!(call("DEL", &second.later_conf()), Ok(Value::Null));
        assert_eq!(worker.status()["pods"], 1);
        reached(&first);
        assert_eq!(check_first(), Ok(Value::Null));
    }
}

#[test]
fn a_del_succeeds_repeatedly_without_an_attachment_and_without_a_namespace() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let kept = worker.pod("kept");
    for version in VERSIONS {
        let (pod, conf) = (worker.pod_with(version, &Worker::netconf(version)), Worker::netconf(version));
        worker.node.run("ip", &["netns", "delete", version]);
        let without = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", version), ("CNI_IFNAME", "eth0")];
        for _ in 0..2 {
            let output = worker.plugin(&without, &conf.to_string());
            assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
            assert_eq!(worker.status()["pods"], 1);
        }
        for netns in ["", pod.netns(), kept.netns(), "/etc/passwd"] {
            worker.del("never-added", netns, &conf);
            worker.del(version, netns, &conf);
        }
    }
    assert_flat_over(Families::DUAL, &[kept, worker.pod("b")], 1450);
}

#[test]
fn a_del_deletes_only_its_own_attachment_for_any_namespace_and_previous_result() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let (kept, netns) = (worker.pod("kept"), worker.namespace("a"));
    for version in VERSIONS {
        let attached = || {
            let result = worker.cni("ADD", "a", &netns, &Worker::netconf(version)).unwrap();
            Pod::new(&worker.node, "a", &netns, Worker::netconf(version), result)
        };
        let is_gone = |pod: &Pod| {
            assert_eq!(worker.status()["pods"], 1);
            assert!(!worker.node.run("ip", &["-o", "link"]).contains(&pod.host_interface()));
            assert!(!pod.run("ip", &["-o", "link"]).contains("eth0"));
        };
        for netns in ["", "/run/netns/never", kept.netns(), "/etc/passwd"] {
            let pod = attached();
            worker.del("a", netns, &pod.later_conf());
            is_gone(&pod);
        }
        let stranger =
            json!({ "interfaces": [{ "name": kept.host_interface() }], "ips": kept.result()["ips"] });
        for previous in [Value::Null, json!([]), json!("garbage"), json!({ "ips": 5 }), stranger] {
            let pod = attached();
            worker.del("a", pod.netns(), &conf(version, &json!({ "prevResult": previous })));
            is_gone(&pod);
        }
    }
    assert_flat_over(Families::DUAL, &[kept, worker.pod("b")], 1450);
}

#[test]
fn a_late_del_does_not_affect_the_new_user_of_the_address() {
    let mut lab = Lab::build(Topology { pools: vec!["10.244.0.0/26"], ..Topology::one_segment(1) });
    lab.workers[0].configure(&format!("{}[ipam]\ncooldown_seconds = 10\n", lab.workers[0].configuration()));
    lab.workers[0].start_and_wait();
    let worker = &lab.workers[0];
    let old = worker.pod("old");
    worker.delete(&old);
    // All other addresses of the only block are used, so the released one must be allocated again.
    let mut pods: Vec<_> = (0..60).map(|number| worker.pod(&format!("p{number}"))).collect();
    // It is in cool-down first.
    let new = worker.pod_within(wait::TIMEOUT * 2, "new", &Worker::netconf("1.1.0"));
    assert_eq!(new.v4(), old.v4());
    for version in VERSIONS {
        worker.del("old", old.netns(), &conf(version, &json!({ "prevResult": old.result() })));
        worker.del("old", new.netns(), &conf(version, &json!({ "prevResult": new.result() })));
    }
    assert_eq!(worker.status()["pods"], 61);
    assert_eq!(worker.cni("CHECK", "new", new.netns(), &new.later_conf()), Ok(Value::Null));
    pods.truncate(1);
    pods.push(new);
    assert_flat(&pods, 1450);
}

#[test]
fn the_error_for_an_exhausted_pool_states_how_its_addresses_are_used() {
    let topology = Topology { pools: vec!["10.244.0.0/26"], ..Topology::one_segment(1) };
    let lab = Lab::start(topology);
    let worker = &lab.workers[0];
    // Without the first and the last address of the pool, and the gateway.
    let pods: Vec<_> = (0..61).map(|number| worker.pod(&format!("p{number}"))).collect();
    let error = worker.try_pod("one-too-many", &Worker::netconf("1.1.0")).unwrap_err();
    assert_eq!(error["code"], 100, "{error}");
    let message = error["msg"].as_str().unwrap();
    for expected in ["62 used", "0 in cool-down", "pool ipv4 (10.244.0.0/26)", "claimed 1 of 1", "Add a pool"]
    {
        assert!(message.contains(expected), "{expected} in {message}");
    }
    assert_eq!(worker.status()["pods"], pods.len());
}

#[test]
fn a_del_without_the_agent_deletes_the_interface_and_frees_the_address_later() {
    let mut lab = Lab::start_node();
    let worker = &lab.workers[0];
    let kept = worker.pod("kept");
    let pods = VERSIONS.map(|version| worker.pod_with(version, &Worker::netconf(version)));
    lab.workers[0].kill();
    let worker = &lab.workers[0];
    let netns = worker.namespace("late");
    for pod in &pods {
        worker.del(pod.name(), pod.netns(), &pod.later_conf());
        worker.del(pod.name(), pod.netns(), &pod.later_conf());
        let links = worker.node.run("ip", &["-o", "link"]);
        assert!(!links.contains(&pod.host_interface()), "the interface is still there: {links}");
        let error = worker.cni("ADD", "late", &netns, pod.conf()).unwrap_err();
        assert_eq!(error["code"], 11);
        assert!(message(Err(error)).contains("not reachable at /run/polder/agent.sock"));
    }
    lab.workers[0].start_and_wait();
    let worker = &lab.workers[0];
    assert_eq!(worker.status()["pods"], 1, "the notes were not taken");
    assert_eq!(worker.node.shell("ls /run/polder/tombstones | wc -l").trim(), "0");
    worker.delete(&kept);
    assert_nothing_left(&lab, worker);
}

#[test]
fn the_address_is_released_if_the_plugin_dies_before_it_creates_the_interface() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    // To the agent, this is a client that sends a request and disconnects.
    let socket = worker.node.path_on_host(Path::new("/run/polder/agent.sock"));
    let mut plugin = Client::connect(&socket, Duration::from_secs(30)).unwrap();
    let reply = plugin.ask(Request::Add(an_add("x"))).unwrap();
    assert!(matches!(reply, Reply::Wiring(_)), "{reply:?}");
    assert_eq!(worker.status()["pods"], 1);
    drop(plugin);
    assert_nothing_left(&lab, worker);
}

#[test]
fn a_plugin_that_dies_before_its_request_is_read_gets_no_address() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let socket = worker.node.path_on_host(Path::new("/run/polder/agent.sock"));
    // The agent may handle a DEL for this attachment before the ADD.
    worker.freeze(true);
    for request in [Request::Add(an_add("x")), Request::Lease(an_add("y"))] {
        let mut plugin = UnixStream::connect(&socket).unwrap();
        frame::write(&mut plugin, &Question { trace: None, credentials: None, request }).unwrap();
    }
    worker.freeze(false);
    wait::until("both to be found gone", || {
        let log = worker.log();
        if log.matches("the caller of this ADD has disconnected").count() == 2 { Ok(()) } else { Err(log) }
    });
    assert_eq!(worker.status()["pods"], 0);
    assert_nothing_left(&lab, worker);
}

/// The ADD request of a plugin for a container.
fn an_add(container: &str) -> AddRequest {
    let attachment = Attachment {
        network: "polder".parse().unwrap(),
        container: container.parse().unwrap(),
        interface: "eth0".parse().unwrap(),
    };
    let netns = format!("/run/netns/{container}");
    let source = AddressSource::Pools { pool: None, addresses: Vec::new() };
    AddRequest { attachment, netns, pod: None, source, mac: None, mtu: None, ports: Vec::new() }
}

#[test]
fn the_only_pod_of_a_node_receives_its_first_packet() {
    for attach in ["bridge", "routed"] {
        let lab = Lab::start(Topology::one_segment(1).bootstrap(&format!("attach = {attach:?}")));
        let worker = &lab.workers[0];
        // Without a port, the bridge has no carrier. The carrier changes in the background, so one round is not enough.
        for round in 0..40 {
            let pod = worker.pod(&format!("p{round}"));
            let answer = probe::ping(worker.node.command("ping"), pod.v4(), 56);
            assert!(answer.is_ok(), "{attach}, pod {round}: {answer:?}");
            worker.delete(&pod);
        }
    }
}

#[test]
fn a_hundred_adds_at_once_and_a_hundred_dels_leave_no_trace() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    let conf = Worker::netconf("1.1.0");
    let names: Vec<String> = (0..100).map(|number| format!("p{number}")).collect();
    let namespaces: Vec<String> = names.iter().map(|name| worker.namespace(name)).collect();
    let all_at_once = |verb: &str| -> Vec<Result<Value, Value>> {
        std::thread::scope(|scope| {
            let calls: Vec<_> = names
                .iter()
                .zip(&namespaces)
                .map(|(name, netns)| scope.spawn(|| worker.cni(verb, name, netns, &conf)))
                .collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        })
    };
    let bridge = || {
        let link: Value =
            serde_json::from_str(&worker.node.run("ip", &["-j", "link", "show", "polder0"])).unwrap();
        (link[0]["ifindex"].clone(), link[0]["address"].clone())
    };
    let before = bridge();
    let mut seen = BTreeSet::new();
    for result in all_at_once("ADD") {
        let result = result.expect("an ADD");
        for ip in result["ips"].as_array().unwrap() {
            assert!(seen.insert(ip["address"].to_string()), "{} is out twice", ip["address"]);
        }
    }
    assert_eq!(seen.len(), 200);
    assert_eq!(worker.status()["pods"], 100);
    wait::until_true("etcd to be told", || lab.etcd.keys("/polder/v1/addresses/n1/").len() == 200);
    for result in all_at_once("DEL") {
        assert_eq!(result, Ok(Value::Null));
    }
    assert_nothing_left(&lab, worker);
    assert_eq!(used(&worker.status()), 2, "the gateways");
    assert_eq!(bridge(), before, "the bridge is another, or has another MAC address");
}

#[test]
fn the_pod_name_is_in_etcd_and_in_the_interface_alias() {
    let lab = Lab::start_node();
    let pod = lab.workers[0].pod("web-0");
    wait::until_true("etcd to be told", || lab.etcd.keys("/polder/v1/addresses/n1/").len() == 2);
    let record =
        lab.etcd.ctl(&["get", "--print-value-only", &format!("/polder/v1/addresses/n1/{}", pod.v4())]);
    let record: Value = serde_json::from_str(record.trim()).unwrap();
    assert_eq!(record["pod"], json!({ "namespace": "lab", "name": "web-0" }));
    assert_eq!(record["attachment"]["container"], "web-0");
}

#[test]
fn an_add_to_a_full_bridge_fails_with_the_reason_and_leaves_nothing() {
    let lab = Lab::start_node();
    let worker = &lab.workers[0];
    // 1,023 ports including that of the probe endpoint, as with the same number of pods.
    worker.node.shell(
        "for n in $(seq 1022); do echo link add q$n type veth peer name r$n; echo link set q$n master polder0; done \
         | ip -batch -",
    );
    let error = worker.try_pod("a", &Worker::netconf("1.1.0")).unwrap_err();
    assert!(error["code"] == 5 && error["msg"].as_str().unwrap().contains("1023 ports"), "{error}");
    assert_eq!(worker.status()["pods"], 0);
    assert!(!worker.node.run("ip", &["-o", "link"]).contains("pld"));
    worker.node.run("ip", &["link", "del", "q1"]);
    worker.cni("ADD", "a", "/run/netns/a", &Worker::netconf("1.1.0")).unwrap();
}

#[test]
fn an_interface_that_is_set_down_and_up_keeps_its_addresses() {
    let lab = Lab::start_node();
    let pod = lab.workers[0].pod("a");
    pod.run("sh", &["-ec", "ip link set eth0 down; ip link set eth0 up"]);
    let addresses = pod.run("ip", &["-o", "address", "show", "dev", "eth0"]);
    for own in pod.addresses() {
        assert!(addresses.contains(&own.to_string()), "{own} is not in {addresses}");
    }
}
