//! The etcd that comes with Polder: containerd starts each member with the grants of the manifest in
//! `deploy/kubernetes`, the certificates of `scripts/etcd-certificates` and the commands of `docs/install.md`. The
//! image contains Debian's etcd instead of the one in the manifest.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use polder_tests::kubelet::{Kubelet, Started};
use polder_tests::manifest::{Container, Manifest, text};
use polder_tests::runtime::{Runtime, Sandbox};
use polder_tests::{Lab, Topology, image, node, wait};

/// The top folder of the project.
fn top() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Nodes with a container runtime and the images, without agents and etcd.
struct Cluster {
    // Dropped first: the runtimes run on the lab's nodes.
    runtimes: Vec<Runtime>,
    lab: Lab,
    folder: tempfile::TempDir,
}

/// An etcd member on one node.
struct Member<'a> {
    kubelet: Kubelet<'a>,
    container: Container,
    sandbox: Sandbox,
    started: Started,
}

impl Cluster {
    /// Returns `None` if no etcd is available that the manifest can run.
    fn start(nodes: usize) -> Option<Self> {
        let Some(programs) = std::env::var_os("POLDER_NEWER_ETCD").map(PathBuf::from) else {
            println!(
                "NOT TESTED: POLDER_NEWER_ETCD does not say where an etcd is that has /readyz and etcdutl"
            );
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let lab = Lab::build(Topology { etcd_members: 0, ..Topology::one_segment(nodes) });
        let etcd = ["etcd", "etcdctl", "etcdutl"].map(|name| programs.join(name));
        let named = Manifest::read("etcd-3").only("polder-etcd").container("containers");
        let etcd = image::of_programs(&folder.path().join("etcd"), &text(&named.0["image"]), &etcd);
        let images = [image::of_polder(folder.path()), etcd];
        let images: Vec<_> = images.iter().map(PathBuf::as_path).collect();
        let start =
            |worker: &polder_tests::agent::Worker| Runtime::start_for_manifests(&worker.node, &images);
        let runtimes = lab.workers.iter().map(start).collect();
        Some(Self { runtimes, lab, folder })
    }

    fn address(&self, number: usize) -> String {
        self.lab.underlay(number, false).to_string()
    }

    /// The manifest, with the names and addresses of these nodes instead of the examples.
    fn manifest(&self, name: &str, members: &[usize]) -> Manifest {
        Manifest::read_with(name, &self.examples(members))
    }

    /// The example names and addresses of a manifest, and their replacements in the lab.
    fn examples(&self, members: &[usize]) -> Vec<(String, String)> {
        let replaced = (1..).zip(members).flat_map(|(place, member)| {
            let name = self.lab.workers[*member].name().to_owned();
            [(format!("control-plane-{place}"), name), (format!("192.0.2.1{place}"), self.address(*member))]
        });
        replaced.collect()
    }

    /// The only command of docs/install.md that contains `words`, with the lab's nodes instead of the examples. For
    /// `kubectl exec`, only the part after ` -- `.
    fn documented(&self, words: &str) -> Vec<String> {
        let docs = fs::read_to_string(top().join("docs/install.md")).unwrap();
        let commands = docs.lines().map(str::trim).filter(|line| {
            line.contains(words) && ["kubectl ", "etcdctl "].iter().any(|start| line.starts_with(start))
        });
        let commands = commands.map(|line| line.split_once(" -- ").map_or(line, |(_, command)| command));
        let mut commands: Vec<_> = commands.collect();
        commands.dedup();
        let [line] = commands[..] else { panic!("commands with {words:?}: {commands:?}") };
        let examples = (1..).zip(&self.lab.workers).fold(line.to_owned(), |line, (place, worker)| {
            line.replace(&format!("cp{place}"), worker.name())
                .replace(&format!("192.0.2.1{place}"), &self.address(place - 1))
        });
        examples.split_whitespace().map(str::to_owned).collect()
    }

    /// The Secrets, for members on these nodes.
    fn secrets(&self, members: &[usize]) -> Manifest {
        let mut script = Command::new(top().join("scripts/etcd-certificates"));
        script.arg("--to").arg(self.certificates()).args(members.iter().map(|member| self.address(*member)));
        Manifest::parse(&node::output(&mut script))
    }

    fn certificates(&self) -> PathBuf {
        self.folder.path().join("polder-etcd")
    }

    fn kubelet<'a>(
        &'a self,
        number: usize,
        manifest: &'a Manifest,
        volume: &str,
        secret: &[(String, String)],
    ) -> Kubelet<'a> {
        let address = self.lab.underlay(number, false);
        let node = &self.lab.workers[number].node;
        let kubelet = Kubelet { node, runtime: &self.runtimes[number], manifest, address };
        kubelet.write("config", &[("agent.toml", &manifest.config("agent.toml"))]);
        let files: Vec<_> = secret.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        kubelet.write(volume, &files);
        kubelet
    }

    fn start_agent(&self, number: usize, manifest: &Manifest, secrets: &Manifest) {
        let manifest = manifest.only("polder");
        self.kubelet(number, &manifest, "etcd", &secrets.secret("polder-etcd")).run("polder");
    }

    /// Starts a member. The manifest must not have another DaemonSet.
    fn start_member<'a>(&'a self, number: usize, manifest: &'a Manifest, secrets: &Manifest) -> Member<'a> {
        let kubelet = self.kubelet(number, manifest, "etcd-member", &secrets.secret("polder-etcd-member"));
        let (sandbox, started) = kubelet.run("polder-etcd");
        Member { container: manifest.container("containers"), kubelet, sandbox, started }
    }

    fn wait_until_ready(&self, number: usize) {
        let worker = &self.lab.workers[number];
        worker.wait_for_status("the agent to be ready", |status| (status["ready"] == true).then_some(()));
        self.runtimes[number].wait_for_network();
    }

    /// Starts a pod on each node. All pods must reach each other.
    fn assert_new_pods_reach_each_other(&self, name: &str) {
        let serve = |runtime: &Runtime| runtime.serve(name);
        let pods: Vec<_> = self.runtimes.iter().map(serve).collect();
        for (runtime, (from, client)) in self.runtimes.iter().zip(&pods) {
            for (to, _) in pods.iter().filter(|(to, _)| to.id != from.id) {
                assert_eq!(runtime.seen(client, &to.addresses[0]), from.addresses[0]);
            }
        }
    }
}

impl Member<'_> {
    /// The result of a probe of the container, run as by the kubelet.
    fn probe(&self, probe: &str) -> Result<(), String> {
        self.kubelet.probe(&self.container, probe)
    }

    fn wait_until_ready(&self) {
        wait::until(&format!("the member on {} to be ready", self.kubelet.node.name()), || {
            self.probe("readinessProbe").map_err(|error| error + &self.kubelet.log(&self.started))
        });
    }

    /// Repeats a command in the container until it succeeds. Returns its output.
    fn exec(&self, command: &[String]) -> String {
        let words: Vec<_> = command.iter().map(String::as_str).collect();
        wait::until(&format!("{words:?}"), || {
            let result = self.kubelet.runtime.exec_program(&self.started.id, &words);
            if result.code == 0 { Ok(result.output) } else { Err(result.errors) }
        })
    }

    fn etcdctl(&self, arguments: &[&str]) -> String {
        self.exec(
            &[&["etcdctl"], arguments].concat().iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(),
        )
    }

    /// Kills etcd, as the kernel does when memory is exhausted.
    fn kill(&self) {
        self.kubelet.node.shell("kill -9 $(pidof etcd)");
        assert_eq!(self.kubelet.end_of(&self.started).0, 137);
    }

    /// Starts the container again, as the kubelet does when it has ended.
    fn start_again(&mut self) {
        self.started = self.kubelet.start(&self.sandbox, &self.container);
    }

    /// Runs another program instead of etcd, until it ends.
    fn run_instead(&self, command: &[String]) {
        let started = self.kubelet.start(&self.sandbox, &self.container.clone().with_command(command));
        let (code, message) = self.kubelet.end_of(&started);
        assert_eq!(code, 0, "{command:?}: {message}");
    }
}

/// The reply on a member's peer port to a client with the certificate `name`.
fn request_as_peer(member: &Member<'_>, folder: &Path, name: &str) -> String {
    let file = |end: &str| folder.join(format!("{name}.{end}")).display().to_string();
    let ask = format!(
        r"printf 'GET /members HTTP/1.0\r\n\r\n' | timeout 10 openssl s_client -quiet -connect {}:12380 -cert {} -key {} 2>&1 || :",
        member.kubelet.address,
        file("crt"),
        file("key")
    );
    member.kubelet.node.shell(&ask)
}

#[test]
fn three_members_serve_the_agents_and_lose_one_and_then_all_of_their_data() {
    let Some(cluster) = Cluster::start(3) else { return };
    let (manifest, secrets) = (cluster.manifest("etcd-3", &[0, 1, 2]), cluster.secrets(&[0, 1, 2]));
    (0..3).for_each(|number| cluster.start_agent(number, &manifest, &secrets));
    let only_etcd = manifest.only("polder-etcd");
    let mut members = vec![cluster.start_member(0, &only_etcd, &secrets)];
    wait::until("a member without the others to be alive", || members[0].probe("livenessProbe"));
    members[0].probe("readinessProbe").expect_err("one of three is not ready");
    assert_eq!(cluster.lab.workers[0].http("/livez").0, 200, "an agent waits for etcd");
    members.extend((1..3).map(|number| cluster.start_member(number, &only_etcd, &secrets)));
    members.iter().for_each(Member::wait_until_ready);
    (0..3).for_each(|number| cluster.wait_until_ready(number));
    cluster.assert_new_pods_reach_each_other("first");

    // Clients with the wrong certificate, or without one, are refused.
    let folder = cluster.certificates();
    assert!(request_as_peer(&members[1], &folder, "polder-etcd-member").contains("peerURLs"));
    let message = request_as_peer(&members[1], &folder, "polder");
    assert!(!message.contains("peerURLs"), "an agent is taken for a member: {message}");
    let endpoint = cluster.documented("snapshot save backup.db")[1].clone();
    let ca = format!("--cacert={}", folder.join("ca.crt").display());
    let refused =
        cluster.lab.workers[0].node.command("etcdctl").args([&endpoint, &ca, "get", "x"]).output().unwrap();
    assert!(!refused.status.success(), "who has no certificate is let in");

    // One member is killed: etcd continues, and the member comes back.
    members[0].kill();
    cluster.lab.workers[1].ctl(&["pool", "add", "more", "10.245.0.0/24"]);
    cluster.assert_new_pods_reach_each_other("second");
    members[0].start_again();
    members[0].wait_until_ready();
    let health = members[1].exec(&cluster.documented("endpoint health"));
    assert!(!health.contains("unhealthy"), "{health}");

    // The backup, made in a member's container, and on a machine with etcdctl.
    members[0].etcdctl(&["put", "/of/somebody/else", "before"]);
    members[0].exec(&cluster.documented("snapshot save /var"));
    let mut elsewhere = cluster.lab.workers[2].node.command("sh");
    let command = cluster.documented("snapshot save backup.db").join(" ");
    let place = cluster.folder.path().display();
    elsewhere.args(["-c", &format!("cd {place}; ETCDCTL_API=3 {command}")]);
    node::output(&mut elsewhere);
    members[0].etcdctl(&["put", "/of/somebody/else", "after"]);

    // All members end, and their data is lost.
    for member in &members {
        member.kubelet.runtime.remove_container(&member.started.id);
        member.kubelet.node.shell("mv /var/lib/polder-etcd/data /var/lib/polder-etcd/data.old");
    }
    cluster.assert_new_pods_reach_each_other("without");
    let backup = cluster.lab.workers[0].node.path_on_host(Path::new("/var/lib/polder-etcd/backup.db"));
    for (number, member) in (1..).zip(&members) {
        let there = member.kubelet.node.path_on_host(Path::new("/var/lib/polder-etcd/backup.db"));
        if number == 2 {
            fs::copy(cluster.folder.path().join("backup.db"), there).unwrap();
        } else if number == 3 {
            fs::copy(&backup, there).unwrap();
        }
        let restore: Vec<String> = cluster.documented("snapshot restore");
        let (name, address) = (cluster.lab.workers[number - 1].name(), cluster.address(number - 1));
        let own = restore.into_iter().map(|word| match word.split_once('=') {
            Some(("--name", _)) => format!("--name={name}"),
            Some((flag @ "--initial-advertise-peer-urls", _)) => format!("{flag}=https://{address}:12380"),
            _ => word.replace("/host/", "/"),
        });
        member.run_instead(&own.collect::<Vec<_>>());
    }
    members.iter_mut().for_each(Member::start_again);
    members.iter().for_each(Member::wait_until_ready);
    let value = members[2].etcdctl(&["get", "--print-value-only", "/of/somebody/else"]);
    assert_eq!(value, "before");
    (0..3).for_each(|number| cluster.wait_until_ready(number));
    cluster.assert_new_pods_reach_each_other("third");
    for worker in &cluster.lab.workers {
        worker.wait_for_status("nothing to be wrong", |status| {
            status["problems"].as_array()?.is_empty().then_some(())
        });
    }
    let (is_right, found) = cluster.lab.workers[0].ctl_verdict(&["ipam", "check"]);
    assert!(is_right, "{found}");
}

#[test]
fn a_new_member_replaces_the_member_of_a_lost_node() {
    let Some(cluster) = Cluster::start(4) else { return };
    let (manifest, secrets) =
        (cluster.manifest("etcd-3", &[0, 1, 2]).only("polder-etcd"), cluster.secrets(&[0, 1, 2]));
    let members: Vec<_> = (0..3).map(|number| cluster.start_member(number, &manifest, &secrets)).collect();
    members.iter().for_each(Member::wait_until_ready);
    members[0].etcdctl(&["put", "/polder/v1/key", "value"]);
    members[2].kill();

    let message = members[0].exec(&cluster.documented("member list"));
    let lost =
        message.lines().find(|line| line.contains(", n3, ")).unwrap().split(',').next().unwrap().to_owned();
    let mut remove = cluster.documented("member remove");
    *remove.last_mut().unwrap() = lost;
    members[0].exec(&remove);
    members[0].exec(&cluster.documented("member add"));
    let state = ["new", "existing"].map(|state| format!("--initial-cluster-state={state}"));
    let next = [cluster.examples(&[0, 1, 3]), vec![state.into()]].concat();
    let next = Manifest::read_with("etcd-3", &next).only("polder-etcd");
    let secrets = cluster.secrets(&[0, 1, 3]);
    let fourth = cluster.start_member(3, &next, &secrets);
    fourth.wait_until_ready();

    // Two of the three current members are enough, and the new member is one of them.
    members[0].kill();
    wait::until("the new member to answer", || fourth.probe("readinessProbe"));
    let value = fourth.etcdctl(&["get", "--print-value-only", "/polder/v1/key"]);
    assert_eq!(value, "value");
}

#[test]
fn a_single_member_serves_an_agent_and_keeps_its_data_over_a_restart() {
    let Some(cluster) = Cluster::start(1) else { return };
    let (manifest, secrets) = (cluster.manifest("etcd-1", &[0]), cluster.secrets(&[0]));
    let only_etcd = manifest.only("polder-etcd");
    let mut member = cluster.start_member(0, &only_etcd, &secrets);
    cluster.start_agent(0, &manifest, &secrets);
    cluster.wait_until_ready(0);
    member.etcdctl(&["put", "/of/somebody/else", "value"]);
    member.kill();
    member.start_again();
    member.wait_until_ready();
    assert_eq!(member.etcdctl(&["get", "--print-value-only", "/of/somebody/else"]), "value");
}
