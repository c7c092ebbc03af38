//! The Kubernetes task: follows the own Node object, and writes its condition, its taint and Events.
//!
//! Nothing in the agent waits for this task. It writes only what differs from the object.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use polder_api::NodeName;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::api::{NodeApi, NodeEvent, NodeWatch};
use super::condition::{self, ConditionInputs};
use super::error::ClientError;
use super::events::EventLog;
use super::node_object::{
    Condition, ConditionStatus, NETWORK_UNAVAILABLE, NodeFacts, NodeObject, ResourceVersion,
};
use super::retry::Retry;
use super::{properties, taint};
use crate::node_state::set_if_changed;
use crate::wake::next_tick;

/// Interval of the checks for problems.
const PROBLEMS: Duration = Duration::from_secs(30);

/// A session that lasted this long is followed by the next one after a short pause.
const LASTS: Duration = Duration::from_secs(60);

/// After this time the API server ends a watch, in seconds. kube accepts at most 294. It differs between agents, so that
/// their watches do not end at the same time for ever after a restart of the API server.
const WATCH_SECONDS: std::ops::Range<u32> = 230..290;

/// What the task needs of the rest of the agent.
pub trait NodeReports {
    /// Why the node is not ready. Empty if it is.
    fn reasons(&self) -> Vec<String>;

    /// The problems of the node, without those of this task.
    fn problems(&self) -> impl Future<Output = Vec<String>> + Send;
}

/// The task.
#[derive(Debug)]
pub struct Task<A, R> {
    /// The API server.
    pub api: A,
    /// The node's readiness and problems.
    pub reports: R,
    /// The name of the node, and of its Node object.
    pub node: NodeName,
    /// Where labels and addresses are kept.
    pub state_dir: PathBuf,
    /// Labels and addresses of the Node object, as last known.
    pub facts: watch::Sender<Arc<NodeFacts>>,
    /// The problems of this task, each with its remedy.
    pub problems: watch::Sender<Vec<String>>,
}

/// What the task does at the API server. Each is retried with its own pauses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Duty {
    Follow,
    Condition,
    Taint,
    Events,
}

/// The state of a duty.
#[derive(Debug, Default)]
struct Attempts {
    retry: Retry,
    /// The last failure.
    problem: Option<String>,
}

/// The task with its state.
#[derive(Debug)]
struct Follower<A, R> {
    task: Task<A, R>,
    /// The Node as last read; `None` if it does not exist, or was not read.
    known: Option<NodeObject>,
    /// The version of the last write, until the watch has reported it: events before it are older than `known`.
    unreported: Option<ResourceVersion>,
    /// Since when the node is seen to be not ready; `None` if it is ready, or was not looked at.
    not_ready_since: Option<Instant>,
    /// The status that was written last.
    written: Option<(ConditionStatus, Instant)>,
    events: EventLog,
    problems_due: Instant,
    attempts: BTreeMap<Duty, Attempts>,
}

impl<A: NodeApi, R: NodeReports> Task<A, R> {
    /// Runs for ever.
    pub async fn run(self) {
        let now = Instant::now();
        let mut follower = Follower {
            task: self,
            known: None,
            unreported: None,
            not_ready_since: None,
            written: None,
            events: EventLog::default(),
            problems_due: now,
            attempts: BTreeMap::new(),
        };
        loop {
            let started = Instant::now();
            match follower.follow().await {
                Ok(()) => {}
                // The version of the watch is too old: a usual event.
                Err(error) if error.is_expired() => {}
                Err(error) => follower.failed(Duty::Follow, &error),
            }
            if started.elapsed() >= LASTS {
                follower.attempts.entry(Duty::Follow).or_default().retry.succeeded();
            }
            let attempts = follower.attempts.entry(Duty::Follow).or_default();
            attempts.retry.failed(Instant::now(), fastrand::f64());
            sleep_until(attempts.retry.due()).await;
        }
    }
}

impl<A: NodeApi, R: NodeReports> Follower<A, R> {
    /// Reads the Node and follows it. Returns when it has to be read again.
    async fn follow(&mut self) -> Result<(), ClientError> {
        let own = self.task.api.own().await?;
        let mut version = own.version;
        self.unreported = None;
        self.learn(own.node);
        loop {
            let seconds = fastrand::u32(WATCH_SECONDS);
            let mut watch = self.task.api.watch(&version, seconds).await?;
            let started = Instant::now();
            loop {
                tokio::select! {
                    event = watch.next() => match event? {
                        None => break,
                        Some(NodeEvent::Changed(node)) => {
                            version = node.version.clone();
                            self.reported(node);
                        }
                        Some(NodeEvent::Deleted(at)) => {
                            version = at;
                            self.unreported = None;
                            self.learn(None);
                        }
                        Some(NodeEvent::Bookmark(at)) => {
                            version = at;
                            // Whatever it was, a watch that goes on has reported it.
                            self.unreported = None;
                        }
                    },
                    () = sleep_until(next_tick()) => {}
                }
                self.tend().await;
            }
            if started.elapsed() < Duration::from_secs(u64::from(seconds) - 1) {
                // The API server stops, or is overloaded: a pause follows.
                return Ok(());
            }
        }
    }

    /// Takes a Node that the watch has reported, unless a write has returned a newer one.
    fn reported(&mut self, node: NodeObject) {
        match &self.unreported {
            Some(version) if *version != node.version => {}
            _ => {
                self.unreported = None;
                self.learn(Some(node));
            }
        }
    }

    /// Publishes what the Node says. Its labels and addresses stay valid when it is deleted: the node still has its pods.
    fn learn(&mut self, node: Option<NodeObject>) {
        if let Some(node) = &node {
            let facts = node.facts();
            if **self.task.facts.borrow() != facts {
                properties::write(&self.task.state_dir, &facts);
                set_if_changed(&self.task.facts, Arc::new(facts));
                info!("read the labels and addresses of the Node object");
            }
        }
        self.known = node;
        let missing = self.known.is_none().then(|| {
            format!(
                "Kubernetes has no Node object named {name}: set node in agent.toml to the name of this machine's Node; \
                 if the Node was deleted because the machine leaves the cluster, run polderctl node remove {name}",
                name = self.task.node
            )
        });
        let problem = &mut self.attempts.entry(Duty::Follow).or_default().problem;
        if *problem != missing {
            match &missing {
                Some(missing) => warn!("{missing}"),
                None => info!("connected to the Kubernetes API server again"),
            }
            *problem = missing;
        }
        self.publish_problems();
    }

    /// Writes what differs from the Node.
    async fn tend(&mut self) {
        let now = Instant::now();
        let reasons = self.task.reports.reasons();
        self.not_ready_since = (!reasons.is_empty()).then(|| self.not_ready_since.unwrap_or(now));
        self.tend_condition(&reasons, now).await;
        if reasons.is_empty() {
            self.tend_taint(now).await;
        }
        if self.problems_due <= now {
            self.problems_due = now + PROBLEMS;
            self.tend_events(now).await;
        }
    }

    async fn tend_condition(&mut self, reasons: &[String], now: Instant) {
        let Some(node) = &self.known else { return };
        let current = node.condition(NETWORK_UNAVAILABLE).cloned();
        let wanted = condition::to_write(ConditionInputs {
            current: current.as_ref(),
            reasons,
            not_ready_for: self.not_ready_since.map_or(Duration::ZERO, |since| now - since),
            written: self.written.map(|(status, at)| (status, now - at)),
        });
        let Some(wanted) = wanted.filter(|_| self.is_due(Duty::Condition, now)) else { return };
        let patch = condition::patch(&wanted, current.as_ref(), Timestamp::now());
        let answer = self.task.api.patch_condition(&patch).await;
        if self.wrote(Duty::Condition, answer) {
            let Condition { status, message, .. } = wanted;
            info!(status = status.as_str(), "wrote the condition NetworkUnavailable of the Node: {message}");
            self.written = Some((status, Instant::now()));
        }
    }

    async fn tend_taint(&mut self, now: Instant) {
        let Some(patch) = self.known.as_ref().and_then(taint::removal) else { return };
        if !self.is_due(Duty::Taint, now) {
            return;
        }
        let answer = self.task.api.patch_node(&patch).await;
        if self.wrote(Duty::Taint, answer) {
            info!("removed the taint {} of the Node", taint::NOT_READY);
        }
    }

    async fn tend_events(&mut self, now: Instant) {
        let problems = self.task.reports.problems().await;
        let Some(uid) = self.known.as_ref().map(|node| node.uid.clone()) else { return };
        while let Some(report) = self.events.next(&problems, now, Timestamp::now()) {
            if !self.is_due(Duty::Events, now) {
                return;
            }
            let event = report.event(&self.task.node, &uid, Timestamp::now());
            match self.task.api.put_event(&event).await {
                Ok(()) => {
                    self.events.sent(&report, now);
                    self.succeeded(Duty::Events);
                }
                Err(error) => return self.failed(Duty::Events, &error),
            }
        }
    }

    /// Notes the answer to a write. Returns whether it was made.
    fn wrote(&mut self, duty: Duty, answer: Result<Option<NodeObject>, ClientError>) -> bool {
        match answer {
            Ok(node) => {
                // Otherwise, the watch may show it only later, and the write would be repeated until then. A write that
                // changes nothing returns a version that the watch has reported.
                if let Some(node) = node {
                    let is_new = self.known.as_ref().is_none_or(|known| known.version != node.version);
                    self.unreported = is_new.then(|| node.version.clone()).or(self.unreported.take());
                    self.known = Some(node);
                }
                self.succeeded(duty);
                true
            }
            Err(error) => {
                self.failed(duty, &error);
                false
            }
        }
    }

    fn is_due(&self, duty: Duty, now: Instant) -> bool {
        self.attempts.get(&duty).is_none_or(|attempts| attempts.retry.is_due(now))
    }

    fn succeeded(&mut self, duty: Duty) {
        self.attempts.remove(&duty);
        self.publish_problems();
    }

    /// Notes a failure. If only the object has changed meanwhile, the watch reports that.
    fn failed(&mut self, duty: Duty, error: &ClientError) {
        let attempts = self.attempts.entry(duty).or_default();
        if duty != Duty::Follow {
            attempts.retry.failed(Instant::now(), fastrand::f64());
        }
        if !error.is_outdated() {
            let problem = error.to_string();
            if attempts.problem.as_ref() != Some(&problem) {
                warn!("{problem}");
            }
            attempts.problem = Some(problem);
        }
        self.publish_problems();
    }

    fn publish_problems(&self) {
        let mut problems: Vec<String> =
            self.attempts.values().filter_map(|attempts| attempts.problem.clone()).collect();
        problems.dedup();
        set_if_changed(&self.task.problems, problems);
    }
}

#[cfg(test)]
mod tests;
