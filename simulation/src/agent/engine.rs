//! Makes the kernel have the node's own addresses.

use super::Hand;
use crate::task::Wait;

/// Runs as long as the agent.
pub async fn run(hand: Hand) {
    loop {
        pass(&hand);
        hand.wait(Wait::Gateways(hand.clock() + 2_000)).await;
    }
}

/// Makes the kernel what the ledger says. Until the registrar has made sure that this node is who it says it is, the kernel is
/// left alone.
fn pass(hand: &Hand) {
    if hand.agent(|agent| agent.is_forbidden()) {
        return;
    }
    let gateways = hand.ipam(|ipam, _| ipam.gateways().to_vec());
    hand.with(|world| world.machines[hand.machine].kernel.gateways = gateways);
}
