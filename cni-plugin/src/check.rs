//! CHECK: compares what ADD made with the kernel. Additions of other plugins are ignored.

use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use polder_api::message::{Attach, Reply, Request, Wiring};
use polder_api::{BRIDGE, IfName};
use polder_netlink::inside::Inside;
use polder_netlink::link::{Link, Port};
use polder_netlink::neighbour::{Destination, FdbEntry, Neighbour};
use polder_netlink::route::{Route, Target};
use polder_netlink::{IfIndex, RouteSocket};
use serde_json::Value;

use crate::agent::unexpected;
use crate::call::Call;
use crate::delegate;
use crate::environment::Verb;
use crate::error::Error;
use crate::pod::{PodNamespace, host_prefix};

const AGENT_PATIENCE: Duration = Duration::from_secs(10);

/// Reports the first difference between the kernel and the attachment. CRI-O calls CHECK for every pod when it starts,
/// possibly while the agent starts too: if the agent is unreachable, the reference is the result of the ADD
/// (`prevResult`).
pub fn check(call: &Call) -> Result<(), Error> {
    if let Some(plugin) = &call.network.conf.delegate {
        delegate::call(&call.network, plugin, Verb::Check)?;
    }
    let request = Request::Check(call.attachment());
    let asked = call.network.agent(AGENT_PATIENCE).and_then(|mut agent| match agent.ask(&request)? {
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
    check_host(&wiring)
}

/// Compares with `prevResult`, which has no MAC addresses of gateways and no bridge ports.
fn check_alone(call: &Call) -> Result<(), Error> {
    check_previous(call, std::iter::empty())?;
    let interface = &call.environment.interface;
    let mut pod = PodNamespace::open(&call.environment)?;
    let Some(link) = pod.link(interface)? else {
        return differs(format!("the pod has no interface {interface}"));
    };
    if !link.up {
        return differs(format!("{interface} in the pod is down"));
    }
    let found = pod.socket.addresses().map_err(Error::kernel("read the network state of the pod"))?;
    for previous in previous_addresses(call, |name| name == interface.as_str()) {
        if !found.iter().any(|found| found.index == link.index && found.address.ip() == previous.ip()) {
            return differs(format!("{interface} in the pod does not have the address {}", previous.ip()));
        }
    }
    let name = call.attachment().host_interface();
    let mut host = RouteSocket::open().map_err(Error::kernel("read the host's interfaces"))?;
    check_link(&mut host, &name).map(drop)
}

/// Reads the host end of the pod's interface, which must exist and be up.
fn check_link(host: &mut RouteSocket, name: &IfName) -> Result<Link, Error> {
    match host.link(name.as_str()).map_err(Error::kernel("read the host's interfaces"))? {
        None => differs(format!("the host has no interface {name}")),
        Some(link) if !link.up => differs(format!("{name} on the host is down")),
        Some(link) => Ok(link),
    }
}

pub(crate) fn differs<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::NotAsAttached(what.into()))
}

/// Checks that `prevResult` lists these addresses.
pub(crate) fn check_previous(call: &Call, addresses: impl Iterator<Item = IpAddr>) -> Result<(), Error> {
    if call.network.conf.previous.is_none() {
        return Err(Error::Config("prevResult is missing: CHECK needs the result of the ADD".to_owned()));
    }
    let known = previous_addresses(call, |_| true);
    for address in addresses {
        if !known.iter().any(|known| known.ip() == address) {
            return differs(format!("prevResult lacks the address {address}, which the ledger has"));
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
    let inside = Inside {
        interface: name.clone(),
        mac: wiring.mac,
        addresses: wiring.addresses.clone(),
        gateway_mac: wiring.gateway_mac,
    };
    let found =
        inside.difference(&mut pod.socket).map_err(Error::kernel("read the network state of the pod"))?;
    found.map_or(Ok(()), differs)
}

fn check_host(wiring: &Wiring) -> Result<(), Error> {
    let read = || Error::kernel("read the host's interfaces");
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
            return differs(format!(
                "the host has no neighbour entry for {} with MAC address {}",
                own.address, wiring.mac
            ));
        }
    }
    Ok(())
}

/// Checks the bridge port and its FDB entry. Returns the interface that has the pod's neighbour entries.
fn check_port(host: &mut RouteSocket, link: &Link, locked: bool, wiring: &Wiring) -> Result<IfIndex, Error> {
    let read = || Error::kernel("read the host's bridge");
    let name = &wiring.host_interface;
    let bridge = host.link(BRIDGE).map_err(read())?.map(|bridge| bridge.index);
    let Some(bridge) = bridge.filter(|_| link.controller == bridge) else {
        return differs(format!("{name} is not a port of {BRIDGE}"));
    };
    if !link.port.is_some_and(|port| port.is_set_like(&Port::of_pod(locked))) {
        return differs(format!("bridge port {name} does not have the settings of a pod port"));
    }
    let forward = FdbEntry { index: link.index, mac: wiring.mac, to: Destination::Port };
    if !host.forwards().map_err(read())?.contains(&forward) {
        return differs(format!("{BRIDGE} has no FDB entry for {} on {name}", wiring.mac));
    }
    Ok(bridge)
}

/// Checks forwarding and routes of a routed pod. Returns the interface that has the pod's neighbour entries.
fn check_routes(host: &mut RouteSocket, link: &Link, wiring: &Wiring) -> Result<IfIndex, Error> {
    if !link.forwards && wiring.addresses.iter().any(|own| own.address.is_ipv4()) {
        return differs(format!("{} on the host does not forward IPv4 packets of the pod", link.name));
    }
    let (routes, _) = host.routes().map_err(Error::kernel("read the host's routes"))?;
    for own in &wiring.addresses {
        let leads = |route: &Route| {
            route.destination == host_prefix(own.address)
                && route.target == Target::Link { index: link.index }
        };
        if !routes.iter().any(leads) {
            return differs(format!("the host has no route to {} through {}", own.address, link.name));
        }
    }
    Ok(link.index)
}
