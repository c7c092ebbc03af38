//! ADD: sends one request to the agent, then creates and configures one interface, completely or not at all.

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use polder_api::client::Client;
use polder_api::message::{
    AddRequest, AddressSource, Attach, Permission, Refusal, RefusalKind, Refuse, Reply, Request, Wiring,
};
use polder_api::{AddMark, Attachment, BRIDGE, Family, IfName, Mac};
use polder_netlink::link::{self, Link, Port, VethPair};
use polder_netlink::monitor::Monitor;
use polder_netlink::neighbour::{Destination, FdbEntry, Neighbour};
use polder_netlink::route::{self, KernelTarget, Route};
use polder_netlink::{IfIndex, Operation, RouteSocket};

use crate::action::{FileAction, KernelAction};
use crate::agent::{add_request, own_addresses, unexpected};
use crate::call::Call;
use crate::delegated::{DelegatedResult, DelegatedRoute};
use crate::environment::Verb;
use crate::error::Error;
use crate::limit::{self, Limit};
use crate::netconf::BadConfig;
use crate::pod::{PodNamespace, PodSetup, host_prefix};
use crate::result::{AttachedPod, result};
use crate::retry::retry;
use crate::version::Version;
use crate::{del, delegate};

/// Timeout for the agent's answer: it may have to claim a block first.
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Timeout for the carrier of the pod's interface. On an idle machine the carrier appears within microseconds.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the interface was not created or is not usable. What was created is deleted again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAttached {
    /// Another ADD of the same attachment has not ended yet.
    /// Remedy: none, it is retried.
    #[error("another process is creating the interface of {attachment}")]
    Running {
        /// The attachment.
        attachment: Attachment,
    },
    /// The agent stopped during the ADD, so another pod may get the addresses. The ADD is retried.
    #[error("polder-agent closed the connection before the interface was ready: the addresses are not held")]
    NotHeld,
    /// Another program deleted the bridge. The ADD is retried.
    #[error("bridge {BRIDGE} is missing: polder-agent recreates it")]
    NoBridge,
    /// Another program deleted or renamed the host end of the pair, or the pod ended during the ADD.
    /// Remedy: none, the runtime repeats the ADD; if it persists, find the program that deletes interfaces.
    #[error("interface {name} disappeared after it was created")]
    NoInterface {
        /// The name of the interface.
        name: String,
    },
    /// The kernel did not report a carrier within 5 s, or the bridge does not forward on the port.
    /// Remedy: none, the runtime repeats the ADD; if it persists, check the load of the node.
    #[error("interface {name} has no carrier")]
    NoCarrier {
        /// The name of the interface.
        name: String,
    },
    /// Another program deleted or renamed the pod end of the pair, or the pod ended during the ADD.
    /// Remedy: none, the runtime repeats the ADD; if it persists, check the other plugins of the network.
    #[error("{interface} in the pod disappeared")]
    NoPodInterface {
        /// The name of the interface in the pod.
        interface: IfName,
    },
}

impl Refuse for NotAttached {
    fn kind(&self) -> RefusalKind {
        match self {
            Self::Running { .. } | Self::NotHeld | Self::NoBridge => RefusalKind::TryAgain,
            Self::NoInterface { .. } | Self::NoCarrier { .. } | Self::NoPodInterface { .. } => {
                RefusalKind::Failed
            }
        }
    }
}

/// Attaches the container. Returns the result for the runtime.
pub fn add(call: &Call) -> Result<String, Error> {
    let mut pod = PodNamespace::open(&call.environment)?;
    // Otherwise a second ADD would request a DEL of the IPAM plugin, which would release the addresses of the running
    // pod.
    let interface = &call.environment.interface;
    if pod.link(interface)?.is_some() {
        return Err(Error::InterfaceExists(interface.clone()));
    }
    let Some(plugin) = &call.network.conf.delegate else {
        return retry(Error::passes, || attach(call, &mut pod, None));
    };
    let attached = delegate::add(&call.network, plugin).and_then(|given| {
        check_address_count(call.network.conf.version, &given)?;
        retry(Error::passes, || attach(call, &mut pod, Some(&given)))
    });
    if attached.is_err() {
        // Release the addresses of the IPAM plugin, also after a partial ADD.
        let _ = delegate::call(&call.network, plugin, Verb::Del);
    }
    attached
}

/// Checks that the result can hold all addresses: before CNI 0.3.0 it holds one address of each family.
fn check_address_count(version: Version, given: &DelegatedResult) -> Result<(), Error> {
    let several =
        |family: &Family| given.addresses.iter().filter(|own| Family::of(**own) == *family).count() > 1;
    match Family::BOTH.iter().find(|family| several(family)) {
        Some(&family) if version < Version::V0_3_0 => {
            Err(BadConfig::SeveralAddresses { family, version }.into())
        }
        _ => Ok(()),
    }
}

/// Attaches the container with the agent's addresses, or with those of a delegated IPAM plugin.
fn attach(call: &Call, pod: &mut PodNamespace, given: Option<&DelegatedResult>) -> Result<String, Error> {
    let interface = &call.environment.interface;
    // The open connection keeps the attachment locked until the interface is ready.
    let mut agent = call.network.agent(AGENT_TIMEOUT)?;
    agent.send(Request::Add(request(call, given)))?;
    // What does not depend on the reply is done while the agent works.
    let mark = mark(call);
    let host = Host::open();
    let wiring = match agent.receive()? {
        Reply::Wiring(wiring) => wiring,
        other => return Err(unexpected(other)),
    };
    let routes = given.map_or(&[][..], |given| &given.routes);
    let held = |agent: &mut Client| if agent.is_open() { Ok(()) } else { Err(lost()) };
    let wired = mark.and_then(|_mark| {
        // If the agent ended before the mark was set, the next agent does not know of this ADD.
        held(&mut agent)?;
        let host = wire(pod, &mut host?, call, &wiring, routes)?;
        held(&mut agent).map(|()| host)
    });
    // Also after a failure: the next reply is that of the DEL.
    let permitted = permitted(&mut agent, wiring.permission);
    let wired = wired.and_then(|host| permitted.map(|()| host));
    if wired.is_err() {
        // The agent deletes the interface, then releases the addresses. If the agent is unreachable, this is an
        // ordinary DEL: by the next agent, or with a tombstone.
        let _ = agent.ask(Request::Del(call.attachment())).map(drop).or_else(|_| del::interface(call));
    }
    let host = wired?;
    // If the agent has ended since, the next one finds the interface.
    let _ = agent.send(Request::Attached);
    let netns = call.environment.netns.as_deref().unwrap_or_else(|| std::path::Path::new(""));
    Ok(result(
        &call.network.conf,
        &AttachedPod { wiring: &wiring, host_mac: host.mac, interface, netns, given },
    ))
}

/// Marks this ADD as in progress, for an agent that starts before the ADD ends.
fn mark(call: &Call) -> Result<AddMark, Error> {
    AddMark::set(&call.network.conf.socket, &call.attachment()).map_err(|source| {
        if source.kind() == ErrorKind::WouldBlock {
            return Error::Refused(NotAttached::Running { attachment: call.attachment() }.into());
        }
        Error::File { action: FileAction::Mark, source }
    })
}

/// Waits until the packet filter lets the pod send and receive.
fn permitted(agent: &mut Client, permission: Permission) -> Result<(), Error> {
    match permission {
        Permission::Given => Ok(()),
        Permission::Follows => match agent.receive()? {
            Reply::Permitted => Ok(()),
            other => Err(unexpected(other)),
        },
    }
}

/// The error if the agent closed the connection: the addresses are no longer reserved, and another pod may get them.
fn lost() -> Error {
    Error::Refused(NotAttached::NotHeld.into())
}

fn request(call: &Call, given: Option<&DelegatedResult>) -> AddRequest {
    AddRequest {
        source: match given {
            None => own_addresses(call),
            Some(given) => AddressSource::Delegated(given.addresses.clone()),
        },
        ..add_request(call)
    }
}

/// The host's side.
struct Host {
    socket: RouteSocket,
    /// The bridge, if it exists.
    bridge: Option<Link>,
}

impl Host {
    fn open() -> Result<Self, Error> {
        let mut socket = RouteSocket::open().map_err(Error::kernel(KernelAction::OpenHost))?;
        let bridge = read_link(&mut socket, BRIDGE)?;
        Ok(Self { socket, bridge })
    }
}

/// Creates the veth pair and configures both ends. Returns the host end.
fn wire(
    pod: &mut PodNamespace,
    host: &mut Host,
    call: &Call,
    wiring: &Wiring,
    routes: &[DelegatedRoute],
) -> Result<Link, Error> {
    let Host { socket: host, bridge } = host;
    let bridge_before = match wiring.attach {
        Attach::Bridge { .. } => Some(bridge.as_ref().ok_or_else(|| Refusal::from(NotAttached::NoBridge))?),
        Attach::Routed => None,
    };
    let bridge = bridge_before.map(|bridge| bridge.index);
    let pair = VethPair {
        name: &wiring.host_interface,
        // The gateway of a routed pod is the host end of its pair: it needs the MAC address that the pod sends to.
        mac: bridge.is_none().then_some(wiring.gateway_mac),
        peer_name: &call.environment.interface,
        peer_mac: wiring.mac,
        peer_namespace: pod.file.as_fd(),
        mtu: wiring.mtu,
        controller: bridge,
    };
    let name = wiring.host_interface.as_str();
    let settings = link::change(name).alias(&wiring.alias);
    let settings = match wiring.attach {
        Attach::Bridge { locked } => settings.port(&Port::of_pod(locked)),
        // Forwarding may be off for new interfaces of this host. A repair by the agent would be too late for the first
        // packets.
        Attach::Routed => settings.forwarding(),
    };
    let settings = [link::without_link_local(name), settings.up().into()];
    let created = match host.create_link(link::create_veth(&pair), settings) {
        Ok(Some(link)) => link,
        Ok(None) => find(host, name)?,
        Err(error) => return Err(not_created(error, &call.environment.interface, wiring)),
    };
    if bridge.is_none() && wiring.addresses.iter().any(|own| own.address.is_ipv6()) {
        allow_ipv6(name)?;
    }
    if bridge.is_none()
        && !call.options.ports.is_empty()
        && wiring.addresses.iter().any(|own| own.address.is_ipv4())
    {
        allow_loopback(name)?;
    }
    let name_of_host = || wiring.host_interface.clone();
    let limit = call.options.bandwidth.ingress.map(|limit| Limit {
        bucket: limit.token_bucket(wiring.mtu),
        index: created.index,
        action: KernelAction::LimitToPod { host: name_of_host() },
    });
    let action = KernelAction::ReachPod { host: name_of_host() };
    limit::execute(host, limit, towards_pod(wiring, bridge, created.index), action)?;
    let setup = PodSetup { wiring, routes, egress: call.options.bandwidth.egress };
    pod.configure(&call.environment.interface, created.peer, &setup)?;
    let ready =
        Ready { name, attach: wiring.attach, bridge_ran: bridge_before.is_some_and(|link| link.running) };
    ready.wait(host)
}

/// Why the pair was not created.
fn not_created(error: polder_netlink::Error, interface: &IfName, wiring: &Wiring) -> Error {
    match error.errno() {
        // `BR_MAX_PORTS` of net/bridge/br_private.h.
        Some(Errno::EXFULL) => Error::BridgeFull,
        _ => {
            let (host, interface) = (wiring.host_interface.clone(), interface.clone());
            Error::kernel(KernelAction::CreatePair { host, interface })(error)
        }
    }
}

/// Enables IPv6 on the host end, where new interfaces of this host have it disabled (`conf/default`).
fn allow_ipv6(name: &str) -> Result<(), Error> {
    let setting = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    let is_disabled = fs::read_to_string(&setting).is_ok_and(|value| value.trim() != "0");
    if !is_disabled {
        return Ok(());
    }
    fs::write(&setting, "0").map_err(Error::file(FileAction::EnableIpv6 { path: setting.clone() }))
}

/// Lets the host end carry replies to the host's own connections to a host port on 127.0.0.1. With a bridge, the agent
/// sets this for the bridge.
fn allow_loopback(name: &str) -> Result<(), Error> {
    let setting = format!("/proc/sys/net/ipv4/conf/{name}/route_localnet");
    if fs::read_to_string(&setting).is_ok_and(|value| value.trim() == "1") {
        return Ok(());
    }
    fs::write(&setting, "1").map_err(Error::file(FileAction::AllowLoopback { path: setting.clone() }))
}

/// The FDB entry, neighbour entries and routes to the pod. They are static, so no ARP or neighbour discovery is needed.
fn towards_pod(wiring: &Wiring, bridge: Option<IfIndex>, port: IfIndex) -> Vec<Operation> {
    let neighbour = |index, mac: Mac| {
        wiring.addresses.iter().map(move |own| Neighbour { index, address: own.address, mac }.replace())
    };
    match bridge {
        Some(bridge) => {
            let fdb_entry = FdbEntry { index: port, mac: wiring.mac, to: Destination::Port };
            let strays = routes(&wiring.strays, bridge);
            std::iter::once(fdb_entry.replace()).chain(neighbour(bridge, wiring.mac)).chain(strays).collect()
        }
        None => {
            let all: Vec<IpAddr> = wiring.addresses.iter().map(|own| own.address).collect();
            routes(&all, port).chain(neighbour(port, wiring.mac)).collect()
        }
    }
}

fn routes(addresses: &[IpAddr], index: IfIndex) -> impl Iterator<Item = Operation> {
    addresses.iter().map(move |address| {
        let destination = host_prefix(*address);
        route::replace(&Route { destination, target: KernelTarget::Link { index }, source: None, mtu: None })
    })
}

fn find(host: &mut RouteSocket, name: &str) -> Result<Link, Error> {
    let gone = || Refusal::from(NotAttached::NoInterface { name: name.to_owned() });
    Ok(read_link(host, name)?.ok_or_else(gone)?)
}

fn read_link(host: &mut RouteSocket, name: &str) -> Result<Option<Link>, Error> {
    host.link(name).map_err(|source| {
        let action = KernelAction::ReadInterface { name: name.to_owned() };
        Error::Kernel { action, source }
    })
}

/// The condition on which the pod's first packet is not lost in either direction. The kernel sets the carrier from a
/// work queue, shortly after the pod end is up.
struct Ready<'a> {
    /// The host end of the pair.
    name: &'a str,
    attach: Attach,
    /// Whether the bridge was running before: it is, once it had a port in state forwarding. A bridge drops packets of
    /// the host until then.
    bridge_ran: bool,
}

impl Ready<'_> {
    /// Waits until the condition is met. Returns the host end of the pair.
    fn wait(&self, host: &mut RouteSocket) -> Result<Link, Error> {
        if let Some(link) = self.read(host)? {
            return Ok(link);
        }
        let failed = || Error::kernel(KernelAction::WaitForCarrier { name: self.name.to_owned() });
        let mut monitor = Monitor::of_links().map_err(failed())?;
        let deadline = Instant::now() + CARRIER_TIMEOUT;
        loop {
            if let Some(link) = self.read(host)? {
                return Ok(link);
            }
            // Events of other interfaces do not extend the deadline.
            let left = deadline.saturating_duration_since(Instant::now());
            if left < Duration::from_millis(1) {
                return Err(Error::Refused(NotAttached::NoCarrier { name: self.name.to_owned() }.into()));
            }
            monitor.set_timeout(left).map_err(failed())?;
            monitor.wait().map_err(failed())?;
        }
    }

    /// The host end of the pair, if the condition is met.
    fn read(&self, host: &mut RouteSocket) -> Result<Option<Link>, Error> {
        let link = find(host, self.name)?;
        let is_met = match self.attach {
            Attach::Bridge { .. } => {
                link.port.is_some_and(|port| port.forwarding)
                    && (self.bridge_ran || find(host, BRIDGE)?.running)
            }
            Attach::Routed => link.running,
        };
        Ok(is_met.then_some(link))
    }
}
