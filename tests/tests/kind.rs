//! `scripts/kind`, with stand-ins for docker, kind and kubectl. The pods that contact each other are pods of the lab.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use polder_tests::agent::dist;
use polder_tests::fabric::Families;
use polder_tests::manifest::{Manifest, text};
use polder_tests::node::Process;
use polder_tests::{Lab, Pod, Topology};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// A machine with the stand-ins, and the calls that they record.
struct Machine {
    folder: tempfile::TempDir,
}

impl Machine {
    /// A machine with these of the three tools.
    fn with(tools: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let machine = Self { folder };
        for part in ["bin", "state/enter"] {
            fs::create_dir_all(machine.path(part)).unwrap();
        }
        // All other programs are those of this machine.
        for program in fs::read_dir("/usr/bin").unwrap().map(|entry| entry.unwrap().path()) {
            let name = program.file_name().unwrap().to_str().unwrap();
            if !["docker", "kind", "kubectl"].contains(&name) {
                symlink(&program, machine.path("bin").join(name)).unwrap();
            }
        }
        for tool in tools {
            symlink(project("tests/stand-ins/cluster-tools"), machine.path("bin").join(tool)).unwrap();
        }
        machine
            .write("etcd.yaml", "  containers:\n    image: registry.k8s.io/etcd:3.6.99-0\n    name: etcd\n");
        machine.write("polder.tar", "");
        machine
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path("state").join(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path("state").join(name)).unwrap_or_default()
    }

    fn kept(&self, name: &str) -> Manifest {
        Manifest::parse(&self.read(name))
    }

    /// Defines the command with which `kubectl exec` enters that pod or daemonset.
    fn enter(&self, name: &str, command: &str) {
        let file = self.path("state/enter").join(name);
        fs::write(&file, format!("#!/bin/sh\nexec {command} \"$@\"\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Run {
        let mut script = Command::new("env");
        script.args([
            "-i",
            &format!("PATH={}", self.path("bin").display()),
            &format!("STATE={}", self.path("state").display()),
        ]);
        let Output { status, stdout, stderr } =
            script.arg(project("scripts/kind")).args(arguments).output().unwrap();
        let output = String::from_utf8(stdout).unwrap();
        Run { code: status.code().unwrap(), output, errors: String::from_utf8_lossy(&stderr).into_owned() }
    }

    fn image(&self) -> String {
        self.path("state/polder.tar").display().to_string()
    }
}

#[derive(Debug)]
struct Run {
    code: i32,
    output: String,
    errors: String,
}

/// Presents the lab's pods as pods of the cluster, with the server of the manifest in each.
fn show_pods(machine: &Machine, lab: &Lab) -> Vec<Process> {
    let manifest = Manifest::parse(&fs::read_to_string(project("deploy/kind/pods.yaml")).unwrap());
    let server = manifest.container("containers").words("command");
    let mut lines = String::new();
    let mut servers = Vec::new();
    for (worker, node) in lab.workers.iter().zip(["lab-control-plane", "lab-worker"]) {
        worker.node.shell("mkdir /run/bin; busybox --install -s /run/bin");
        for letter in ["a", "b"] {
            let name = format!("{letter}-{node}");
            let pod: Pod = worker.pod(&name);
            let addresses: Vec<_> = pod.addresses().iter().map(ToString::to_string).collect();
            lines += &format!("{name} {node} {letter} {}\n", addresses.join(" "));
            machine.enter(&name, &format!("{} -- env PATH=/run/bin", pod.how_to_enter()));
            let mut serve = pod.command("env");
            servers.push(worker.node.spawn(serve.arg("PATH=/run/bin").args(&server), "server.log"));
        }
    }
    machine.write("pods", &lines);
    let first = lab.workers[0].node.how_to_enter();
    machine.enter("daemonset-polder", &format!("{first} -- env PATH={}", dist().display()));
    servers
}

const ALL: [&str; 3] = ["docker", "kind", "kubectl"];

#[test]
fn scripts_kind_creates_a_cluster_and_shows_the_sources_that_pods_see() {
    let lab = Lab::start(Topology::one_segment(2).families(Families::DUAL));
    let machine = Machine::with(&ALL);
    let _servers = show_pods(&machine, &lab);
    let image = machine.image();
    let arguments = ["--name", "lab", "--nodes", "2", "--families", "both", "--image", &image, "--keep"];
    let run = machine.run(&arguments);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.output.matches("unchanged\n").count(), 24, "{}", run.output);
    assert!(run.output.contains("All 24 pairs reach each other"), "{}", run.output);
    assert!(run.output.contains("n2"), "the nodes that Polder knows are shown: {}", run.output);
    for pod in machine.read("pods").lines() {
        let [_, node, letter, v4, v6] = <[&str; 5]>::try_from(pod.split(' ').collect::<Vec<_>>()).unwrap();
        for address in [v4, v6] {
            let from = format!("{node}-{letter} {address} ");
            let rows: Vec<_> = run.output.lines().filter(|row| row.starts_with(&from)).collect();
            assert_eq!(rows.len(), 3, "{from} in {}", run.output);
            assert!(rows.iter().all(|row| row.split_whitespace().nth(4) == Some(address)), "{rows:?}");
        }
    }

    // The order matters: the image is loaded before anything is applied, and Polder runs before pods start.
    let calls = machine.read("calls");
    let calls: Vec<_> = calls.lines().map(|call| call.replace("kubectl --context kind-lab ", "")).collect();
    let expected = [
        "docker info",
        "kind get clusters",
        "kind create cluster --name lab --config ",
        &format!("kind load image-archive {image} --name lab"),
        "docker exec lab-control-plane sed ",
        "apply --filename ",
        "--namespace polder-system rollout status deployment/polder-etcd",
        "--namespace polder-system rollout status daemonset/polder",
        "wait --for=condition=Ready nodes --all",
        "apply --filename ",
        "--namespace polder-try rollout status daemonset/a",
        "--namespace polder-try rollout status daemonset/b",
        "--namespace polder-system exec daemonset/polder --container agent -- polderctl node list",
        "--namespace polder-try get pods",
        "--namespace polder-try exec a-lab-control-plane -- sh",
        "--namespace polder-try exec b-lab-control-plane -- sh",
        "--namespace polder-try exec a-lab-worker -- sh",
        "--namespace polder-try exec b-lab-worker -- sh",
    ];
    // Shell scripts that are passed to exec have several lines in the file; all lines after the first are indented.
    let heads: Vec<_> = calls.iter().filter(|call| !call.starts_with(' ')).collect();
    assert_eq!(heads.len(), expected.len(), "{heads:#?}");
    for (call, head) in heads.iter().zip(expected) {
        assert!(call.starts_with(head), "{call:?} is not {head:?}");
    }

    let cluster = machine.kept("cluster-1");
    let cluster = cluster.document("Cluster");
    assert_eq!(cluster["networking"]["disableDefaultCNI"], true);
    assert_eq!(cluster["networking"]["ipFamily"], "dual");
    let roles: Vec<_> = cluster["nodes"].as_array().unwrap().iter().map(|node| text(&node["role"])).collect();
    assert_eq!(roles, ["control-plane", "worker"]);

    let applied = machine.kept("applied-1");
    let config = applied.config("agent.toml");
    for line in [
        "endpoints = [\"http://lab-control-plane:12379\"]",
        "pools = [\"10.244.0.0/16\", \"fd00:10:244::/56\"]",
        "identity = \"ledger\"",
    ] {
        assert!(config.contains(line), "{line} in {config}");
    }
    assert_eq!(applied.pod(), Manifest::read("kind").pod(), "the agent runs as the overlay says");
    let etcd = &applied.document("Deployment")["spec"]["template"]["spec"];
    assert_eq!(etcd["hostNetwork"], true);
    let etcd = &etcd["containers"][0];
    assert_eq!(etcd["image"], "registry.k8s.io/etcd:3.6.99-0", "it is on the control plane already");
    let command = etcd["command"].to_string();
    for part in ["http://[::]:12379", "http://lab-control-plane:12379"] {
        assert!(command.contains(part), "{part} in {command}");
    }

    // A rule of another program hides the source addresses of the first node's pods.
    lab.workers[0].node.shell(
        "nft add table ip hide; nft add chain ip hide out '{ type nat hook postrouting priority 0; }'; \
         nft add rule ip hide out oifname != polder0 ip protocol tcp masquerade",
    );
    assert_eq!(machine.run(&["--down", "--name", "lab"]).code, 0);
    let run = machine.run(&arguments[..8]);
    assert_eq!(run.code, 1, "{run:?}");
    assert_eq!(run.output.matches("CHANGED\n").count(), 4, "{}", run.output);
    assert!(run.errors.contains("in 4 of 24 pairs"), "{}", run.errors);
    assert!(run.errors.contains("scripts/kind --down --name lab"), "{}", run.errors);
    assert_eq!(machine.read("clusters"), "lab\n", "it is left to be looked at");
}

#[test]
fn a_missing_tool_is_reported_before_any_change() {
    for missing in ALL {
        let others: Vec<_> = ALL.into_iter().filter(|tool| *tool != missing).collect();
        let machine = Machine::with(&others);
        let run = machine.run(&["--image", &machine.image()]);
        assert_eq!(run.code, 1, "{run:?}");
        assert!(run.errors.contains(&format!("{missing} is not here")), "{run:?}");
        assert!(!machine.read("calls").contains("create"), "{}", machine.read("calls"));
    }
    let machine = Machine::with(&ALL);
    let image = machine.image();
    machine.write("fail", "docker info");
    assert!(machine.run(&["--image", &image]).errors.contains("docker does not answer"));
    machine.write("fail", "");
    for (arguments, complaint) in [
        (["--nodes", "0"], "--nodes is a number"),
        (["--families", "ipv5"], "--families is one of"),
        (["--name", "Ä"], "--name is of small letters"),
        (["--image", "/nowhere"], "there is no file /nowhere"),
    ] {
        let run = machine.run(&arguments);
        assert!(run.code == 1 && run.errors.contains(complaint), "{run:?}");
    }
    assert!(!machine.read("calls").contains("create"), "{}", machine.read("calls"));
}

#[test]
fn clusters_of_other_programs_are_left_alone() {
    let machine = Machine::with(&ALL);
    let image = machine.image();
    machine.write("clusters", "kind\npolder-2\npolder\n");
    let run = machine.run(&["--image", &image]);
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.errors.contains("there is a cluster polder already"), "{run:?}");
    assert!(run.errors.contains("scripts/kind --down --name polder"), "{run:?}");
    assert!(!machine.read("calls").contains("create") && !machine.read("calls").contains("delete"));

    let run = machine.run(&["--down"]);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(machine.read("clusters"), "kind\npolder-2\n");

    // A cluster whose name only starts the same is another cluster.
    machine.write("fail", "kind create cluster *");
    let run = machine.run(&["--image", &image]);
    assert!(run.errors.contains("kind has not created the cluster"), "{run:?}");
}

#[test]
fn a_failed_step_ends_the_script_with_diagnostics_and_keeps_the_cluster() {
    for (step, error) in [
        ("kind load *", "the image has not reached the nodes"),
        ("*apply*", "the manifests are refused"),
        ("*deployment/polder-etcd*", "etcd does not start"),
        ("*rollout status daemonset/polder *", "not all agents are ready"),
        ("*wait*", "not all nodes are ready"),
    ] {
        let machine = Machine::with(&ALL);
        machine.write("fail", step);
        let run = machine.run(&["--image", &machine.image()]);
        assert_eq!(run.code, 1, "{run:?}");
        assert!(run.errors.contains(error) && run.errors.contains("what there is"), "{run:?}");
        assert!(run.errors.contains("scripts/kind --down --name polder"), "{run:?}");
        assert_eq!(machine.read("clusters"), "polder\n");
    }
}
