//! The cluster while parts of Polder do not run.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::kernel_state::{assert_unchanged, kernel_state};
use polder_tests::matrix::assert_flat;
use polder_tests::routes::wait_for_routes;
use polder_tests::traffic::without_packet_loss;
use polder_tests::wait::TIMEOUT;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::json;

/// A lab with a pod on each node. The nodes are on one segment and behind a router.
fn lab() -> (Lab, Vec<Pod>) {
    let lab = Lab::start(Topology::two_segments());
    let pods = lab.workers.iter().map(|worker| worker.pod(&format!("{}-old", worker.name()))).collect();
    (lab, pods)
}

#[test]
fn pods_communicate_while_the_agent_is_killed_and_restarted() {
    let (mut lab, pods) = lab();
    let before: Vec<_> = lab.workers.iter().map(kernel_state).collect();
    without_packet_loss(&pods, || {
        lab.workers.iter_mut().for_each(Worker::kill);
        lab.workers.iter_mut().for_each(Worker::start_and_wait);
    });
    for (worker, before) in lab.workers.iter().zip(&before) {
        assert_eq!(worker.status()["last_pass"]["written"], 0, "{}", worker.log());
        assert_unchanged(worker, before);
    }
    let all: Vec<Pod> = pods.into_iter().chain(lab.workers.iter().map(|worker| worker.pod("new"))).collect();
    assert_flat(&all, 1450);
}

#[test]
fn a_stopped_agent_exits_cleanly_and_leaves_pods_connected() {
    let (mut lab, pods) = lab();
    let before = kernel_state(&lab.workers[0]);
    without_packet_loss(&pods, || assert!(lab.workers[0].stop()));
    assert_unchanged(&lab.workers[0], &before);
    assert_flat(&pods, 1450);
}

#[test]
fn a_second_pass_right_after_the_first_writes_nothing() {
    let mut lab = Lab::build(Topology::two_segments());
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    assert_flat(&pods, 1450);
    for worker in &lab.workers {
        let of_passes = |status: &serde_json::Value, field: &str| status["last_pass"][field].as_u64();
        let (settled, written) = worker.wait_for_status("a pass without writes", |status| {
            let pass = of_passes(status, "count").zip(of_passes(status, "written"));
            pass.filter(|_| status["last_pass"]["writes"] == 0)
        });
        let before = kernel_state(worker);
        worker.wait_for_status("three more passes", |status| {
            of_passes(status, "count").filter(|now| *now >= settled + 3)
        });
        assert_eq!(of_passes(&worker.status(), "written"), Some(written), "{}", worker.log());
        assert_unchanged(worker, &before);
    }
}

#[test]
fn without_etcd_pods_communicate_and_can_be_added_and_deleted() {
    let (mut lab, mut pods) = lab();
    let store = |lab: &Lab, state: &str| {
        for worker in &lab.workers {
            worker.wait_for_status(&format!("the store to be {state}"), |status| {
                (status["store"]["state"] == state).then_some(())
            });
        }
    };
    without_packet_loss(&pods, || {
        lab.etcd.kill();
        store(&lab, "disconnected");
    });
    for worker in &lab.workers {
        let status = worker.status();
        assert_eq!(status["ready"], json!(true), "{status}");
        pods.push(worker.pod(&format!("{}-new", worker.name())));
    }
    assert_flat(&pods, 1450);
    lab.workers[0].delete(&pods.remove(0));
    without_packet_loss(&pods, || {
        lab.etcd.start_again();
        store(&lab, "connected");
    });
    wait::until("etcd to be told who has which address", || {
        let keys = lab.etcd.keys("/polder/v1/addresses/");
        // Three nodes, each with its old and its new pod, minus the deleted one.
        if keys.len() == 5 { Ok(()) } else { Err(format!("{keys:?}")) }
    });
}

#[test]
fn an_agent_starts_without_etcd_from_its_snapshot() {
    let (mut lab, pods) = lab();
    wait::until_true("the records to be written down", || {
        lab.workers.iter().all(|worker| {
            worker
                .node
                .read("/var/lib/polder/cluster.json")
                .is_ok_and(|text| text.matches("blocks/").count() == 3)
        })
    });
    lab.workers.iter_mut().for_each(Worker::kill);
    lab.etcd.kill();
    without_packet_loss(&pods, || lab.workers.iter_mut().for_each(Worker::start_and_wait));
    let new: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("new")).collect();
    assert_flat(&[pods, new].concat(), 1450);
    lab.etcd.start_again();
    for worker in &lab.workers {
        worker.wait_for_status("the store's return", |status| {
            (status["store"]["state"] == "connected").then_some(())
        });
    }
}

#[test]
fn a_rebooted_node_keeps_its_block_and_no_old_attachment() {
    let (mut lab, _pods) = lab();
    let before = lab.workers[0].status();
    lab.reboot(0);
    lab.workers[0].start_and_wait();
    let after = lab.workers[0].status();
    assert_eq!(after["pods"], 0);
    assert_eq!(after["blocks"][0]["block"], before["blocks"][0]["block"]);
    assert_eq!(after["blocks"][0]["used"], 1, "the gateway's address alone");
    wait::until_true("etcd to be told", || lab.etcd.keys("/polder/v1/addresses/n1/").is_empty());
    let pods: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("new")).collect();
    assert_flat(&pods, 1450);
}

#[test]
fn an_agent_that_waits_for_etcd_uses_little_cpu_time() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.etcd.freeze(true);
    lab.workers[0].start();
    let (lived, worked) = wait::until("it to have lived for a while", || {
        let line = lab.workers[0].node.shell("ps -o etimes=,times= -C polder-agent || true");
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        match numbers[..] {
            [lived, worked] if lived >= 6 => Ok((lived, worked)),
            _ => Err(line),
        }
    });
    assert!(worked * 2 < lived, "of {lived} s it worked {worked}");
    lab.etcd.freeze(false);
    lab.workers[0].wait_until_ready();
}

#[test]
fn a_lost_ledger_is_rebuilt_before_an_address_is_allocated() {
    let (mut lab, mut pods) = lab();
    let gateway = pods[0].gateway(pods[0].v4());
    lab.workers[0].kill();
    lab.workers[0].node.shell("rm /var/lib/polder/ledger.db*");
    lab.workers[0].start_and_wait();
    assert_eq!(lab.workers[0].status()["pods"], 1);
    let new = lab.workers[0].pod("new");
    assert_ne!(new.v4(), pods[0].v4(), "an address was handed out that is in use");
    assert_eq!(new.gateway(new.v4()), gateway, "the gateway of running pods has changed");
    pods.push(new);
    wait_for_routes(&lab, TIMEOUT);
    assert_flat(&pods, 1450);
    lab.workers[0].delete(&pods[0]);
    assert_eq!(lab.workers[0].status()["pods"], 1);
}

#[test]
fn a_ledger_lost_without_etcd_is_rebuilt_after_several_starts() {
    let (mut lab, pods) = lab();
    lab.workers[0].kill();
    lab.etcd.kill();
    lab.workers[0].node.shell("rm -r /var/lib/polder");
    for _ in 0..2 {
        lab.workers[0].start();
        lab.workers[0].wait_for_status("the agent to wait for etcd", |status| {
            status["reasons"].to_string().contains("etcd").then_some(())
        });
        lab.workers[0].kill();
    }
    lab.etcd.start_again();
    without_packet_loss(&pods, || lab.workers[0].start_and_wait());
    assert_eq!(lab.workers[0].status()["pods"], 1);
}

#[test]
fn pods_can_be_deleted_although_the_ledger_is_not_writable() {
    let mut lab = Lab::build(Topology::one_segment(1));
    lab.workers[0].node.shell("mkdir -p /var/lib/polder; mount -t tmpfs -o size=1m none /var/lib/polder");
    lab.start_agents();
    let worker = &lab.workers[0];
    let pod = worker.pod("a");
    worker.node.shell("dd if=/dev/zero of=/var/lib/polder/full bs=4k 2>/dev/null || true");
    worker.delete(&pod);
    assert!(!worker.node.shell("ip -o link").contains("pld"), "its interface is still there");
    let refused = worker.try_pod("b", &Worker::netconf("1.1.0")).unwrap_err();
    assert!(refused["msg"].as_str().unwrap().contains("ledger"), "{refused}");
    worker.node.shell("rm /var/lib/polder/full");
    worker.cni("ADD", "b", "/run/netns/b", &Worker::netconf("1.1.0")).unwrap();
}

#[test]
fn deleted_devices_are_recreated_with_all_their_entries() {
    let mut lab = Lab::build(Topology::two_segments());
    lab.workers.iter().for_each(|worker| worker.configure_also("resync_seconds = 1"));
    lab.start_agents();
    let pods: Vec<Pod> = lab.workers.iter().flat_map(|worker| [worker.pod("a"), worker.pod("b")]).collect();
    for damage in [
        "ip link del polder.vx",
        "ip link del polder0",
        "ip link set polder0 address 02:00:00:00:00:99",
        "ip link set polder.vx down",
        "nft flush ruleset",
        "ip route flush proto 84",
        "ip neigh flush dev polder0 nud permanent; ip neigh flush dev polder.vx nud permanent",
        "for port in $(ls /sys/class/net | grep ^pld); do ip link set $port nomaster; done; true",
        "ip address flush dev polder0",
    ] {
        let count = |status: &serde_json::Value| status["last_pass"]["count"].as_u64();
        lab.workers[0].node.shell(damage);
        let before = count(&lab.workers[0].status()).unwrap();
        lab.workers[0].wait_for_status(&format!("repair of {damage:?}"), |status| {
            count(status).filter(|now| *now >= before + 3 && status["last_pass"]["writes"] == 0)
        });
        assert_flat(&pods, 1450);
    }
}
