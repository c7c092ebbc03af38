//! Repairs deviations that a node found in a check. No repair takes anything from a running pod.

use polder_api::IfName;
use polder_ipam::Revision;
use polder_ipam::change::{Change, Member, Writer};
use polder_ipam::key::Name;
use polder_ipam::ledger::{AttachmentEntry, LedgerError};
use polder_ipam::record::AddressRecord;
use polder_ipam::recovery::LivingPod;
use polder_ipam::release::NotReleased;
use polder_ipam::store::{Outcome, StoreError};
use polder_ipam::tasks::orphan_collector;
use tracing::{info, warn};

use super::own::OwnRepair;
use crate::local_pods::LocalPod;
use crate::machine::now;
use crate::node::Node;

/// Why a repair failed.
#[derive(Debug, thiserror::Error)]
enum NotRepaired {
    /// The node is not registered, so that it may not change records.
    ///
    /// Remedy: correct what `polderctl status` shows on this node, and repeat the check with --repair.
    #[error("the datastore has no record of this node")]
    Unregistered,
    /// The addresses of the attachment cannot be released.
    #[error(transparent)]
    Release(#[from] NotReleased),
    /// The repair compares revisions, and another program or the node itself wrote a record first.
    ///
    /// Remedy: none, the next check with --repair repeats it if it is still needed.
    #[error("its record or the record of this node has changed in the meantime")]
    Changed,
    /// A request to the datastore failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The interface of a pod does not contain the name of its attachment, so that the ledger cannot record the pod.
    ///
    /// Remedy: delete the pod, so that its controller creates a new one, or delete the interface if it has no pod.
    #[error("interface {0} has no known owner")]
    Nameless(IfName),
    /// The kernel cannot be read.
    #[error(transparent)]
    Kernel(#[from] polder_netlink::Error),
    /// The ledger cannot be written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Carries out a repair. The next examination shows whether it succeeded.
pub(super) async fn carry_out(node: &Node, repair: OwnRepair) {
    let done = match &repair {
        OwnRepair::Release(attachment) => {
            let swept = orphan_collector::sweep(node, attachment, "a check found that it is gone").await;
            swept.map(drop).map_err(NotRepaired::from)
        }
        OwnRepair::Publish(held, address) => publish(node, held, *address).await,
        OwnRepair::Withdraw { key, revision } => withdraw(node, key, *revision).await,
        OwnRepair::Restore(pod) => restore(node, pod).await,
        OwnRepair::Reconcile => {
            node.channels.registrar.wake();
            Ok(())
        }
    };
    match done {
        Ok(()) => info!(repair = ?repair, "repaired"),
        Err(error) => warn!(repair = ?repair, %error, "repair failed"),
    }
}

fn me(node: &Node) -> Result<Member, NotRepaired> {
    let revision = node.node_state.membership.own_revision(&node.node_state.view());
    let revision = revision.ok_or(NotRepaired::Unregistered)?;
    Ok(Member { node: node.config.node.clone(), revision })
}

async fn commit(node: &Node, change: Change) -> Result<(), NotRepaired> {
    match node.store.commit(&change).await? {
        Outcome::Applied { .. } => Ok(()),
        Outcome::Refused => Err(NotRepaired::Changed),
    }
}

/// Deletes the published record, if it still has that revision.
async fn withdraw(node: &Node, key: &str, revision: Revision) -> Result<(), NotRepaired> {
    let records = vec![(Name::from(key), Some(revision))];
    commit(node, Change::WithdrawAddresses { by: Writer::Node(me(node)?), records }).await
}

/// Publishes that the attachment has the address, with the attachment locked so that it cannot be released meanwhile.
async fn publish(node: &Node, held: &AttachmentEntry, address: std::net::IpAddr) -> Result<(), NotRepaired> {
    let Some(_held) = node.in_flight.hold(&held.attachment) else { return Ok(()) };
    let attachment = held.attachment.clone();
    let is_there = node.ipam.run(move |ipam| ipam.get(&attachment).is_some_and(|held| !held.leaving)).await;
    if !is_there {
        return Ok(());
    }
    let record = AddressRecord { attachment: held.attachment.clone(), pod: held.pod.clone() };
    let (publish, withdraw) = (vec![(address, record)], Vec::new());
    commit(node, Change::PublishAddresses { by: me(node)?, publish, withdraw }).await
}

/// Adds a running pod to the ledger.
async fn restore(node: &Node, pod: &LivingPod) -> Result<(), NotRepaired> {
    let Some(held) = pod.clone().held(now()) else { return Err(NotRepaired::Nameless(pod.name.clone())) };
    let Some(_held) = node.in_flight.hold(&held.attachment) else { return Ok(()) };
    let interfaces = node.pods.kernel.run(crate::kernel::Kernel::pod_interfaces).await;
    if !interfaces?.contains(&pod.name) {
        return Ok(());
    }
    let local = LocalPod::of(&held);
    node.ipam.run(move |ipam| ipam.restore(held)).await?;
    node.pods.local.add(local);
    node.channels.publisher.wake();
    // The packet filter needs its addresses.
    node.channels.engine.wake();
    Ok(())
}
