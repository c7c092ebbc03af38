use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use k8s_openapi::api::core::v1::Event;
use polder_ipam::ids::NodeUid;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::super::api::OwnNode;
use super::super::error::Action;
use super::super::fixture::node;
use super::super::node_object::ResourceVersion;
use super::super::taint::NOT_READY;
use super::*;

/// An API server with one Node, and a node, as the test sets them.
#[derive(Debug, Clone, Default)]
struct Fake(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    node: Option<NodeObject>,
    /// The errors of the next requests; afterwards all succeed.
    errors: VecDeque<ClientError>,
    /// Requests so far, by verb and resource.
    requests: Vec<(Instant, String)>,
    writes: Vec<Value>,
    events: Vec<Event>,
    /// The open watch.
    watch: Option<mpsc::UnboundedSender<NodeEvent>>,
    reasons: Vec<String>,
    problems: Vec<String>,
}

impl State {
    /// Changes the Node to its next version. The watch reports it, and the writer gets it as the answer.
    fn write(&mut self, change: impl FnOnce(&mut NodeObject)) -> Option<NodeObject> {
        let node = self.node.as_mut()?;
        change(node);
        node.version = ResourceVersion((node.version.0.parse::<u32>().unwrap() + 1).to_string());
        if let Some(watch) = &self.watch {
            let _ = watch.send(NodeEvent::Changed(node.clone()));
        }
        Some(node.clone())
    }
}

impl Fake {
    fn with_node(more: Value) -> Self {
        let fake = Self::default();
        fake.state().node = Some(node(more));
        fake
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn request(&self, action: Action) -> Result<(), ClientError> {
        let mut state = self.state();
        state.requests.push((Instant::now(), action.to_string()));
        state.errors.pop_front().map_or(Ok(()), Err)
    }

    /// The Node changes, and the watch reports it.
    fn change(&self, changed: NodeObject) {
        let mut state = self.state();
        state.node = Some(changed.clone());
        if let Some(watch) = &state.watch {
            let _ = watch.send(NodeEvent::Changed(changed));
        }
    }

    fn count(&self, request: &str) -> usize {
        self.state().requests.iter().filter(|(_, made)| made == request).count()
    }

    /// The statuses written so far.
    fn statuses(&self) -> Vec<String> {
        let of = |patch: &Value| Some(patch["status"]["conditions"][0]["status"].as_str()?.to_owned());
        self.state().writes.iter().filter_map(of).collect()
    }

    /// Starts the task. Returns its entries.
    fn start(
        &self,
        state_dir: &std::path::Path,
    ) -> (watch::Receiver<Arc<NodeFacts>>, watch::Receiver<Vec<String>>) {
        let (facts, problems) = (watch::Sender::default(), watch::Sender::default());
        let entries = (facts.subscribe(), problems.subscribe());
        let (api, reports, state_dir) = (self.clone(), self.clone(), state_dir.to_owned());
        tokio::spawn(Task { api, reports, node: "n1".parse().unwrap(), state_dir, facts, problems }.run());
        entries
    }
}

impl NodeReports for Fake {
    fn reasons(&self) -> Vec<String> {
        self.state().reasons.clone()
    }

    async fn problems(&self) -> Vec<String> {
        self.state().problems.clone()
    }
}

impl NodeApi for Fake {
    type Watch = mpsc::UnboundedReceiver<NodeEvent>;

    async fn own(&self) -> Result<OwnNode, ClientError> {
        self.request(Action::ListNodes)?;
        Ok(OwnNode { node: self.state().node.clone(), version: ResourceVersion("7".to_owned()) })
    }

    async fn watch(&self, _: &ResourceVersion, seconds: u32) -> Result<Self::Watch, ClientError> {
        self.request(Action::WatchNodes)?;
        assert!(WATCH_SECONDS.contains(&seconds));
        let (sender, receiver) = mpsc::unbounded_channel();
        self.state().watch = Some(sender);
        Ok(receiver)
    }

    async fn patch_condition(&self, patch: &Value) -> Result<Option<NodeObject>, ClientError> {
        self.request(Action::PatchStatus)?;
        let mut state = self.state();
        state.writes.push(patch.clone());
        let changed = node(patch.clone());
        Ok(state.write(|node| node.conditions = changed.conditions))
    }

    async fn patch_node(&self, patch: &Value) -> Result<Option<NodeObject>, ClientError> {
        self.request(Action::PatchNode)?;
        let mut state = self.state();
        state.writes.push(patch.clone());
        let changed = node(json!({ "spec": patch["spec"] }));
        Ok(state.write(|node| node.taints = changed.taints))
    }

    async fn put_event(&self, event: &Event) -> Result<(), ClientError> {
        self.request(Action::CreateEvent)?;
        self.state().events.push(event.clone());
        Ok(())
    }
}

impl NodeWatch for mpsc::UnboundedReceiver<NodeEvent> {
    async fn next(&mut self) -> Result<Option<NodeEvent>, ClientError> {
        Ok(self.recv().await)
    }
}

fn refused(code: u16, reason: &str) -> ClientError {
    let (reason, message) = (reason.to_owned(), "no".to_owned());
    ClientError::Refused { action: Action::PatchStatus, code, reason, message }
}

fn tainted() -> Value {
    json!({ "spec": { "taints": [{ "key": NOT_READY, "effect": "NoSchedule" }] } })
}

async fn seconds(seconds: u64) {
    sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn a_ready_node_gets_its_condition_and_loses_its_taint_with_one_write_each_and_then_none() {
    let (fake, folder) = (Fake::with_node(tainted()), tempfile::tempdir().unwrap());
    let (_facts, problems) = fake.start(folder.path());
    seconds(3600).await;
    assert_eq!(fake.statuses(), ["False"]);
    assert_eq!((fake.count("patch nodes/status"), fake.count("patch nodes")), (1, 1));
    assert_eq!((fake.count("list nodes"), fake.count("watch nodes")), (1, 1));
    assert!(fake.state().node.as_ref().unwrap().taints.is_empty() && problems.borrow().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_taint_stays_and_the_condition_does_not_get_worse_until_the_node_has_not_been_ready_for_a_while()
{
    let (fake, folder) = (Fake::with_node(tainted()), tempfile::tempdir().unwrap());
    fake.state().reasons = vec!["no bridge".to_owned()];
    let _entries = fake.start(folder.path());
    seconds(25).await;
    assert_eq!(fake.statuses(), Vec::<String>::new());
    seconds(10).await;
    assert_eq!(fake.statuses(), ["True"]);
    assert_eq!(fake.state().writes[0]["status"]["conditions"][0]["message"], "no bridge");
    assert_eq!(fake.count("patch nodes"), 0);
    fake.state().reasons.clear();
    seconds(2).await;
    assert_eq!(fake.statuses(), ["True", "False"]);
    assert_eq!(fake.count("patch nodes"), 1);
    // Not ready for a short time, as at the start of another agent: nothing is written, and the taint does not return.
    fake.state().reasons = vec!["the agent starts".to_owned()];
    seconds(20).await;
    fake.state().reasons.clear();
    seconds(3600).await;
    assert_eq!((fake.statuses().len(), fake.count("patch nodes")), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn the_condition_is_restored_when_another_program_changes_it() {
    let (fake, folder) = (Fake::with_node(json!({})), tempfile::tempdir().unwrap());
    let _entries = fake.start(folder.path());
    seconds(60).await;
    let foreign = json!([{ "type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated" }]);
    fake.change(node(json!({ "status": { "conditions": foreign } })));
    seconds(2).await;
    assert_eq!(fake.statuses(), ["False", "False"]);
}

#[tokio::test(start_paused = true)]
async fn labels_and_addresses_follow_the_node_and_stay_when_it_is_deleted() {
    let (fake, folder) = (Fake::with_node(json!({})), tempfile::tempdir().unwrap());
    let (facts, problems) = fake.start(folder.path());
    seconds(2).await;
    let addresses =
        json!([{ "type": "Hostname", "address": "n1" }, { "type": "InternalIP", "address": "192.0.2.7" }]);
    fake.change(node(json!({
        "metadata": { "labels": { "zone": "a" } }, "status": { "addresses": addresses }
    })));
    seconds(2).await;
    let expected = NodeFacts {
        labels: [("zone".to_owned(), "a".to_owned())].into(),
        addresses: vec!["192.0.2.7".parse().unwrap()],
        uid: Some(NodeUid::new("u1")),
    };
    assert_eq!((&**facts.borrow(), &properties::read(folder.path())), (&expected, &expected));
    fake.state().watch.as_ref().unwrap().send(NodeEvent::Deleted(ResourceVersion("9".to_owned()))).unwrap();
    seconds(2).await;
    assert_eq!(**facts.borrow(), expected);
    assert!(problems.borrow()[0].starts_with("Kubernetes has no Node object named n1:"), "{problems:?}");
    fake.change(node(json!({})));
    seconds(2).await;
    let bare = NodeFacts { uid: expected.uid, ..NodeFacts::default() };
    assert_eq!((&**facts.borrow(), problems.borrow().len()), (&bare, 0));
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_api_server_is_a_problem_and_is_asked_less_and_less() {
    let (fake, folder) = (Fake::with_node(json!({})), tempfile::tempdir().unwrap());
    let unreachable = || ClientError::NoAnswer { action: Action::ListNodes, seconds: 10 };
    fake.state().errors.extend(std::iter::repeat_with(unreachable).take(1000));
    let (facts, problems) = fake.start(folder.path());
    seconds(3600).await;
    assert_eq!(problems.borrow().as_slice(), [unreachable().to_string()]);
    let asked = fake.count("list nodes");
    assert!((40..200).contains(&asked), "{asked} requests in an hour");
    assert_eq!(**facts.borrow(), NodeFacts::default());
    fake.state().errors.clear();
    seconds(120).await;
    assert_eq!((problems.borrow().len(), fake.statuses()), (0, vec!["False".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_is_forbidden_is_a_problem_and_the_others_are_made() {
    let (fake, folder) = (Fake::with_node(tainted()), tempfile::tempdir().unwrap());
    let (_facts, problems) = fake.start(folder.path());
    // The list and the watch succeed at once.
    seconds(0).await;
    tokio::task::yield_now().await;
    fake.state()
        .errors
        .push_back(ClientError::Forbidden { action: Action::PatchStatus, message: "no role".to_owned() });
    sleep(Duration::from_millis(700)).await;
    assert_eq!((fake.count("patch nodes/status"), fake.count("patch nodes")), (1, 1));
    assert!(problems.borrow()[0].contains("forbids the agent to patch nodes/status"), "{problems:?}");
    seconds(10).await;
    assert_eq!((fake.statuses(), problems.borrow().len()), (vec!["False".to_owned()], 0));
}

#[tokio::test(start_paused = true)]
async fn a_taint_whose_node_has_changed_is_removed_from_the_changed_node_without_a_problem() {
    let (fake, folder) = (Fake::with_node(tainted()), tempfile::tempdir().unwrap());
    fake.state().reasons = vec!["no path".to_owned()];
    let (_facts, problems) = fake.start(folder.path());
    seconds(2).await;
    fake.state().reasons.clear();
    fake.state().errors.extend([refused(409, "Conflict"), refused(409, "Conflict")]);
    sleep(Duration::from_millis(700)).await;
    assert!(problems.borrow().is_empty(), "{problems:?}");
    seconds(10).await;
    assert!(fake.state().node.as_ref().unwrap().taints.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_expired_watch_is_no_problem_and_the_node_is_read_again() {
    let (fake, folder) = (Fake::with_node(json!({})), tempfile::tempdir().unwrap());
    let (_facts, mut problems) = fake.start(folder.path());
    seconds(100).await;
    problems.mark_unchanged();
    fake.state().errors.push_back(refused(410, "Expired"));
    fake.state().watch = None;
    seconds(10).await;
    assert!(!problems.has_changed().unwrap(), "{problems:?}");
    assert!(fake.count("list nodes") >= 2 && fake.state().watch.is_some());
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_ends_every_watch_is_asked_less_and_less() {
    let (fake, folder) = (Fake::with_node(json!({})), tempfile::tempdir().unwrap());
    let _entries = fake.start(folder.path());
    for _ in 0..3600 {
        seconds(1).await;
        fake.state().watch = None;
    }
    let asked = fake.count("watch nodes");
    assert!((40..200).contains(&asked), "{asked} watches in an hour");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_at_its_time_continues_without_reading_the_node() {
    let (fake, folder) = (Fake::with_node(json!({})), tempfile::tempdir().unwrap());
    let _entries = fake.start(folder.path());
    for _ in 0..10 {
        seconds(u64::from(WATCH_SECONDS.end)).await;
        fake.state().watch = None;
    }
    seconds(1).await;
    assert_eq!((fake.count("list nodes"), fake.count("watch nodes")), (1, 11));
}

#[tokio::test(start_paused = true)]
async fn a_problem_that_persists_becomes_an_event_on_the_node() {
    let (fake, folder) = (Fake::with_node(json!({})), tempfile::tempdir().unwrap());
    let _entries = fake.start(folder.path());
    seconds(60).await;
    fake.state().problems = vec!["node n2 is unreachable".to_owned()];
    seconds(3000).await;
    let state = fake.state();
    assert_eq!(state.events.len(), 1);
    let event = &state.events[0];
    assert_eq!(event.message.as_deref(), Some("node n2 is unreachable"));
    assert_eq!(event.involved_object.uid.as_deref(), Some("u1"));
}
