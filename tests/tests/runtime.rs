//! A real container runtime: the guarantees of Kubernetes for the containers of a pod, and between pods.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use polder_tests::fabric::Families;
use polder_tests::runtime::{ContainerdRelease, Runtime, Sandbox};
use polder_tests::{Lab, Topology, wait};

const SLEEP: [&str; 2] = ["sleep", "86400"];

/// The installed runtime, and the newer one if it is configured.
fn releases() -> Vec<ContainerdRelease> {
    let newer = ContainerdRelease::newer();
    if newer.is_none() {
        println!(
            "NOT TESTED with a runtime that supports CNI 1.1: set POLDER_NEWER_CONTAINERD to the folder of its programs"
        );
    }
    [Some(ContainerdRelease::Installed), newer].into_iter().flatten().collect()
}

/// A pod with two containers.
struct Pod<'a> {
    runtime: &'a Runtime,
    sandbox: Sandbox,
    first: String,
    second: String,
}

impl<'a> Pod<'a> {
    fn run(runtime: &'a Runtime, name: &str) -> Self {
        let sandbox = runtime.run_pod(name);
        let first = runtime.run_container(&sandbox, "first", &SLEEP);
        let second = runtime.run_container(&sandbox, "second", &SLEEP);
        Self { runtime, sandbox, first, second }
    }

    fn address(&self) -> &str {
        &self.sandbox.addresses[0]
    }

    /// Runs a command in a container. Returns its output; the command must succeed.
    fn exec(&self, container: &str, command: &[&str]) -> String {
        let result = self.runtime.exec(container, command);
        assert_eq!(result.code, 0, "{command:?}: {result:?}");
        result.output
    }

    /// Starts a server in the first container, in the background.
    fn serve(&self, listen: &str) {
        self.exec(&self.first, &["httpd", "-h", "/www", "-p", listen]);
    }

    /// Requests a page from a server, from the second container. Returns the last line.
    fn get(&self, server: &str, port: u16, page: &str) -> String {
        let get = format!(r"printf 'GET {page} HTTP/1.0\r\n\r\n' | busybox nc -w 5 {server} {port}");
        let answer = self.exec(&self.second, &["sh", "-c", &get]);
        assert!(answer.starts_with("HTTP/1.1 200"), "{server} answered {answer}");
        answer.lines().last().unwrap_or_default().to_owned()
    }
}

#[test]
fn the_containers_of_a_pod_share_one_address_one_loopback_and_one_port_space() {
    releases().iter().for_each(assert_pod_network_is_shared);
}

fn assert_pod_network_is_shared(release: &ContainerdRelease) {
    let lab = Lab::start(Topology::one_segment(1));
    let runtime = Runtime::start(&lab.workers[0], release);
    let pod = Pod::run(&runtime, "web");

    let expected = format!("inet {}/32", pod.address());
    for container in [&pod.first, &pod.second] {
        let interfaces = pod.exec(container, &["ip", "-o", "address", "show", "dev", "eth0"]);
        assert!(interfaces.contains(&expected), "{expected} in {interfaces}");
    }

    pod.serve("127.0.0.1:8081");
    assert_eq!(pod.get("127.0.0.1", 8081, "/page"), "the page", "over the loopback that both share");

    pod.serve("0.0.0.0:8080");
    let second_bind = runtime.exec(&pod.second, &["httpd", "-f", "-h", "/www", "-p", "0.0.0.0:8080"]);
    assert_ne!(second_bind.code, 0, "two containers of a pod listen on the same port");
    assert!(second_bind.errors.contains("Address already in use"), "{second_bind:?}");

    runtime.remove_pod(&pod.sandbox);
}

#[test]
fn pods_use_the_same_port_and_reach_each_other_without_nat_on_one_node_and_across_nodes() {
    releases().iter().for_each(assert_pods_reach_each_other);
}

fn assert_pods_reach_each_other(release: &ContainerdRelease) {
    let lab = Lab::start(Topology { nodes: vec![1, 2], router: true, ..Topology::default() });
    let runtimes: Vec<_> = lab.workers.iter().map(|worker| Runtime::start(worker, release)).collect();
    assert_eq!(lab.workers[0].path_to("n2", "ipv4"), "vxlan");
    let pods = [
        Pod::run(&runtimes[0], "near-one"),
        Pod::run(&runtimes[0], "near-two"),
        Pod::run(&runtimes[1], "far"),
    ];
    pods.iter().for_each(|pod| pod.serve("0.0.0.0:8080"));
    for client in &pods {
        for server in pods.iter().filter(|server| server.address() != client.address()) {
            let seen = client.get(server.address(), 8080, "/cgi-bin/who");
            assert_eq!(seen, client.address(), "server {} sees another client address", server.address());
        }
    }
}

#[test]
fn the_address_of_a_removed_pod_is_released() {
    releases().iter().for_each(assert_address_released);
}

fn assert_address_released(release: &ContainerdRelease) {
    let lab = Lab::start(Topology::one_segment(1));
    let worker = &lab.workers[0];
    let runtime = Runtime::start(worker, release);
    let used = || worker.status()["blocks"][0]["used"].as_u64().unwrap();
    assert_eq!(used(), 1, "only the gateway address is used");
    let pods = ["a", "b"].map(|name| Pod::run(&runtime, name));
    assert_eq!(used(), 3);
    wait::until_true("etcd to have the address record of the pod", || {
        let key = format!("/polder/v1/addresses/n1/{}", pods[0].address());
        lab.etcd.ctl(&["get", "--print-value-only", &key]).contains(r#""namespace":"default","name":"a""#)
    });
    for pod in &pods {
        // kubelet stops a pod again if it is unsure of the outcome.
        runtime.stop_pod(&pod.sandbox);
        runtime.remove_pod(&pod.sandbox);
    }
    let status = worker.status();
    assert_eq!((used(), &status["blocks"][0]["resting"], &status["pods"]), (1, &2.into(), &0.into()));
    assert!(!worker.node.run("ip", &["link"]).contains("pld"), "an interface is left");
    wait::until_true("the address records of the pods to be deleted from etcd", || {
        lab.etcd.keys("/polder/v1/addresses/").is_empty()
    });
}

#[test]
fn a_pod_gets_the_address_and_the_pool_that_its_annotations_name() {
    releases().iter().for_each(assert_annotations_work);
}

fn assert_annotations_work(release: &ContainerdRelease) {
    let mut lab = Lab::build(Topology::one_segment(1).families(Families::DUAL));
    // A plugin of another project after polder in the chain: the runtime calls both.
    let chain = "[cni]\nchain = [{ type = \"tuning\", sysctl = { \"net.core.somaxconn\" = \"567\" } }]\n";
    lab.workers[0]
        .configure(&lab.workers[0].configuration().replace("[etcd]\n", &format!("{chain}[etcd]\n")));
    lab.start_agents();
    let runtime = Runtime::start(&lab.workers[0], release);
    // In a block that no node owns, so that no other pod has the address by chance.
    let wanted = "10.244.255.77";
    let annotations =
        [("polder.dev/address", wanted), ("polder.dev/pool", "ipv4"), ("example.com/other", "anything")];
    let pod = runtime.try_run_pod("annotated", &annotations).unwrap();
    assert_eq!(pod.addresses, [wanted], "a pod with one pool has one address");
    assert_eq!(runtime.run_pod("without-annotations").addresses.len(), 2);
    let container = runtime.run_container(&pod, "first", &SLEEP);
    let interface = runtime.exec(&container, &["ip", "-o", "address", "show", "dev", "eth0"]).output;
    assert!(interface.contains(&format!("inet {wanted}/32")), "{interface}");
    let tuned = runtime.exec(&container, &["cat", "/proc/sys/net/core/somaxconn"]).output;
    assert_eq!(tuned.trim(), "567", "the chained plugin was not called");

    // The runtime's error contains the plugin's reason.
    let refused = runtime.try_run_pod("same-address", &annotations).unwrap_err();
    assert!(refused.contains(wanted) && refused.contains(&pod.id), "{refused}");
    let refused = runtime.try_run_pod("unknown-pool", &[("polder.dev/pool", "nobody")]).unwrap_err();
    assert!(refused.contains("there is no pool nobody"), "{refused}");
    assert_eq!(lab.workers[0].status()["pods"], 2);
}

#[test]
fn the_runtime_reports_the_network_as_not_ready_without_the_agent() {
    for release in releases().into_iter().filter(|release| *release != ContainerdRelease::Installed) {
        let mut lab = Lab::start(Topology::one_segment(1));
        let runtime = Runtime::start(&lab.workers[0], &release);
        lab.workers[0].kill();
        let message = wait::until("the runtime to report the network as not ready", || {
            runtime.network_problem().ok_or("the runtime reports no network problem".to_owned())
        });
        assert!(message.contains("polder-agent is not reachable"), "{message}");
        lab.workers[0].start_and_wait();
        wait::until_true("the runtime to report the network as ready", || {
            runtime.network_problem().is_none()
        });
    }
}
