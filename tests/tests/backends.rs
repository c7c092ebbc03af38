//! Paths between nodes change while pods exchange packets.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::agent::Worker;
use polder_tests::fabric::Families;
use polder_tests::matrix::assert_flat;
use polder_tests::traffic::without_packet_loss;
use polder_tests::{Lab, Pod, Topology, wait};

/// A pod on each node.
fn pods(lab: &Lab) -> Vec<Pod> {
    lab.workers.iter().map(|worker| worker.pod("a")).collect()
}

fn wait_for_paths(lab: &Lab, path: &str) {
    for worker in &lab.workers {
        for other in lab.workers.iter().filter(|other| other.name() != worker.name()) {
            for family in ["ipv4", "ipv6"] {
                let what = format!("{family} from {} to {} to be {path}", worker.name(), other.name());
                wait::until_true(&what, || worker.path_to(other.name(), family) == path);
            }
        }
        // Kernel objects of the previous paths are deleted, too.
        worker.wait_for_status("nothing to do", |status| (status["last_pass"]["writes"] == 0).then_some(()));
    }
}

#[test]
fn settings_change_on_all_nodes_and_impossible_changes_are_refused_with_the_reason() {
    let lab = Lab::start(Topology::two_segments());
    let pods: Vec<_> = lab.workers.iter().map(|worker| worker.pod("a")).collect();
    let worker = &lab.workers[0];
    assert!(worker.node.run("nft", &["list", "table", "inet", "polder"]).contains(" @unmasqueraded4"));
    let shown = worker.ctl(&["cluster", "show"]);
    assert_eq!(
        (&shown["vxlan_port"], &shown["vxlan_vni"], &shown["masquerade"]),
        (&8472.into(), &1.into(), &true.into())
    );
    let message =
        worker.ctl(&["cluster", "set", "--vxlan-port", "4789", "--vxlan-vni", "7", "--masquerade", "off"]);
    for expected in [
        "the VXLAN port is now 4789 (was 8472)",
        "the VNI is now 7 (was 1)",
        "masquerade is now off (was on)",
    ] {
        assert!(message.to_string().contains(expected), "{message}");
    }
    for worker in &lab.workers {
        // The device is replaced, so it is missing for a moment.
        wait::until_true("the tunnel to be another one", || {
            let device = worker.node.shell("ip -d link show polder.vx || true");
            device.contains("vxlan id 7 ") && device.contains("dstport 4789")
        });
        wait::until_true("no masquerading any more", || {
            !worker.node.run("nft", &["list", "table", "inet", "polder"]).contains(" @unmasqueraded4")
        });
    }
    for worker in &lab.workers {
        worker.wait_for_status("nothing to do", |status| (status["last_pass"]["writes"] == 0).then_some(()));
    }
    assert_flat(&pods, 1450);
    worker.ctl(&[
        "cluster",
        "set",
        "--masquerade",
        "on",
        "--masquerade-except",
        "192.0.2.0/24,198.51.100.0/24",
    ]);
    wait::until_true("the exceptions to be known", || {
        worker.ctl(&["cluster", "show"])["masquerade_except"]
            == serde_json::json!(["192.0.2.0/24", "198.51.100.0/24"])
    });
    let refused = worker.try_ctl(&["cluster", "set", "--attach", "routed"]).unwrap_err();
    assert!(refused.contains("running pods have the devices and the gateway of bridge"), "{refused}");
    let refused = worker.try_ctl(&["cluster", "set", "--vxlan-vni", "16777216"]).unwrap_err();
    assert!(refused.contains("VNI 16777216 is out of range: use 1 to 16777215"), "{refused}");
    assert!(worker.try_ctl(&["cluster", "set"]).is_err(), "nothing is given");
}

#[test]
fn a_change_of_the_backend_of_all_nodes_loses_no_packet() {
    let lab = Lab::start(Topology::one_segment(3).families(Families::DUAL));
    let pods = pods(&lab);
    without_packet_loss(&pods, || {
        for (backend, path) in
            [("vxlan", "vxlan"), ("direct", "direct"), ("vxlan", "vxlan"), ("auto", "direct")]
        {
            let message = lab.workers[1].ctl(&["cluster", "set", "--backend", backend]);
            assert!(message.as_str().unwrap().contains(&format!("is now {backend} (was ")), "{message}");
            wait_for_paths(&lab, path);
        }
    });
    let message = lab.workers[2].ctl(&["cluster", "set", "--backend", "auto"]);
    assert_eq!(message, "the backend is already auto");
    let error = lab.workers[2].try_ctl(&["cluster", "set", "--backend", "ipip"]).unwrap_err();
    assert!(error.contains("auto, direct or vxlan"), "{error}");
    assert_flat(&pods, 1450);
}

/// The underlay addresses of node `name`, as reported by the agent of `worker`.
fn known(worker: &Worker, name: &str) -> String {
    let nodes = worker.ctl(&["node", "list"]);
    let node = nodes.as_array().unwrap().iter().find(|node| node["name"] == name).unwrap().clone();
    node["underlay"].to_string()
}

#[test]
fn a_change_of_a_nodes_underlay_address_loses_no_packet() {
    // The path to the second node is direct, the path to the third uses a tunnel.
    let mut lab = Lab::start(Topology::two_segments());
    let pods = pods(&lab);
    let (old, new) = ("10.10.1.1", "10.10.1.101");
    without_packet_loss(&pods, || {
        // As systemd sets it: otherwise, the kernel deletes the second address with the first.
        lab.workers[0].node.shell(&format!(
            "sysctl -qw net.ipv4.conf.eth0.promote_secondaries=1; ip address add {new}/24 dev eth0"
        ));
        wait::until_true("the records to be written down", || {
            let written = lab.workers[0].node.read("/var/lib/polder/cluster.json").unwrap_or_default();
            ["n1", "n2", "n3"].iter().all(|name| written.contains(&format!("/polder/v1/nodes/{name}")))
        });
        assert!(lab.workers[0].stop());
        lab.workers[0]
            .configure(&format!("{}[underlay]\naddresses = [\"{new}\"]\n", lab.workers[0].configuration()));
        // While the node cannot publish its new address, it sends from the old one.
        lab.etcd.freeze(true);
        lab.workers[0].start();
        lab.workers[0].wait_for_status("the new address to be chosen", |status| {
            let is_chosen = status["underlay"][0]["address"] == new;
            (is_chosen && status["last_pass"]["writes"] == 0).then_some(())
        });
        let tunnel = |worker: &Worker| worker.node.run("ip", &["-d", "link", "show", "polder.vx"]);
        assert!(tunnel(&lab.workers[0]).contains(&format!("local {old} ")), "{}", tunnel(&lab.workers[0]));
        lab.etcd.freeze(false);
        lab.workers[0].wait_until_ready();
        for worker in &lab.workers {
            wait::until_true("the new address to be known", || known(worker, "n1").contains(new));
            worker.wait_for_status("nothing to do", |status| {
                (status["last_pass"]["writes"] == 0).then_some(())
            });
        }
        wait::until_true("the node itself to go by it", || {
            tunnel(&lab.workers[0]).contains(&format!("local {new} "))
        });
        let others = lab.workers[0].status()["not_underlay"].clone();
        let reason = format!("{new} was chosen by underlay.addresses");
        assert_eq!(others[0]["reason"], reason, "{others}");
        lab.workers[0].node.run("ip", &["address", "delete", &format!("{old}/24"), "dev", "eth0"]);
    });
    wait_until_address_is_unused(&lab.workers[1..], old);
    assert_flat(&pods, 1450);
}

/// Waits until these nodes have no route or FDB entry to that address.
fn wait_until_address_is_unused(workers: &[Worker], address: &str) {
    for worker in workers {
        wait::until(&format!("{} to go by another address than {address}", worker.name()), || {
            let all = worker.node.shell("ip route; bridge fdb show dev polder.vx");
            if all.contains(&format!("{address} ")) { Err(all) } else { Ok(()) }
        });
    }
}

#[test]
fn peers_use_the_new_underlay_address_of_a_node() {
    let lab = Lab::start(Topology::two_segments());
    let pods = pods(&lab);
    // As after a change of a DHCP lease: the agent's connections to etcd are dead, too.
    lab.workers[0].node.shell(
        "ip address flush dev eth0; ip address add 10.10.1.101/24 dev eth0; ip route add default via 10.10.1.254",
    );
    for worker in &lab.workers {
        wait::within(std::time::Duration::from_secs(60), "the new address to be known", || {
            let known = known(worker, "n1");
            if known.contains("10.10.1.101") { Ok(()) } else { Err(known) }
        });
    }
    lab.workers.iter().for_each(|worker| {
        worker.wait_for_status("nothing to do", |status| {
            (status["last_pass"]["writes"] == 0 && status["problems"] == serde_json::json!([])).then_some(())
        });
    });
    wait_until_address_is_unused(&lab.workers[1..], "10.10.1.1");
    assert_flat(&pods, 1450);
}

#[test]
fn pods_follow_the_underlays_mtu() {
    let lab = Lab::start(Topology::two_segments().families(Families::DUAL));
    let before = pods(&lab);
    let set = |mtu: &str| lab.workers[0].node.run("ip", &["link", "set", "eth0", "mtu", mtu]);
    let wait_for = |mtu: u32| {
        lab.workers[0].wait_for_status(&format!("pods of {mtu} bytes"), |status| {
            (status["mtu"] == mtu && status["last_pass"]["writes"] == 0).then_some(())
        });
        // The other nodes must know the MTU, too: the sender's node refuses packets that are too long for the peer's
        // pods.
        for other in &lab.workers[1..] {
            wait::until_true("the others to know", || {
                other.node.shell("ip route show proto 84").contains("mtu 1350") == (mtu == 1350)
            });
            other.wait_for_status("nothing to do", |status| {
                (status["last_pass"]["writes"] == 0).then_some(())
            });
        }
    };
    set("1400");
    wait_for(1350);
    let new = lab.workers[0].pod("new");
    assert!(new.run("ip", &["link", "show", "eth0"]).contains("mtu 1350"));
    assert_flat(&[before.as_slice(), &[new]].concat(), 1350);
    set("1500");
    wait_for(1450);
    // A learned path MTU expires after ten minutes, and new pods have learned none.
    let after: Vec<Pod> = lab.workers.iter().map(|worker| worker.pod("after")).collect();
    assert_flat(&after, 1450);
}
