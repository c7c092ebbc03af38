//! Rebuilds a lost ledger from kernel state, before the first address is allocated.

use polder_ipam::ledger::LedgerError;
use polder_ipam::recovery::{self, NotRestored};
use polder_store::NodeIpam;

use crate::kernel::Kernel;
use crate::machine::now;

/// Why a lost ledger is not rebuilt. The agent does not start, because it could allocate addresses that pods use.
#[derive(Debug, thiserror::Error)]
pub enum NotRecovered {
    /// The identity cannot be read from the ledger.
    #[error(transparent)]
    Identity(LedgerError),
    /// The kernel's list of interfaces cannot be read.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text, and start polder-agent again.
    #[error("cannot list the pods that are already attached")]
    Pods(#[source] polder_netlink::Error),
    /// The kernel's list of addresses cannot be read.
    ///
    /// Remedy: correct the cause that the kernel reports at the end of the text, and start polder-agent again.
    #[error("cannot list the node's own addresses")]
    Gateways(#[source] polder_netlink::Error),
    /// A recovered pod or address cannot be written to the ledger.
    #[error(transparent)]
    Ledger(NotRestored),
}

/// If the ledger is empty, adds the pods found in the kernel, and the addresses of these pods and of the node. A ledger
/// with an identity is not changed.
pub fn recover(ipam: &mut NodeIpam, kernel: &mut Kernel) -> Result<(), NotRecovered> {
    if ipam.identity().map_err(NotRecovered::Identity)?.is_some() {
        return Ok(());
    }
    let pods = kernel.attached().map_err(NotRecovered::Pods)?;
    let gateways = kernel.gateways().map_err(NotRecovered::Gateways)?;
    recovery::recover(ipam, &gateways, pods, now()).map_err(NotRecovered::Ledger)
}
