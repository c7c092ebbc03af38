//! Attachments: what a runtime may do with them, in which order it likes, and what is left afterwards.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use polder_api::Attachment;
use polder_api::client::Client;
use polder_api::message::{AddRequest, AddressSource, Reply, Request};
use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::{assert_flat, assert_flat_over};
use polder_tests::probe::{self, Echo};
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

fn node() -> Lab {
    Lab::start(Topology::one_segment(1).families(Families::DUAL))
}

fn code(error: Result<Value, Value>) -> u64 {
    error.expect_err("an error")["code"].as_u64().expect("a code")
}

/// Everything that belongs to attachments, by where it is. Each is empty if there are none.
fn traces(lab: &Lab, worker: &Worker) -> BTreeMap<&'static str, String> {
    let lines = |text: String, sign: &str| {
        text.lines().filter(|line| line.contains(sign)).collect::<Vec<_>>().join("\n")
    };
    let run = |program: &str, line: &str| worker.node.run(program, &line.split(' ').collect::<Vec<_>>());
    let status = worker.status();
    let more = |count: u64, than: u64| if count > than { count.to_string() } else { String::new() };
    BTreeMap::from([
        ("interfaces", lines(run("ip", "-o link show"), ": pld")),
        ("neighbours", run("ip", "neigh show dev polder0 nud permanent")),
        ("fdb", lines(run("bridge", "fdb show br polder0"), "dev pld")),
        ("senders4", lines(run("nft", "list set inet polder senders4"), "elements")),
        ("senders6", lines(run("nft", "list set inet polder senders6"), "elements")),
        ("ledger", more(status["pods"].as_u64().unwrap(), 0)),
        // The gateways are of no attachment.
        ("addresses", more(used(&status), 2)),
        ("etcd", lab.etcd.keys("/polder/v1/addresses/").join("\n")),
    ])
}

/// How many addresses of the node's blocks are out.
fn used(status: &Value) -> u64 {
    status["blocks"].as_array().unwrap().iter().map(|block| block["used"].as_u64().unwrap()).sum()
}

fn assert_nothing_left(lab: &Lab, worker: &Worker) {
    wait::until("nothing to be left", || {
        let mut traces = traces(lab, worker);
        traces.retain(|_, found| !found.is_empty());
        if traces.is_empty() { Ok(()) } else { Err(format!("{traces:?}")) }
    });
}

#[test]
fn an_add_makes_what_it_says_and_a_del_leaves_nothing() {
    let lab = node();
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    let inside = pod.run("ip", &["-o", "address", "show", "dev", "eth0"]);
    for own in pod.addresses() {
        assert!(
            inside.contains(&format!("{own}/{}", if own.is_ipv4() { 32 } else { 128 })),
            "{own} in {inside}"
        );
    }
    let result = pod.result();
    let link = pod.run("ip", &["link", "show", "dev", "eth0"]);
    assert!(link.contains(result["interfaces"][2]["mac"].as_str().unwrap()), "{link}");
    assert!(link.contains("mtu 1450") && result["interfaces"][2]["mtu"] == 1450);
    assert_eq!(result["interfaces"][2]["sandbox"], pod.netns());
    let host = worker.node.run("ip", &["-d", "link", "show", "dev", pod.host_interface()]);
    for sign in [
        "master polder0",
        "locked on",
        "isolated on",
        "learning off",
        "flood off",
        "alias polder/a/eth0 lab/a",
    ] {
        assert!(host.contains(sign), "{sign} in {host}");
    }
    assert!(host.contains(result["interfaces"][1]["mac"].as_str().unwrap()));
    wait::until_true("etcd to be told", || lab.etcd.keys("/polder/v1/addresses/n1/").len() == 2);
    for (place, found) in traces(&lab, worker) {
        assert!(!found.is_empty(), "{place} is not looked at in the right place");
    }
    worker.delete(&pod);
    assert_nothing_left(&lab, worker);
}

#[test]
fn each_version_gets_the_shape_that_it_knows() {
    let lab = node();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = lab.workers[0].pod_with(&format!("v{version}"), &Worker::netconf(version));
        let result = pod.result();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"][0].get("version").is_some(), version < "1.0.0", "{result}");
        assert_eq!(result["interfaces"][1].get("mtu").is_some(), version == "1.1.0", "{result}");
    }
}

#[test]
fn a_second_add_is_refused_and_the_first_attachment_is_whole() {
    let lab = node();
    let worker = &lab.workers[0];
    let (pod, other) = (worker.pod("a"), worker.pod("b"));
    let before = traces(&lab, worker);
    assert_eq!(code(worker.cni("ADD", "a", pod.netns(), pod.conf())), 102);
    // The same attachment for another namespace, in which there is no such interface yet.
    let elsewhere = worker.namespace("elsewhere");
    assert_eq!(code(worker.cni("ADD", "a", &elsewhere, pod.conf())), 102);
    assert_eq!(worker.status()["pods"], 2);
    let interfaces = traces(&lab, worker)["interfaces"].clone();
    assert_eq!(interfaces.lines().count(), 2, "{before:?} became {interfaces}");
    assert_flat_over(Families::DUAL, &[pod, other], 1450);
}

#[test]
fn an_add_where_the_interface_exists_is_refused_and_leaks_nothing() {
    let lab = node();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    worker.node.shell("ip -n a link add eth0 type bridge");
    assert_eq!(code(worker.cni("ADD", "a", &netns, &Worker::netconf("1.1.0"))), 102);
    assert!(
        worker.node.shell("ip -d -n a link show eth0").contains("bridge"),
        "the container's own interface is gone"
    );
    assert_nothing_left(&lab, worker);
}

#[test]
fn an_add_whose_wiring_fails_is_undone() {
    let lab = node();
    let worker = &lab.workers[0];
    let netns = worker.namespace("a");
    worker.node.shell("ip netns exec a sysctl -q net.ipv6.conf.default.disable_ipv6=1");
    let error = worker.cni("ADD", "a", &netns, &Worker::netconf("1.1.0")).unwrap_err();
    assert_eq!(error["code"], 5, "{error}");
    assert!(error["details"].as_str().unwrap().contains("IPv6 is disabled"), "{error}");
    let inside = worker.node.run("ip", &["-n", "a", "link", "show"]);
    assert!(!inside.contains("eth0"), "{inside}");
    assert_eq!(traces(&lab, worker)["ledger"], "", "the answer came before the undoing was over");
    assert_nothing_left(&lab, worker);
}

#[test]
fn of_two_adds_of_one_attachment_at_once_one_succeeds_and_the_other_leaves_it_alone() {
    let lab = node();
    let worker = &lab.workers[0];
    for name in ["a", "b", "c", "d", "e"] {
        let (netns, mut conf) = (worker.namespace(name), Worker::netconf("1.1.0"));
        let add = || worker.cni("ADD", name, &netns, &conf);
        let results = std::thread::scope(|scope| {
            let other = scope.spawn(add);
            [add(), other.join().unwrap()]
        });
        let (result, error) = match results {
            [Ok(result), Err(error)] | [Err(error), Ok(result)] => (result, error),
            both => panic!("{both:?}"),
        };
        assert!([11, 102].contains(&error["code"].as_u64().unwrap()), "{error}");
        conf["prevResult"] = result;
        assert_eq!(worker.cni("CHECK", name, &netns, &conf), Ok(Value::Null));
        assert_eq!(used(&worker.status()), 2 + 2, "the gateways, and one attachment");
        assert_eq!(worker.cni("DEL", name, &netns, &conf), Ok(Value::Null));
        assert_nothing_left(&lab, worker);
    }
}

#[test]
fn two_interfaces_of_one_container_are_two_attachments_and_both_answer() {
    let lab = node();
    let worker = &lab.workers[0];
    let first = worker.pod("a");
    let call = |interface: &str, verb: &str, result: &Value| {
        let mut conf = first.conf().clone();
        conf["prevResult"] = result.clone();
        worker.cni_for(interface, verb, "a", first.netns(), &conf).unwrap_or_else(|error| panic!("{error}"))
    };
    let reached = |pod: &Pod| {
        for own in pod.addresses() {
            probe::ping(worker.node.command("ping"), own, 56).expect("the node reaches the pod");
            let gateway = pod.gateway(own);
            let _echo = worker.node.within(|| Echo::start(gateway));
            assert_eq!(pod.within(|| probe::udp(own, gateway, 100)).expect("and the pod the node").0, own);
        }
    };
    // The second time, what the first has left in the container is still there.
    for _ in 0..2 {
        let result = call("net1", "ADD", &Value::Null);
        let second = Pod::new(&worker.node, "a", first.netns(), first.conf().clone(), result);
        assert_eq!(worker.status()["pods"], 2);
        [&first, &second].into_iter().for_each(reached);
        call("eth0", "CHECK", first.result());
        call("net1", "CHECK", second.result());
        let rule = format!("ip rule del from {}", second.v4());
        first.run("sh", &["-ec", &rule]);
        let mut conf = first.conf().clone();
        conf["prevResult"] = second.result().clone();
        let error = worker.cni_for("net1", "CHECK", "a", first.netns(), &conf).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains("no default route"), "{error}");
        call("net1", "DEL", second.result());
        assert_eq!(worker.status()["pods"], 1);
        reached(&first);
        call("eth0", "CHECK", first.result());
    }
}

#[test]
fn a_del_succeeds_twice_and_for_what_was_never_added_and_without_a_namespace() {
    let lab = node();
    let worker = &lab.workers[0];
    let (pod, kept) = (worker.pod("a"), worker.pod("kept"));
    let conf = Worker::netconf("1.1.0");
    worker.node.run("ip", &["netns", "delete", "a"]);
    let without_namespace = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0")];
    for _ in 0..2 {
        let output = worker.plugin(&without_namespace, &conf.to_string());
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    }
    for netns in ["", "/run/netns/never", pod.netns(), kept.netns(), "/etc/passwd"] {
        assert_eq!(
            worker.cni("DEL", "never-added", netns, &conf),
            Ok(Value::Null),
            "with namespace {netns:?}"
        );
        // The namespace may be another container's by now.
        assert_eq!(worker.cni("DEL", "a", netns, &conf), Ok(Value::Null), "with namespace {netns:?}");
    }
    let garbage =
        json!({ "cniVersion": "1.1.0", "name": "polder", "type": "polder", "prevResult": { "ips": 5 } });
    assert_eq!(worker.cni("DEL", "a", pod.netns(), &garbage), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 1);
    assert_flat_over(Families::DUAL, &[kept, worker.pod("b")], 1450);
}

#[test]
fn a_late_del_takes_nothing_from_who_has_the_address_now() {
    let mut lab = Lab::build(Topology { pools: vec!["10.244.0.0/26"], ..Topology::one_segment(1) });
    lab.workers[0].configure(&format!("{}[ipam]\ncooldown_seconds = 10\n", lab.workers[0].configuration()));
    lab.workers[0].start_and_wait();
    let worker = &lab.workers[0];
    let old = worker.pod("old");
    worker.delete(&old);
    // All other addresses of the only block are taken, so that the freed one has to go out again.
    let mut pods: Vec<_> = (0..60).map(|number| worker.pod(&format!("p{number}"))).collect();
    let new = wait::within(wait::PATIENCE * 2, "the freed address to have rested", || {
        worker.try_pod("new", &Worker::netconf("1.1.0")).map_err(|error| {
            worker.node.run("ip", &["netns", "delete", "new"]);
            error.to_string()
        })
    });
    assert_eq!(new.v4(), old.v4());
    assert_eq!(worker.cni("DEL", "old", old.netns(), old.conf()), Ok(Value::Null));
    assert_eq!(worker.status()["pods"], 61);
    pods.truncate(1);
    pods.push(new);
    assert_flat(&pods, 1450);
}

#[test]
fn an_exhausted_pool_is_named_with_what_has_become_of_it() {
    let topology = Topology { pools: vec!["10.244.0.0/26"], ..Topology::one_segment(1) };
    let lab = Lab::start(topology);
    let worker = &lab.workers[0];
    // Less the pool's first and last address, and the gateway.
    let pods: Vec<_> = (0..61).map(|number| worker.pod(&format!("p{number}"))).collect();
    let error = worker.try_pod("one-too-many", &Worker::netconf("1.1.0")).unwrap_err();
    assert_eq!(error["code"], 100, "{error}");
    let message = error["msg"].as_str().unwrap();
    for sign in
        ["62 of this node are used", "0 rest", "pool ipv4 (10.244.0.0/26)", "all 1 are claimed", "Add a pool"]
    {
        assert!(message.contains(sign), "{sign} in {message}");
    }
    assert_eq!(worker.status()["pods"], pods.len());
}

#[test]
fn check_finds_what_is_missing_and_nothing_where_all_is_well() {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    let mut conf = pod.conf().clone();
    conf["prevResult"] = pod.result().clone();
    let check = || worker.cni("CHECK", "a", pod.netns(), &conf);
    assert_eq!(check(), Ok(Value::Null));
    // What a later plugin of the chain adds is none of our business.
    pod.run("ip", &["route", "add", "192.0.2.0/24", "dev", "eth0"]);
    pod.run("ip", &["link", "set", "eth0", "mtu", "1400"]);
    assert_eq!(check(), Ok(Value::Null));
    let own = pod.v4();
    let gateway = pod.gateway(own);
    let host = pod.host_interface();
    let in_pod = |line: &str| pod.run("sh", &["-ec", line]);
    for (damage, repair, sign) in [
        (
            "ip link set eth0 address 02:00:00:00:00:09".to_owned(),
            String::new(),
            "MAC address 02:00:00:00:00:09",
        ),
        (
            format!("ip address del {own}/32 dev eth0"),
            format!("ip address add {own}/32 dev eth0"),
            "does not have the address",
        ),
        (
            "ip route del default".to_owned(),
            format!("ip route add default via {gateway} dev eth0 onlink"),
            "no default route",
        ),
        (format!("ip neigh del {gateway} dev eth0"), String::new(), "does not know its gateway"),
    ] {
        let mac = pod.result()["interfaces"][2]["mac"].as_str().unwrap().to_owned();
        let bridge = pod.result()["interfaces"][0]["mac"].as_str().unwrap().to_owned();
        in_pod(&damage);
        let error = check().expect_err(&damage);
        assert!(error["msg"].as_str().unwrap().contains(sign), "{damage}: {error}");
        in_pod(&repair);
        in_pod(&format!(
            "ip link set eth0 address {mac}; ip neigh replace {gateway} lladdr {bridge} dev eth0 nud permanent; \
             ip route replace default via {gateway} dev eth0 onlink"
        ));
        assert_eq!(check(), Ok(Value::Null), "after the repair of {damage}");
    }
    let mac = pod.result()["interfaces"][2]["mac"].as_str().unwrap();
    for (damage, repair, sign) in [
        (
            format!("bridge fdb del {mac} dev {host} master"),
            format!("bridge fdb add {mac} dev {host} master static"),
            "does not know that".to_owned(),
        ),
        (
            format!(
                "ip neigh del {own} dev polder0; ip neigh add {own} lladdr {mac} dev {host} nud permanent"
            ),
            format!("ip neigh replace {own} lladdr {mac} dev polder0 nud permanent"),
            format!("does not know {own}"),
        ),
    ] {
        worker.node.shell(&damage);
        let error = check().expect_err(&damage);
        assert!(error["msg"].as_str().unwrap().contains(&sign), "{damage}: {error}");
        worker.node.shell(&repair);
        assert_eq!(check(), Ok(Value::Null), "after the repair of {damage}");
    }
    worker.node.run("ip", &["link", "set", host, "down"]);
    assert!(check().unwrap_err()["msg"].as_str().unwrap().contains(host));
    worker.delete(&pod);
    assert_eq!(code(check()), 3, "an attachment that is gone");
}

#[test]
fn check_misses_the_route_to_a_pod_without_a_bridge() {
    let lab = Lab::start(Topology::one_segment(1).bootstrap("attach = \"routed\""));
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    let mut conf = pod.conf().clone();
    conf["prevResult"] = pod.result().clone();
    let check = || worker.cni("CHECK", "a", pod.netns(), &conf);
    assert_eq!(check(), Ok(Value::Null));
    worker.node.run("ip", &["route", "del", &pod.v4().to_string(), "dev", pod.host_interface()]);
    assert!(check().unwrap_err()["msg"].as_str().unwrap().contains("has no route to"));
}

#[test]
fn a_del_without_the_agent_takes_the_interface_and_the_agent_frees_the_address_later() {
    let mut lab = node();
    let pods = [lab.workers[0].pod("a"), lab.workers[0].pod("b")];
    lab.workers[0].kill();
    let worker = &lab.workers[0];
    assert_eq!(worker.cni("DEL", "a", pods[0].netns(), pods[0].conf()), Ok(Value::Null));
    assert_eq!(worker.cni("DEL", "a", pods[0].netns(), pods[0].conf()), Ok(Value::Null));
    assert!(
        !worker.node.run("ip", &["link"]).contains(pods[0].host_interface()),
        "the interface is still there"
    );
    let error = worker.cni("ADD", "c", &worker.namespace("c"), pods[0].conf()).unwrap_err();
    assert_eq!(error["code"], 11);
    assert!(error["msg"].as_str().unwrap().contains("not reachable at /run/polder/agent.sock"), "{error}");
    lab.workers[0].start_and_wait();
    let worker = &lab.workers[0];
    assert_eq!(worker.status()["pods"], 1, "the note was not taken");
    assert_eq!(worker.node.shell("ls /run/polder/tombstones | wc -l").trim(), "0");
    worker.delete(&pods[1]);
    assert_nothing_left(&lab, worker);
}

#[test]
fn a_plugin_that_dies_before_it_makes_an_interface_gives_the_address_back() {
    let lab = node();
    let worker = &lab.workers[0];
    // To the agent it is a caller that asks and hangs up.
    let socket = worker.node.outside(Path::new("/run/polder/agent.sock"));
    let mut plugin = Client::connect(&socket, Duration::from_secs(30)).unwrap();
    let attachment = Attachment {
        network: "polder".parse().unwrap(),
        container: "x".parse().unwrap(),
        interface: "eth0".parse().unwrap(),
    };
    let netns = "/run/netns/x".to_owned();
    let source = AddressSource::Pools { pool: None, addresses: Vec::new() };
    let add = AddRequest { attachment, netns, pod: None, source, mac: None, mtu: None };
    let reply = plugin.ask(&Request::Add(add)).unwrap();
    assert!(matches!(reply, Reply::Wiring(_)), "{reply:?}");
    assert_eq!(worker.status()["pods"], 1);
    drop(plugin);
    assert_nothing_left(&lab, worker);
}

#[test]
fn a_hundred_adds_at_once_and_a_hundred_dels_leave_no_trace() {
    let lab = node();
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
fn the_pod_named_in_the_arguments_is_in_etcd_and_in_the_alias() {
    let lab = node();
    let pod = lab.workers[0].pod("web-0");
    wait::until_true("etcd to be told", || lab.etcd.keys("/polder/v1/addresses/n1/").len() == 2);
    let record =
        lab.etcd.ctl(&["get", "--print-value-only", &format!("/polder/v1/addresses/n1/{}", pod.v4())]);
    let record: Value = serde_json::from_str(record.trim()).unwrap();
    assert_eq!(record["pod"], json!({ "namespace": "lab", "name": "web-0" }));
    assert_eq!(record["attachment"]["container"], "web-0");
}

#[test]
fn a_bridge_that_is_full_is_named_with_what_to_do_and_nothing_is_left() {
    let lab = node();
    let worker = &lab.workers[0];
    // 1,023 ports, as if there were as many pods.
    worker.node.shell(
        "for n in $(seq 1023); do echo link add q$n type veth peer name r$n; echo link set q$n master polder0; done \
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
fn an_interface_that_is_switched_off_and_on_keeps_its_addresses() {
    let lab = node();
    let pod = lab.workers[0].pod("a");
    pod.run("sh", &["-ec", "ip link set eth0 down; ip link set eth0 up"]);
    let addresses = pod.run("ip", &["-o", "address", "show", "dev", "eth0"]);
    for own in pod.addresses() {
        assert!(addresses.contains(&own.to_string()), "{own} is not in {addresses}");
    }
}
