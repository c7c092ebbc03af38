//! CHECK: compares what ADD made with the kernel. Additions of other plugins are ignored.

use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use polder_api::message::{Attach, Reply, Request, Wiring};
use polder_api::{BRIDGE, IfName, Mac};
use polder_netlink::inside::{PodInterface, PodInterfaceDifference as InPod};
use polder_netlink::link::{Link, Port};
use polder_netlink::neighbour::{Destination, FdbEntry, Neighbour};
use polder_netlink::route::{KernelTarget, Route};
use polder_netlink::{IfIndex, RouteSocket};
use serde_json::Value;

use crate::action::KernelAction;
use crate::agent::unexpected;
use crate::call::Call;
use crate::delegate;
use crate::environment::Verb;
use crate::error::Error;
use crate::netconf::BadConfig;
use crate::pod::{PodNamespace, host_prefix};

const AGENT_TIMEOUT: Duration = Duration::from_secs(10);

/// A difference between what ADD made and the kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachmentDifference {
    /// A difference in the pod.
    #[error(transparent)]
    InPod(#[from] InPod),
    /// Another program removed an address of the result of the ADD. The agent is unreachable.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("{interface} in the pod does not have the address {address}")]
    NoPreviousAddress {
        /// The name of the pod's interface.
        interface: IfName,
        /// The missing address.
        address: IpAddr,
    },
    /// Another program set lo down.
    /// Remedy: set it up in the network namespace of the pod (ip link set lo up), or delete the pod.
    #[error("lo in the pod is down")]
    LoopbackDown,
    /// The result of the ADD lacks an address of the attachment: another plugin of the chain removed it, or the runtime
    /// passed the result of another ADD.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("prevResult lacks the address {address}, which the ledger has")]
    NotInPrevious {
        /// The missing address.
        address: IpAddr,
    },
    /// Another program deleted or renamed the host end of the pair.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("the host has no interface {host}")]
    NoHostInterface {
        /// The name of the host end.
        host: IfName,
    },
    /// Another program set the host end of the pair down.
    /// Remedy: none, polder-agent sets it up; if it persists, check the log of polder-agent.
    #[error("{host} on the host is down")]
    HostDown {
        /// The name of the host end.
        host: IfName,
    },
    /// Another program removed the neighbour entry of the pod.
    /// Remedy: none, polder-agent restores it; if it persists, check the log of polder-agent.
    #[error("the host has no neighbour entry for {address} with MAC address {mac}")]
    NoNeighbour {
        /// The address of the pod.
        address: IpAddr,
        /// The MAC address of the pod.
        mac: Mac,
    },
    /// Another program deleted the bridge, or removed the port from it.
    /// Remedy: none, polder-agent restores it; if it persists, check the log of polder-agent.
    #[error("{host} is not a port of {BRIDGE}")]
    NotPort {
        /// The name of the host end.
        host: IfName,
    },
    /// Another program changed the settings of the bridge port.
    /// Remedy: none, polder-agent restores them; if it persists, check the log of polder-agent.
    #[error("bridge port {host} does not have the settings of a pod port")]
    OtherPort {
        /// The name of the host end.
        host: IfName,
    },
    /// Another program removed the FDB entry of the pod.
    /// Remedy: none, polder-agent restores it; if it persists, check the log of polder-agent.
    #[error("{BRIDGE} has no FDB entry for {mac} on {host}")]
    NoFdbEntry {
        /// The MAC address of the pod.
        mac: Mac,
        /// The name of the host end.
        host: IfName,
    },
    /// Another program turned IPv4 forwarding off on the host end of the pair.
    /// Remedy: none, polder-agent turns it on; if it persists, check the log of polder-agent.
    #[error("{host} on the host does not forward IPv4 packets of the pod")]
    NotForwarding {
        /// The name of the host end.
        host: String,
    },
    /// Another program changed the bandwidth limit, or the requested limit changed after the ADD.
    /// Remedy: delete the pod; without a controller, also create it again.
    #[error("{host} on the host limits the bandwidth to the pod to {found} instead of {expected} byte/s")]
    OtherLimit {
        /// The name of the host end.
        host: String,
        /// The rate in the kernel, in bytes per second.
        found: u64,
        /// The requested rate, in bytes per second.
        expected: u64,
    },
    /// Another program removed the route to the pod.
    /// Remedy: none, polder-agent restores it; if it persists, check the log of polder-agent.
    #[error("the host has no route to {address} through {host}")]
    NoRoute {
        /// The address of the pod.
        address: IpAddr,
        /// The name of the host end.
        host: String,
    },
}

/// Reports the first difference between the kernel and the attachment. CRI-O calls CHECK for every pod when it starts,
/// possibly while the agent starts too: if the agent is unreachable, the reference is the result of the ADD
/// (`prevResult`).
pub fn check(call: &Call) -> Result<(), Error> {
    if let Some(plugin) = &call.network.conf.delegate {
        delegate::call(&call.network, plugin, Verb::Check)?;
    }
    let request = Request::Check(call.attachment());
    let asked = call.network.agent(AGENT_TIMEOUT).and_then(|mut agent| match agent.ask(request)? {
        Reply::Wiring(wiring) => Ok(wiring),
        other => Err(unexpected(other)),
    });
    let wiring = match asked {
        Ok(wiring) => wiring,
        Err(error) if error.passes() => return check_alone(call),
        Err(error) => return Err(error),
    };
    let addresses = wiring.addresses.iter().map(|own| own.address);
    check_previous(call, addresses)?;
    let mut pod = PodNamespace::open(&call.environment)?;
    check_pod(&mut pod, &call.environment.interface, &wiring)?;
    check_host(call, &wiring)
}

/// Compares with `prevResult`, which has no MAC addresses of gateways and no bridge ports.
fn check_alone(call: &Call) -> Result<(), Error> {
    check_previous(call, std::iter::empty())?;
    let interface = &call.environment.interface;
    let mut pod = PodNamespace::open(&call.environment)?;
    let Some(link) = pod.link(interface)? else {
        return differs(InPod::NoInterface { interface: interface.clone() });
    };
    if !link.up {
        return differs(InPod::Down { interface: interface.clone() });
    }
    let found = pod.socket.addresses().map_err(Error::kernel(KernelAction::ReadPod))?;
    for previous in previous_addresses(call, |name| name == interface.as_str()) {
        if !found.iter().any(|found| found.index == link.index && found.address.ip() == previous.ip()) {
            let (interface, address) = (interface.clone(), previous.ip());
            return differs(AttachmentDifference::NoPreviousAddress { interface, address });
        }
    }
    let name = call.attachment().host_interface();
    let mut host = RouteSocket::open().map_err(Error::kernel(KernelAction::ReadHost))?;
    let link = check_link(&mut host, &name)?;
    check_rate(call, &mut host, &link)
}

/// Reads the host end of the pod's interface, which must exist and be up.
fn check_link(host: &mut RouteSocket, name: &IfName) -> Result<Link, Error> {
    match host.link(name.as_str()).map_err(Error::kernel(KernelAction::ReadHost))? {
        None => differs(AttachmentDifference::NoHostInterface { host: name.clone() }),
        Some(link) if !link.up => differs(AttachmentDifference::HostDown { host: name.clone() }),
        Some(link) => Ok(link),
    }
}

pub(crate) fn differs<T>(difference: impl Into<AttachmentDifference>) -> Result<T, Error> {
    Err(Error::NotAsAttached(difference.into()))
}

/// Checks that `prevResult` lists these addresses.
pub(crate) fn check_previous(call: &Call, addresses: impl Iterator<Item = IpAddr>) -> Result<(), Error> {
    if call.network.conf.previous.is_none() {
        return Err(BadConfig::NoPrevious.into());
    }
    let known = previous_addresses(call, |_| true);
    for address in addresses {
        if !known.iter().any(|known| known.ip() == address) {
            return differs(AttachmentDifference::NotInPrevious { address });
        }
    }
    Ok(())
}

/// The addresses in `prevResult` of the wanted interfaces. Addresses without an interface index are included.
fn previous_addresses(call: &Call, is_wanted: impl Fn(&str) -> bool) -> Vec<IpNetwork> {
    let Some(previous) = &call.network.conf.previous else { return Vec::new() };
    let interface = |ip: &Value| {
        let number = usize::try_from(ip["interface"].as_u64()?).ok()?;
        previous.get("interfaces")?.get(number)?["name"].as_str()
    };
    let ips = previous.get("ips").and_then(Value::as_array).into_iter().flatten();
    let wanted = ips.filter(|ip| interface(ip).is_none_or(&is_wanted));
    wanted.filter_map(|ip| ip["address"].as_str()?.parse().ok()).collect()
}

fn check_pod(pod: &mut PodNamespace, name: &IfName, wiring: &Wiring) -> Result<(), Error> {
    let inside = PodInterface {
        interface: name.clone(),
        mac: wiring.mac,
        addresses: wiring.addresses.clone(),
        gateway_mac: wiring.gateway_mac,
    };
    let found = inside.difference(&mut pod.socket).map_err(Error::kernel(KernelAction::ReadPod))?;
    found.map_or(Ok(()), differs)
}

fn check_host(call: &Call, wiring: &Wiring) -> Result<(), Error> {
    let read = || Error::kernel(KernelAction::ReadHost);
    let mut host = RouteSocket::open().map_err(read())?;
    let name = &wiring.host_interface;
    let link = check_link(&mut host, name)?;
    let index = match wiring.attach {
        Attach::Bridge { locked } => check_port(&mut host, &link, locked, wiring)?,
        Attach::Routed => check_routes(&mut host, &link, wiring)?,
    };
    let neighbours = host.neighbours().map_err(read())?;
    for own in &wiring.addresses {
        let neighbour = Neighbour { index, address: own.address, mac: wiring.mac };
        if !neighbours.contains(&neighbour) {
            return differs(AttachmentDifference::NoNeighbour { address: own.address, mac: wiring.mac });
        }
    }
    check_rate(call, &mut host, &link)
}

/// Checks the limit for packets to the pod, if the runtime passes one. A pod without a limit is accepted: an earlier
/// release attached it, and runtimes end pods whose CHECK fails. The pod itself may change the limit for packets from
/// it.
fn check_rate(call: &Call, host: &mut RouteSocket, link: &Link) -> Result<(), Error> {
    let Some(limit) = call.options.bandwidth.ingress else { return Ok(()) };
    let expected = limit.rate;
    let host_end = || link.name.clone();
    let action = KernelAction::ReadLimit { host: host_end() };
    match host.token_bucket_rate(link.index).map_err(Error::kernel(action))? {
        Some(found) if found != expected => {
            differs(AttachmentDifference::OtherLimit { host: host_end(), found, expected })
        }
        _ => Ok(()),
    }
}

/// Checks the bridge port and its FDB entry. Returns the interface that has the pod's neighbour entries.
fn check_port(host: &mut RouteSocket, link: &Link, locked: bool, wiring: &Wiring) -> Result<IfIndex, Error> {
    let read = || Error::kernel(KernelAction::ReadBridge);
    let name = &wiring.host_interface;
    let bridge = host.link(BRIDGE).map_err(read())?.map(|bridge| bridge.index);
    let Some(bridge) = bridge.filter(|_| link.controller == bridge) else {
        return differs(AttachmentDifference::NotPort { host: name.clone() });
    };
    if !link.port.is_some_and(|port| port.is_set_like(&Port::of_pod(locked))) {
        return differs(AttachmentDifference::OtherPort { host: name.clone() });
    }
    let fdb_entry = FdbEntry { index: link.index, mac: wiring.mac, to: Destination::Port };
    if !host.fdb().map_err(read())?.contains(&fdb_entry) {
        return differs(AttachmentDifference::NoFdbEntry { mac: wiring.mac, host: name.clone() });
    }
    Ok(bridge)
}

/// Checks forwarding and routes of a routed pod. Returns the interface that has the pod's neighbour entries.
fn check_routes(host: &mut RouteSocket, link: &Link, wiring: &Wiring) -> Result<IfIndex, Error> {
    if !link.ipv4_forwarding && wiring.addresses.iter().any(|own| own.address.is_ipv4()) {
        return differs(AttachmentDifference::NotForwarding { host: link.name.clone() });
    }
    let (routes, _) = host.routes().map_err(Error::kernel(KernelAction::ReadRoutes))?;
    for own in &wiring.addresses {
        let leads = |route: &Route| {
            route.destination == host_prefix(own.address)
                && route.target == KernelTarget::Link { index: link.index }
        };
        if !routes.iter().any(leads) {
            return differs(AttachmentDifference::NoRoute { address: own.address, host: link.name.clone() });
        }
    }
    Ok(link.index)
}
