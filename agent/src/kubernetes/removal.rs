//! Compares the nodes with the Node objects of Kubernetes, and removes those that have left, if configured. One agent does
//! it for all: the leader. Its record in the datastore is bound to a lease, and shows all agents what it found.
//!
//! What is decided is in `polder_ipam::departure`; this file decides when. Two leaders at a time are harmless: a removal
//! requires that the record of the node is the one of the decision, and that its agent has no lease.

use std::sync::Arc;
use std::time::Duration;

use polder_ipam::change::{Change, Member};
use polder_ipam::departure::{Departures, KubernetesNode, NodeHistory, NodeList, ShutDown};
use polder_ipam::key::Key;
use polder_ipam::publication::living_nodes;
use polder_ipam::record::LeaderRecord;
use polder_ipam::store::refusal::RefusalCause;
use polder_ipam::store::{Outcome, StoreError};
use polder_ipam::tasks::lease::LeaseStore;
use polder_ipam::tasks::operator::{DepartedNotRemoved, Knowledge, remove_departed};
use polder_ipam::tasks::{OwnNode, RecordStore};
use polder_ipam::view::{View, ViewSource};
use polder_ipam::{Moment, Revision};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::error::ClientError;
use super::node_object::{ConditionStatus, NodeObject};
use super::settings::RemoveNodes;

/// The record of a leader that does not renew its lease is deleted after this time.
pub const LEADER_TTL: Duration = Duration::from_secs(30);

/// Shortest time between two lists.
const SHORTEST: Duration = Duration::from_secs(60);

/// Added for each node, in a large cluster: 5,000 Node objects of some 10 KB are listed every 5 minutes, 170 KB/s.
const FOR_EACH: Duration = Duration::from_millis(60);

/// Delay of a candidate for each node of the cluster, at most; agents start at the same time, and the first becomes the
/// leader.
const DELAY_FOR_EACH: Duration = Duration::from_millis(20);

/// Time until the next attempt after the datastore failed.
const RETRY: Duration = Duration::from_secs(30);

/// Time until an agent that could not work as the leader tries it again.
const UNFIT: Duration = Duration::from_secs(600);

/// Number of failed lists in a row after which the leader leaves it to another agent.
const MOST_FAILURES: u32 = 3;

/// What the task needs of its node and of the API server.
pub trait LeaderHost: Knowledge {
    /// The datastore.
    type Store: LeaseStore + RecordStore;

    /// The datastore. A refusal of these writes is not a problem of the node.
    fn store(&self) -> &Self::Store;

    /// The revision of the node's own record; `None` if it is not registered.
    fn own_revision(&self) -> Option<Revision>;

    /// A complete list of the Node objects.
    fn list(&self) -> impl Future<Output = Result<Vec<NodeObject>, ClientError>>;

    /// The current time.
    fn now(&self) -> Moment;
}

/// The problems that the leader has found, or the reason why there is no leader. All agents report the same.
pub fn problems(view: &View, no_leader: Option<&NoLeader>) -> Vec<String> {
    match &view.leader {
        Some(leader) => leader.record.problems(|node| view.nodes.contains_key(node)),
        None => no_leader.iter().map(ToString::to_string).collect(),
    }
}

/// Why this agent cannot be the leader. It matters only while no other agent is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoLeader {
    /// The datastore refuses the leader's record to this node.
    /// Remedy: follow the remedy in parentheses.
    #[error("no agent compares the nodes with Kubernetes: {0}")]
    Refused(StoreError),
}

/// Why an agent ends its time as the leader.
#[derive(Debug, thiserror::Error)]
enum LeaderEnded {
    /// The datastore failed, or the lease has expired.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another agent is the leader, or the record of this node has changed.
    /// Remedy: none, it is retried.
    #[error("the record of the leader has changed")]
    Replaced,
    /// The Node objects cannot be listed: another agent may be able to.
    #[error(transparent)]
    NotListed(ClientError),
}

/// The task of one agent.
#[derive(Debug)]
pub struct Removal<'a, H> {
    /// The node, and its access to datastore and API server.
    pub host: &'a H,
    /// The node.
    pub me: &'a OwnNode,
    /// Who removes nodes.
    pub remove_nodes: RemoveNodes,
    /// Why there is no leader.
    pub no_leader: &'a watch::Sender<Option<NoLeader>>,
}

impl<H: LeaderHost> Removal<'_, H> {
    /// Runs for ever.
    pub async fn run(&self) {
        loop {
            let view = self.host.current_view();
            if self.candidacy(&view).is_none() {
                self.host.view_changed_from(&view, UNFIT).await;
                continue;
            }
            self.pause(self.delay(&view)).await;
            let Some(by) = self.candidacy(&self.host.current_view()) else { continue };
            let pause = match self.become_leader(by).await {
                Ok(()) => Duration::ZERO,
                Err(LeaderEnded::Replaced) => RETRY.min(LEADER_TTL),
                Err(LeaderEnded::NotListed(error)) => {
                    warn!(%error, "cannot list the Nodes: another agent may be able to");
                    UNFIT
                }
                Err(LeaderEnded::Store(error)) if is_denied(&error) => {
                    debug!(%error, "this agent does not compare the nodes with Kubernetes");
                    self.no_leader.send_replace(Some(NoLeader::Refused(error)));
                    UNFIT
                }
                Err(LeaderEnded::Store(error)) => {
                    debug!(%error, "not the leader any more");
                    RETRY
                }
            };
            self.pause(pause).await;
        }
    }

    /// This node as the author of the leader's record, if it may become the leader: it is registered with a Node object,
    /// and no other agent is the leader.
    fn candidacy(&self, view: &View) -> Option<Member> {
        let is_current = view.source == ViewSource::Store && view.lost.is_none();
        let own = view.nodes.get(&self.me.name)?;
        let may = is_current && view.leader.is_none() && own.record.kubernetes_uid.is_some();
        let revision = self.host.own_revision().filter(|_| may)?;
        Some(Member { node: self.me.name.clone(), revision })
    }

    /// Gets a lease, writes the record, and works until it is lost.
    async fn become_leader(&self, by: Member) -> Result<(), LeaderEnded> {
        let store = self.host.store();
        let mut lease = store.grant(LEADER_TTL).await?;
        let record = LeaderRecord::new(self.me.name.clone(), self.me.boot_id.clone());
        let written = self.write(&lease, by, &record, None).await;
        let ended = match written {
            Ok(revision) => {
                self.no_leader.send_replace(None);
                info!("this agent compares the nodes with Kubernetes");
                self.lead(&mut lease, record, revision).await
            }
            Err(error) => error,
        };
        // It may have been written: its record is deleted with the lease.
        store.revoke(lease).await;
        Err(ended)
    }

    async fn write(
        &self,
        lease: &<H::Store as LeaseStore>::Lease,
        by: Member,
        record: &LeaderRecord,
        before: Option<Revision>,
    ) -> Result<Revision, LeaderEnded> {
        let change = Change::WriteLeader { by, record: record.clone(), before };
        match self.host.store().put(lease, &change).await? {
            Outcome::Applied { revision } => Ok(revision),
            Outcome::Refused => Err(LeaderEnded::Replaced),
        }
    }

    /// Evaluates a list at each interval. The lease is renewed meanwhile.
    async fn lead(
        &self,
        lease: &mut <H::Store as LeaseStore>::Lease,
        mut record: LeaderRecord,
        mut revision: Revision,
    ) -> LeaderEnded {
        let mut history = NodeHistory::default();
        let mut failures = 0;
        loop {
            let listed = tokio::select! {
                lost = self.keep(lease) => return LeaderEnded::Store(lost),
                listed = self.host.list() => listed,
            };
            let found = match listed {
                Ok(nodes) => {
                    failures = 0;
                    self.evaluate(&mut history, nodes).await
                }
                Err(error) => {
                    failures += 1;
                    if failures >= MOST_FAILURES {
                        return LeaderEnded::NotListed(error);
                    }
                    debug!(%error, "cannot list the Nodes");
                    None
                }
            };
            if let Some(found) = found {
                let now = self.act(&record, found).await;
                let Some(own) = self.host.own_revision() else { return LeaderEnded::Replaced };
                if now != record {
                    let by = Member { node: self.me.name.clone(), revision: own };
                    revision = match self.write(lease, by, &now, Some(revision)).await {
                        Ok(revision) => revision,
                        Err(ended) => return ended,
                    };
                    record = now;
                }
            }
            let interval = interval(&self.host.current_view());
            tokio::select! {
                lost = self.keep(lease) => return LeaderEnded::Store(lost),
                () = self.pause(interval) => {}
            }
        }
    }

    /// What the list shows. `None` if the records or the leases are not known now.
    async fn evaluate(&self, history: &mut NodeHistory, nodes: Vec<NodeObject>) -> Option<Departures> {
        // Read after the list: an agent that was not alive when its Node object was deleted is not meant.
        let leases = self.host.store().range(&Key::all_leases()).await.ok()?;
        let view = self.host.current_view();
        if view.source != ViewSource::Store || view.lost.is_some() {
            return None;
        }
        let list: NodeList = nodes.iter().map(|node| (node.name.clone(), kubernetes_node(node))).collect();
        Some(history.observe(&self.me.name, &list, &view, &living_nodes(&leases), self.host.now()))
    }

    /// Removes what may be removed, and returns the leader's record afterwards.
    async fn act(&self, record: &LeaderRecord, mut found: Departures) -> LeaderRecord {
        let mut failure = None;
        if self.remove_nodes == RemoveNodes::Automatic {
            let removable: Vec<_> = found.removable().cloned().collect();
            for departed in removable {
                let node = &departed.node;
                match remove_departed(self.host, self.host.store(), &departed).await {
                    Ok(outcome) => {
                        let (departure, uid) = (departed.departure, departed.uid.to_string());
                        let proof = departed.proof.map(|proof| proof.to_string());
                        warn!(%node, uid, ?departure, proof, "removed from the cluster: its Node object was deleted, \
                                                              and its agent is not alive. {outcome}");
                        found.missing.retain(|missing| missing.node != *node);
                    }
                    Err(changed @ DepartedNotRemoved::Changed(_)) => debug!("{changed}"),
                    Err(failed) => {
                        warn!("{failed}");
                        failure = Some(failed.to_string());
                        break;
                    }
                }
            }
        }
        record.with(&found, failure)
    }

    /// Renews the lease until it is lost.
    async fn keep(&self, lease: &mut <H::Store as LeaseStore>::Lease) -> StoreError {
        let every = LEADER_TTL / 3;
        loop {
            if let Err(error) = self.host.store().renew(lease, every).await {
                return error;
            }
            self.pause(every).await;
        }
    }

    async fn pause(&self, time: Duration) {
        self.host.store().pause(time).await;
    }

    /// A delay that is different on each node.
    fn delay(&self, view: &View) -> Duration {
        let place = view.nodes.keys().take_while(|name| **name != self.me.name).count();
        DELAY_FOR_EACH.saturating_mul(u32::try_from(place).unwrap_or(u32::MAX))
    }
}

/// Time between two lists.
fn interval(view: &View) -> Duration {
    SHORTEST.max(FOR_EACH.saturating_mul(u32::try_from(view.nodes.len()).unwrap_or(u32::MAX)))
}

fn is_denied(error: &StoreError) -> bool {
    matches!(error, StoreError::Refused { refusal, .. } if refusal.cause == RefusalCause::Permission)
}

/// The Node object, as the decision needs it. That a machine is shut down is believed only while the condition `Ready`
/// is `Unknown`: the node lifecycle controller of Kubernetes sets it when the kubelet has sent no status for 40 s. A
/// kubelet that runs writes `True` or `False`, so a taint that was left on a machine that runs again proves nothing.
fn kubernetes_node(node: &NodeObject) -> KubernetesNode {
    let is_silent = node.condition("Ready").is_some_and(|ready| ready.status == ConditionStatus::Unknown);
    let stated = [
        ("node.kubernetes.io/out-of-service", ShutDown::OutOfService),
        ("node.cloudprovider.kubernetes.io/shutdown", ShutDown::CloudProvider),
    ];
    let shut_down = stated.into_iter().find(|(taint, _)| is_silent && node.has_taint(taint));
    KubernetesNode { uid: node.uid.clone(), shut_down: shut_down.map(|(_, shut_down)| shut_down) }
}

/// [`LeaderHost`] on a node.
#[derive(Debug)]
pub struct OnNode {
    /// The node.
    pub node: Arc<crate::node::Node>,
    /// The datastore, with its own account of refused writes.
    pub store: polder_store::Store,
    /// The API server.
    pub client: super::client::Client,
}

impl Knowledge for OnNode {
    fn store_name(&self) -> String {
        self.node.store_name()
    }

    fn current_view(&self) -> Arc<View> {
        self.node.current_view()
    }

    async fn view_changed_from(&self, known: &Arc<View>, max_wait: Duration) {
        self.node.view_changed_from(known, max_wait).await;
    }

    async fn view_at(&self, revision: Revision, max_wait: Duration) -> Option<Arc<View>> {
        self.node.view_at(revision, max_wait).await
    }
}

impl LeaderHost for OnNode {
    type Store = polder_store::Store;

    fn store(&self) -> &polder_store::Store {
        &self.store
    }

    fn own_revision(&self) -> Option<Revision> {
        self.node.node_state.basis().revision
    }

    async fn list(&self) -> Result<Vec<NodeObject>, ClientError> {
        self.client.list_nodes().await
    }

    fn now(&self) -> Moment {
        crate::machine::now()
    }
}

/// The task of the agent.
#[derive(Debug)]
pub struct Task {
    /// The node, and its access to datastore and API server.
    pub host: OnNode,
    /// Who removes nodes.
    pub remove_nodes: RemoveNodes,
    /// Why there is no leader.
    pub no_leader: watch::Sender<Option<NoLeader>>,
}

impl Task {
    /// Runs for ever.
    pub async fn run(self) {
        let Self { host, remove_nodes, no_leader } = &self;
        let me = host.node.node_state.membership.me();
        // Boxed because its etcd requests make the future large.
        Box::pin(Removal { host, me, remove_nodes: *remove_nodes, no_leader }.run()).await;
    }
}

#[cfg(test)]
mod tests;
