//! Task 6: certificates are replaced while agents run.

use std::path::Path;
use std::time::Duration;

use polder_tests::agent::Worker;
use polder_tests::etcd::Tls;
use polder_tests::matrix::assert_flat;
use polder_tests::traffic::without_packet_loss;
use polder_tests::{Lab, Topology, wait};

use super::document::Task;
use crate::{NAMES, pods};

const ETCD: &str = "10.10.1.200";

/// The cluster of the text: your machine, etcd and the nodes, with the files of `scripts/etcd-certificates`.
struct Cluster {
    lab: Lab,
    task: Task,
    pools: u8,
}

impl Cluster {
    /// Runs the three blocks that make and install certificates.
    fn install(&self) {
        // The reader's machine needs no network, only a home folder of its own.
        let etcd = self.lab.etcd.machine(0);
        self.task.run(("your machine", etcd), "for node in node1 node2");
        self.task.run(("the etcd machine", etcd), "-o etcd");
        for worker in &self.lab.workers {
            self.task.run(("every node", &worker.node), "/etc/polder/");
        }
    }

    fn restart_etcd(&mut self) {
        self.task.in_another_way("restart etcd");
        self.lab.etcd.kill();
        self.lab.etcd.start_again();
    }

    /// Waits until all agents are connected, and etcd accepts their writes.
    fn wait_until_connected(&mut self) {
        for worker in &self.lab.workers {
            self.task.look(("every node", &worker.node), "polderctl status");
            self.pools += 1;
            let (name, cidr) = (format!("p{}", self.pools), format!("10.245.{}.0/24", self.pools));
            wait::until("a write to be accepted", || worker.try_ctl(&["pool", "add", &name, &cidr]));
        }
    }

    /// Waits until all agents have logged this number of renewed certificates.
    fn wait_until_renewed(&self, count: usize, longest: Duration) {
        for worker in &self.lab.workers {
            wait::within(longest, "the agent to read its certificates again", || {
                let seen = worker.log().matches("etcd certificates renewed").count();
                if seen >= count { Ok(()) } else { Err(format!("{seen} times")) }
            });
        }
    }

    /// Issuer and serial number of the certificate that etcd presents.
    fn certificate(&self) -> (String, String) {
        let shown = self.lab.workers[0].node.shell(&format!(
            "openssl s_client -connect {ETCD}:2379 < /dev/null 2> /dev/null | openssl x509 -noout -issuer -serial"
        ));
        let mut lines = shown.lines().map(str::to_owned);
        (lines.next().unwrap(), lines.next().unwrap())
    }
}

/// Uses the certificates that the commands of the text have installed.
fn use_tls(worker: &Worker) {
    let line = |(key, file)| format!("{key} = \"/etc/polder/{file}\"\n");
    let lines = [("ca", "ca.crt"), ("cert", "polder.crt"), ("key", "polder.key")].map(line).concat();
    let config = worker.configuration().replace("http://", "https://");
    worker.configure(&config.replace("[etcd]\n", &format!("[etcd]\n{lines}")));
}

#[test]
fn certificates_and_their_ca_are_replaced_without_restarting_agents() {
    let lab = Lab::build(Topology::one_segment(2));
    let replacements = [&[("192.0.2.10", ETCD)], &NAMES[..]].concat();
    let task = Task::read("6. Replace certificates", &replacements);
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
    std::os::unix::fs::symlink(scripts, task.home("reader").join("scripts")).unwrap();
    for node in lab.etcd.nodes() {
        node.shell("mkdir -p /etc/etcd");
    }
    lab.workers.iter().for_each(use_tls);
    let mut cluster = Cluster { lab, task, pools: 0 };
    cluster.install();
    let file = |name: &str| Path::new("/etc/etcd").join(name);
    let tls = Tls {
        ca: file("ca.crt"),
        certificate: file("polder-etcd-member.crt"),
        key: file("polder-etcd-member.key"),
    };
    cluster.lab.etcd.restart_with_tls(tls);
    cluster.lab.start_agents();
    let processes: Vec<_> = cluster.lab.workers.iter().map(Worker::agent_pid).collect();
    let running = pods(&cluster.lab, "running");
    without_packet_loss(&running, || {
        // The same CA: not even etcd is restarted.
        let before = cluster.certificate();
        cluster.install();
        // Without a lost connection, agents read the files every minute.
        cluster.wait_until_renewed(1, wait::TIMEOUT * 4);
        assert!(cluster.certificate() != before && cluster.certificate().0 == before.0, "{before:?}");
        cluster.wait_until_connected();

        let rounds = ["cat old-ca.crt polder-etcd-new", "mv polder-etcd-new", "cp new-ca.crt polder"];
        for (round, words) in (2..).zip(rounds) {
            cluster.task.run(("your machine", cluster.lab.etcd.machine(0)), words);
            cluster.install();
            cluster.restart_etcd();
            // After a lost connection, agents read the files at once.
            cluster.wait_until_renewed(round, wait::TIMEOUT);
            cluster.wait_until_connected();
        }
        assert_ne!(cluster.certificate().0, before.0, "the CA");
    });
    let now: Vec<_> = cluster.lab.workers.iter().map(Worker::agent_pid).collect();
    assert_eq!(now, processes, "agents were restarted");
    // The old client certificate is refused.
    let old = cluster.task.home("reader").join("polder-etcd-old");
    let new = cluster.task.home("reader").join("polder-etcd");
    let get = |cluster: &mut Cluster, folder: &Path| {
        cluster.lab.etcd.identify(&folder.join("polder.crt"), &folder.join("polder.key"));
        cluster.lab.etcd.try_ctl(&["get", "/polder/v1/cluster"])
    };
    get(&mut cluster, &new).unwrap();
    get(&mut cluster, &old).expect_err("the old CA is still accepted");
    assert_flat(&[running, pods(&cluster.lab, "new")].concat(), 1450);
    cluster.task.finish();
}
