//! Reads all pod interfaces, also those without a known owner.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use polder_api::{Attachment, IfName};
use polder_ipam::recovery::LivingPod;
use polder_netlink::link::{Link, LinkKind};
use polder_netlink::{Error, RouteSocket, namespace};

use super::Kernel;
use super::snapshot::pod;

/// Directories in which container runtimes keep the network namespaces of their pods.
const NAMESPACES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// A pod interface, identified by its name and its type veth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenPod {
    /// Interface name on the host.
    pub name: IfName,
    /// Its `ifalias`. The first word is the attachment.
    pub alias: Option<String>,
    /// The addresses of the neighbour entries that lead to it.
    pub addresses: Vec<IpAddr>,
}

impl SeenPod {
    /// The attachment in the alias; `None` if the interface of that attachment has another name.
    pub fn attachment(&self) -> Option<Attachment> {
        let attachment: Attachment = self.alias.as_deref()?.split(' ').next()?.parse().ok()?;
        (attachment.host_interface() == self.name).then_some(attachment)
    }
}

impl Kernel {
    /// All pod interfaces on the host.
    pub fn seen_pods(&mut self) -> Result<Vec<SeenPod>, Error> {
        let links = self.routes.links()?;
        let attached = self.attached()?.into_iter();
        let mut addresses: BTreeMap<IfName, Vec<IpAddr>> =
            attached.map(|pod| (pod.name, pod.addresses)).collect();
        let seen = links.values().filter_map(|link| {
            let name = pod(link)?;
            let addresses = addresses.remove(&name).unwrap_or_default();
            Some(SeenPod { addresses, alias: link.alias.clone(), name })
        });
        Ok(seen.collect())
    }

    /// Whether an interface with that name exists.
    pub fn has_pod(&mut self, name: &IfName) -> Result<bool, Error> {
        Ok(self.routes.link(name.as_str())?.is_some())
    }

    /// Reads the MAC address and the addresses of a pod inside its network namespace, because the host may have lost
    /// its entries. `None` if the namespace is not in the usual directories, or has no interface of this pair.
    pub fn look_inside(&mut self, attachment: &Attachment) -> Result<Option<LivingPod>, Error> {
        let name = attachment.host_interface();
        let Some(host) = self.routes.link(name.as_str())? else { return Ok(None) };
        for path in namespaces() {
            // Unreadable namespaces are skipped: they may have been deleted meanwhile.
            let Some((mac, addresses)) = inside(&path, attachment, &host) else { continue };
            let alias = host.alias.clone().unwrap_or_default();
            let ports = self.host_ports_of(&addresses)?;
            return Ok(Some(LivingPod { name, alias, mac, mtu: host.mtu, addresses, ports }));
        }
        Ok(None)
    }
}

fn namespaces() -> Vec<PathBuf> {
    let entries = NAMESPACES.iter().filter_map(|folder| fs::read_dir(folder).ok());
    entries.flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// MAC address and addresses of the other end of `host`; `None` if it is not in the namespace at that path.
fn inside(path: &Path, attachment: &Attachment, host: &Link) -> Option<(polder_api::Mac, Vec<IpAddr>)> {
    let file = namespace::open(path).ok()?;
    let mut socket = namespace::within(&file, RouteSocket::open).ok()?.ok()?;
    let link = socket.link(attachment.interface.as_str()).ok()??;
    let is_pair =
        link.kind == LinkKind::Veth && link.peer == Some(host.index) && host.peer == Some(link.index);
    let mac = link.mac.filter(|_| is_pair)?;
    let own = socket.addresses().ok()?.into_iter().filter(|found| found.index == link.index && found.global);
    let mut addresses: Vec<IpAddr> = own.map(|found| found.address.ip()).collect();
    addresses.sort();
    (!addresses.is_empty()).then_some((mac, addresses))
}
