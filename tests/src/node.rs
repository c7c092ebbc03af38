//! A machine of the lab.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{cgroup, wait};

/// Number of boots of all machines, so that each boot has a different id.
static BOOTS: AtomicU32 = AtomicU32::new(0);

/// A machine: namespaces and a first process that keeps them.
#[derive(Debug)]
pub struct Node {
    name: String,
    folder: PathBuf,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    /// `unshare`, whose child is the node's first process.
    outer: Child,
    /// The node ends when this is closed.
    input: Option<ChildStdin>,
    /// Process id of the first process, on the host.
    pid: i32,
}

/// A process in a node, ended when it is dropped.
#[derive(Debug)]
pub struct Process {
    /// `nsenter`, which stays until its child ends.
    outer: Child,
    /// Process id on the host; `None` if it ended before it was found.
    pid: Option<Pid>,
}

impl Node {
    /// Boots a machine of that name. Its files in `/var/lib` and `/etc` are in `folder`.
    pub fn boot(name: &str, folder: &Path) -> Self {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).expect("a folder for the node");
        let mut node = Self { name: name.to_owned(), folder, running: None };
        node.running = Some(node.start());
        node
    }

    /// Name of the node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder of its files, on the host.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Process id of its first process, on the host.
    pub fn pid(&self) -> i32 {
        self.running.as_ref().expect("the node runs").pid
    }

    /// Command with which a user enters the node.
    pub fn how_to_enter(&self) -> String {
        format!("nsenter --target {} --mount --net --uts --pid", self.pid())
    }

    fn start(&self) -> Running {
        let boot = BOOTS.fetch_add(1, Ordering::Relaxed);
        let boot_id = format!("{:08x}-0000-4000-8000-{:012x}", std::process::id(), boot);
        // A node that is kept must not hold this program's standard error open.
        let errors =
            File::options().create(true).append(true).open(self.folder.join("boot.log")).expect("a log file");
        let mut outer = Command::new("unshare")
            .args(["--mount", "--net", "--uts", "--pid", "--fork", "--kill-child=SIGKILL", "--"])
            .arg(helper("lab-node"))
            .args([OsStr::new(&self.name), self.folder.as_os_str(), OsStr::new(&boot_id)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("unshare of util-linux is installed, and this is root");
        let input = outer.stdin.take();
        let mut line = String::new();
        let output = outer.stdout.take().expect("piped");
        BufReader::new(output).read_line(&mut line).expect("the node's first process speaks");
        let pid = line.trim().strip_prefix("ready ").and_then(|pid| pid.parse().ok());
        let pid = pid.unwrap_or_else(|| panic!("node {} did not boot: it said {line:?}", self.name));
        Running { outer, input, pid }
    }

    /// Powers the node off: all processes end at once, memory is lost, files on disk are kept. Then boots it again,
    /// without a network connection.
    pub fn reboot(&mut self) {
        self.halt();
        self.running = Some(self.start());
    }

    /// Powers the node off.
    pub fn halt(&mut self) {
        if let Some(mut running) = self.running.take() {
            drop(running.input.take());
            let _ = running.outer.wait();
        }
    }

    /// Keeps the node running after the end of this program.
    pub fn keep(&mut self) {
        if let Some(input) = self.running.as_mut().and_then(|running| running.input.as_mut()) {
            let _ = input.write_all(b"keep\n");
        }
        if let Some(running) = self.running.take() {
            std::mem::forget(running.outer);
        }
    }

    /// A command that runs in the node.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.enter(&[]);
        command.arg(program);
        command
    }

    fn enter(&self, more: &[String]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--mount", "--uts", "--pid"]);
        if more.is_empty() {
            command.arg("--net");
        }
        command.args(more).arg("--");
        command
    }

    /// A command that runs in a network namespace, given by its path in the node.
    pub fn command_in(&self, netns: &Path, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.enter(&[format!("--net={}", self.path_on_host(netns).display())]);
        command.arg(program);
        command
    }

    /// Runs a command in the node and returns its output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        output(self.command(program).args(arguments))
    }

    /// Runs a shell command line in the node and returns its output.
    pub fn shell(&self, line: &str) -> String {
        self.run("sh", &["-ec", line])
    }

    /// The path on the host of a path in the node.
    pub fn path_on_host(&self, path: &Path) -> PathBuf {
        let relative = path.strip_prefix("/").unwrap_or(path);
        Path::new("/proc").join(self.pid().to_string()).join("root").join(relative)
    }

    /// Reads a file in the node.
    pub fn read(&self, path: &str) -> std::io::Result<String> {
        fs::read_to_string(self.path_on_host(Path::new(path)))
    }

    /// Writes a file in the node.
    pub fn write(&self, path: &str, text: &str) {
        let path = self.path_on_host(Path::new(path));
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).expect("a folder in the node");
        }
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Runs a job on a thread in the node's network namespace.
    pub fn within<T: Send>(&self, job: impl FnOnce() -> T + Send) -> T {
        within(&self.path_on_host(Path::new("/proc/1/ns/net")), job)
    }

    /// Sends a request to an HTTP server from this machine. Returns the status code and the body.
    pub fn http(&self, place: &(String, u16), path: &str) -> Result<(u16, String), String> {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(place)?;
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = self.within(ask).map_err(|error| error.to_string())?;
        let parts = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
            let code = head.split(' ').nth(1)?.parse().ok()?;
            Some((code, body.to_owned()))
        });
        parts.ok_or_else(|| format!("no HTTP answer: {answer}"))
    }

    /// Starts a process in the node. Its output goes to that file in the node's folder.
    pub fn spawn(&self, command: &mut Command, log: &str) -> Process {
        let log = File::options().create(true).append(true).open(self.folder.join(log)).expect("a log file");
        command.stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a second handle")).stderr(log);
        let mut outer = command.spawn().expect("nsenter of util-linux is installed");
        let nsenter = outer.id();
        let pid = wait::until("nsenter to start its command", || match outer.try_wait() {
            // It ended before it was found.
            Ok(Some(_)) => Ok(None),
            _ => child_of(nsenter).map(|pid| Some(Pid::from_raw(pid))),
        });
        Process { outer, pid }
    }

    /// Reads a log that a process of the node has written.
    pub fn log(&self, log: &str) -> String {
        fs::read_to_string(self.folder.join(log)).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.running.is_some() {
            self.halt();
            cgroup::remove(&self.folder);
        }
    }
}

impl Process {
    /// Process id on the host; `None` if the process ended before it was found.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Sends a signal to the process.
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid {
            let _ = kill(pid, signal);
        }
        // `nsenter` stops together with its child, and must be continued.
        if let (Signal::SIGCONT | Signal::SIGKILL, Ok(outer)) = (signal, i32::try_from(self.outer.id())) {
            let _ = kill(Pid::from_raw(outer), Signal::SIGCONT);
        }
    }

    /// Stops the process, or continues it. Returns when all its threads are stopped: the signal alone may return
    /// earlier.
    pub fn freeze(&self, frozen: bool) {
        self.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT });
        let Some(pid) = self.pid.filter(|_| frozen) else { return };
        wait::until(&format!("process {pid} to stand still"), || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).map_err(|error| error.to_string())?;
            for thread in threads.filter_map(Result::ok) {
                let state = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
                let state = state.lines().find(|line| line.starts_with("State:")).unwrap_or_default();
                if !state.contains("stopped") {
                    return Err(format!("{}: {state}", thread.path().display()));
                }
            }
            Ok(())
        });
    }

    /// Kills the process with SIGKILL, and waits for its end.
    pub fn kill(mut self) {
        self.end();
    }

    /// Ends the process with SIGTERM and waits for its end. Returns whether it succeeded.
    pub fn stop(mut self) -> bool {
        self.signal(Signal::SIGTERM);
        self.outer.wait().is_ok_and(|status| status.success())
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.outer.try_wait().expect("a child can be waited for")
    }

    fn end(&mut self) {
        // Repeated, because `nsenter` may be about to stop, and must be continued then.
        wait::until_true("a killed process to be gone", || {
            let ended = self.ended().is_some();
            if !ended {
                self.signal(Signal::SIGKILL);
            }
            ended
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs a job on a thread in the network namespace at that path.
pub fn within<T: Send>(netns: &Path, job: impl FnOnce() -> T + Send) -> T {
    let netns = File::open(netns).unwrap_or_else(|error| panic!("{}: {error}", netns.display()));
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(&netns, CloneFlags::CLONE_NEWNET).expect("root enters any namespace");
            job()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs a command to its end and returns its output. Panics with the command if it fails.
pub fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{error}", output.status);
    text
}

pub(crate) fn child_of(pid: u32) -> Result<i32, String> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    children.split_whitespace().next().and_then(|child| child.parse().ok()).ok_or("no child yet".to_owned())
}

/// Path of a program built together with the running one.
pub fn helper(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("the program that runs has a path");
    let found = this.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not built: cargo build -p polder-tests"))
}
