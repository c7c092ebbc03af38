//! A runtime of a node: it attaches, checks and detaches pods, with the errors of careless runtimes.

use std::io::Write;
use std::net::IpAddr;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::agent::Worker;
use crate::churn::pace::{Pace, StopOnPanic};
use crate::churn::site::{Boot, Site};
use crate::churn::tally::Tally;
use crate::churn::truth::{Holder, Truth};
use crate::random::Random;

/// Maximum number of pods of one runtime.
const PODS: usize = 5;

/// Number of attempts at an ADD that returns "try again later", and the time between two attempts.
const ATTEMPTS: usize = 4;
const BETWEEN: Duration = Duration::from_millis(150);

/// Maximum age of an abandoned ADD, in milliseconds: longer than an ADD takes.
const LONGEST_ADD: usize = 60;

/// State that all runtimes share.
#[derive(Debug)]
pub struct Common<'a> {
    /// The owner of each address.
    pub truth: &'a Truth,
    /// Limit of the steps.
    pub pace: &'a Pace,
    /// Counts of events.
    pub tally: &'a Tally,
}

/// A runtime on a node.
#[derive(Debug)]
pub struct Runtime<'a> {
    common: &'a Common<'a>,
    site: &'a Site,
    random: Random,
    name: String,
    made: usize,
    boot: u64,
    pods: Vec<Running>,
}

/// A running pod.
#[derive(Debug, Clone)]
pub struct Running {
    /// Name of the node.
    pub node: String,
    /// Container ID.
    pub container: String,
    /// Result of the ADD.
    pub result: Value,
}

/// Actions of a runtime on one of its pods.
#[derive(Debug, Clone, Copy)]
enum PodAction {
    Del,
    DelTwice,
    DelTwiceAtOnce,
    Forget,
    DelAfterwards,
    Check,
    AddAgain,
    DelAndAdd,
}

/// The actions, each repeated according to its probability.
const POD_ACTIONS: &[PodAction] = &[
    PodAction::Del,
    PodAction::Del,
    PodAction::Del,
    PodAction::Del,
    PodAction::DelTwice,
    PodAction::DelTwiceAtOnce,
    PodAction::Forget,
    PodAction::Forget,
    PodAction::DelAfterwards,
    PodAction::Check,
    PodAction::AddAgain,
    PodAction::DelAndAdd,
];

impl<'a> Runtime<'a> {
    /// A runtime of that name, which is unique on its node.
    pub fn new(common: &'a Common<'a>, site: &'a Site, name: &str, random: Random) -> Self {
        Self { common, site, random, name: name.to_owned(), made: 0, boot: 0, pods: Vec::new() }
    }

    /// Runs until the last step. Returns the pods that run then.
    pub fn work(mut self) -> Vec<Running> {
        let _guard = StopOnPanic(self.common.pace);
        while self.common.pace.step() {
            let boot = self.enter();
            if self.pods.is_empty() || self.pods.len() < PODS && self.random.chance(55) {
                self.made += 1;
                let container = format!("{}-{}", self.name, self.made);
                self.start(&boot, &container);
            } else {
                self.treat(&boot);
            }
        }
        self.enter();
        self.pods
    }

    /// The node in its current boot. After a reboot no pod runs.
    fn enter(&mut self) -> Boot {
        let boot = self.site.enter();
        if boot.number != self.boot {
            self.boot = boot.number;
            self.pods.clear();
        }
        boot
    }

    fn holder(&self, container: &str) -> Holder {
        Holder { node: self.site.node.clone(), container: container.to_owned() }
    }

    fn call(&self, boot: &Boot, verb: &str, container: &str, conf: &Value) -> Result<Value, Value> {
        let outcome = boot.caller.cni("eth0", verb, container, &path(container), conf);
        self.common.tally.count(match &outcome {
            Ok(_) => format!("{verb} succeeded"),
            Err(error) if error.is_null() => format!("{verb} ended with its node"),
            Err(error) => format!("{verb} failed with code {}: {}", error["code"], cause(error)),
        });
        outcome
    }

    fn start(&mut self, boot: &Boot, container: &str) {
        if boot.caller.attempt("ip", &["netns", "add", container]).is_none() {
            return;
        }
        match self.random.below(12) {
            0 => self.abandon(boot, container),
            1 => {
                let (one, other) = std::thread::scope(|scope| {
                    let other = scope.spawn(|| self.call(boot, "ADD", container, &conf()));
                    let one = self.call(boot, "ADD", container, &conf());
                    (one, other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                });
                match (one, other) {
                    (Ok(one), Ok(other)) => {
                        let holder = self.holder(container);
                        self.common
                            .truth
                            .record_error(format!("{holder:?} was added twice: {one} and {other}"));
                    }
                    (Ok(result), Err(_)) | (Err(_), Ok(result)) => self.runs(boot, container, result),
                    (Err(_), Err(_)) => self.give_up(boot, container),
                }
            }
            _ => self.add(boot, container),
        }
    }

    /// Runs an ADD, and repeats it while it returns "try again later".
    fn add(&mut self, boot: &Boot, container: &str) {
        for _ in 0..ATTEMPTS {
            if self.common.truth.is_known_to_be_wrong() {
                break;
            }
            match self.call(boot, "ADD", container, &conf()) {
                Ok(result) => return self.runs(boot, container, result),
                Err(error) if error["code"] == 11 => std::thread::park_timeout(BETWEEN),
                Err(_) => break,
            }
        }
        self.give_up(boot, container);
    }

    /// Starts an ADD and does not wait for its end.
    fn abandon(&mut self, boot: &Boot, container: &str) {
        let mut command = boot.caller.plugin("eth0", "ADD", container, &path(container), &conf());
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut child = spawned.expect("nsenter is installed");
        // Fails if the node is down.
        let _ = child.stdin.take().expect("piped").write_all(conf().to_string().as_bytes());
        std::thread::park_timeout(Duration::from_millis(self.random.below(LONGEST_ADD) as u64));
        // Only `nsenter` is killed: the plugin that it started continues.
        let _ = child.kill();
        let _ = child.wait();
        self.common.tally.count("ADD abandoned");
        self.give_up(boot, container);
    }

    fn runs(&mut self, boot: &Boot, container: &str, result: Value) {
        if self.common.truth.record_add(&self.holder(container), boot.number, &addresses(&result)) {
            let node = self.site.node.clone();
            self.pods.push(Running { node, container: container.to_owned(), result });
        }
    }

    /// Cleans up after a failed ADD.
    fn give_up(&mut self, boot: &Boot, container: &str) {
        if self.random.chance(60) {
            self.del(boot, container);
        }
        remove(boot, container);
    }

    fn del(&self, boot: &Boot, container: &str) {
        match self.call(boot, "DEL", container, &conf()) {
            Err(error) if !error.is_null() => {
                let holder = self.holder(container);
                self.common.truth.record_error(format!("DEL of {holder:?} failed: {error}"));
            }
            _ => {}
        }
    }

    /// Performs a random action on one of the pods.
    fn treat(&mut self, boot: &Boot) {
        let chosen = self.random.below(self.pods.len());
        let action = *self.random.one_of(POD_ACTIONS);
        match action {
            PodAction::Check => return self.check(boot, &self.pods[chosen]),
            PodAction::AddAgain => return self.add_again(boot, &self.pods[chosen]),
            _ => {}
        }
        let Running { container, .. } = self.pods.swap_remove(chosen);
        self.common.truth.record_end(&self.holder(&container));
        match action {
            PodAction::Check | PodAction::AddAgain => {}
            PodAction::Del => self.del(boot, &container),
            PodAction::DelTwice => (0..2).for_each(|_| self.del(boot, &container)),
            PodAction::DelTwiceAtOnce => std::thread::scope(|scope| {
                scope.spawn(|| self.del(boot, &container));
                self.del(boot, &container);
            }),
            PodAction::Forget => self.common.tally.count("DEL lost"),
            PodAction::DelAfterwards => {
                remove(boot, &container);
                return self.del(boot, &container);
            }
            PodAction::DelAndAdd => {
                self.del(boot, &container);
                return self.add(boot, &container);
            }
        }
        remove(boot, &container);
    }

    /// Runs CHECK on a running pod. It may be refused for now, but must not report a difference.
    fn check(&self, boot: &Boot, pod: &Running) {
        let mut conf = conf();
        conf["prevResult"] = pod.result.clone();
        match self.call(boot, "CHECK", &pod.container, &conf) {
            Err(error) if !error.is_null() && error["code"] != 11 => {
                self.common.truth.record_error(format!("CHECK of {pod:?} failed: {error}"));
            }
            _ => {}
        }
    }

    /// Repeats the ADD of a running pod, which must fail.
    fn add_again(&self, boot: &Boot, pod: &Running) {
        if let Ok(result) = self.call(boot, "ADD", &pod.container, &conf()) {
            self.common.truth.record_error(format!("{pod:?} was added again: {result}"));
        }
    }
}

fn conf() -> Value {
    Worker::netconf("1.1.0")
}

fn path(container: &str) -> String {
    format!("/run/netns/{container}")
}

fn remove(boot: &Boot, container: &str) {
    let _ = boot.caller.attempt("ip", &["netns", "delete", container]);
}

/// The text of an error without names and numbers, so that few different texts exist.
fn cause(error: &Value) -> String {
    let words = error["msg"].as_str().unwrap_or_default().split_whitespace();
    let plain = words.filter(|word| !word.contains(|c: char| c.is_ascii_digit()));
    plain.take(10).collect::<Vec<_>>().join(" ")
}

/// The addresses in the result of an ADD.
pub fn addresses(result: &Value) -> Vec<IpAddr> {
    let none = json!([]);
    let ips = result.get("ips").unwrap_or(&none).as_array().into_iter().flatten();
    ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
}
