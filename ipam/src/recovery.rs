//! Rebuilds a lost ledger from the kernel, before the first address is allocated.

use std::net::IpAddr;

use polder_api::{IfName, Mac, PortMapping};
use tracing::{info, warn};

use crate::alias;
use crate::ledger::{AttachmentEntry, AttachmentKind, Ledger, LedgerError};
use crate::moment::Moment;
use crate::node::NodeIpam;

/// A pod's interface in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LivingPod {
    /// The name of the host end.
    pub name: IfName,
    /// The interface alias (`ifalias`).
    pub alias: String,
    /// The MAC address of the pod end.
    pub mac: Mac,
    /// MTU, in bytes.
    pub mtu: u32,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The host ports that lead to it.
    pub ports: Vec<PortMapping>,
}

impl LivingPod {
    /// The ledger entry of the pod; `None` if the alias does not identify the attachment of this interface.
    pub fn held(self, now: Moment) -> Option<AttachmentEntry> {
        let (attachment, pod) =
            alias::read(&self.alias).filter(|(attachment, _)| attachment.host_interface() == self.name)?;
        Some(AttachmentEntry {
            attachment,
            kind: AttachmentKind::Pod,
            since: now,
            addresses: self.addresses,
            mac: self.mac,
            mtu: self.mtu,
            netns: String::new(),
            pod,
            leaving: false,
            gateways: Vec::new(),
            ports: self.ports,
        })
    }
}

/// An address in use could not be written to the ledger.
#[derive(Debug, thiserror::Error)]
pub enum NotRestored {
    /// A gateway address that the kernel has is not in the ledger.
    /// Remedy: correct the error of the ledger that follows, and start the agent again.
    #[error("cannot restore gateway {gateway} in the ledger")]
    Gateway {
        /// The gateway address.
        gateway: IpAddr,
        /// The error of the ledger.
        source: LedgerError,
    },
    /// A running pod with an interface is not in the ledger.
    /// Remedy: correct the error of the ledger that follows, and start the agent again.
    #[error("cannot restore the pod on {interface} in the ledger")]
    Pod {
        /// The host end of the pod's interface.
        interface: IfName,
        /// The error of the ledger.
        source: LedgerError,
    },
}

/// Adds the running pods and the node's own addresses to the ledger, if it does not have them. Only for a ledger
/// without attachments: in any other ledger, a missing attachment was released.
pub fn recover<L: Ledger>(
    ipam: &mut NodeIpam<L>,
    gateways: &[IpAddr],
    pods: Vec<LivingPod>,
    now: Moment,
) -> Result<(), NotRestored> {
    for gateway in gateways {
        let restored = ipam.restore_gateway(*gateway);
        restored.map_err(|source| NotRestored::Gateway { gateway: *gateway, source })?;
    }
    for pod in pods {
        let (name, alias) = (pod.name.clone(), pod.alias.clone());
        let Some(held) = pod.held(now) else {
            warn!(interface = %name, alias, "the alias of the interface does not identify its pod: not \
                                             restored");
            continue;
        };
        info!(attachment = %held.attachment, addresses = ?held.addresses, "restored from the kernel");
        ipam.restore(held).map_err(|source| NotRestored::Pod { interface: name, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use polder_api::{Attachment, Pod};

    use super::*;
    use crate::ids::BootId;
    use crate::ledger::memory::Memory;

    fn living(container: &str, pod: Option<&Pod>) -> LivingPod {
        let attachment: Attachment = format!("net/{container}/eth0").parse().unwrap();
        let address = "10.0.0.5".parse().unwrap();
        LivingPod {
            name: attachment.host_interface(),
            alias: alias::write(&attachment, pod),
            mac: Mac::of_pod(address),
            mtu: 1400,
            addresses: vec![address],
            ports: vec!["8080:80/tcp".parse().unwrap()],
        }
    }

    #[test]
    fn a_lost_ledger_is_recovered_from_the_interfaces_with_pod_names() {
        let (mut ipam, _) =
            NodeIpam::with(Memory::default(), &BootId::new("b1"), Duration::from_secs(60)).unwrap();
        let pod = Pod { namespace: "default".to_owned(), name: "db-0".to_owned(), uid: None };
        let gateway = "10.0.0.1".parse().unwrap();
        let others = LivingPod { alias: "uplink of somebody".to_owned(), ..living("b", None) };
        let now = Moment::from_millis(7);
        recover(&mut ipam, &[gateway], vec![living("a", Some(&pod)), others], now).unwrap();
        assert_eq!(ipam.gateways(), [gateway]);
        let held: Vec<&AttachmentEntry> = ipam.attachments().collect();
        assert_eq!(held.len(), 1);
        assert_eq!((held[0].pod.as_ref(), held[0].mtu, held[0].since), (Some(&pod), 1400, now));
        assert_eq!(held[0].ports.len(), 1);
    }

    #[test]
    fn an_interface_with_the_alias_of_another_is_not_recovered() {
        let swapped = LivingPod { alias: living("b", None).alias, ..living("a", None) };
        assert_eq!(swapped.held(Moment::from_millis(7)), None);
    }
}
