//! The agent in a container: from the image of `scripts/image`, with only the grants of the manifest in
//! `deploy/kubernetes`, started by containerd over CRI, as by the kubelet.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::Path;
use std::process::Command;

use polder_tests::agent::{Worker, dist};
use polder_tests::kubelet::{Kubelet, Started};
use polder_tests::manifest::{Container, Manifest};
use polder_tests::runtime::{Runtime, Sandbox};
use polder_tests::tls::Authority;
use polder_tests::{Lab, Topology, image, node, wait};

/// Nodes, the first ones with a container runtime and the image. No agent runs.
struct Cluster {
    // Dropped first: the runtimes run on the lab's nodes.
    runtimes: Vec<Runtime>,
    lab: Lab,
    manifest: Manifest,
    authority: Authority,
    _folder: tempfile::TempDir,
}

impl Cluster {
    fn start(topology: Topology, with_runtime: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new(folder.path(), "polder-lab");
        let lab = Lab::build_with_tls(topology, |addresses| Some(authority.for_etcd(addresses)));
        let image = image::of_polder(folder.path());
        let start = |worker: &Worker| Runtime::start_for_manifests(&worker.node, &[&image]);
        let runtimes = lab.workers.iter().take(with_runtime).map(start).collect();
        Self { runtimes, lab, manifest: Manifest::read("base"), authority, _folder: folder }
    }

    /// A stand-in for the kubelet of a node: starts the agent's pods, with their volumes.
    fn kubelet(&self, number: usize) -> Kubelet<'_> {
        self.kubelet_for(number, &self.manifest)
    }

    fn kubelet_for<'a>(&'a self, number: usize, manifest: &'a Manifest) -> Kubelet<'a> {
        let worker = &self.lab.workers[number];
        let address = self.lab.underlay(number, false);
        let kubelet = Kubelet { node: &worker.node, runtime: &self.runtimes[number], manifest, address };
        kubelet.write("config", &[("agent.toml", &self.agent_config(manifest))]);
        let (certificate, key) = self.authority.sign(worker.name(), &[]);
        let files = [self.authority.ca(), certificate, key].map(|path| fs::read_to_string(path).unwrap());
        let names = ["ca.crt", "tls.crt", "tls.key"];
        let files: Vec<_> = names.into_iter().zip(files.iter().map(String::as_str)).collect();
        kubelet.write("etcd", &files);
        kubelet
    }

    /// The agent's configuration in the manifest, with the endpoints of etcd.
    fn agent_config(&self, manifest: &Manifest) -> String {
        let (etcd, given) = (self.lab.etcd.endpoints(), manifest.config("agent.toml"));
        let config = given.replace("https://192.0.2.10:2379", &etcd[0]);
        assert_ne!(config, given, "the manifest says where to put the endpoints of etcd");
        config
    }
}

#[test]
fn the_image_has_only_static_binaries_and_is_reproducible() {
    let folder = tempfile::tempdir().unwrap();
    let first = image::of_polder(folder.path());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/image");
    let again = folder.path().join("again.tar");
    let mut masked = Command::new("sh");
    masked.args(["-c", "umask 077; exec \"$@\"", "sh"]).arg(script);
    node::output(masked.arg("--from").arg(dist()).arg("--to").arg(&again));
    assert!(fs::read(&first).unwrap() == fs::read(&again).unwrap(), "two runs give other bytes");

    let file =
        |name: &str| node::output(Command::new("tar").arg("-xOf").arg(&first).arg(format!("./{name}")));
    let json = |name: &str| serde_json::from_str::<serde_json::Value>(&file(name)).unwrap();
    let image = &json("manifest.json")[0];
    assert_eq!(json(image["Config"].as_str().unwrap())["config"]["Env"][1], "container=oci");
    let layer = folder.path().join("layer.tar");
    let mut extract = Command::new("tar");
    extract
        .arg("-xf")
        .arg(&first)
        .arg("-C")
        .arg(folder.path())
        .arg(format!("./{}", image["Layers"][0].as_str().unwrap()));
    node::output(&mut extract);
    fs::rename(folder.path().join(image["Layers"][0].as_str().unwrap()), &layer).unwrap();
    let list = node::output(Command::new("tar").arg("-tf").arg(&layer));
    let files: Vec<_> = list.lines().filter(|path| !path.ends_with('/')).collect();
    let programs =
        ["polder", "polder-agent", "polder-ipam", "polderctl"].map(|name| format!("./usr/local/bin/{name}"));
    assert_eq!(files, programs);
}

fn wait_until_ready(worker: &Worker) {
    worker.wait_for_status("the agent to be ready", |status| (status["ready"] == true).then_some(()));
}

#[test]
fn agents_started_from_the_manifest_connect_the_pods_of_all_nodes() {
    let cluster = Cluster::start(Topology::two_segments(), 3);
    let kubelets: Vec<_> = (0..3).map(|number| cluster.kubelet(number)).collect();
    let mut agents: Vec<_> = kubelets.iter().map(|kubelet| kubelet.run("polder")).collect();
    cluster.lab.workers.iter().for_each(wait_until_ready);
    for ((kubelet, (_, agent)), worker) in kubelets.iter().zip(&agents).zip(&cluster.lab.workers) {
        assert_eq!(worker.http("/livez").0, 200);
        assert_eq!(worker.http("/readyz"), (200, "ok\n".to_owned()));
        let status = kubelet.runtime.exec_program(&agent.id, &["polderctl", "status"]);
        assert!(
            status.output.contains("changes inside pods' network namespaces are not detected"),
            "{status:?}"
        );
        assert!(status.output.contains("needs SYS_ADMIN"), "{status:?}");
        assert!(!status.output.contains("/run/netns"), "pods' namespaces are not seen: {status:?}");
        kubelet.runtime.wait_for_network();
    }
    let pods: Vec<_> = cluster
        .runtimes
        .iter()
        .enumerate()
        .map(|(number, runtime)| runtime.serve(&format!("pod-{number}")))
        .collect();
    let all_reach_all = |clients: &[(Sandbox, String)]| {
        for (number, (from, client)) in clients.iter().enumerate() {
            for (to, _) in clients.iter().filter(|(to, _)| to.id != from.id) {
                let seen = cluster.runtimes[number].seen(client, &to.addresses[0]);
                assert_eq!(seen, from.addresses[0], "{} sees somebody else", to.name());
            }
        }
    };
    all_reach_all(&pods);

    // As in a rolling update: the container ends, and a new one starts. No packet of a pod is lost.
    let (sandbox, agent) = &agents[0];
    let [(_, sender), (receiver, _), ..] = &pods[..] else { panic!("there are three") };
    cluster.runtimes[0].send(sender, &receiver.addresses[0]);
    cluster.runtimes[0].remove_container(&agent.id);
    all_reach_all(&pods);
    cluster.runtimes[0].remove_pod(sandbox);
    agents[0] = kubelets[0].run("polder-next");
    let first = &cluster.lab.workers[0];
    first.wait_for_status("both pods to be known", |status| {
        (status["ready"] == true && status["pods"].as_u64() >= Some(1)).then_some(())
    });
    all_reach_all(&pods);
    cluster.runtimes[0].wait_for_replies(sender, 200);
    assert_eq!(cluster.runtimes[0].lost(sender), [0; 0]);

    cluster.runtimes[0].remove_pod(&pods[0].0);
    assert_eq!(first.status()["pods"], 0);
    assert!(!first.node.run("ip", &["link"]).contains("pld"), "an interface is left");
    assert_eq!(first.status()["problems"], serde_json::json!([]), "{}", kubelets[0].log(&agents[0].1));
}

/// Does what kind does when a container starts: `images/base/files/usr/local/bin/entrypoint` writes a new machine id
/// each time, and makes all mounts shared. `/var` is a volume; `/etc` and `/opt` persist with the container; `/run` is
/// in memory. The boot id is that of the machine, also in containers of the lab: their `/proc` is not that of the lab's
/// node.
fn start_node_of_kind(worker: &Worker, image: &Path, machine_id: char) -> Runtime {
    worker.node.shell("mkdir -p /var/lib/opt; mount --bind /var/lib/opt /opt; mount --make-rshared /");
    worker.node.write("/etc/machine-id", &format!("{}\n", machine_id.to_string().repeat(32)));
    let runtime = Runtime::start_of_kind(&worker.node);
    runtime.import(&worker.node, image);
    runtime
}

#[test]
fn a_restarted_kind_node_keeps_its_blocks_and_its_pods_return() {
    let folder = tempfile::tempdir().unwrap();
    let image = image::of_polder(folder.path());
    let manifest = Manifest::read("kind");
    let mut lab = Lab::build(Topology::one_segment(2));
    let mut runtimes: Vec<_> = lab
        .workers
        .iter()
        .zip(['a', 'b'])
        .map(|(worker, id)| start_node_of_kind(worker, &image, id))
        .collect();
    let start = |lab: &Lab, runtime: &Runtime, number: usize, name: &str| {
        let address = lab.underlay(number, false);
        let kubelet = Kubelet { node: &lab.workers[number].node, runtime, manifest: &manifest, address };
        let given = manifest.config("agent.toml");
        let config = given.replace("http://polder-control-plane:12379", &lab.etcd.endpoints()[0]);
        assert_ne!(config, given, "the etcd of deploy/kind is on the control plane");
        let config = config + "\n[ipam]\ncooldown_seconds = 10\ngrace_seconds = 2\n";
        kubelet.write("config", &[("agent.toml", &config)]);
        kubelet.run(name);
        wait_until_ready(&lab.workers[number]);
        runtime.wait_for_network();
    };
    let record = |lab: &Lab, name: &str| -> serde_json::Value {
        let key = format!("/polder/v1/nodes/{name}");
        serde_json::from_str(lab.etcd.ctl(&["get", "--print-value-only", &key]).trim()).unwrap()
    };
    (0..2).for_each(|number| start(&lab, &runtimes[number], number, "polder"));
    lab.workers[0].ctl(&["pool", "add", "named", "10.99.0.0/24", "--reservations"]);
    let (peer, peer_container) = runtimes[0].serve("peer");
    let (web, _) = runtimes[1].serve("web");
    let reserved = [("polder.dev/pool", "named")];
    let database = runtimes[1].try_run_pod("database", &reserved).unwrap();
    runtimes[1].run_pod("deleted-meanwhile");
    assert_eq!(lab.workers[1].status()["pods"], 3);
    let (before, blocks) = (record(&lab, "n2"), lab.workers[1].status()["blocks"].clone());
    assert_eq!(before["boot_id"], record(&lab, "n1")["boot_id"], "the nodes share a kernel");

    drop(runtimes.pop());
    lab.reboot(1);
    let runtime = start_node_of_kind(&lab.workers[1], &image, 'c');
    start(&lab, &runtime, 1, "polder-again");
    let after = record(&lab, "n2");
    assert_eq!(after["machine_id"], "c".repeat(32));
    assert_eq!((&after["incarnation"], &after["boot_id"]), (&before["incarnation"], &before["boot_id"]));
    let names = |blocks: &serde_json::Value| -> Vec<String> {
        blocks.as_array().unwrap().iter().map(|block| block["block"].to_string()).collect()
    };
    assert_eq!(names(&lab.workers[1].status()["blocks"]), names(&blocks));

    // As the kubelet does for pods whose sandboxes have ended.
    [&web, &database].into_iter().for_each(|sandbox| runtime.remove_pod(sandbox));
    let (web, web_container) = runtime.serve("web");
    let again = wait::until("the database to be back", || runtime.try_run_pod("database", &reserved));
    assert_eq!(again.addresses, database.addresses, "it has its address by its name");
    assert_eq!(runtimes[0].seen(&peer_container, &web.addresses[0]), peer.addresses[0]);
    assert_eq!(runtime.seen(&web_container, &peer.addresses[0]), web.addresses[0]);
    // The third pod got no DEL, and the boot id is the same.
    lab.workers[1].wait_for_status("what is gone to be released", |status| {
        (status["pods"] == 2 && status["problems"] == serde_json::json!([])).then_some(())
    });
}

/// The effect of a missing grant.
enum Symptom {
    /// The container ends, and its output contains these words.
    Ends(&'static [&'static str]),
    /// The node is not ready, and the reasons contain these words.
    NotReady(&'static [&'static str]),
    /// The node is ready, and its status contains these words.
    Says(&'static [&'static str]),
}

#[test]
fn every_grant_of_the_manifest_is_necessary_and_reported_if_missing() {
    let cluster = Cluster::start(Topology::one_segment(2), 1);
    let kubelet = cluster.kubelet(0);
    let worker = &cluster.lab.workers[0];
    let second = &cluster.lab.workers[1];
    let tls = |worker: &Worker| {
        let (certificate, key) = cluster.authority.sign(&format!("{}-host", worker.name()), &[]);
        let [ca, certificate, key] =
            [cluster.authority.ca(), certificate, key].map(|path| path.display().to_string());
        worker
            .configuration()
            .replace("[etcd]\n", &format!("[etcd]\nca = {ca:?}\ncert = {certificate:?}\nkey = {key:?}\n"))
    };
    let config = format!("fastpath = \"auto\"\n{}", cluster.agent_config(&cluster.manifest));
    kubelet.write("config", &[("agent.toml", &config)]);
    second.configure(&tls(second));
    let mut command = second.node.command(dist().join("polder-agent"));
    let _peer = second.node.spawn(&mut command, "agent.log");

    let manifest = &cluster.manifest;
    let sandbox = kubelet.sandbox("polder");
    let init = manifest.container("initContainers");
    assert_eq!((init.capabilities(), init.mounts()), (vec![], vec!["cni-bin".to_owned()]));
    ends(
        &kubelet,
        &sandbox,
        &init.clone().without_mount("cni-bin"),
        &["/opt/cni/bin is in the container", "hostPath"],
    );
    let (code, message) = kubelet.end_of(&kubelet.start(&sandbox, &init));
    assert_eq!(code, 0, "{message}");

    let whole = manifest.container("containers");
    for capability in whole.capabilities() {
        let expected = match capability.as_str() {
            "NET_ADMIN" => Symptom::Ends(&["needs the capability NET_ADMIN"]),
            "NET_RAW" => Symptom::NotReady(&["peers cannot be probed", "Operation not permitted"]),
            "BPF" => Symptom::Says(&["does not load the BPF programs", "capabilities NET_ADMIN and BPF"]),
            other => panic!("nothing shows that {other} is needed"),
        };
        shows(&kubelet, worker, &sandbox, &whole.clone().without_capability(&capability), &expected);
    }
    for mount in whole.mounts() {
        let expected = match mount.as_str() {
            "config" => Symptom::Ends(&["/etc/polder/agent.toml", "No such file"]),
            "etcd" => Symptom::Ends(&["etcd.cert: /etc/polder-etcd/tls.crt", "No such file"]),
            "state" => Symptom::Ends(&["state_dir /var/lib/polder", "Mount /var/lib/polder of the host"]),
            "run" => Symptom::Ends(&["/run/polder", "Read-only file system"]),
            "cni-conf" => {
                Symptom::NotReady(&["/etc/cni/net.d/10-polder.conflist cannot be written", "Read-only"])
            }
            "netns" => Symptom::Says(&["/run/netns is not mounted here", "HostToContainer"]),
            "machine-id" => Symptom::Ends(&["/etc/machine-id cannot be read"]),
            "proc-sys-net" => {
                Symptom::Ends(&["proc_sys_net /host/proc/sys/net", "mount the host's /proc/sys/net"])
            }
            other => panic!("nothing shows that the mount {other} is needed"),
        };
        shows(&kubelet, worker, &sandbox, &whole.clone().without_mount(&mount), &expected);
    }
    let alone = whole.clone().without_propagation("netns");
    shows(
        &kubelet,
        worker,
        &sandbox,
        &alone,
        &Symptom::Says(&["/run/netns is mounted without mount propagation"]),
    );
    shows(&kubelet, worker, &sandbox, &whole, &Symptom::Says(&["needs SYS_ADMIN"]));
}

#[test]
fn the_cleanup_waits_for_agent_and_pods_and_leaves_nothing_on_the_node() {
    let cluster = Cluster::start(Topology::one_segment(1), 1);
    let (worker, runtime) = (&cluster.lab.workers[0], &cluster.runtimes[0]);
    let before = worker.node.shell("sysctl -n net.ipv4.ip_forward");
    let (agents, agent) = cluster.kubelet(0).run("polder");
    wait_until_ready(worker);
    runtime.wait_for_network();
    let pod = runtime.run_pod("pod");

    let manifest = Manifest::read("cleanup");
    let cleanup = cluster.kubelet_for(0, &manifest);
    let (sandbox, uninstall) = (cleanup.sandbox("cleanup"), manifest.container("initContainers"));
    ends(&cleanup, &sandbox, &uninstall, &["stop the agent first"]);
    runtime.remove_container(&agent.id);
    runtime.remove_pod(&agents);
    ends(&cleanup, &sandbox, &uninstall, &["1 pods are attached"]);
    runtime.stop_pod(&pod);
    let (code, message) = cleanup.end_of(&cleanup.start(&sandbox, &uninstall));
    assert_eq!(code, 0, "{message}");

    let links = worker.node.run("ip", &["link"]);
    assert!(!links.contains("polder") && !links.contains("pld"), "{links}");
    assert_eq!(worker.node.shell("nft list tables; ip route show proto 84"), "");
    assert_eq!(worker.node.shell("sysctl -n net.ipv4.ip_forward"), before);
    let left = worker
        .node
        .shell("ls -d /var/lib/polder /run/polder /etc/cni/net.d/* /opt/cni/bin/polder* 2>/dev/null || :");
    assert_eq!(left, "");

    // The last container runs until it is stopped.
    let done = cleanup.start(&sandbox, &manifest.container("containers"));
    wait::until("the container to be done", || {
        let message = cleanup.log(&done);
        if message.contains("nothing") { Ok(()) } else { Err(message) }
    });
    assert_eq!(runtime.exit_code(&done.id), None, "it stays");
    runtime.remove_container(&done.id);
}

fn ends(kubelet: &Kubelet<'_>, sandbox: &Sandbox, container: &Container, words: &[&str]) {
    let started = kubelet.start(sandbox, container);
    let (code, message) = kubelet.end_of(&started);
    assert_ne!(code, 0, "{message}");
    words.iter().for_each(|word| assert!(message.contains(word), "{word:?} in {message}"));
}

fn shows(
    kubelet: &Kubelet<'_>,
    worker: &Worker,
    sandbox: &Sandbox,
    container: &Container,
    expected: &Symptom,
) {
    let words = match expected {
        Symptom::Ends(words) => return ends(kubelet, sandbox, container, words),
        Symptom::NotReady(words) | Symptom::Says(words) => words,
    };
    let is_ready = matches!(expected, Symptom::Says(_));
    let started: Started = kubelet.start(sandbox, container);
    wait::until(&format!("the agent to report {words:?}"), || {
        let status = worker.try_status().map_err(|error| error + &kubelet.log(&started))?;
        let message = if is_ready { status.to_string() } else { status["reasons"].to_string() };
        let is_so = status["ready"] == is_ready && words.iter().all(|word| message.contains(word));
        if is_so { Ok(()) } else { Err(message) }
    });
    kubelet.runtime.remove_container(&started.id);
}
