//! Task 5: a restored etcd has records that are older than reality.

use std::net::IpAddr;

use polder_tests::agent::Worker;
use polder_tests::matrix::assert_flat;
use polder_tests::traffic::without_packet_loss;
use polder_tests::{Lab, Node, Pod, Topology, wait};

use super::document::Task;
use crate::{NAMES, lab, pods, shorten_cool_down};

/// All nodes but the removed one.
fn members(lab: &Lab) -> impl Iterator<Item = &Worker> {
    lab.workers.iter().filter(|worker| worker.name() != "n3")
}

/// The number of the pod's /26 in 10.244.0.0/24.
fn block(pod: &Pod) -> u8 {
    let IpAddr::V4(address) = pod.v4() else { panic!("it is IPv4") };
    address.octets()[3] / 64
}

fn wait_until_routed(lab: &Lab, pod: &Pod) {
    for worker in members(lab) {
        let route = format!("ip route get {} 2>&1 || true", pod.v4());
        wait::until(&format!("{} to have a route to {}", worker.name(), pod.v4()), || {
            let route = worker.node.shell(&route);
            if route.contains(" via ") || route.contains("dev polder0") { Ok(()) } else { Err(route) }
        });
    }
}

/// The machine of etcd, as the text names it.
fn etcd(lab: &Lab) -> (&'static str, &Node) {
    ("the etcd machine", lab.etcd.machine(0))
}

#[test]
fn etcd_is_restored_from_an_old_backup() {
    // A block for each node.
    let mut lab = lab(Topology { pools: vec!["10.244.0.0/24"], ..Topology::one_segment(4) });
    // Debian's etcd runs as another user than that of the lab.
    let places = [("DATA", "/var/lib/etcd"), ("192.0.2.10", "10.10.1.200"), ("etcd: ", "root: ")];
    let task = Task::read("5. Restore etcd from a backup", &[&places[..], &NAMES].concat())
        .set("ETCDCTL_ENDPOINTS", "http://10.10.1.200:2379");
    let published = |lab: &Lab, count: usize| {
        wait::until_true("the addresses to be published", || {
            lab.etcd.keys("/polder/v1/addresses/").len() == count
        });
    };
    let (kept, mut gone) = (pods(&lab, "kept"), pods(&lab, "gone"));
    published(&lab, 8);
    task.run(etcd(&lab), "snapshot save");

    // Pods end and start, node n3 is removed, and node n5 gets its block.
    lab.workers[0].delete(&gone.remove(0));
    let new = lab.workers[0].pod("new");
    lab.workers[0].remove_node("n3", 2);
    let newcomer = lab.add_worker(1);
    shorten_cool_down(newcomer);
    newcomer.start_and_wait();
    let newest = lab.workers[4].pod("newest");
    assert_eq!(block(&newest), block(&kept[2]), "the block of n3");
    lab.workers[2].kill();
    lab.workers[2].node.run("ip", &["link", "set", "eth0", "down"]);
    wait_until_routed(&lab, &newest);

    let running = [kept[0].clone(), kept[1].clone(), kept[3].clone(), gone[0].clone(), new.clone()];
    without_packet_loss(&running, || {
        task.in_another_way("systemctl stop etcd");
        lab.etcd.kill();
        task.run(etcd(&lab), "sudo mv DATA");
        task.run(etcd(&lab), "snapshot restore");
        task.in_another_way("systemctl start etcd");
        lab.etcd.start_again();
        let first = &lab.workers[0];
        wait::until_true("n3 to be back in the records", || {
            first.ctl(&["node", "list"]).to_string().contains("\"n3\"")
        });
        // The claim of the restored n3 keeps the newcomer from serving. It names the command of the text.
        let claimed = |expected: &str| {
            lab.workers[4].wait_for_status(expected, |status| {
                let reasons = status["reasons"].to_string();
                (reasons.contains("which node n3 has claimed") && reasons.contains(expected)).then_some(())
            });
        };
        claimed("run polderctl node remove n3 --dead");
        task.look(("any node", &first.node), "node remove node3 --dead");
        claimed("the claim is deleted after the cool-down. Nothing to do");
        task.look(("any node", &first.node), "ipam check");
    });
    published(&lab, 7);
    members(&lab).for_each(Worker::wait_until_ready);
    wait_until_routed(&lab, &newest);
    assert_flat(&[&running[..], &[newest]].concat(), 1450);
    task.finish();
}
