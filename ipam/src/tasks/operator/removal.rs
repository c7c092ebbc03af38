//! Removes a node from the cluster, for an operator.

use polder_api::NodeName;
use polder_api::message::{Refusal, RefusalKind, Refuse, Removal};
use tracing::warn;

use super::{ATTEMPTS, Knowledge, current};
use crate::cause::HostError;
use crate::departure::Departed;
use crate::record::{Boot, FenceRecord, NodeRecord, PodsGone};
use crate::removal::{self, NotRemoved, OperatorConfirmation, blocks_of};
use crate::store::{Outcome, StoreError};
use crate::tasks::CATCH_UP;
use crate::tasks::records::{RecordStore, read_all};
use crate::view::View;

impl Refuse for NotRemoved {
    fn kind(&self) -> RefusalKind {
        RefusalKind::Invalid
    }
}

/// Why a permitted removal was not made, or has no known result.
#[derive(Debug, thiserror::Error)]
enum NodeNotRemoved {
    /// The node is not the one that it was when the operator requested its removal.
    #[error(
        "the machine or the boot of node {0} has changed since its removal began: see polderctl node list, and \
         try again"
    )]
    OtherNode(NodeName),
    /// The node or others changed its record in each attempt.
    #[error("the record of node {0} keeps changing: try again")]
    Contended(NodeName),
    /// The datastore failed, and the node was not removed.
    /// Remedy: correct the error of the datastore, and repeat the command.
    #[error("node {node} was not removed: {error}")]
    Store {
        /// The node.
        node: NodeName,
        /// The error.
        #[source]
        error: StoreError,
    },
    /// The datastore failed, and the node may have been removed.
    #[error("{error}. It is unknown whether node {node} was removed: see polderctl node list")]
    InDoubt {
        /// The node.
        node: NodeName,
        /// The error.
        #[source]
        error: StoreError,
    },
}

/// Why a node that has left Kubernetes was not removed.
#[derive(Debug, thiserror::Error)]
pub enum DepartedNotRemoved {
    /// The records are not up to date, or the datastore failed. It is decided again from the next list.
    /// Remedy: correct the error of the datastore. With etcd users, the user of this node needs the right to remove
    /// nodes: run scripts/etcd-roles with --leader.
    #[error("cannot remove node {node}, which has left Kubernetes: {error}")]
    Failed {
        /// The node.
        node: NodeName,
        /// The error.
        #[source]
        error: HostError,
    },
    /// The record of the node has changed since the decision, or its agent is alive again. It is decided again.
    /// Remedy: none.
    #[error("node {0} has changed since the decision to remove it, or its agent is alive")]
    Changed(NodeName),
}

/// Removes a node that has left Kubernetes, if its record is unchanged and its agent is not alive. One attempt: after
/// any failure, the next list decides. Returns a message that states what its blocks wait for.
pub async fn remove_departed(
    agent: &impl Knowledge,
    records: &impl RecordStore,
    departed: &Departed,
) -> Result<String, DepartedNotRemoved> {
    let node = &departed.node;
    let failed = |error: HostError| DepartedNotRemoved::Failed { node: node.clone(), error };
    let view = current(agent).map_err(|error| failed(HostError::new(error)))?;
    let changed = || DepartedNotRemoved::Changed(node.clone());
    let change = removal::remove_departed(&view, departed).ok_or_else(changed)?;
    match records.commit(&change).await {
        Ok(Outcome::Applied { revision }) => Ok(match agent.view_at(revision, CATCH_UP).await {
            Some(view) => waits_for(&view, node),
            None => format!("node {node} is removed"),
        }),
        Ok(Outcome::Refused) => Err(changed()),
        Err(error) => Err(failed(HostError::new(error))),
    }
}

impl Refuse for NodeNotRemoved {
    fn kind(&self) -> RefusalKind {
        RefusalKind::TryAgain
    }
}

/// Removes the node. Returns a message that states what its blocks wait for. An attempt of unknown outcome is not
/// repeated: meanwhile another machine may have become the node.
pub async fn remove_node(
    agent: &impl Knowledge,
    records: &impl RecordStore,
    removal: Removal,
) -> Result<String, Refusal> {
    let Removal { node, dead, earlier, .. } = removal;
    let confirmed = match (dead, earlier) {
        (false, _) => OperatorConfirmation::No,
        (true, false) => OperatorConfirmation::Yes,
        (true, true) => OperatorConfirmation::Earlier,
    };
    let mut meant = None;
    for _ in 0..ATTEMPTS {
        let view = current(agent)?;
        let found = view.nodes.get(&node).map(|known| &*known.record);
        let meant = meant.get_or_insert_with(|| found.cloned());
        if found.is_some_and(|found| is_another(meant.as_ref(), found)) {
            return Err(NodeNotRemoved::OtherNode(node).into());
        }
        let change = removal::remove(&view, &node, confirmed)?;
        let Some(change) = change else {
            // This view can be outdated: another machine may be the node by now.
            let now = read_all(records).await?;
            if removal::remove(&now, &node, confirmed) == Ok(None) {
                return Ok(waits_for(&now, &node));
            }
            agent.view_changed_from(&view, CATCH_UP).await;
            continue;
        };
        match records.commit(&change).await {
            Ok(Outcome::Applied { revision }) => {
                warn!(%node, dead, "removed from the cluster");
                return Ok(match agent.view_at(revision, CATCH_UP).await {
                    Some(view) => waits_for(&view, &node),
                    None => format!("node {node} is removed"),
                });
            }
            // The record has changed: wait for the view to show that.
            Ok(Outcome::Refused) => agent.view_changed_from(&view, CATCH_UP).await,
            Err(error) => return failed(records, node, confirmed, error).await,
        }
    }
    Err(NodeNotRemoved::Contended(node).into())
}

/// Whether the node of that name is not the one that the operator meant: then the operator's confirmation does not
/// apply.
fn is_another(meant: Option<&NodeRecord>, found: &NodeRecord) -> bool {
    meant.is_none_or(|meant| found.incarnation != meant.incarnation || Boot::from(found) != Boot::from(meant))
}

/// The result of a removal that the datastore refused or did not answer.
async fn failed(
    records: &impl RecordStore,
    node: NodeName,
    confirmed: OperatorConfirmation,
    error: StoreError,
) -> Result<String, Refusal> {
    let is_made = if error.needs_reread() && !error.is_unknown() {
        read_all(records).await.ok().map(|now| match removal::remove(&now, &node, confirmed) {
            Ok(None) | Err(NotRemoved::AlreadyRemoved(_)) => Some(waits_for(&now, &node)),
            _ => None,
        })
    } else {
        (!error.is_unknown()).then_some(None)
    };
    match is_made {
        Some(Some(done)) => Ok(done),
        Some(None) => Err(NodeNotRemoved::Store { node, error }.into()),
        None => Err(NodeNotRemoved::InDoubt { node, error }.into()),
    }
}

fn waits_for(view: &View, node: &NodeName) -> String {
    let standings = standings(view).into_iter().filter(|(name, _)| name == node);
    let standings: Vec<String> = standings.map(|(_, text)| text).collect();
    if standings.is_empty() {
        format!("node {node} is removed, and nothing of it is left")
    } else {
        format!("node {node} is {}", standings.join("; "))
    }
}

/// The removed nodes that still have blocks or unconfirmed pods, with a text that states what their blocks wait for.
pub fn standings(view: &View) -> Vec<(NodeName, String)> {
    let text = |fence: &FenceRecord, blocks: usize| match fence.pods {
        PodsGone::Unknown => {
            // Without this option, the command would be about the machine that has the name now.
            let earlier = if view.nodes.contains_key(&fence.node) { " --earlier" } else { "" };
            format!(
                "removed: its {blocks} blocks are held back until it has disconnected its pods and confirmed \
                 that ({}), or you confirm that they are gone with polderctl node remove {} --dead{earlier}",
                Boot::from(fence),
                fence.node
            )
        }
        PodsGone::Confirmed | PodsGone::ConfirmedByOperator => {
            format!("removed, and its pods are gone: its {blocks} blocks are in cool-down")
        }
    };
    let fences = view.fences.iter().filter_map(|(incarnation, fence)| {
        let (record, blocks) = (&*fence.record, blocks_of(view, incarnation).count());
        (blocks > 0 || record.pods == PodsGone::Unknown).then(|| (record.node.clone(), text(record, blocks)))
    });
    fences.collect()
}
