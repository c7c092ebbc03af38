//! Rebuilds a lost ledger from kernel state, before the first address is allocated.

use anyhow::Context;
use polder_ipam::recovery;
use polder_store::NodeIpam;

use crate::kernel::Kernel;
use crate::machine::now;

/// If the ledger is empty, adds the pods found in the kernel, and the addresses of these pods and of the node. A ledger
/// with an identity is not changed.
pub fn recover(ipam: &mut NodeIpam, kernel: &mut Kernel) -> anyhow::Result<()> {
    if ipam.identity()?.is_some() {
        return Ok(());
    }
    let pods = kernel.attached().context("list the pods that are already attached")?;
    let gateways = kernel.gateways().context("list the node's own addresses")?;
    Ok(recovery::recover(ipam, &gateways, pods, now())?)
}
