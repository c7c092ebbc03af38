//! Access of a runtime to a node, to call plugins while other threads stop, disconnect or reboot the node.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde_json::Value;

use crate::agent::{Worker, program};
use crate::node::Node;
use crate::wait::{self, TIMEOUT};

/// Longer than any timeout of Polder's programs.
const UNTIL_IT_HANGS: Duration = TIMEOUT.saturating_mul(4);

/// Holds the namespaces of a node in its current boot. After a reboot all commands fail, even if process ids of the
/// node are used again.
#[derive(Debug, Clone)]
pub struct Caller {
    namespaces: Arc<Vec<(&'static str, File)>>,
}

impl Caller {
    /// Access to that running node.
    pub fn of(node: &Node) -> Self {
        let folder = Path::new("/proc").join(node.pid().to_string()).join("ns");
        let open = |(option, name): (&'static str, &str)| {
            let path = folder.join(name);
            (option, File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        };
        let all = [("--mount", "mnt"), ("--net", "net"), ("--uts", "uts"), ("--pid", "pid")];
        Self { namespaces: Arc::new(all.into_iter().map(open).collect()) }
    }

    /// A command that runs in the node.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(
            self.namespaces.iter().map(|(option, file)| {
                format!("{option}=/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
            }),
        );
        command.arg("--").arg(program);
        command
    }

    /// Runs a command. Returns its output if it succeeds.
    pub fn attempt(&self, program: &str, arguments: &[&str]) -> Option<String> {
        let output = self.command(program).args(arguments).stdin(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The plugin of the configuration, for an interface of a container. It waits for its configuration on standard
    /// input.
    pub fn plugin(&self, interface: &str, verb: &str, container: &str, netns: &str, conf: &Value) -> Command {
        let variables = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", interface),
            ("CNI_PATH", &Worker::cni_path()),
            // The reference plugins run system programs.
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            ("CNI_ARGS", &format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=lab;K8S_POD_NAME={container}")),
        ];
        let mut command = self.command("env");
        command.arg("-i").args(variables.iter().map(|(name, value)| format!("{name}={value}")));
        command.arg(program(conf["type"].as_str().expect("a plugin's name")));
        command
    }

    /// Runs the plugin. Returns its JSON, the result or the error; null for an error without JSON.
    pub fn cni(
        &self,
        interface: &str,
        verb: &str,
        container: &str,
        netns: &str,
        conf: &Value,
    ) -> Result<Value, Value> {
        let mut command = self.plugin(interface, verb, container, netns, conf);
        let output = feed(&mut command, &conf.to_string());
        let text = String::from_utf8_lossy(&output.stdout);
        let json = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{verb} printed {text:?}: {error}"))
        };
        if output.status.success() { Ok(json) } else { Err(json) }
    }
}

/// Runs a command to its end, with this standard input. Fails the test if it hangs.
pub(crate) fn feed(command: &mut Command, input: &str) -> Output {
    let piped = || Stdio::piped();
    let mut child =
        command.stdin(piped()).stdout(piped()).stderr(piped()).spawn().expect("nsenter is installed");
    // A program may end without reading its input.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    finish(child, command)
}

/// Waits for the end of a started command. Fails the test if it hangs; the command then ends with its node.
pub(crate) fn finish(child: Child, command: &Command) -> Output {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let deadline = wait::scaled(UNTIL_IT_HANGS);
    let outcome = receiver.recv_timeout(deadline);
    outcome
        .unwrap_or_else(|_| panic!("{command:?} has not ended within {deadline:?}"))
        .expect("a child can be waited for")
}
