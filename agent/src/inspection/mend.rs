//! Puts right what a node has found of itself. Nothing here takes anything from what lives.

use polder_ipam::change::{Change, Member, Speaker};
use polder_ipam::key::Name;
use polder_ipam::ledger::Held;
use polder_ipam::record::AddressRecord;
use polder_ipam::recovery::LivingPod;
use polder_ipam::store::Outcome;
use polder_ipam::tasks::sweeper;
use tracing::{info, warn};

use super::own::Mend;
use crate::machine::now;
use crate::node::Node;

/// Carries a repair out. Whether it has succeeded, another look tells.
pub(super) async fn mend(node: &Node, mend: Mend) {
    let done = match &mend {
        Mend::Release(attachment) => {
            sweeper::sweep(node, attachment, "a check has found that it is gone").await.map(drop)
        }
        Mend::Publish(held, address) => publish(node, held, *address).await,
        Mend::Withdraw { key, revision } => {
            let records = vec![(Name::from(key.as_str()), Some(*revision))];
            commit(node, Change::WithdrawAddresses { by: Speaker::Node(me(node)), records }).await
        }
        Mend::Restore(pod) => restore(node, pod).await,
        Mend::Reconcile => {
            node.calls.registrar.ring();
            Ok(())
        }
    };
    match done {
        Ok(()) => info!(?mend, "put right"),
        Err(error) => warn!(?mend, error, "not put right"),
    }
}

fn me(node: &Node) -> Member {
    Member {
        node: node.config.node.clone(),
        revision: node.board.membership.own_revision(&node.board.view()),
    }
}

async fn commit(node: &Node, change: Change) -> Result<(), String> {
    match node.store.commit(&change).await {
        Ok(Outcome::Applied { .. }) => Ok(()),
        Ok(Outcome::Refused) => Err("its record, or that of this node, has changed meanwhile".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Publishes that the attachment has the address, while nobody can take it away.
async fn publish(node: &Node, held: &Held, address: std::net::IpAddr) -> Result<(), String> {
    let Some(_held) = node.in_flight.hold(&held.attachment) else { return Ok(()) };
    let attachment = held.attachment.clone();
    let is_there = node.ipam.run(move |ipam| ipam.get(&attachment).is_some_and(|held| !held.leaving)).await;
    if !is_there {
        return Ok(());
    }
    let record = AddressRecord { attachment: held.attachment.clone(), pod: held.pod.clone() };
    let (say, withdraw) = (vec![(address, record)], Vec::new());
    commit(node, Change::PublishAddresses { by: me(node), say, withdraw }).await
}

/// Takes down a pod that lives and that the ledger does not have.
async fn restore(node: &Node, pod: &LivingPod) -> Result<(), String> {
    let Some(held) = pod.clone().held(now()) else {
        return Err(format!("interface {} does not say whose it is", pod.name));
    };
    let Some(_held) = node.in_flight.hold(&held.attachment) else { return Ok(()) };
    let interfaces = node.pods.kernel.run(crate::kernel::Kernel::pod_interfaces).await;
    if !interfaces.map_err(|error| error.to_string())?.contains(&pod.name) {
        return Ok(());
    }
    let restored = node.ipam.run(move |ipam| ipam.restore(held)).await;
    restored.map_err(|error| error.to_string())?;
    node.calls.publisher.ring();
    // The filter has to know its addresses.
    node.calls.engine.ring();
    Ok(())
}
