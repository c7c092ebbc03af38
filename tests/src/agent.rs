//! The real agent and the real plugin on a node of the lab.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::caller::{Caller, feed, finish};
use crate::kernel_state;
use crate::node::{self, Node, Process};
use crate::pod::Pod;
use crate::scripted::SCRIPTED_PLUGINS;
use crate::stopped_thread;
use crate::wait;

/// Plugin directory of Debian's package containernetworking-plugins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Path of the node's CNI configuration.
pub const CNI_CONF: &str = "/run/cni/net.d/10-polder.conflist";

const CONFIG: &str = "/etc/polder/agent.toml";
const LOG: &str = "agent.log";

/// A node with the agent's configuration, and the agent if it runs.
#[derive(Debug)]
pub struct Worker {
    // Dropped first: a stopped process must be continued before its machine can end.
    agent: Option<Process>,
    /// Environment variables of the agent.
    pub variables: Vec<(String, String)>,
    /// The machine.
    pub node: Node,
    /// The node's segment.
    pub segment: u8,
}

/// Memory of a process, in MiB.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Resident memory.
    pub resident: f64,
    /// The highest resident memory since the start.
    pub highest: f64,
    /// Resident memory that is no part of a file.
    pub anonymous: f64,
}

/// A running plugin that waits for its configuration.
#[derive(Debug)]
pub struct Pending(std::process::Child);

impl Pending {
    /// Passes the configuration and waits for the plugin's end. Returns whether it succeeded.
    pub fn finish(mut self, input: &str) -> bool {
        self.go_on(input);
        self.0.wait().is_ok_and(|status| status.success())
    }

    /// Passes the configuration.
    pub fn go_on(&mut self, input: &str) {
        let mut pipe = self.0.stdin.take().expect("piped");
        pipe.write_all(input.as_bytes()).expect("the plugin reads");
    }

    /// Kills the plugin's caller. The plugin itself continues.
    pub fn kill_caller(mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it is a child of this process");
    }
}

/// The folder with the tested binaries: those of `scripts/build`, unless `POLDER_DIST` is set.
pub fn dist() -> PathBuf {
    let named = std::env::var_os("POLDER_DIST").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist"));
    folder.canonicalize().unwrap_or_else(|_| panic!("{} is not there: run scripts/build", folder.display()))
}

/// Whether all labs run with the fast path: if `POLDER_FASTPATH` is `auto`.
pub fn all_use_the_fast_path() -> bool {
    std::env::var_os("POLDER_FASTPATH").is_some_and(|value| value == "auto")
}

/// Path of a Polder program or of a reference plugin.
pub(crate) fn program(name: &str) -> PathBuf {
    let own = dist().join(name);
    if own.exists() { own } else { Path::new(CNI_PLUGINS).join(name) }
}

impl Worker {
    /// A node with this configuration. The agent does not run yet.
    pub fn new(node: Node, segment: u8, config: &str) -> Self {
        let worker = Self { node, segment, agent: None, variables: Vec::new() };
        worker.configure(config);
        worker
    }

    /// Name of the node.
    pub fn name(&self) -> &str {
        self.node.name()
    }

    /// Replaces the agent's configuration.
    pub fn configure(&self, config: &str) {
        self.node.write(CONFIG, config);
    }

    /// Adds a line to the agent's configuration, before all tables.
    pub fn configure_also(&self, line: &str) {
        self.configure(&format!("{line}\n{}", self.configuration()));
    }

    /// The agent's configuration.
    pub fn configuration(&self) -> String {
        self.node.read(CONFIG).expect("the configuration was written")
    }

    /// Starts the agent.
    pub fn start(&mut self) {
        assert!(self.agent.is_none(), "the agent of {} runs already", self.name());
        let mut command = self.node.command(dist().join("polder-agent"));
        command.env("RUST_LOG", "polder_agent=debug,info");
        if all_use_the_fast_path() {
            command.env("POLDER__FASTPATH", "auto");
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        self.agent = Some(self.node.spawn(&mut command, LOG));
    }

    /// Starts the agent and waits until it serves.
    pub fn start_and_wait(&mut self) {
        self.start();
        self.wait_until_ready();
    }

    /// Waits until the agent serves: its CNI configuration is visible to a runtime, and its status is ready.
    pub fn wait_until_ready(&self) {
        wait::until(&format!("the agent of {} to be ready", self.name()), || {
            let status = self.try_status()?;
            let reasons = status["reasons"].to_string();
            if status["ready"] == json!(true) { Ok(()) } else { Err(reasons) }
        });
        wait::until_true("the CNI configuration", || self.node.read(CNI_CONF).is_ok());
    }

    /// Kills the agent with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.kill();
        }
    }

    /// Whether the agent was started and has not ended.
    pub fn runs(&mut self) -> bool {
        self.agent.as_mut().is_some_and(|agent| agent.ended().is_none())
    }

    /// Ends the agent with SIGTERM. Returns whether it succeeded.
    pub fn stop(&mut self) -> bool {
        self.agent.take().is_none_or(Process::stop)
    }

    /// Stops or continues the agent, without ending it.
    pub fn freeze(&self, frozen: bool) {
        self.agent.as_ref().expect("the agent runs").freeze(frozen);
    }

    /// Deletes all routes of Polder. Repeated, because a flush fails if the kernel deletes a route meanwhile: the probe
    /// endpoint of an ended agent is deleted shortly after it, with its route.
    pub fn flush_routes(&self) {
        wait::until("all routes of ours to be gone", || {
            let flush = self.node.command("ip").args(["route", "flush", "proto", "84"]).output();
            let flush = flush.map_err(|error| error.to_string())?;
            flush.status.success().then_some(()).ok_or(String::from_utf8_lossy(&flush.stderr).into_owned())
        });
    }

    /// Process id of the agent on the host, if it runs.
    pub fn agent_pid(&self) -> Option<Pid> {
        self.agent.as_ref().and_then(Process::pid)
    }

    /// Memory of the agent. Panics if it does not run.
    pub fn agent_memory(&self) -> Memory {
        let pid = self.agent_pid().expect("the agent runs");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the agent runs");
        let of = |key: &str| {
            let line = status.lines().find(|line| line.starts_with(key)).unwrap_or_default();
            line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or_default()
                / 1024.0
        };
        Memory { resident: of("VmRSS"), highest: of("VmHWM"), anonymous: of("RssAnon") }
    }

    /// Runs a job while the agent's thread of that name is stopped. The other threads continue.
    pub fn with_stopped_thread<T>(&self, thread: &str, job: impl FnOnce() -> T) -> T {
        stopped_thread::with_stopped_thread(self.agent_id(), thread, job)
    }

    /// The process id of the agent, which runs.
    pub fn agent_id(&self) -> Pid {
        self.agent.as_ref().and_then(Process::pid).expect("the agent runs")
    }

    /// Powers the node off and boots it again, without network and agent.
    pub fn reboot(&mut self) {
        self.kill();
        self.node.reboot();
    }

    /// Waits until the agent ends by itself. Returns its exit code and its log.
    pub fn wait_until_ended(&mut self) -> (Option<i32>, String) {
        let agent = self.agent.as_mut().expect("the agent runs");
        let status = wait::until("the agent to end", || agent.ended().ok_or("it still runs".to_owned()));
        self.agent = None;
        (status.code(), self.log())
    }

    /// The agent's log.
    pub fn log(&self) -> String {
        self.node.log(LOG)
    }

    /// Runs `polderctl` and returns its JSON.
    pub fn ctl(&self, arguments: &[&str]) -> Value {
        self.try_ctl(arguments)
            .unwrap_or_else(|error| panic!("polderctl {arguments:?} on {}: {error}", self.name()))
    }

    /// Runs `polderctl` and returns its JSON, even if it reports a problem, or the error.
    pub fn try_ctl(&self, arguments: &[&str]) -> Result<Value, String> {
        self.verdict(arguments).map(|(_, json)| json)
    }

    /// Removes a live node with this number of pods, once their addresses are published. Returns the JSON output.
    pub fn remove_node(&self, name: &str, pods: u64) -> Value {
        let pods = pods.to_string();
        let arguments = ["node", "remove", name, "--disconnect-pods", &pods];
        wait::until(&format!("node {name} to be removed"), || self.try_ctl(&arguments))
    }

    /// Runs `polderctl`. Returns whether it found no problem, and its JSON.
    pub fn ctl_verdict(&self, arguments: &[&str]) -> (bool, Value) {
        self.verdict(arguments)
            .unwrap_or_else(|error| panic!("polderctl {arguments:?} on {}: {error}", self.name()))
    }

    /// Runs `polderctl` with these environment variables, like `try_ctl`.
    pub fn try_ctl_with(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Result<Value, String> {
        self.verdict_with(variables, arguments).map(|(_, json)| json)
    }

    fn verdict(&self, arguments: &[&str]) -> Result<(bool, Value), String> {
        self.verdict_with(&[], arguments)
    }

    fn verdict_with(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Result<(bool, Value), String> {
        let output = self.program_with("polderctl", variables, &[&["-o", "json"], arguments].concat());
        let found_no_problem = match output.status.code() {
            Some(0) => true,
            Some(3) => false,
            _ => return Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        };
        let json = serde_json::from_slice(&output.stdout).map_err(|error| format!("{error}: {output:?}"))?;
        Ok((found_no_problem, json))
    }

    /// Runs a Polder program on the node, like an operator.
    pub fn program(&self, name: &str, arguments: &[&str]) -> Output {
        self.program_with(name, &[], arguments)
    }

    fn program_with(&self, name: &str, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
        let mut command = self.node.command(dist().join(name));
        command.envs(variables.iter().copied());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("nsenter is installed");
        finish(child, &command)
    }

    /// The node's status.
    pub fn status(&self) -> Value {
        self.ctl(&["status"])
    }

    /// The node's status, if the agent answers.
    pub fn try_status(&self) -> Result<Value, String> {
        self.try_ctl(&["status"])
    }

    /// Waits until `find` finds a value in the status.
    pub fn wait_for_status<T>(&self, what: &str, mut find: impl FnMut(&Value) -> Option<T>) -> T {
        wait::until(&format!("{what} on {}", self.name()), || {
            let status = self.try_status()?;
            find(&status).ok_or_else(|| status.to_string())
        })
    }

    /// Whether this kernel can lock bridge ports (Linux 5.18, or a backport). If not, the status reports it, and tests
    /// check the alternative.
    pub fn locks_ports(&self) -> bool {
        let missing = self.status()["missing_features"].to_string();
        let locks = !missing.contains("bridge ports cannot be locked");
        assert!(locks || kernel_state::release() < (5, 18), "this kernel can lock ports: {missing}");
        if !locks {
            println!("this kernel cannot lock bridge ports: tested without");
        }
        locks
    }

    /// Sends a request to the agent's HTTP server. Returns the status code and the body.
    pub fn http(&self, path: &str) -> (u16, String) {
        let place = ("127.0.0.1".to_owned(), 9474);
        self.node.http(&place, path).expect("the agent serves HTTP")
    }

    /// The path from this node to the pods of another, for a family: `direct`, `vxlan` or `unreachable`.
    pub fn path_to(&self, other: &str, family: &str) -> String {
        let nodes = self.ctl(&["node", "list"]);
        let node = nodes.as_array().into_iter().flatten().find(|node| node["name"] == other);
        let paths = node.and_then(|node| node["paths"].as_array()).into_iter().flatten();
        let path = paths.into_iter().find(|path| path["family"] == family);
        path.and_then(|path| path["path"].as_str()).unwrap_or("none").to_owned()
    }

    /// Whether this node has a path to the pods of another. A peer whose record has no gateway yet has no path.
    pub fn has_path_to(&self, other: &str, family: &str) -> bool {
        matches!(self.path_to(other, family).as_str(), "direct" | "vxlan")
    }

    /// The network configuration as a runtime passes it to the plugin, in that version.
    pub fn netconf(version: &str) -> Value {
        json!({ "cniVersion": version, "name": "polder", "type": "polder" })
    }

    /// Runs the plugin with exactly these environment variables, as a runtime does.
    pub fn plugin(&self, variables: &[(&str, &str)], input: &str) -> Output {
        self.any_plugin("polder", variables, input)
    }

    /// Runs one of Polder's plugins or of the reference plugins.
    pub fn any_plugin(&self, name: &str, variables: &[(&str, &str)], input: &str) -> Output {
        let mut command = self.node.command("env");
        command.arg("-i").args(variables.iter().map(|(name, value)| format!("{name}={value}")));
        feed(command.arg(program(name)), input)
    }

    /// Starts the plugin. Returns when it waits for its configuration.
    pub fn pending(&self, variables: &[(&str, &str)]) -> Pending {
        let mut command = self.node.command("env");
        command.arg("-i").args(variables.iter().map(|(name, value)| format!("{name}={value}")));
        command.arg(dist().join("polder")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().expect("nsenter is installed");
        let nsenter = child.id();
        wait::until("the plugin to read its configuration", || {
            let plugin = node::child_of(nsenter)?;
            let path = format!("/proc/{plugin}/syscall");
            let call = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
            // The system call is read(0, ...), whose number depends on the architecture: the first argument is the
            // descriptor.
            let name = std::fs::read_to_string(format!("/proc/{plugin}/comm")).unwrap_or_default();
            let reads = call.split(' ').nth(1) == Some("0x0") && name.trim() == "polder";
            if reads { Ok(()) } else { Err(format!("{name}: {call}")) }
        });
        Pending(child)
    }

    /// Plugin directories of a runtime of this node: Polder's, the reference plugins, and the scripted plugins.
    pub fn cni_path() -> String {
        format!("{}:{CNI_PLUGINS}:{SCRIPTED_PLUGINS}", dist().display())
    }

    /// Runs the plugin for a container's `eth0`. Returns its JSON, the result or the error.
    pub fn cni(&self, verb: &str, container: &str, netns: &str, conf: &Value) -> Result<Value, Value> {
        self.cni_for("eth0", verb, container, netns, conf)
    }

    /// Runs the plugin of the configuration for an interface of a container.
    pub fn cni_for(
        &self,
        interface: &str,
        verb: &str,
        container: &str,
        netns: &str,
        conf: &Value,
    ) -> Result<Value, Value> {
        Caller::of(&self.node).cni(interface, verb, container, netns, conf)
    }

    /// Creates a pod and attaches it.
    pub fn pod(&self, name: &str) -> Pod {
        self.pod_with(name, &Self::netconf("1.1.0"))
    }

    /// Creates a pod and attaches it with this configuration.
    pub fn pod_with(&self, name: &str, conf: &Value) -> Pod {
        self.try_pod(name, conf).unwrap_or_else(|error| panic!("ADD of {name} on {}: {error:#}", self.name()))
    }

    /// Creates a pod and attaches it. Repeats that with another namespace, like a runtime, until the timeout.
    pub fn pod_within(&self, max_wait: Duration, name: &str, conf: &Value) -> Pod {
        wait::within(max_wait, &format!("ADD of {name} on {}", self.name()), || {
            self.try_pod(name, conf).map_err(|error| {
                self.node.run("ip", &["netns", "delete", name]);
                error.to_string()
            })
        })
    }

    /// Creates a pod and tries to attach it.
    pub fn try_pod(&self, name: &str, conf: &Value) -> Result<Pod, Value> {
        let netns = self.namespace(name);
        let result = self.cni("ADD", name, &netns, conf)?;
        Ok(Pod::new(&self.node, name, &netns, conf.clone(), result))
    }

    /// Creates an empty network namespace. Returns its path in the node.
    pub fn namespace(&self, name: &str) -> String {
        self.node.run("ip", &["netns", "add", name]);
        format!("/run/netns/{name}")
    }

    /// Detaches a pod and deletes its namespace.
    pub fn delete(&self, pod: &Pod) {
        let result = self.cni("DEL", pod.name(), pod.netns(), pod.conf());
        assert!(result.is_ok(), "DEL of {} on {}: {result:?}", pod.name(), self.name());
        self.node.run("ip", &["netns", "delete", pod.name()]);
    }

    /// Runs a DEL, which must succeed.
    pub fn del(&self, container: &str, netns: &str, conf: &Value) {
        let result = self.cni("DEL", container, netns, conf);
        assert_eq!(result, Ok(Value::Null), "{container}, {netns:?}, {conf}");
    }

    /// Deletes a pod's namespace without a DEL. Returns when its interface is deleted, too: the kernel deletes
    /// namespaces later, one after the other.
    pub fn end_without_del(&self, pod: &Pod) {
        self.node.run("ip", &["netns", "delete", pod.name()]);
        let interface = pod.host_interface();
        let is_there = || self.node.shell("ls /sys/class/net").lines().any(|name| name == interface);
        wait::until_true(&format!("{interface} to be gone"), || !is_there());
    }

    /// Keeps the node and the agent running after the end of this program.
    pub fn keep(&mut self) {
        std::mem::forget(self.agent.take());
        self.node.keep();
    }
}
