//! Checks whether a node may be removed while it is alive. Its pods lose their network at once, so the operator has to
//! confirm their number.

use std::collections::BTreeSet;

use polder_api::message::{RefusalKind, Refuse, Removal, Reply};
use polder_api::{Attachment, NodeName};

use super::OperatorHost;
use crate::key::{Key, Range};
use crate::publication;
use crate::store::StoreError;
use crate::tasks::published::PublishedAddresses;
use crate::tasks::records::RecordStore;
use crate::tasks::{LedgerUnusable, OwnNode, lease};

/// The state of a node that is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RemovalState {
    /// Whether it is a node of the cluster, and not yet removed.
    is_member: bool,
    /// Whether its lease is valid, or it is the node that answers this request.
    is_alive: bool,
    /// Number of its pods, as far as known here.
    pods: u64,
    /// Whether it is the only node of the cluster.
    is_last: bool,
}

/// Why the removal of a node is not permitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum NotAllowed {
    /// The request has --dead, but the agent of the node is running.
    #[error(
        "node {node} is alive: its agent renews its lease. --dead is only for a machine that is \
         permanently gone: for a node that is alive, other nodes would assign the addresses of its running pods \
         to new pods. If you mean an earlier machine of that name, add --earlier. If this machine is gone, wait \
         {ttl} s and try again; otherwise omit --dead"
    )]
    Alive {
        /// The node.
        node: NodeName,
        /// The TTL of the node's lease, in seconds.
        ttl: u64,
    },
    /// The number of pods that the operator confirms is not the current one.
    #[error(
        "node {node} is alive and has {pods} pods, not {confirmed}: nothing was done. Give the number that \
         polderctl node list shows"
    )]
    OtherNumber {
        /// The node.
        node: NodeName,
        /// The number of its pods.
        pods: u64,
        /// The number in the request.
        confirmed: u64,
    },
    /// The datastore did not show the node's lease and pods; a retry may succeed.
    #[error("{error}. It is unknown whether node {node} is alive: try again")]
    Unknown {
        /// The node.
        node: NodeName,
        /// The error.
        #[source]
        error: StoreError,
    },
    /// The datastore did not show the node's lease and pods, until an operator corrects the cause.
    /// Remedy: correct the error of the datastore, and repeat the command.
    #[error("{error}. It is unknown whether node {node} is alive")]
    Refused {
        /// The node.
        node: NodeName,
        /// The error.
        #[source]
        error: StoreError,
    },
}

impl Refuse for NotAllowed {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Alive { .. } | Self::OtherNumber { .. } => RefusalKind::Invalid,
            Self::Unknown { error, .. } | Self::Refused { error, .. } => error.kind(),
        }
    }
}

/// Why the node is not removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Objection {
    /// The request contradicts the state of the node.
    #[error(transparent)]
    Wrong(NotAllowed),
    /// The operator has to confirm the number of pods that would be disconnected.
    #[error(
        "node {node} is alive and has {pods} pods, which would lose their network at once. Drain the node in \
         Kubernetes first, or confirm with: polderctl node remove {node} --disconnect-pods {pods}"
    )]
    Unconfirmed {
        /// The node.
        node: NodeName,
        /// The number of its pods.
        pods: u64,
    },
    /// The same, for the only node of the cluster.
    #[error(
        "node {node} is alive and has {pods} pods, which would lose their network at once. It is the last \
         node of the cluster. Drain the node in Kubernetes first, or confirm with: polderctl node remove {node} \
         --disconnect-pods {pods}"
    )]
    LastUnconfirmed {
        /// The node.
        node: NodeName,
        /// The number of its pods.
        pods: u64,
    },
}

fn check_removal(removal: &Removal, state: RemovalState) -> Result<(), Objection> {
    let Removal { node, dead, disconnect_pods, earlier } = removal;
    let RemovalState { is_member, is_alive, pods, is_last } = state;
    // With `earlier`, the request is about an earlier machine of that name, not the one that is alive.
    if !is_member || !is_alive || *earlier {
        return Ok(());
    }
    if *dead {
        let ttl = lease::LEASE_TTL.as_secs();
        return Err(Objection::Wrong(NotAllowed::Alive { node: node.clone(), ttl }));
    }
    let node = node.clone();
    match disconnect_pods {
        Some(known) if *known == pods => Ok(()),
        None if pods == 0 => Ok(()),
        Some(known) => Err(Objection::Wrong(NotAllowed::OtherNumber { node, pods, confirmed: *known })),
        None if is_last => Err(Objection::LastUnconfirmed { node, pods }),
        None => Err(Objection::Unconfirmed { node, pods }),
    }
}

/// Succeeds if the node may be removed; otherwise returns the answer to the request.
pub async fn allow_removal<H: OperatorHost>(
    host: &H,
    me: &OwnNode,
    records: &impl RecordStore,
    removal: &Removal,
) -> Result<(), Reply> {
    let unknown = |error: StoreError| {
        let node = removal.node.clone();
        Reply::Refused(if error.is_lasting() {
            NotAllowed::Refused { node, error }.into()
        } else {
            NotAllowed::Unknown { node, error }.into()
        })
    };
    let identity = host.ledger(|ipam, _| ipam.identity()).await;
    let identity = identity.map_err(|error| Reply::Refused(LedgerUnusable(error).into()))?;
    let own_revision =
        publication::own_revision(&host.current_view(), &me.name, identity.as_ref(), me.boot());
    // Another machine can be registered under this node's name; then this machine is not the node.
    let is_own = removal.node == me.name && own_revision.is_some();
    let state = state_of(host, records, &removal.node, is_own).await.map_err(unknown)?;
    check_removal(removal, state).map_err(|objection| match objection {
        Objection::Wrong(problem) => Reply::Refused(problem.into()),
        unconfirmed => Reply::Unconfirmed { message: unconfirmed.to_string(), pods: state.pods },
    })
}

async fn state_of<H: OperatorHost>(
    host: &H,
    records: &impl RecordStore,
    node: &NodeName,
    is_own: bool,
) -> Result<RemovalState, StoreError> {
    let view = host.current_view();
    let lease = records.range(&Range::single(Key::Lease(node.clone()).to_string())).await?;
    let pods = if is_own {
        let pods = host.ledger(|ipam, _| ipam.attachments().filter(|held| !held.leaving).count()).await;
        pods as u64
    } else {
        let published = PublishedAddresses::read_range(records, &Key::addresses_of(node)).await?;
        let published = published.records.into_iter().map(|(published, _)| published.record.attachment);
        published.collect::<BTreeSet<Attachment>>().len() as u64
    };
    let is_member = view.nodes.contains_key(node);
    Ok(RemovalState {
        is_member,
        // The node that answers this request is alive, even if its lease has expired.
        is_alive: is_own || !lease.entries.is_empty(),
        pods,
        is_last: is_member && view.nodes.len() == 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE_NODE: RemovalState = RemovalState { is_member: true, is_alive: true, pods: 2, is_last: false };

    fn asked(dead: bool, disconnect_pods: Option<u64>) -> Removal {
        Removal { node: "n1".parse().unwrap(), dead, disconnect_pods, earlier: false }
    }

    fn message(removal: &Removal, state: RemovalState) -> String {
        match check_removal(removal, state) {
            Ok(()) => String::new(),
            Err(objection) => objection.to_string(),
        }
    }

    #[test]
    fn removing_a_live_node_requires_its_pod_count() {
        assert_eq!(check_removal(&asked(false, Some(2)), LIVE_NODE), Ok(()));
        let unconfirmed = message(&asked(false, None), LIVE_NODE);
        assert!(
            unconfirmed.contains("has 2 pods") && unconfirmed.contains("--disconnect-pods 2"),
            "{unconfirmed}"
        );
        assert!(!unconfirmed.contains("last node"), "{unconfirmed}");
        for number in [0, 1, 3] {
            let wrong = message(&asked(false, Some(number)), LIVE_NODE);
            assert!(wrong.contains(&format!("has 2 pods, not {number}")), "{wrong}");
        }
        let last = message(&asked(false, None), RemovalState { is_last: true, ..LIVE_NODE });
        assert!(last.contains("the last node of the cluster"), "{last}");
    }

    #[test]
    fn no_pod_count_is_needed_without_pods_or_if_dead_or_removed() {
        assert_eq!(check_removal(&asked(false, None), RemovalState { pods: 0, ..LIVE_NODE }), Ok(()));
        for dead in [false, true] {
            assert_eq!(
                check_removal(&asked(dead, None), RemovalState { is_alive: false, ..LIVE_NODE }),
                Ok(())
            );
            assert_eq!(
                check_removal(&asked(dead, None), RemovalState { is_member: false, ..LIVE_NODE }),
                Ok(())
            );
        }
    }

    #[test]
    fn the_dead_flag_is_refused_for_a_live_node() {
        for pods in [0, 2] {
            let wrong = message(&asked(true, Some(pods)), RemovalState { pods, ..LIVE_NODE });
            assert!(wrong.contains("node n1 is alive") && wrong.contains("--dead is only for"), "{wrong}");
        }
    }
}
