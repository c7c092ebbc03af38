//! Creates the tasks that talk to Kubernetes, and their entries.

use std::sync::Arc;

use tokio::sync::watch;

use crate::config::Config;
use crate::kubernetes;
use crate::kubernetes::client::Client;
use crate::kubernetes::node_object::NodeFacts;
use crate::kubernetes::properties;
use crate::kubernetes::removal::{self, NoLeader};
use crate::node::Node;
use crate::reporter::Reporter;

/// The entries of the Kubernetes task.
pub(super) struct Entries {
    pub(super) facts: watch::Sender<Arc<NodeFacts>>,
    pub(super) problems: watch::Sender<Vec<String>>,
    pub(super) no_leader: watch::Sender<Option<NoLeader>>,
}

/// The receivers of these entries for the reporter.
pub(super) struct Reads {
    pub(super) problems: watch::Receiver<Vec<String>>,
    pub(super) no_leader: watch::Receiver<Option<NoLeader>>,
}

/// The entry of the Node object, with what an earlier agent kept: before the first choice of the underlay and the first
/// claim.
pub(super) fn kept_facts(config: &Config) -> watch::Sender<Arc<NodeFacts>> {
    let kept = config.kubernetes.as_ref().map(|_| properties::read(&config.state_dir));
    watch::Sender::new(Arc::new(kept.unwrap_or_default()))
}

/// Creates the entries; `facts` exists already.
pub(super) fn entries(facts: watch::Sender<Arc<NodeFacts>>) -> (Entries, Reads) {
    let (problems, no_leader) = (watch::Sender::default(), watch::Sender::default());
    let reads = Reads { problems: problems.subscribe(), no_leader: no_leader.subscribe() };
    (Entries { facts, problems, no_leader }, reads)
}

pub(super) fn tasks(
    node: &Arc<Node>,
    reporter: &Reporter,
    entries: Entries,
) -> (Option<kubernetes::Task>, Option<removal::Task>) {
    let Some(settings) = node.config.kubernetes.clone() else { return (None, None) };
    let (name, remove_nodes) = (node.config.node.clone(), settings.remove_nodes);
    let client = Client::new(settings, name.clone());
    let store = node.store.for_leader();
    let removal = store.map(|store| removal::Task {
        host: removal::OnNode { node: Arc::clone(node), store, client: client.clone() },
        remove_nodes,
        no_leader: entries.no_leader,
    });
    let task = kubernetes::Task {
        api: client,
        reports: kubernetes::OnNode { reporter: reporter.clone() },
        node: name,
        state_dir: node.config.state_dir.clone(),
        facts: entries.facts,
        problems: entries.problems,
    };
    (Some(task), removal)
}
