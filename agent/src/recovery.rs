//! A ledger that was lost, rebuilt from what the kernel has: before the first address goes out.

use anyhow::Context;
use polder_ipam::alias;
use polder_ipam::ledger::{Held, Kind};
use polder_store::NodeIpam;
use tracing::{info, warn};

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
    for gateway in gateways {
        ipam.restore_gateway(gateway).with_context(|| format!("restore gateway {gateway}"))?;
    }
    for pod in pods {
        let whose = alias::read(&pod.alias).filter(|(whose, _)| whose.host_interface() == pod.name);
        let Some((attachment, of_pod)) = whose else {
            warn!(interface = %pod.name, alias = pod.alias, "the interface does not say whose it is");
            continue;
        };
        let held = Held {
            attachment,
            kind: Kind::Pod,
            since: now(),
            addresses: pod.addresses,
            mac: pod.mac,
            mtu: pod.mtu,
            netns: String::new(),
            pod: of_pod,
            leaving: false,
            gateways: Vec::new(),
        };
        info!(attachment = %held.attachment, addresses = ?held.addresses, "restored from the kernel");
        ipam.restore(held).with_context(|| format!("restore {}", pod.name))?;
    }
    Ok(())
}
