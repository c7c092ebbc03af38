//! The cluster when etcd loses, corrupts or replaces its records.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::time::{Duration, Instant};

use polder_ipam::ids::{BootId, MachineId};
use polder_ipam::key::Key;
use polder_ipam::publication::lease_write;
use polder_ipam::record::Boot;
use polder_ipam::tasks::lease;
use polder_store::Store;
use polder_store::etcd::Etcd;
use polder_store::etcd::config::EtcdConfig;
use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat;
use polder_tests::traffic::without_packet_loss;
use polder_tests::{Lab, Pod, Topology, wait};
use serde_json::Value;
use tokio::runtime;

fn pods(lab: &Lab, name: &str) -> Vec<Pod> {
    lab.workers.iter().map(|worker| worker.pod(name)).collect()
}

/// All keys that agents write.
fn keys(lab: &Lab) -> Vec<String> {
    lab.etcd.keys("/polder/")
}

/// Waits until etcd has the same keys as before, and all nodes are ready and have paths to all others.
fn assert_restored(lab: &Lab, before: &[String]) {
    wait::until("all records to be back", || {
        let now = keys(lab);
        if now == before { Ok(()) } else { Err(format!("{now:#?}")) }
    });
    for worker in &lab.workers {
        worker.wait_for_status("the node to be known and to serve", |status| {
            (status["ready"] == true && status["problems"].as_array()?.is_empty()).then_some(())
        });
        for peer in lab.workers.iter().filter(|peer| peer.name() != worker.name()) {
            wait::until_true("the peer to be known", || worker.has_path_to(peer.name(), "ipv4"));
        }
    }
}

#[test]
fn an_emptied_datastore_is_restored_while_pods_communicate() {
    let lab = Lab::start(Topology::two_segments());
    let old = pods(&lab, "old");
    wait::until_true("the addresses to be published", || keys(&lab).len() == 14);
    let (before, cluster) = (keys(&lab), lab.etcd.ctl(&["get", "/polder/v1/cluster"]));
    without_packet_loss(&old, || {
        lab.etcd.ctl(&["del", "--prefix", "/polder/"]);
        assert_restored(&lab, &before);
    });
    assert_eq!(lab.etcd.ctl(&["get", "/polder/v1/cluster"]), cluster, "it is another cluster now");
    assert_flat(&[old, pods(&lab, "new")].concat(), 1450);
}

#[test]
fn an_empty_replacement_datastore_is_restored_without_bootstrap_settings() {
    let mut lab = Lab::build(Topology::two_segments());
    lab.start_agents();
    let old = pods(&lab, "old");
    wait::until_true("the addresses to be published", || keys(&lab).len() == 14);
    let before = keys(&lab);
    wait::until_true("the records to be written down", || {
        let written = lab.workers[0].node.read("/var/lib/polder/cluster.json");
        written.is_ok_and(|text| text.matches("blocks/").count() == 3)
    });
    for worker in &lab.workers {
        // Running agents know the settings, and do not need those of the configuration any more.
        let config = worker.configuration();
        worker.configure(config.split("[bootstrap]").next().unwrap());
    }
    without_packet_loss(&old, || {
        lab.etcd.kill();
        lab.etcd.nodes().for_each(|node| drop(node.shell("rm -r /var/lib/etcd")));
        lab.workers[0].kill();
        lab.etcd.start_again();
        lab.workers[0].start();
        assert_restored(&lab, &before);
    });
    assert_flat(&[old, pods(&lab, "new")].concat(), 1450);
}

#[test]
fn a_replaced_datastore_with_a_higher_revision_is_reloaded_and_restored() {
    let mut lab = Lab::start(Topology::one_segment(2));
    let old = pods(&lab, "old");
    wait::until_true("the addresses to be published", || keys(&lab).len() == 10);
    let before = keys(&lab);
    // Another store, whose revision is higher than the old one ever was.
    lab.workers.iter().for_each(|worker| worker.freeze(true));
    lab.etcd.kill();
    lab.etcd.nodes().for_each(|node| drop(node.shell("rm -r /var/lib/etcd")));
    lab.etcd.start_again();
    lab.etcd.nodes().next().unwrap().shell(
        "for n in $(seq 150); do ETCDCTL_API=3 etcdctl --endpoints http://10.10.1.200:2379 put unrelated $n; done",
    );
    without_packet_loss(&old, || {
        lab.workers.iter().for_each(|worker| worker.freeze(false));
        assert_restored(&lab, &before);
    });
}

#[test]
fn changes_that_were_compacted_before_the_watch_resumed_are_not_missed() {
    let mut lab = Lab::start(Topology::one_segment(2));
    lab.workers[0].freeze(true);
    lab.etcd.kill();
    lab.etcd.start_again();
    let new = lab.add_worker(1);
    new.start_and_wait();
    let status = lab.etcd.ctl(&["endpoint", "status", "--write-out", "json"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    lab.etcd.try_ctl(&["compact", &revision]).unwrap();
    lab.workers[0].freeze(false);
    wait::until_true("the new node to be known", || lab.workers[0].path_to("n3", "ipv4") == "direct");
    assert_flat(&pods(&lab, "a"), 1450);
}

#[test]
fn a_lease_whose_key_has_a_new_owner_is_not_revoked() {
    let lab = Lab::build(Topology::one_segment(1));
    let machine = lab.etcd.nodes().next().unwrap();
    let name = "n1".parse().unwrap();
    let (node, alive) = (Key::Node("n1".parse().unwrap()), Key::Lease("n1".parse().unwrap()));
    let is_held = || !lab.etcd.keys(&alive.to_string()).is_empty();
    let write = |value: &str| {
        lab.etcd.ctl(&["put", &node.to_string(), value]);
        let shown = lab.etcd.ctl(&["get", &node.to_string(), "-w", "json"]);
        serde_json::from_str::<Value>(&shown).unwrap()["kvs"][0]["mod_revision"].as_i64().unwrap()
    };
    let hold = |revision: i64, until: &(dyn Fn() -> bool + Sync)| {
        machine.within(|| {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let config = EtcdConfig { endpoints: lab.etcd.endpoints(), ..EtcdConfig::default() };
                let store = Store::Etcd(Etcd::new(&config).await.unwrap());
                let liveness = lease_write(
                    &name,
                    Boot { machine_id: &MachineId::new("m"), boot_id: &BootId::new("b") },
                    polder_ipam::Revision::new(revision),
                );
                let end = async {
                    while !until() {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                };
                tokio::select! {
                    () = lease::hold(&store, &liveness, Duration::from_secs(2)) => {}
                    () = end => {}
                }
            });
        });
    };
    let first = write("first");
    hold(first, &is_held);
    write("second");
    wait::until_true("the lease to run out", || !is_held());
    // Long enough for more than one attempt.
    let started = Instant::now();
    hold(first, &|| is_held() || started.elapsed() > Duration::from_secs(5));
    assert!(!is_held());
}

#[test]
fn any_one_of_three_etcd_members_may_fail() {
    let mut lab = Lab::start(Topology { etcd_members: 3, ..Topology::one_segment(2) });
    let old = pods(&lab, "old");
    for number in 0..3 {
        without_packet_loss(&old, || lab.etcd.kill_member(number));
        // Operations that need etcd work with the other two members: a node joins, and all others detect it.
        lab.add_worker(1).start_and_wait();
        let new = lab.workers.last().unwrap().name().to_owned();
        for worker in lab.workers.iter().filter(|worker| worker.name() != new) {
            wait::until_true("the new node to be known", || worker.path_to(&new, "ipv4") == "direct");
        }
        lab.etcd.start_member(number);
        wait::until_true("the member to be back", || lab.etcd.is_healthy());
    }
    assert_flat(&pods(&lab, "new"), 1450);
}

#[test]
fn an_invalid_record_is_reported_and_its_previous_value_stays_in_use() {
    let lab = Lab::start(Topology::two_segments());
    let old = pods(&lab, "old");
    for key in ["/polder/v1/pools/ipv4", "/polder/v1/cluster", "/polder/v1/nodes/n3"] {
        let record = lab.etcd.ctl(&["get", "--print-value-only", key]);
        without_packet_loss(&old, || {
            lab.etcd.ctl(&["put", key, "{\"cidr\": 7}"]);
            for worker in &lab.workers[..2] {
                worker.wait_for_status("the record to be named", |status| {
                    status["problems"].to_string().contains(key).then_some(())
                });
            }
        });
        lab.etcd.ctl(&["put", key, record.trim()]);
        for worker in &lab.workers {
            worker.wait_for_status("the problem to be gone", |status| {
                status["problems"].as_array()?.is_empty().then_some(())
            });
        }
    }
    assert_flat(&[old, pods(&lab, "new")].concat(), 1450);
}

#[test]
fn the_loss_of_one_familys_pool_does_not_affect_the_other_family() {
    let lab = Lab::start(Topology::two_segments().families(Families::DUAL));
    let old = pods(&lab, "old");
    without_packet_loss(&old, || {
        lab.etcd.ctl(&["del", "/polder/v1/pools/ipv6"]);
        for worker in &lab.workers {
            worker.wait_for_status("the loss to be named", |status| {
                status["problems"]
                    .to_string()
                    .contains("is not in a pool that this node can use")
                    .then_some(())
            });
        }
    });
    let new = lab.workers[0].pod_with("new", &Worker::netconf("1.1.0"));
    assert!(new.addresses().iter().all(std::net::IpAddr::is_ipv4), "{:?}", new.addresses());
}
