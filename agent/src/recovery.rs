//! A ledger that was lost, rebuilt from what the kernel has: before the first address goes out.

use anyhow::Context;
use polder_ipam::recovery;
use polder_store::NodeIpam;

use crate::kernel::Kernel;
use crate::machine::now;

/// Where the ledger knows nobody and the kernel has pods, takes down who they are and which addresses they and the
/// node itself have. A ledger that knows the node is left alone.
pub fn recover(ipam: &mut NodeIpam, kernel: &mut Kernel) -> anyhow::Result<()> {
    if ipam.identity()?.is_some() {
        return Ok(());
    }
    let pods = kernel.attached().context("look for pods that are attached already")?;
    let gateways = kernel.gateways().context("look for the node's own addresses")?;
    Ok(recovery::recover(ipam, &gateways, pods, now())?)
}
