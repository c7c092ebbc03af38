//! Makes the kernel have the node's own addresses, and no interfaces but those of its attachments.

use std::collections::BTreeSet;

use polder_api::Attachment;

use super::Hand;
use crate::task::Wait;

/// Runs as long as the agent.
pub async fn run(hand: Hand) {
    loop {
        pass(&hand).await;
        hand.wait(Wait::Gateways(hand.clock() + 2_000)).await;
    }
}

/// Makes the kernel what the ledger says. Until the registrar has made sure that this node is who it says it is, the kernel is
/// left alone.
async fn pass(hand: &Hand) {
    if hand.agent(|agent| agent.is_forbidden()) {
        return;
    }
    // First the kernel, then the ledger: what comes meanwhile is not taken for nobody's.
    let found: Vec<Attachment> =
        hand.with(|world| world.machines[hand.machine].kernel.interfaces.keys().cloned().collect());
    hand.turn().await;
    let (gateways, named) = hand.ipam(|ipam, _| {
        let named: BTreeSet<_> = ipam.attachments().map(|held| held.attachment.clone()).collect();
        (ipam.gateways().to_vec(), named)
    });
    hand.with(|world| {
        let kernel = &mut world.machines[hand.machine].kernel;
        kernel.gateways = gateways;
        let nobodys = found.iter().filter(|attachment| !named.contains(attachment));
        nobodys.for_each(|attachment| drop(kernel.interfaces.remove(attachment)));
    });
}
