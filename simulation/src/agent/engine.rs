//! Reconciles the kernel with the ledger: the node's own addresses, and only the interfaces of its attachments.

use std::collections::BTreeSet;

use polder_api::Attachment;

use super::SimHost;
use crate::task::Wait;

/// Runs as long as the agent.
pub async fn run(host: SimHost) {
    loop {
        pass(&host).await;
        host.wait(Wait::Gateways(host.clock() + 2_000)).await;
    }
}

/// One pass. It does not touch the kernel until the registrar has verified the node's identity.
async fn pass(host: &SimHost) {
    if host.agent(|agent| agent.is_forbidden()) {
        return;
    }
    // Read the kernel first, then the ledger: an interface added in between is not treated as foreign.
    let found: Vec<Attachment> =
        host.with(|world| world.machines[host.machine].kernel.interfaces.keys().cloned().collect());
    host.turn().await;
    let (gateways, named) = host.ipam(|ipam, _| {
        let named: BTreeSet<_> = ipam.attachments().map(|held| held.attachment.clone()).collect();
        (ipam.gateways().to_vec(), named)
    });
    host.with(|world| {
        let kernel = &mut world.machines[host.machine].kernel;
        kernel.gateways = gateways;
        let nobodys = found.iter().filter(|attachment| !named.contains(attachment));
        nobodys.for_each(|attachment| drop(kernel.interfaces.remove(attachment)));
    });
}
