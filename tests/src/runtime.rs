//! A real container runtime on a node of the lab: containerd, controlled over CRI as by kubelet.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatusRequest, CreateContainerRequest,
    ExecSyncRequest, ImageSpec, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxStatusRequest, RemoveContainerRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest,
};
use tonic::transport::{Channel, Endpoint};

use crate::agent::{CNI_PLUGINS, Worker, dist};
use crate::cgroup;
use crate::image::{self, IMAGE};
use crate::node::{Node, Process};
use crate::wait;

const SOCKET: &str = "/run/containerd/containerd.sock";

/// containerd on a node. It ends when this is dropped.
#[derive(Debug)]
pub struct Runtime {
    _containerd: Process,
    tokio: tokio::runtime::Runtime,
    client: RuntimeServiceClient<Channel>,
    cgroup: String,
    path: String,
    attempts: AtomicU32,
}

/// Folders of a node with the CNI plugins and their configuration.
#[derive(Debug, Clone, Copy)]
struct CniFolders {
    /// Plugins.
    plugins: &'static str,
    /// Configuration.
    configuration: &'static str,
}

/// The folders of the lab.
const LAB_FOLDERS: CniFolders = CniFolders { plugins: "/run/cni/bin", configuration: "/run/cni/net.d" };
/// The folders in the manifests.
const MANIFESTS_FOLDERS: CniFolders = CniFolders { plugins: "/opt/cni/bin", configuration: "/etc/cni/net.d" };

/// A pod sandbox of the runtime.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// The runtime's ID.
    pub id: String,
    /// The addresses that the runtime reports.
    pub addresses: Vec<String>,
    config: PodSandboxConfig,
}

/// Result of a command in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// Its exit code.
    pub code: i32,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
}

/// The containerd release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerdRelease {
    /// The installed one, which supports CNI 1.0.
    Installed,
    /// One with its programs in this folder, which supports CNI 1.1.
    Newer(PathBuf),
}

impl ContainerdRelease {
    /// The newer release, if `scripts/test` has provided it.
    pub fn newer() -> Option<Self> {
        std::env::var_os("POLDER_NEWER_CONTAINERD").map(|folder| Self::Newer(folder.into()))
    }

    /// `PATH` with the programs of the release first.
    fn path(&self) -> String {
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        match self {
            Self::Installed => path.to_owned(),
            Self::Newer(folder) => format!("{}:{path}", folder.display()),
        }
    }
}

impl Runtime {
    /// Starts containerd on a node with a serving agent. All its folders are the node's own.
    pub fn start(worker: &Worker, release: &ContainerdRelease) -> Self {
        worker.node.shell("mkdir -p /run/cni/bin");
        // Plugins of other software, which the agent's install command would replace by a link to Polder's.
        let foreign = ["tuning", "loopback"].map(|name| Path::new(CNI_PLUGINS).join(name));
        for plugin in foreign.into_iter().chain([dist().join("polder")]) {
            worker.node.shell(&format!("ln -s {} /run/cni/bin/", plugin.display()));
        }
        let runtime = Self::start_without_network(&worker.node, release, LAB_FOLDERS);
        runtime.wait_for_network();
        runtime
    }

    /// Starts containerd with these images on a node without Polder, as the manifests expect it.
    pub fn start_for_manifests(node: &Node, images: &[&Path]) -> Self {
        // Shared mounts as systemd sets them up, and a plugin folder of the node's own.
        node.shell("mount --make-rshared /; mount -t tmpfs tmpfs /opt");
        let runtime = Self::start_without_network(node, &ContainerdRelease::Installed, MANIFESTS_FOLDERS);
        images.iter().for_each(|image| runtime.import(node, image));
        runtime
    }

    /// Starts containerd on a node without Polder.
    fn start_without_network(node: &Node, release: &ContainerdRelease, cni: CniFolders) -> Self {
        Self::start_configured(node, release, cni.plugins, &config(cni))
    }

    /// Starts containerd with kind's configuration (`images/base/files/etc/containerd/config.toml` of kind 0.33): the
    /// CNI folders are the default ones, and containers use kind's base specification. Settings that are not possible
    /// in the lab are replaced as by kind's entrypoint: the snapshotter, and the limits of a user namespace.
    pub fn start_of_kind(node: &Node) -> Self {
        node.shell("mkdir -p /etc/containerd; ctr oci spec >/etc/containerd/cri-base.json");
        Self::start_configured(node, &ContainerdRelease::Installed, "/opt/cni/bin", &config_of_kind())
    }

    fn start_configured(node: &Node, release: &ContainerdRelease, plugins: &str, config: &str) -> Self {
        let path = format!("PATH={}", release.path());
        node.run("mkdir", &["-p", plugins]);
        node.write("/etc/containerd/config.toml", config);
        let containerd = node.spawn(
            node.command("env").args([&path, "containerd", "--config", "/etc/containerd/config.toml"]),
            "containerd.log",
        );
        import(node, &path, &image::make(&node.folder().join("image")));
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let url = format!("unix://{}", node.path_on_host(Path::new(SOCKET)).display());
        let connect = async { Endpoint::from_shared(url)?.timeout(Duration::from_secs(60)).connect().await };
        let channel = tokio.block_on(connect).expect("containerd listens");
        let cgroup = cgroup::of_node(node.folder());
        let (client, attempts) = (RuntimeServiceClient::new(channel), AtomicU32::new(0));
        Self { _containerd: containerd, tokio, client, cgroup, path, attempts }
    }

    /// Imports the image from that archive into the runtime.
    pub fn import(&self, node: &Node, archive: &Path) {
        import(node, &self.path, archive);
    }

    /// An attempt number that no container of this runtime has used.
    pub fn next_attempt(&self) -> u32 {
        self.attempts.fetch_add(1, Ordering::Relaxed)
    }

    /// Waits until the runtime reports that the network is ready, as kubelet does.
    pub fn wait_for_network(&self) {
        wait::until("the runtime's network to be ready", || self.network_problem().map_or(Ok(()), Err));
    }

    /// The reason for which the runtime reports that the network is not ready, if it does.
    pub fn network_problem(&self) -> Option<String> {
        let request = k8s_cri::v1::StatusRequest::default;
        let status = match self.call(async |mut client| client.status(request()).await) {
            Ok(status) => status.status.unwrap_or_default(),
            Err(error) => return Some(error),
        };
        let network = status.conditions.into_iter().find(|condition| condition.r#type == "NetworkReady");
        match network {
            Some(network) if network.status => None,
            Some(network) => Some(network.message),
            None => Some("it says nothing of its network".to_owned()),
        }
    }

    /// Runs a pod sandbox, which the plugin attaches.
    pub fn run_pod(&self, name: &str) -> Sandbox {
        self.try_run_pod(name, &[]).unwrap_or_else(|error| panic!("containerd: {error}"))
    }

    /// Tries to run a pod sandbox with these annotations.
    pub fn try_run_pod(&self, name: &str, annotations: &[(&str, &str)]) -> Result<Sandbox, String> {
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            annotations: annotations.collect(),
            linux: Some(LinuxPodSandboxConfig { cgroup_parent: self.cgroup.clone(), ..Default::default() }),
            ..Default::default()
        };
        self.run_sandbox(config)
    }

    /// Runs a pod sandbox in the host's network. The logs of its containers are in that folder.
    pub fn run_host_pod(&self, name: &str, logs: &str) -> Sandbox {
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "polder-system".to_owned(),
                attempt: self.next_attempt(),
            }),
            log_directory: logs.to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        network: NamespaceMode::Node.into(),
                        pid: NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.run_sandbox(config).unwrap_or_else(|error| panic!("containerd: {error}"))
    }

    fn run_sandbox(&self, config: PodSandboxConfig) -> Result<Sandbox, String> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let id = self.call(async |mut client| client.run_pod_sandbox(request.clone()).await)?.pod_sandbox_id;
        let status = PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
        let status = self.must(async |mut client| client.pod_sandbox_status(status.clone()).await);
        let network = status.status.and_then(|status| status.network).unwrap_or_default();
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        Ok(Sandbox { id, addresses: std::iter::once(network.ip).chain(more).collect(), config })
    }

    /// Runs a container in a pod and returns its ID.
    pub fn run_container(&self, pod: &Sandbox, name: &str, command: &[&str]) -> String {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: std::iter::once("/bin/busybox")
                .chain(command.iter().copied())
                .map(str::to_owned)
                .collect(),
            ..Default::default()
        };
        self.start_container(pod, config)
    }

    /// Runs a container with that configuration in a pod and returns its ID.
    pub fn start_container(&self, pod: &Sandbox, config: ContainerConfig) -> String {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let container_id =
            self.must(async |mut client| client.create_container(request.clone()).await).container_id;
        let start = StartContainerRequest { container_id: container_id.clone() };
        self.must(async |mut client| client.start_container(start.clone()).await);
        container_id
    }

    /// The exit code of a container, if it has ended.
    pub fn exit_code(&self, container: &str) -> Option<i32> {
        let request = ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
        let status = self.must(async |mut client| client.container_status(request.clone()).await);
        let status = status.status.expect("a container has a status");
        (status.state == i32::from(ContainerState::ContainerExited)).then_some(status.exit_code)
    }

    /// Stops and removes a container, as kubelet does.
    pub fn remove_container(&self, container: &str) {
        let stop = StopContainerRequest { container_id: container.to_owned(), timeout: 10 };
        self.must(async |mut client| client.stop_container(stop.clone()).await);
        let remove = RemoveContainerRequest { container_id: container.to_owned() };
        self.must(async |mut client| client.remove_container(remove.clone()).await);
    }

    /// Runs a busybox command in a container to its end.
    pub fn exec(&self, container: &str, command: &[&str]) -> ExecResult {
        self.exec_program(container, &[&["/bin/busybox"], command].concat())
    }

    /// Runs a program in a container to its end.
    pub fn exec_program(&self, container: &str, command: &[&str]) -> ExecResult {
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        let request = ExecSyncRequest { container_id: container.to_owned(), cmd, timeout: 20 };
        let result = self.must(async |mut client| client.exec_sync(request.clone()).await);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        ExecResult { code: result.exit_code, output: text(&result.stdout), errors: text(&result.stderr) }
    }

    /// Runs a pod with a server that returns the client's address. Returns the pod and its container.
    pub fn serve(&self, name: &str) -> (Sandbox, String) {
        let sandbox = self.run_pod(name);
        let server = ["httpd", "-f", "-h", "/www", "-p", "0.0.0.0:8080"];
        let container = self.run_container(&sandbox, "server", &server);
        (sandbox, container)
    }

    /// Sends a request to that server from a container. Returns the client address that the server saw.
    pub fn seen(&self, client: &str, server: &str) -> String {
        let get = format!(r"printf 'GET /cgi-bin/who HTTP/1.0\r\n\r\n' | busybox nc -w 5 {server} 8080");
        wait::until(&format!("{server} to answer"), || {
            let result = self.exec(client, &["sh", "-c", &get]);
            let answers = result.output.starts_with("HTTP/1.1 200");
            if answers {
                Ok(result.output.lines().last().unwrap_or_default().to_owned())
            } else {
                Err(format!("{result:?}"))
            }
        })
    }

    /// Starts to send packets from a container to an address, 50 per second.
    pub fn send(&self, client: &str, to: &str) {
        let ping = format!("busybox ping -i 0.02 {to} >/replies 2>&1 & echo $! >/sender");
        let result = self.exec(client, &["sh", "-c", &ping]);
        assert_eq!(result.code, 0, "{result:?}");
        self.wait_for_replies(client, 1);
    }

    /// Waits until this number of packets was answered.
    pub fn wait_for_replies(&self, client: &str, number: usize) {
        wait::until("packets to be answered", || {
            let replies = self.replies(client);
            if replies.len() >= number { Ok(()) } else { Err(format!("{} were", replies.len())) }
        });
    }

    /// Stops sending. Returns the numbers of the unanswered packets before the last answered one.
    pub fn lost(&self, client: &str) -> Vec<usize> {
        self.exec(client, &["sh", "-c", "kill $(cat /sender)"]);
        let replies = self.replies(client);
        (0..replies.last().copied().unwrap_or_default()).filter(|number| !replies.contains(number)).collect()
    }

    /// The numbers of the answered packets.
    fn replies(&self, client: &str) -> BTreeSet<usize> {
        let output = self.exec(client, &["cat", "/replies"]).output;
        let number = |line: &str| line.split_once("seq=")?.1.split(' ').next()?.parse().ok();
        output.lines().filter_map(number).collect()
    }

    /// Stops a pod, which detaches it from the network.
    pub fn stop_pod(&self, pod: &Sandbox) {
        let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        self.must(async |mut client| client.stop_pod_sandbox(stop.clone()).await);
    }

    /// Stops and removes a pod.
    pub fn remove_pod(&self, pod: &Sandbox) {
        self.stop_pod(pod);
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        self.must(async |mut client| client.remove_pod_sandbox(remove.clone()).await);
    }

    fn must<T>(
        &self,
        call: impl AsyncFn(RuntimeServiceClient<Channel>) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> T {
        self.call(call).unwrap_or_else(|error| panic!("containerd: {error}"))
    }

    fn call<T>(
        &self,
        call: impl AsyncFn(RuntimeServiceClient<Channel>) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, String> {
        let answer = self.tokio.block_on(call(self.client.clone()));
        answer.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
    }
}

impl Sandbox {
    /// The pod's name.
    pub fn name(&self) -> &str {
        self.config.metadata.as_ref().map(|metadata| metadata.name.as_str()).unwrap_or_default()
    }
}

fn import(node: &Node, path: &str, archive: &Path) {
    wait::until("containerd to import the image", || {
        let mut ctr = node.command("env");
        let import = ctr
            .args([path, "ctr", "--address", SOCKET, "--namespace", "k8s.io", "images", "import"])
            .arg(archive);
        let import = import.output().map_err(|error| error.to_string())?;
        let result = String::from_utf8_lossy(&import.stderr).into_owned();
        if import.status.success() { Ok(()) } else { Err(result + &node.log("containerd.log")) }
    });
}

fn config(cni: CniFolders) -> String {
    let CniFolders { plugins, configuration } = cni;
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{configuration}"
"#
    )
}

fn config_of_kind() -> String {
    format!(
        r#"version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[plugins."io.containerd.grpc.v1.cri".containerd]
discard_unpacked_layers = true
snapshotter = "native"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
base_runtime_spec = "/etc/containerd/cri-base.json"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
tolerate_missing_hugepages_controller = true
restrict_oom_score_adj = true
"#
    )
}
