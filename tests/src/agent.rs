//! The real agent on a node of the lab, and the real plugin beside it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::caller::{Caller, feed, finish};
use crate::kernel_state;
use crate::node::{self, Node, Process};
use crate::pod::Pod;
use crate::scripted::SCRIPTED_PLUGINS;
use crate::standstill;
use crate::wait;

/// Where Debian's package containernetworking-plugins has its plugins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Where the node's CNI configuration is written.
pub const CNI_CONF: &str = "/run/cni/net.d/10-polder.conflist";

const CONFIG: &str = "/etc/polder/agent.toml";
const LOG: &str = "agent.log";

/// A node with the agent's configuration, and the agent, if it runs.
#[derive(Debug)]
pub struct Worker {
    // Dropped first: a process that was stopped has to be woken before its machine can end.
    agent: Option<Process>,
    /// What the agent finds in its environment.
    pub variables: Vec<(String, String)>,
    /// The machine.
    pub node: Node,
    /// The segment that it is on.
    pub segment: u8,
}

/// A plugin that waits for its configuration.
#[derive(Debug)]
pub struct Pending(std::process::Child);

impl Pending {
    /// Gives it the configuration, and waits for its end; true if it ended well.
    pub fn finish(mut self, input: &str) -> bool {
        let mut pipe = self.0.stdin.take().expect("piped");
        pipe.write_all(input.as_bytes()).expect("the plugin reads");
        drop(pipe);
        self.0.wait().is_ok_and(|status| status.success())
    }
}

/// The folder with the binaries that are tested: those of `scripts/build`, unless `POLDER_DIST` names others.
pub fn dist() -> PathBuf {
    let named = std::env::var_os("POLDER_DIST").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist"));
    folder.canonicalize().unwrap_or_else(|_| panic!("{} is not there: run scripts/build", folder.display()))
}

/// One of our programs, or of the reference plugins.
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

    /// Its name.
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
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        self.agent = Some(self.node.spawn(&mut command, LOG));
    }

    /// Starts the agent and waits until it serves.
    pub fn start_and_wait(&mut self) {
        self.start();
        self.wait_until_ready();
    }

    /// Waits until the agent serves: until a runtime would see its configuration, and its status says so, too.
    pub fn wait_until_ready(&self) {
        wait::until(&format!("the agent of {} to be ready", self.name()), || {
            let status = self.try_status()?;
            let reasons = status["reasons"].to_string();
            if status["ready"] == json!(true) { Ok(()) } else { Err(reasons) }
        });
        wait::until_true("the CNI configuration", || self.node.read(CNI_CONF).is_ok());
    }

    /// Ends the agent without any warning.
    pub fn kill(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.kill();
        }
    }

    /// Whether the agent was started and has not ended, by itself or otherwise.
    pub fn runs(&mut self) -> bool {
        self.agent.as_mut().is_some_and(|agent| agent.ended().is_none())
    }

    /// Asks the agent to end; true if it ended well.
    pub fn stop(&mut self) -> bool {
        self.agent.take().is_none_or(Process::stop)
    }

    /// Stops or continues the agent, without ending it.
    pub fn freeze(&self, frozen: bool) {
        self.agent.as_ref().expect("the agent runs").freeze(frozen);
    }

    /// Takes all routes of ours away. The kernel may be taking some of them away itself: the probe endpoint of an agent that has
    /// ended goes a little later, with its route, and a flush that meets that gives up.
    pub fn flush_routes(&self) {
        wait::until("all routes of ours to be gone", || {
            let flush = self.node.command("ip").args(["route", "flush", "proto", "84"]).output();
            let flush = flush.map_err(|error| error.to_string())?;
            flush.status.success().then_some(()).ok_or(String::from_utf8_lossy(&flush.stderr).into_owned())
        });
    }

    /// Does something while the agent's thread of that name stands still, and the others go on.
    pub fn while_thread_stands_still<T>(&self, thread: &str, job: impl FnOnce() -> T) -> T {
        let agent = self.agent.as_ref().and_then(Process::pid).expect("the agent runs");
        standstill::while_thread(agent, thread, job)
    }

    /// Pulls the node's plug, and boots it again, without network and without agent.
    pub fn reboot(&mut self) {
        self.kill();
        self.node.reboot();
    }

    /// Waits until the agent ends by itself, and returns its exit code and what it said.
    pub fn wait_until_ended(&mut self) -> (Option<i32>, String) {
        let agent = self.agent.as_mut().expect("the agent runs");
        let status = wait::until("the agent to end", || agent.ended().ok_or("it still runs".to_owned()));
        self.agent = None;
        (status.code(), self.log())
    }

    /// What the agent has said.
    pub fn log(&self) -> String {
        self.node.log(LOG)
    }

    /// Runs `polderctl` and returns its JSON.
    pub fn ctl(&self, arguments: &[&str]) -> Value {
        self.try_ctl(arguments)
            .unwrap_or_else(|error| panic!("polderctl {arguments:?} on {}: {error}", self.name()))
    }

    /// Runs `polderctl` and returns its JSON, also where that names a problem; or why there is no answer.
    pub fn try_ctl(&self, arguments: &[&str]) -> Result<Value, String> {
        self.verdict(arguments).map(|(_, json)| json)
    }

    /// Removes a node that is alive and has so many pods, once their addresses are published; what is said of it.
    pub fn remove_node(&self, name: &str, pods: u64) -> Value {
        let pods = pods.to_string();
        let arguments = ["node", "remove", name, "--disconnect-pods", &pods];
        wait::until(&format!("node {name} to be removed"), || self.try_ctl(&arguments))
    }

    /// Runs `polderctl` and returns whether it found no problem, with its JSON.
    pub fn ctl_verdict(&self, arguments: &[&str]) -> (bool, Value) {
        self.verdict(arguments)
            .unwrap_or_else(|error| panic!("polderctl {arguments:?} on {}: {error}", self.name()))
    }

    /// Runs `polderctl` with these variables in its environment, as `try_ctl` does.
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

    /// Runs one of our programs on the node, as a person would.
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

    /// Waits until the status is such that `look` finds something in it.
    pub fn wait_for_status<T>(&self, what: &str, mut look: impl FnMut(&Value) -> Option<T>) -> T {
        wait::until(&format!("{what} on {}", self.name()), || {
            let status = self.try_status()?;
            look(&status).ok_or_else(|| status.to_string())
        })
    }

    /// Whether bridge ports of this kernel can be locked (Linux 5.18, or one to which it was backported). Where they cannot be,
    /// the status says so, and a test asserts what is there instead.
    pub fn locks_ports(&self) -> bool {
        let missing = self.status()["missing_features"].to_string();
        let locks = !missing.contains("bridge ports cannot be locked");
        assert!(locks || kernel_state::release() < (5, 18), "this kernel can lock ports: {missing}");
        if !locks {
            println!("this kernel cannot lock bridge ports: tested without");
        }
        locks
    }

    /// Asks the agent's own HTTP server; the status code, and the body.
    pub fn http(&self, path: &str) -> (u16, String) {
        let place = ("127.0.0.1".to_owned(), 9474);
        self.node.http(&place, path).expect("the agent serves HTTP")
    }

    /// How this node reaches the pods of another: `direct`, `vxlan` or `unreachable`, by family.
    pub fn path_to(&self, other: &str, family: &str) -> String {
        let nodes = self.ctl(&["node", "list"]);
        let node = nodes.as_array().into_iter().flatten().find(|node| node["name"] == other);
        let paths = node.and_then(|node| node["paths"].as_array()).into_iter().flatten();
        let path = paths.into_iter().find(|path| path["family"] == family);
        path.and_then(|path| path["path"].as_str()).unwrap_or("none").to_owned()
    }

    /// Whether this node knows how to reach the pods of another: a peer whose record does not name its gateway yet has no
    /// way.
    pub fn has_path_to(&self, other: &str, family: &str) -> bool {
        matches!(self.path_to(other, family).as_str(), "direct" | "vxlan")
    }

    /// The network configuration as a runtime passes it to the plugin, in that version.
    pub fn netconf(version: &str) -> Value {
        json!({ "cniVersion": version, "name": "polder", "type": "polder" })
    }

    /// Runs the plugin as a runtime does: the variables are all the environment that it has.
    pub fn plugin(&self, variables: &[(&str, &str)], input: &str) -> Output {
        self.any_plugin("polder", variables, input)
    }

    /// Runs one of our plugins, or of the reference plugins.
    pub fn any_plugin(&self, name: &str, variables: &[(&str, &str)], input: &str) -> Output {
        let mut command = self.node.command("env");
        command.arg("-i").args(variables.iter().map(|(name, value)| format!("{name}={value}")));
        feed(command.arg(program(name)), input)
    }

    /// Starts the plugin, and returns when it waits for its configuration.
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
            // read(0, ...) on x86-64 and, with another number, elsewhere: the first argument is the descriptor.
            let name = std::fs::read_to_string(format!("/proc/{plugin}/comm")).unwrap_or_default();
            let reads = call.split(' ').nth(1) == Some("0x0") && name.trim() == "polder";
            if reads { Ok(()) } else { Err(format!("{name}: {call}")) }
        });
        Pending(child)
    }

    /// Where a runtime of this node would look for plugins: our own, the reference plugins, and the scripted ones.
    pub fn cni_path() -> String {
        format!("{}:{CNI_PLUGINS}:{SCRIPTED_PLUGINS}", dist().display())
    }

    /// Runs the plugin for a container's `eth0`. Its JSON is the result, or the error.
    pub fn cni(&self, verb: &str, container: &str, netns: &str, conf: &Value) -> Result<Value, Value> {
        self.cni_for("eth0", verb, container, netns, conf)
    }

    /// Runs the plugin that the configuration names for an interface of a container.
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

    /// Makes a pod and attaches it.
    pub fn pod(&self, name: &str) -> Pod {
        self.pod_with(name, &Self::netconf("1.1.0"))
    }

    /// Makes a pod and attaches it with this configuration.
    pub fn pod_with(&self, name: &str, conf: &Value) -> Pod {
        self.try_pod(name, conf).unwrap_or_else(|error| panic!("ADD of {name} on {}: {error:#}", self.name()))
    }

    /// Makes a pod and attaches it, as a runtime does that tries again with another namespace.
    pub fn pod_within(&self, patience: Duration, name: &str, conf: &Value) -> Pod {
        wait::within(patience, &format!("ADD of {name} on {}", self.name()), || {
            self.try_pod(name, conf).map_err(|error| {
                self.node.run("ip", &["netns", "delete", name]);
                error.to_string()
            })
        })
    }

    /// Makes a pod and tries to attach it.
    pub fn try_pod(&self, name: &str, conf: &Value) -> Result<Pod, Value> {
        let netns = self.namespace(name);
        let result = self.cni("ADD", name, &netns, conf)?;
        Ok(Pod::new(&self.node, name, &netns, conf.clone(), result))
    }

    /// Makes an empty network namespace; its path in the node.
    pub fn namespace(&self, name: &str) -> String {
        self.node.run("ip", &["netns", "add", name]);
        format!("/run/netns/{name}")
    }

    /// Detaches a pod and takes its namespace away.
    pub fn delete(&self, pod: &Pod) {
        let result = self.cni("DEL", pod.name(), pod.netns(), pod.conf());
        assert!(result.is_ok(), "DEL of {} on {}: {result:?}", pod.name(), self.name());
        self.node.run("ip", &["netns", "delete", pod.name()]);
    }

    /// A DEL, which has to succeed.
    pub fn del(&self, container: &str, netns: &str, conf: &Value) {
        let result = self.cni("DEL", container, netns, conf);
        assert_eq!(result, Ok(Value::Null), "{container}, {netns:?}, {conf}");
    }

    /// Takes a pod's namespace away without a DEL. Returns when its interface is gone, too: the kernel takes namespaces
    /// down later, one after the other.
    pub fn lose(&self, pod: &Pod) {
        self.node.run("ip", &["netns", "delete", pod.name()]);
        let interface = pod.host_interface();
        let is_there = || self.node.shell("ls /sys/class/net").lines().any(|name| name == interface);
        wait::until_true(&format!("{interface} to be gone"), || !is_there());
    }

    /// Lets the node and the agent outlive this program.
    pub fn keep(&mut self) {
        std::mem::forget(self.agent.take());
        self.node.keep();
    }
}
