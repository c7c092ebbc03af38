//! The task with a datastore in a file, and lists of Node objects that the test sets.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use polder_api::NodeName;
use polder_ipam::departure::AgentState;
use polder_ipam::ids::NodeUid;
use polder_ipam::ids::{BootId, Incarnation, MachineId};
use polder_ipam::key::Range;
use polder_ipam::record::{FenceRecord, LeaseRecord, NodeRecord, PodsGone, encode};
use polder_ipam::store::refusal::StoreRefusal;
use polder_ipam::store::{Contents, Txn, Write};
use polder_ipam::view::Versioned;
use polder_store::{Embedded, Lease, Store};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::fixture;
use crate::kubernetes::error::Action;
use crate::kubernetes::fixture::node;

/// How the datastore answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answers {
    Normally,
    WithoutPermission,
}

/// A datastore whose leases do not expire by themselves.
struct FakeStore {
    inner: Store,
    answers: Mutex<Answers>,
    puts: Mutex<usize>,
}

impl LeaseStore for FakeStore {
    type Lease = Lease;

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        self.inner.grant(ttl).await
    }

    async fn put(&self, lease: &Lease, change: &Change) -> Result<Outcome, StoreError> {
        if *self.answers.lock().unwrap() == Answers::WithoutPermission {
            let refusal = StoreRefusal::new(RefusalCause::Permission, "permission denied".to_owned());
            return Err(StoreError::Refused { store: "etcd".to_owned(), refusal });
        }
        *self.puts.lock().unwrap() += 1;
        self.inner.put(lease, change).await
    }

    async fn renew(&self, lease: &mut Lease, max_wait: Duration) -> Result<(), StoreError> {
        self.inner.renew(lease, max_wait).await
    }

    async fn revoke(&self, _: Lease) {
        self.write(Write::Delete { key: Key::Leader.to_string() }).await;
    }

    async fn pause(&self, time: Duration) {
        sleep(time).await;
    }
}

impl RecordStore for FakeStore {
    async fn commit(&self, change: &Change) -> Result<Outcome, StoreError> {
        self.inner.commit(change).await
    }

    async fn range(&self, range: &Range) -> Result<Contents, StoreError> {
        self.inner.range(range).await
    }
}

impl FakeStore {
    async fn write(&self, write: Write) {
        let txn = Txn { compares: Vec::new(), writes: vec![write] };
        self.inner.transact(&txn).await.unwrap();
    }

    async fn put_record(&self, key: Key, value: Vec<u8>) {
        self.write(Write::Put { key: key.to_string(), value }).await;
    }
}

/// A cluster of nodes `n1` to `n5`, as the agent of `n1` sees it.
struct Cluster {
    store: FakeStore,
    view: watch::Sender<Arc<View>>,
    /// The Node objects; `None`: they cannot be listed.
    listed: Mutex<Option<Vec<NodeObject>>>,
    start: Instant,
    no_leader: watch::Sender<Option<NoLeader>>,
    _folder: tempfile::TempDir,
}

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

fn node_object(name: &str) -> NodeObject {
    node(json!({ "metadata": { "name": name, "uid": format!("uid-{name}") } }))
}

/// The Node object of a machine that is shut down.
fn shut_down(name: &str) -> NodeObject {
    node(json!({
        "metadata": { "name": name, "uid": format!("uid-{name}") },
        "spec": { "taints": [{ "key": "node.kubernetes.io/out-of-service", "effect": "NoExecute" }] },
        "status": { "conditions": [{ "type": "Ready", "status": "Unknown" }] },
    }))
}

impl Cluster {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let inner = Store::Embedded(Embedded::open(&folder.path().join("store")).unwrap());
        let store = FakeStore { inner, answers: Mutex::new(Answers::Normally), puts: Mutex::new(0) };
        let cluster = Self {
            store,
            view: watch::Sender::default(),
            listed: Mutex::new(Some((1..=5).map(|number| node_object(&format!("n{number}"))).collect())),
            start: Instant::now(),
            no_leader: watch::Sender::default(),
            _folder: folder,
        };
        let own = fixture::view().nodes[&name("n1")].record.clone();
        for number in 1..=5 {
            let node = format!("n{number}");
            let record = NodeRecord {
                incarnation: Incarnation::new(format!("i{number}")),
                boot_id: BootId::new(format!("b{number}")),
                kubernetes_uid: Some(NodeUid::new(format!("uid-{node}"))),
                ..NodeRecord::clone(&own)
            };
            cluster.store.put_record(Key::Node(name(&node)), encode(&record)).await;
            cluster.start_agent(&node).await;
        }
        cluster
    }

    async fn start_agent(&self, node: &str) {
        let record = LeaseRecord { boot_id: BootId::new("b"), machine_id: MachineId::default() };
        self.store.put_record(Key::Lease(name(node)), encode(&record)).await;
    }

    async fn stop_agent(&self, node: &str) {
        self.store.write(Write::Delete { key: Key::Lease(name(node)).to_string() }).await;
    }

    fn list(&self, nodes: Vec<NodeObject>) {
        *self.listed.lock().unwrap() = Some(nodes);
    }

    fn delete_node_object(&self, node: &str) {
        self.listed.lock().unwrap().as_mut().unwrap().retain(|listed| listed.name != name(node));
    }

    /// Runs the task until the condition holds, at most for ten minutes. Whether it came to hold.
    async fn run_until(&self, remove_nodes: RemoveNodes, holds: impl Fn(&View) -> bool) -> bool {
        let me = fixture::me();
        let task = Removal { host: self, me: &me, remove_nodes, no_leader: &self.no_leader };
        let mut updates = self.store.inner.follow(Key::followed());
        let followed = async {
            while let Some(update) = updates.recv().await {
                self.view.send_modify(|view| Arc::make_mut(view).apply(update));
                if holds(&self.view.borrow()) {
                    return;
                }
            }
        };
        tokio::select! {
            () = task.run() => unreachable!("the task ends"),
            reached = timeout(Duration::from_secs(600), followed) => reached.is_ok(),
        }
    }

    async fn fences(&self) -> Vec<FenceRecord> {
        let range = Range::prefix("/polder/v1/fences/".to_owned());
        let entries = self.store.range(&range).await.unwrap().entries;
        entries.iter().map(|entry| serde_json::from_slice(&entry.value).unwrap()).collect()
    }
}

impl Knowledge for Cluster {
    fn store_name(&self) -> String {
        "a fake".to_owned()
    }

    fn current_view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    async fn view_changed_from(&self, known: &Arc<View>, max_wait: Duration) {
        let _ = timeout(max_wait, self.view.subscribe().wait_for(|now| !Arc::ptr_eq(now, known))).await;
    }

    async fn view_at(&self, revision: Revision, max_wait: Duration) -> Option<Arc<View>> {
        let mut views = self.view.subscribe();
        let view = timeout(max_wait, views.wait_for(|view| view.revision >= revision)).await.ok()?.ok()?;
        Some(Arc::clone(&view))
    }
}

impl LeaderHost for Cluster {
    type Store = FakeStore;

    fn store(&self) -> &FakeStore {
        &self.store
    }

    fn own_revision(&self) -> Option<Revision> {
        self.view.borrow().nodes.get(&name("n1")).map(|own| own.revision)
    }

    async fn list(&self) -> Result<Vec<NodeObject>, ClientError> {
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        listed.ok_or(ClientError::NoAnswer { action: Action::ListNodes, seconds: 10 })
    }

    fn now(&self) -> Moment {
        Moment::BOOT + self.start.elapsed()
    }
}

fn is_leader(view: &View) -> bool {
    view.leader.as_ref().is_some_and(|leader| leader.record.node == name("n1"))
}

#[tokio::test(start_paused = true)]
async fn the_leader_removes_a_node_without_node_object_and_without_agent() {
    let cluster = Cluster::new().await;
    cluster.stop_agent("n3").await;
    cluster.delete_node_object("n3");
    assert!(cluster.run_until(RemoveNodes::Automatic, |view| !view.nodes.contains_key(&name("n3"))).await);
    let fences = cluster.fences().await;
    assert_eq!(fences.len(), 1);
    assert_eq!((fences[0].node.as_str(), fences[0].pods), ("n3", PodsGone::Unknown));
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_was_shut_down_is_removed_with_its_blocks() {
    let cluster = Cluster::new().await;
    cluster.stop_agent("n3").await;
    cluster.list(
        (1..=5).map(|n| if n == 3 { shut_down("n3") } else { node_object(&format!("n{n}")) }).collect(),
    );
    let deletes_it = |view: &View| {
        if is_leader(view) {
            // The leader lists at once; the object is deleted before its next list.
            let mut listed = cluster.listed.lock().unwrap();
            if cluster.start.elapsed() > Duration::from_secs(30) {
                listed.as_mut().unwrap().retain(|listed| listed.name != name("n3"));
            }
        }
        !view.nodes.contains_key(&name("n3"))
    };
    let tick = async {
        for number in 0..20 {
            sleep(Duration::from_secs(20)).await;
            cluster
                .store
                .put_record(Key::Inspection, format!(r#"{{"id":"{number}","repairs":"none"}}"#).into())
                .await;
        }
    };
    let (removed, ()) = tokio::join!(cluster.run_until(RemoveNodes::Automatic, deletes_it), tick);
    assert!(removed);
    assert_eq!(cluster.fences().await[0].pods, PodsGone::ConfirmedByOperator);
}

#[tokio::test(start_paused = true)]
async fn a_manual_leader_offers_the_removal_to_all_agents_and_writes_only_changes() {
    let cluster = Cluster::new().await;
    cluster.stop_agent("n3").await;
    cluster.delete_node_object("n3");
    let offers = |view: &View| {
        let leader = view.leader.iter();
        let problems: Vec<_> =
            leader.flat_map(|leader| leader.record.problems(|node| view.nodes.contains_key(node))).collect();
        problems.iter().any(|problem| problem.contains("`polderctl node remove n3`"))
    };
    assert!(cluster.run_until(RemoveNodes::Manual, offers).await);
    assert_eq!(*cluster.store.puts.lock().unwrap(), 2, "one to become the leader, one for the offer");
    // The offer stays, and nothing is written, until the node is removed.
    assert!(!cluster.run_until(RemoveNodes::Manual, |view| !view.nodes.contains_key(&name("n3"))).await);
    assert_eq!(*cluster.store.puts.lock().unwrap(), 2);
    assert!(cluster.fences().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn no_node_is_removed_whose_agent_is_alive() {
    let cluster = Cluster::new().await;
    cluster.delete_node_object("n3");
    assert!(!cluster.run_until(RemoveNodes::Automatic, |view| !view.nodes.contains_key(&name("n3"))).await);
    let view = cluster.current_view();
    let missing = &view.leader.as_ref().unwrap().record.missing;
    assert_eq!(missing.iter().map(|missing| missing.agent).collect::<Vec<_>>(), [AgentState::Alive]);
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_cannot_list_leaves_it_to_another_agent() {
    let cluster = Cluster::new().await;
    *cluster.listed.lock().unwrap() = None;
    let was_leader = AtomicBool::new(false);
    let gave_up = |view: &View| {
        was_leader.fetch_or(is_leader(view), Ordering::Relaxed);
        was_leader.load(Ordering::Relaxed) && view.leader.is_none()
    };
    assert!(cluster.run_until(RemoveNodes::Automatic, gave_up).await);
}

#[tokio::test(start_paused = true)]
async fn an_agent_does_not_become_the_leader_while_there_is_one_or_without_a_node_object() {
    let cluster = Cluster::new().await;
    let other = LeaderRecord::new(name("n2"), BootId::new("b2"));
    cluster.store.put_record(Key::Leader, encode(&other)).await;
    assert!(!cluster.run_until(RemoveNodes::Automatic, is_leader).await);
    // The lease of the other one expires.
    cluster.store.write(Write::Delete { key: Key::Leader.to_string() }).await;
    assert!(cluster.run_until(RemoveNodes::Automatic, is_leader).await);

    let cluster = Cluster::new().await;
    let own = fixture::view().nodes[&name("n1")].record.clone();
    cluster.store.put_record(Key::Node(name("n1")), encode(&*own)).await;
    assert!(!cluster.run_until(RemoveNodes::Automatic, is_leader).await);
}

#[tokio::test(start_paused = true)]
async fn without_the_right_to_lead_the_remedy_is_reported_until_there_is_a_leader() {
    let cluster = Cluster::new().await;
    *cluster.store.answers.lock().unwrap() = Answers::WithoutPermission;
    assert!(!cluster.run_until(RemoveNodes::Automatic, is_leader).await);
    let no_leader = cluster.no_leader.borrow().clone();
    let problems = problems(&cluster.current_view(), no_leader.as_ref());
    assert!(problems[0].starts_with("no agent compares the nodes with Kubernetes: "), "{problems:?}");
    let mut led = View::clone(&cluster.current_view());
    let record = Arc::new(LeaderRecord::new(name("n2"), BootId::new("b2")));
    led.leader = Some(Versioned { record, revision: Revision::new(9) });
    assert_eq!(super::problems(&led, no_leader.as_ref()), Vec::<String>::new());
}

#[test]
fn a_taint_is_proof_only_while_the_kubelet_is_silent() {
    let with_ready = |status: &str| {
        let taint = "node.cloudprovider.kubernetes.io/shutdown";
        let object = node(json!({
            "spec": { "taints": [{ "key": taint, "effect": "NoSchedule" }] },
            "status": { "conditions": [{ "type": "Ready", "status": status }] },
        }));
        kubernetes_node(&object).shut_down
    };
    assert_eq!(with_ready("Unknown"), Some(ShutDown::CloudProvider));
    assert_eq!((with_ready("True"), with_ready("False")), (None, None));
    assert_eq!(kubernetes_node(&shut_down("n3")).shut_down, Some(ShutDown::OutOfService));
    assert_eq!(kubernetes_node(&node_object("n3")).shut_down, None);
}
