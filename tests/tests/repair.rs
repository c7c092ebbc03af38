//! Changes of Polder's kernel state by other programs: the kernel reports them, the agent repairs and records them.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::time::{Duration, Instant};

use polder_tests::agent::Worker;
use polder_tests::kernel_state::{difference, kernel_state};
use polder_tests::matrix::assert_flat;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::{Value, json};

/// Longer than an agent waits before a pass after a notification.
const LONGEST_GAP: Duration = Duration::from_secs(1);

/// Three nodes without periodic passes for an hour, with a pod on each.
fn lab() -> (Lab, Vec<Pod>) {
    let mut lab = Lab::build(Topology::two_segments());
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 3600"));
    lab.start_agents();
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
    (lab, pods)
}

fn repairs(worker: &Worker) -> u64 {
    worker.status()["repair_count"].as_u64().unwrap()
}

/// Waits for a repair with these words, after the first `earlier` repairs. Returns it.
fn repair(worker: &Worker, earlier: u64, words: &str) -> Value {
    worker.wait_for_status(&format!("a repair that contains {words:?}"), |status| {
        let new = usize::try_from(status["repair_count"].as_u64()? - earlier).unwrap();
        let mut repairs = status["repairs"].as_array()?.iter().rev().take(new);
        repairs.find(|repair| repair["changes"].to_string().contains(words)).cloned()
    })
}

/// Waits until no pass is pending: it would find changes that the kernel did not report.
fn wait_until_idle(worker: &Worker) {
    let (mut last, mut since) = (None, Instant::now());
    wait::until("no more passes", || {
        let count = worker.status()["last_pass"]["count"].as_u64();
        if count != last {
            (last, since) = (count, Instant::now());
        }
        if since.elapsed() > LONGEST_GAP { Ok(()) } else { Err(format!("{count:?}")) }
    });
}

#[test]
fn foreign_changes_are_repaired_and_listed_in_the_status() {
    let (lab, pods) = lab();
    let worker = &lab.workers[0];
    let sh = |command: &str| worker.node.shell(command).trim().to_owned();
    let peer = |name: &str| {
        let nodes = worker.ctl(&["node", "list"]);
        let node = nodes.as_array().unwrap().iter().find(|node| node["name"] == name).unwrap().clone();
        let first = |key: &str| node[key][0].as_str().unwrap().to_owned();
        (first("blocks"), first("gateways"))
    };
    let ((direct, _), (tunnelled, gateway)) = (peer("n2"), peer("n3"));
    let vtep = sh(&format!("ip neigh show {gateway} dev polder.vx | grep -o 'lladdr [^ ]*' | cut -d' ' -f2"));
    let remote =
        sh(&format!("bridge fdb show dev polder.vx | grep {vtep} | grep -o 'dst [^ ]*' | cut -d' ' -f2"));
    let (own, pod, port) =
        (worker.ctl(&["node", "list"])[0]["gateways"][0].clone(), pods[0].v4(), pods[0].host_interface());
    let own = own.as_str().unwrap();
    let before = kernel_state(worker);
    let forwarding_stopped = |name: &str| format!("echo 0 > /proc/sys/net/ipv4/conf/{name}/forwarding");

    // Commands of another program, and words of the expected repair.
    let disturbances = [
        (format!("ip route delete {direct}"), format!("route {direct} direct")),
        (
            format!("ip route replace blackhole {tunnelled} proto 84"),
            format!("delete route {tunnelled} metric 0"),
        ),
        (format!("ip neigh delete {gateway} dev polder.vx"), format!("neighbour {gateway}")),
        (
            format!("ip neigh replace {gateway} lladdr 02:00:00:00:00:99 nud permanent dev polder.vx"),
            format!("neighbour {gateway}"),
        ),
        (format!("bridge fdb delete {vtep} dev polder.vx dst {remote}"), format!("FDB entry {vtep}")),
        (
            format!("bridge fdb replace {vtep} dev polder.vx dst 192.0.2.9 self permanent"),
            format!("FDB entry {vtep}"),
        ),
        (
            format!("bridge fdb replace {vtep} dev polder.vx dst {remote} port 4790 self permanent"),
            format!("FDB entry {vtep}"),
        ),
        (
            format!("bridge fdb replace {vtep} dev polder.vx dst {remote} self dynamic"),
            format!("FDB entry {vtep}"),
        ),
        // The entry may be repaired before the last command.
        (
            format!(
                "ip nexthop add id 84 via {remote} fdb; ip nexthop add id 85 group 84 fdb; \
                 bridge fdb delete {vtep} dev polder.vx; \
                 bridge fdb add {vtep} dev polder.vx nhid 85 self permanent || true"
            ),
            format!("FDB entry {vtep}"),
        ),
        (
            "bridge fdb append 02:00:00:00:00:97 dev polder.vx dst 192.0.2.8 self permanent".to_owned(),
            "delete FDB entry 02:00:00:00:00:97".to_owned(),
        ),
        (
            "bridge fdb append 00:00:00:00:00:00 dev polder.vx dst 192.0.2.8 self permanent; \
             bridge fdb append 00:00:00:00:00:00 dev polder.vx dst 192.0.2.7 vni 7 self permanent"
                .to_owned(),
            "delete FDB entry 00:00:00:00:00:00".to_owned(),
        ),
        (format!("ip address delete {own}/32 dev polder0"), format!("add address {own}/32")),
        (format!("ip address delete {own}/32 dev polder.vx"), format!("add address {own}/32")),
        ("ip link set polder0 down".to_owned(), "adjust polder0".to_owned()),
        ("ip link set polder0 address 02:00:00:00:00:77".to_owned(), "adjust polder0".to_owned()),
        ("ip link set polder.vx mtu 1300".to_owned(), "adjust polder.vx".to_owned()),
        (
            // In one batch: the bridge may be repaired before the last command.
            "printf 'link set polder0 down\\nlink set polder0 name other\\nlink set other up\\n' | ip -batch - || true"
                .to_owned(),
            "restore the name of polder0".to_owned(),
        ),
        ("ip link delete polder0".to_owned(), "create polder0".to_owned()),
        ("ip link delete polder.vx".to_owned(), "create polder.vx".to_owned()),
        (format!("ip link set {port} nomaster"), format!("attach pod interface {port}")),
        (format!("ip link set {port} down"), format!("attach pod interface {port}")),
        (format!("bridge link set dev {port} isolated off"), format!("attach pod interface {port}")),
        (format!("ip neigh delete {pod} dev polder0"), format!("neighbour {pod}")),
        ("nft delete table inet polder".to_owned(), "install the packet filter".to_owned()),
        ("nft delete table arp polder".to_owned(), "install the packet filter".to_owned()),
        ("nft flush set inet polder peers4".to_owned(), "set peers4: add".to_owned()),
        // The ARP filter has the same set, which then differs.
        ("nft flush set inet polder senders4".to_owned(), "set senders4".to_owned()),
        ("sysctl -w net.ipv4.ip_forward=0".to_owned(), "net/ipv4/ip_forward to 1".to_owned()),
        (forwarding_stopped("eth0"), "net/ipv4/conf/eth0/forwarding to 1".to_owned()),
        (forwarding_stopped("polder0"), "net/ipv4/conf/polder0/forwarding to 1".to_owned()),
        (forwarding_stopped("polder.vx"), "net/ipv4/conf/polder.vx/forwarding to 1".to_owned()),
    ];
    for (disturbance, words) in &disturbances {
        wait_until_idle(worker);
        let earlier = repairs(worker);
        sh(disturbance);
        wait::until(&format!("{disturbance:?} to be repaired"), || {
            difference(worker, &before).map_or(Ok(()), Err)
        });
        repair(worker, earlier, words);
    }
    assert_flat(&pods, 1450);
    worker.wait_for_status("a pass that finds nothing", |status| {
        (status["last_pass"]["writes"] == 0).then_some(())
    });
    assert!(worker.log().contains("changed Polder's kernel state; repaired: set route"), "{}", worker.log());
}

#[test]
fn the_status_names_the_process_that_made_a_change_if_known() {
    let (lab, _pods) = lab();
    let worker = &lab.workers[0];
    worker.node.shell("nft flush set inet polder senders4");
    let by = repair(worker, 0, "set senders4")["by"].to_string();
    assert!(by.contains("process") && by.contains("(nft)"), "{by}");
    // For routes the kernel reports a socket's port, which is a process ID only in the sender's own PID namespace.
    worker.node.shell("(echo 'route delete 10.244.0.0/16'; sleep 1) | ip -batch -");
    assert_eq!(repair(worker, 0, "route 10.244.0.0/16")["by"], json!([]));
    // An additional entry on the tunnel interface is detected too, although it conflicts with nothing.
    let stranger = "10.244.255.7 lladdr 02:00:00:00:00:98 nud permanent dev polder.vx";
    worker.node.shell(&format!("(echo 'neigh add {stranger}'; sleep 1) | ip -batch -"));
    assert_eq!(repair(worker, 0, "delete neighbour 10.244.255.7")["by"], json!([]));
}

#[test]
fn adds_and_dels_are_no_repairs_and_foreign_objects_are_left_alone() {
    let (lab, pods) = lab();
    let worker = &lab.workers[0];
    assert_eq!(repairs(worker), 0);
    let new: Vec<Pod> = (0..10).map(|number| worker.pod(&format!("p{number}"))).collect();
    new.iter().for_each(|pod| worker.delete(pod));
    worker.node.shell(
        "ip link add other type bridge; ip address add 192.0.2.1/24 dev other; ip link set other up; \
         ip route add 198.51.100.0/24 via 192.0.2.2; nft add table inet other; nft add chain inet other c",
    );
    let foreign = || {
        worker.node.shell("ip address show other; ip route show 198.51.100.0/24; nft list table inet other")
    };
    let theirs = foreign();
    // During many other changes, a repair may be part of another pass, and is then not recorded as a repair.
    wait::until("a repair", || {
        worker.node.shell("ip route delete 10.244.0.0/16");
        wait::until_true("the route to be back", || {
            worker.node.shell("ip route").contains("unreachable 10.244.0.0/16")
        });
        let repairs = worker.status()["repairs"].clone();
        if repairs == json!([]) { Err("none".to_owned()) } else { Ok(()) }
    });
    for repair in worker.status()["repairs"].as_array().unwrap() {
        assert_eq!(repair["changes"], json!(["set route 10.244.0.0/16 unreachable"]), "{repair}");
    }
    assert_eq!(foreign(), theirs);
    assert_flat(&pods, 1450);
}
