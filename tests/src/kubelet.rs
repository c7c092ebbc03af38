//! The part of kubelet that starts a pod of a DaemonSet: prepares the volumes on a node of the lab, and sends the
//! runtime the manifest's containers with kubelet's additions.

use std::net::IpAddr;
use std::path::Path;

use k8s_cri::v1::{
    Capability, ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerSecurityContext, Mount, MountPropagation, NamespaceMode, NamespaceOption, SeLinuxOption,
    SecurityProfile, security_profile,
};
use serde_json::Value;

use crate::manifest::{Container, Manifest, text};
use crate::node::Node;
use crate::runtime::{Runtime, Sandbox};
use crate::wait;

/// Folder on a node for the files of the volumes and the logs of the containers.
const FOLDER: &str = "/var/lib/kubelet";

/// Paths that kubelet hides in an unprivileged container, and paths that it makes read-only (`defaultMaskedPaths` and
/// `defaultReadonlyPaths` in `pkg/securitycontext/util.go`).
const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Runs the pods of one manifest on one node.
#[derive(Debug)]
pub struct Kubelet<'a> {
    /// The node.
    pub node: &'a Node,
    /// The node's runtime.
    pub runtime: &'a Runtime,
    /// The manifest of the pods.
    pub manifest: &'a Manifest,
    /// The node's address.
    pub address: IpAddr,
}

/// A container that was started.
#[derive(Debug)]
pub struct Started {
    /// The runtime's ID.
    pub id: String,
    log: String,
}

impl Kubelet<'_> {
    /// Writes the files of a ConfigMap or Secret to the folder of its volume.
    pub fn write(&self, volume: &str, files: &[(&str, &str)]) {
        files.iter().for_each(|(name, text)| self.node.write(&format!("{FOLDER}/{volume}/{name}"), text));
    }

    /// Creates the pod's sandbox.
    pub fn sandbox(&self, name: &str) -> Sandbox {
        assert_eq!(self.manifest.pod()["hostNetwork"], true);
        self.runtime.run_host_pod(name, &format!("{FOLDER}/log/{name}"))
    }

    /// Starts the pod: the init containers one after the other, which must succeed, and then its container.
    pub fn run(&self, name: &str) -> (Sandbox, Started) {
        let sandbox = self.sandbox(name);
        for init in self.manifest.containers("initContainers") {
            let started = self.start(&sandbox, &init);
            let (code, message) = self.end_of(&started);
            assert_eq!(code, 0, "{}: {message}", init.name());
        }
        let started = self.start(&sandbox, &self.manifest.container("containers"));
        (sandbox, started)
    }

    /// Starts a container.
    pub fn start(&self, sandbox: &Sandbox, container: &Container) -> Started {
        let config = self.config(container);
        let log = format!("{FOLDER}/log/{}/{}", sandbox.name(), config.log_path);
        self.node.write(&log, "");
        Started { id: self.runtime.start_container(sandbox, config), log }
    }

    /// Waits for the end of the container. Returns its exit code and its log.
    pub fn end_of(&self, started: &Started) -> (i32, String) {
        let code = wait::until("the container to end", || {
            self.runtime.exit_code(&started.id).ok_or_else(|| self.log(started))
        });
        (code, self.log(started))
    }

    /// The container's log so far.
    pub fn log(&self, started: &Started) -> String {
        self.node.read(&started.log).unwrap_or_default()
    }

    fn config(&self, container: &Container) -> ContainerConfig {
        let Container(written) = container;
        // References to variables: in arguments to those of the container, in variables to earlier ones.
        let replace = |envs: &[KeyValue], word: String| {
            envs.iter().fold(word, |word, env| word.replace(&format!("$({})", env.key), &env.value))
        };
        let mut envs: Vec<KeyValue> = Vec::new();
        for env in written["env"].as_array().into_iter().flatten().map(|env| self.env(env)) {
            let value = replace(&envs, env.value);
            envs.push(KeyValue { value, ..env });
        }
        let replaced = |word: String| replace(&envs, word);
        let mounts = written["volumeMounts"].as_array().into_iter().flatten();
        let attempt = self.runtime.next_attempt();
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: container.name(), attempt }),
            image: Some(ImageSpec { image: text(&written["image"]), ..Default::default() }),
            command: container.words("command").into_iter().map(replaced).collect(),
            args: container.words("args").into_iter().map(replaced).collect(),
            mounts: mounts.map(|mount| self.mount(mount)).collect(),
            log_path: format!("{}-{attempt}.log", container.name()),
            linux: Some(LinuxContainerConfig {
                security_context: Some(security(&written["securityContext"], container)),
                ..Default::default()
            }),
            envs,
            ..Default::default()
        }
    }

    /// Performs a probe of the container, for example `readinessProbe`.
    pub fn probe(&self, container: &Container, probe: &str) -> Result<(), String> {
        let get = &container.0[probe]["httpGet"];
        let place =
            (text(&get["host"]), u16::try_from(get["port"].as_u64().expect("a port")).expect("a port"));
        let (code, message) = self.node.http(&place, &text(&get["path"]))?;
        if (200..400).contains(&code) { Ok(()) } else { Err(format!("{code}: {message}")) }
    }

    fn env(&self, written: &Value) -> KeyValue {
        let value = match written["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
            Some("spec.nodeName") => self.node.name().to_owned(),
            Some("status.hostIP") => self.address.to_string(),
            Some(other) => panic!("fieldPath {other}"),
            None => text(&written["value"]),
        };
        KeyValue { key: text(&written["name"]), value }
    }

    fn mount(&self, written: &Value) -> Mount {
        let name = text(&written["name"]);
        let volume = self.manifest.volume(&name);
        let host_path = match &volume["hostPath"] {
            Value::Null => format!("{FOLDER}/{name}"),
            path => self.host_path(path),
        };
        let propagation = match written["mountPropagation"].as_str() {
            None | Some("None") => MountPropagation::PropagationPrivate,
            Some("HostToContainer") => MountPropagation::PropagationHostToContainer,
            Some(other) => panic!("mountPropagation {other}"),
        };
        Mount {
            container_path: text(&written["mountPath"]),
            host_path,
            readonly: written["readOnly"] == true,
            propagation: propagation.into(),
            ..Default::default()
        }
    }

    fn host_path(&self, written: &Value) -> String {
        let path = text(&written["path"]);
        let outside = self.node.path_on_host(Path::new(&path));
        match written["type"].as_str() {
            Some("DirectoryOrCreate") => drop(self.node.run("mkdir", &["-p", &path])),
            Some("Directory") => {
                assert!(outside.is_dir(), "hostPath type check failed: {path} is not a directory");
            }
            Some("File") => {
                assert!(outside.is_file(), "hostPath type check failed: {path} is not a file");
            }
            other => panic!("hostPath {path} has type {other:?}"),
        }
        path
    }
}

fn security(written: &Value, container: &Container) -> LinuxContainerSecurityContext {
    assert_eq!(written["privileged"], false);
    assert_eq!(written["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(
        written["appArmorProfile"],
        Value::Null,
        "kubelet admits no pod that names one on a host without AppArmor"
    );
    assert_eq!(written["capabilities"]["drop"][0], "ALL");
    let user = written["runAsUser"].as_i64().map(|value| Int64Value { value });
    LinuxContainerSecurityContext {
        capabilities: Some(Capability {
            add_capabilities: container.capabilities(),
            drop_capabilities: vec!["ALL".to_owned()],
            ..Default::default()
        }),
        namespace_options: Some(NamespaceOption {
            network: NamespaceMode::Node.into(),
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        }),
        selinux_options: written["seLinuxOptions"]["type"]
            .as_str()
            .map(|kind| SeLinuxOption { r#type: kind.to_owned(), ..Default::default() }),
        run_as_user: user,
        run_as_group: written["runAsGroup"].as_i64().map(|value| Int64Value { value }),
        readonly_rootfs: written["readOnlyRootFilesystem"] == true,
        no_new_privs: written["allowPrivilegeEscalation"] == false,
        masked_paths: MASKED.map(str::to_owned).to_vec(),
        readonly_paths: READ_ONLY.map(str::to_owned).to_vec(),
        seccomp: Some(SecurityProfile {
            profile_type: security_profile::ProfileType::RuntimeDefault.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}
