//! Puts right what a node has found of itself. Nothing here takes anything from what lives.

use polder_api::{Attachment, InvalidName};
use polder_ipam::change::{Change, Member, Speaker};
use polder_ipam::key::Name;
use polder_ipam::ledger::{Held, Kind};
use polder_ipam::record::AddressRecord;
use polder_ipam::store::Outcome;
use polder_ipam::tasks::sweeper;
use tracing::{info, warn};

use super::own::Mend;
use crate::kernel::snapshot::AttachedPod;
use crate::machine::now;
use crate::node::Node;

/// Carries a repair out. Whether it has succeeded, another look tells.
pub(super) async fn mend(agent: &Node, mend: Mend) {
    let done = match &mend {
        Mend::Release(attachment) => {
            sweeper::sweep(agent, attachment, "a check has found that it is gone").await.map(drop)
        }
        Mend::Publish(held, address) => publish(agent, held, *address).await,
        Mend::Withdraw { key, revision } => {
            let records = vec![(Name::from(key.as_str()), Some(*revision))];
            commit(agent, Change::WithdrawAddresses { by: Speaker::Node(me(agent)), records }).await
        }
        Mend::Restore(pod) => restore(agent, pod).await,
        Mend::Reconcile => {
            agent.calls.registrar.ring();
            Ok(())
        }
    };
    match done {
        Ok(()) => info!(?mend, "put right"),
        Err(error) => warn!(?mend, error, "not put right"),
    }
}

fn me(agent: &Node) -> Member {
    Member {
        node: agent.config.node.clone(),
        revision: agent.board.membership.own_revision(&agent.board.view()),
    }
}

async fn commit(agent: &Node, change: Change) -> Result<(), String> {
    match agent.store.commit(&change).await {
        Ok(Outcome::Applied { .. }) => Ok(()),
        Ok(Outcome::Refused) => Err("its record, or that of this node, has changed meanwhile".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Publishes that the attachment has the address, while nobody can take it away.
async fn publish(agent: &Node, held: &Held, address: std::net::IpAddr) -> Result<(), String> {
    let Some(_held) = agent.in_flight.hold(&held.attachment) else { return Ok(()) };
    let attachment = held.attachment.clone();
    let is_there = agent.ipam.run(move |ipam| ipam.get(&attachment).is_some_and(|held| !held.leaving)).await;
    if !is_there {
        return Ok(());
    }
    let record = AddressRecord { attachment: held.attachment.clone(), pod: held.pod.clone() };
    let (say, withdraw) = (vec![(address, record)], Vec::new());
    commit(agent, Change::PublishAddresses { by: me(agent), say, withdraw }).await
}

/// Takes down a pod that lives and that the ledger does not have.
async fn restore(agent: &Node, pod: &AttachedPod) -> Result<(), String> {
    let (attachment, _) = pod.alias.split_once(' ').unwrap_or((&pod.alias, ""));
    let attachment: Attachment = attachment.parse().map_err(|error: InvalidName| error.to_string())?;
    let Some(_held) = agent.in_flight.hold(&attachment) else { return Ok(()) };
    let interfaces = agent.pods.kernel.run(crate::kernel::Kernel::pod_interfaces).await;
    if !interfaces.map_err(|error| error.to_string())?.contains(&pod.name) {
        return Ok(());
    }
    let held = Held {
        attachment,
        kind: Kind::Pod,
        since: now(),
        addresses: pod.addresses.clone(),
        mac: pod.mac,
        mtu: pod.mtu,
        netns: String::new(),
        pod: None,
        leaving: false,
        gateways: Vec::new(),
    };
    let restored = agent.ipam.run(move |ipam| ipam.restore(held)).await;
    restored.map_err(|error| error.to_string())?;
    agent.calls.publisher.ring();
    // The filter has to know its addresses.
    agent.calls.engine.ring();
    Ok(())
}
