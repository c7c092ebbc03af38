//! A container runtime that only calls plugins: a process in the node's namespaces, controlled over its standard input
//! and output. It measures each call from the start of the plugin to its end.
//!
//! Environment, standard input, output file and network namespace of a call exist before the clock starts. The plugin
//! is started without `nsenter` or a shell.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write, pipe, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::errno::Errno;
use nix::libc::pid_t;
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::sys::wait::{WaitStatus, wait, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::mounts::bind;
use crate::node::Node;

/// Folder of the network namespaces, and of the output of the plugins, in the node.
const NAMESPACES: &str = "/run/netns";
const OUTPUT: &str = "/run/bench";

/// Pause of the thread that waits for plugins while none is running.
const NONE_RUNS: Duration = Duration::from_micros(100);

/// A call of a plugin.
#[derive(Debug, Clone)]
pub struct Call {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// The number of the network namespace.
    pub namespace: usize,
    /// `CNI_ARGS`.
    pub arguments: String,
    /// `runtimeConfig`, or null.
    pub runtime_config: Value,
}

/// The outcome of some calls.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Duration of each call, in milliseconds.
    pub calls: Vec<f64>,
    /// Calls per second: number of calls divided by the time from the first start to the last end, in each burst.
    pub rates: Vec<f64>,
    /// Processor time of the plugins and their children, in milliseconds for all calls.
    pub cpu: f64,
}

/// The control of a runtime. The runtime ends when this is dropped.
#[derive(Debug)]
pub struct Runtime {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Runtime {
    /// Starts a runtime in the node, with this number of network namespaces.
    pub fn start(node: &Node, namespaces: usize) -> anyhow::Result<Self> {
        let mut command = node.command(std::env::current_exe()?);
        command.arg("runtime").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start nsenter")?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut runtime = Self { child, input, output };
        runtime.ask(&json!({ "namespaces": namespaces }))?;
        Ok(runtime)
    }

    fn ask(&mut self, request: &Value) -> anyhow::Result<Value> {
        let input = self.input.as_mut().context("a pipe")?;
        writeln!(input, "{request}")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the runtime has ended");
        let answer: Value = serde_json::from_str(&line)?;
        match answer.get("error") {
            Some(error) => bail!("{}", error.as_str().unwrap_or_default()),
            None => Ok(answer),
        }
    }

    /// Runs the plugin for each call, `at_once` of them at the same time, and waits for their end before the next ones
    /// are started. Fails if one of them fails.
    pub fn run(
        &mut self,
        verb: &str,
        program: &Path,
        conf: &Value,
        calls: &[Call],
        at_once: usize,
    ) -> anyhow::Result<Outcome> {
        let one = |call: &Call| json!([call.container, call.namespace, call.arguments, call.runtime_config]);
        let calls: Vec<_> = calls.iter().map(one).collect();
        let answer = self.ask(&json!({
            "verb": verb, "program": program, "conf": conf, "calls": calls, "at_once": at_once,
        }))?;
        let list = |name: &str| -> Vec<f64> {
            answer[name].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
        };
        let cpu = answer["cpu"].as_f64().context("processor time")?;
        Ok(Outcome { calls: list("calls"), rates: list("rates"), cpu })
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// Serves requests until standard input ends.
pub fn serve() -> anyhow::Result<()> {
    // A plugin may leave a process behind, whose processor time counts, too.
    set_child_subreaper(true)?;
    fs::create_dir_all(OUTPUT)?;
    let mut results = HashMap::new();
    for line in stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let answer = match request["namespaces"].as_u64() {
            Some(count) => create_namespaces(count).map(|()| json!({})),
            None => measure(&request, &mut results),
        };
        let answer = answer.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        println!("{answer}");
        stdout().flush()?;
    }
    Ok(())
}

fn namespace(number: u64) -> PathBuf {
    Path::new(NAMESPACES).join(format!("bench-{number}"))
}

/// Creates the network namespaces, and sets their lo up, like a sandbox that was used before.
fn create_namespaces(count: u64) -> anyhow::Result<()> {
    let create = move || {
        for number in 0..count {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let path = namespace(number);
            File::create(&path)?;
            bind(Path::new("/proc/thread-self/ns/net"), &path, MsFlags::empty())?;
        }
        anyhow::Ok(())
    };
    std::thread::spawn(create).join().map_err(|_| anyhow::anyhow!("a panic"))?
}

/// A prepared call.
struct Prepared {
    container: String,
    command: Command,
    output: File,
}

fn measure(request: &Value, results: &mut HashMap<String, Value>) -> anyhow::Result<Value> {
    let text = |name: &str| request[name].as_str().with_context(|| name.to_owned());
    let (verb, program) = (text("verb")?, text("program")?);
    let at_once = usize::try_from(request["at_once"].as_u64().context("at_once")?)?;
    let calls = request["calls"].as_array().context("calls")?;
    let (mut times, mut rates) = (Vec::new(), Vec::new());
    let before = children_cpu()?;
    for burst in calls.chunks(at_once.max(1)) {
        let prepared: anyhow::Result<Vec<Prepared>> = burst
            .iter()
            .enumerate()
            .map(|(slot, call)| prepare((verb, program), &request["conf"], call, slot, results))
            .collect();
        let mut prepared = prepared?;
        let taken = if let [one] = prepared.as_mut_slice() { alone(one)? } else { together(&mut prepared)? };
        let first = taken.iter().map(|(begin, _, _)| *begin).min().context("a call")?;
        let last = taken.iter().map(|(_, end, _)| *end).max().context("a call")?;
        rates.push(number(taken.len()) / (last - first).as_secs_f64());
        for ((begin, end, succeeded), mut call) in taken.into_iter().zip(prepared) {
            call.output.seek(SeekFrom::Start(0))?;
            let output = std::io::read_to_string(&call.output)?;
            ensure!(succeeded, "{verb} of {} failed: {output}", call.container);
            times.push((end - begin).as_secs_f64() * 1e3);
            if verb == "ADD" {
                results.insert(call.container, serde_json::from_str(&output)?);
            } else {
                results.remove(&call.container);
            }
        }
    }
    reap_all();
    Ok(json!({ "calls": times, "rates": rates, "cpu": (children_cpu()? - before) * 1e3 }))
}

fn number(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Processor time of the children that have ended, in seconds.
fn children_cpu() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let microseconds = (usage.user_time() + usage.system_time()).num_microseconds();
    Ok(Duration::from_micros(u64::try_from(microseconds)?).as_secs_f64())
}

fn prepare(
    (verb, program): (&str, &str),
    conf: &Value,
    call: &Value,
    slot: usize,
    results: &HashMap<String, Value>,
) -> anyhow::Result<Prepared> {
    let container = call[0].as_str().context("a container")?.to_owned();
    let netns = namespace(call[1].as_u64().context("a namespace")?);
    let mut conf = conf.clone();
    if !call[3].is_null() {
        conf["runtimeConfig"] = call[3].clone();
    }
    if let (true, Some(result)) = (verb != "ADD", results.get(&container)) {
        conf["prevResult"] = result.clone();
    }
    // The configuration waits in the pipe before the plugin starts.
    let (reader, mut writer) = pipe()?;
    writer.write_all(conf.to_string().as_bytes())?;
    drop(writer);
    let mut options = File::options();
    options.create(true).truncate(true).read(true).write(true);
    let output = options.open(Path::new(OUTPUT).join(slot.to_string()))?;
    let mut command = Command::new(program);
    let folder = Path::new(program).parent().context("a folder")?;
    command.env_clear().envs([
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", &container),
        ("CNI_NETNS", &netns.to_string_lossy()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", &folder.to_string_lossy()),
        ("CNI_ARGS", call[2].as_str().context("arguments")?),
        // The reference plugins run system programs.
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    ]);
    command.stdin(reader).stdout(output.try_clone()?).stderr(output.try_clone()?);
    Ok(Prepared { container, command, output })
}

/// Start, end and success of a call.
type Taken = (Instant, Instant, bool);

fn alone(call: &mut Prepared) -> anyhow::Result<Vec<Taken>> {
    let begin = Instant::now();
    let child = call.command.spawn()?;
    let status = waitpid(pid(&child)?, None)?;
    Ok(vec![(begin, Instant::now(), succeeded(&status))])
}

fn pid(child: &Child) -> anyhow::Result<Pid> {
    Ok(Pid::from_raw(pid_t::try_from(child.id())?))
}

fn succeeded(status: &WaitStatus) -> bool {
    matches!(status, WaitStatus::Exited(_, 0))
}

/// Starts the calls one after the other, as the starts of a runtime are, while another thread waits for their ends.
fn together(calls: &mut [Prepared]) -> anyhow::Result<Vec<Taken>> {
    let all_started = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reaper = scope.spawn(|| {
            let mut ends = HashMap::new();
            loop {
                // Set before the check, so that no child is missed.
                let was_last = all_started.load(Ordering::SeqCst);
                match wait() {
                    Ok(status) => {
                        let end = Instant::now();
                        status.pid().map(|pid| ends.insert(pid, (end, succeeded(&status))));
                    }
                    Err(Errno::ECHILD) if was_last => return ends,
                    Err(_) => std::thread::park_timeout(NONE_RUNS),
                }
            }
        });
        let begins: anyhow::Result<Vec<_>> = calls
            .iter_mut()
            .map(|call| {
                let begin = Instant::now();
                let child = call.command.spawn()?;
                Ok((begin, pid(&child)?))
            })
            .collect();
        all_started.store(true, Ordering::SeqCst);
        let ends = reaper.join().map_err(|_| anyhow::anyhow!("a panic"))?;
        let taken = begins?.into_iter().map(|(begin, pid)| {
            let (end, succeeded) = ends.get(&pid).context("an end")?;
            Ok((begin, *end, *succeeded))
        });
        taken.collect()
    })
}

/// Waits for all processes that plugins have left behind.
fn reap_all() {
    while wait().is_ok() {}
}
