//! Makes the kernel have the node's own addresses.

use super::Hand;

/// Runs as long as the agent.
pub async fn run(hand: Hand) {
    loop {
        pass(&hand);
        hand.sleep(2_000).await;
    }
}

/// Makes the kernel what the ledger says.
fn pass(hand: &Hand) {
    let gateways = hand.ipam(|ipam, _| ipam.gateways().to_vec());
    hand.with(|world| world.machines[hand.machine].kernel.gateways = gateways);
}
