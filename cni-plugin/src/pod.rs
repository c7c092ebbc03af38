//! The pod's network namespace, and the configuration of the pod's interface in it.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use ipnetwork::IpNetwork;
use polder_api::message::{Refusal, Wiring};
use polder_api::{Family, IfName};
use polder_netlink::link::Link;
use polder_netlink::namespace::{self, NamespaceId};
use polder_netlink::neighbour::Neighbour;
use polder_netlink::route::{OnlinkRoute, RouteTable};
use polder_netlink::rule::RoutingRule;
use polder_netlink::{IfIndex, Operation, RouteSocket, address, link, route};

use crate::action::{FileAction, KernelAction};
use crate::add::NotAttached;
use crate::delegated::DelegatedRoute;
use crate::environment::Environment;
use crate::error::Error;
use crate::limit::{self, Limit};
use crate::options::bandwidth::RateLimit;

/// The network namespace of `CNI_NETNS` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadNamespace {
    /// The file of the namespace does not exist or cannot be opened: the pod ended, or the runtime has another mount
    /// namespace.
    /// Remedy: none if the pod was deleted; else check that the path exists on the node.
    #[error("CNI_NETNS {}: {problem}", path.display())]
    Unreadable {
        /// The value of `CNI_NETNS`.
        path: PathBuf,
        /// The cause.
        problem: io::Error,
    },
    /// The path leads to the namespace of the plugin itself, for example because a pod with hostNetwork was passed.
    #[error(
        "CNI_NETNS {}: is the namespace that the plugin itself runs in: refusing to change the host's network",
        path.display()
    )]
    Own {
        /// The value of `CNI_NETNS`.
        path: PathBuf,
    },
    /// The file is not a network namespace, or the plugin may not enter it.
    /// Remedy: check the path, and that the runtime runs the plugin as root.
    #[error("CNI_NETNS {}: is not a network namespace ({problem})", path.display())]
    OtherFile {
        /// The value of `CNI_NETNS`.
        path: PathBuf,
        /// The cause.
        problem: io::Error,
    },
}

/// The configuration of the pod's interface.
#[derive(Debug)]
pub(crate) struct PodSetup<'a> {
    /// Addresses, gateways and MTU.
    pub wiring: &'a Wiring,
    /// The routes, instead of a default route.
    pub routes: &'a [DelegatedRoute],
    /// The limit for packets from the pod.
    pub egress: Option<RateLimit>,
}

/// An open network namespace with a netlink socket in it.
#[derive(Debug)]
pub struct PodNamespace {
    /// The open namespace file.
    pub file: File,
    /// A netlink socket in the namespace.
    pub socket: RouteSocket,
}

impl PodNamespace {
    /// Opens the namespace of `CNI_NETNS`, which must not be the host's own.
    pub fn open(environment: &Environment) -> Result<Self, Error> {
        let path = environment.netns.as_deref().unwrap_or(Path::new(""));
        let unreadable = |problem| BadNamespace::Unreadable { path: path.to_owned(), problem };
        let file = namespace::open(path).map_err(unreadable)?;
        let same = NamespaceId::of(&file).and_then(|id| Ok(id == NamespaceId::own()?)).map_err(unreadable)?;
        if same && !environment.own_netns_allowed {
            return Err(BadNamespace::Own { path: path.to_owned() }.into());
        }
        let inside = namespace::within(&file, RouteSocket::open)
            .map_err(|problem| BadNamespace::OtherFile { path: path.to_owned(), problem })?;
        let socket = inside.map_err(Error::kernel(KernelAction::OpenPod))?;
        Ok(Self { file, socket })
    }

    /// Reads the interface of that name in the namespace; `None` if it does not exist.
    pub fn link(&mut self, name: &IfName) -> Result<Option<Link>, Error> {
        let action = KernelAction::ReadPodInterface { interface: name.clone() };
        self.socket.link(name.as_str()).map_err(Error::kernel(action))
    }

    /// Sets up the pod's interface: bandwidth limit, addresses, neighbour entry of the gateway, and routes. `index` is
    /// its index, if known.
    ///
    /// The first interface gets the pod's default route. A later one gets a default route in its own table, for packets
    /// from its own addresses: replies must leave through the interface of the request, or the node drops them.
    pub(crate) fn configure(
        &mut self,
        interface: &IfName,
        index: Option<IfIndex>,
        setup: &PodSetup<'_>,
    ) -> Result<(), Error> {
        let PodSetup { wiring, routes, egress } = *setup;
        let action = || KernelAction::ConfigurePod { interface: interface.clone() };
        let gone = || Refusal::from(NotAttached::NoPodInterface { interface: interface.clone() });
        let index = match index {
            Some(index) => index,
            None => self.link(interface)?.ok_or_else(gone)?.index,
        };
        if wiring.addresses.iter().any(|own| own.address.is_ipv6()) {
            // New interfaces of the namespace may have IPv6 disabled (`conf/default`).
            self.set_ipv6(interface, "disable_ipv6", "0")?;
            // Keep IPv6 addresses when another program sets the interface down and up to change something else.
            self.set_ipv6(interface, "keep_addr_on_down", "1")?;
        }
        let mut operations: Vec<Operation> = vec![
            // Not all runtimes set lo up.
            link::change("lo").up().into(),
            link::without_link_local(interface.as_str()),
        ];
        operations.extend(wiring.addresses.iter().map(|own| address::add(index, host_prefix(own.address))));
        operations.push(link::change_index(index).up().into());
        let mut led_out = Vec::new();
        for own in &wiring.addresses {
            let family = Family::of(own.address);
            let gateway = Neighbour { index, address: own.gateway, mac: wiring.gateway_mac };
            operations.push(gateway.replace());
            let known = self.socket.default_routes(family, RouteTable::MAIN);
            let is_first = known.map_err(Error::kernel(action()))?.is_empty();
            let table = if is_first { RouteTable::MAIN } else { RouteTable::of_interface(index) };
            if !is_first {
                operations.push(RoutingRule { source: own.address, table }.add());
            }
            // The routes of the first address serve the other addresses of the same family.
            if led_out.contains(&family) {
                continue;
            }
            led_out.push(family);
            if routes.is_empty() {
                operations.push(route::onlink(index, own.gateway, &OnlinkRoute::to_everywhere(table)));
            }
            let of_family = |route: &&DelegatedRoute| Family::of(route.dst.ip()) == family;
            operations.extend(routes.iter().filter(of_family).map(|given| {
                let DelegatedRoute { dst, mtu, advmss, priority } = *given;
                let route = OnlinkRoute { table, destination: Some(dst), mtu, advmss, priority };
                route::onlink(index, own.gateway, &route)
            }));
        }
        let limit = egress.map(|limit| Limit {
            bucket: limit.token_bucket(wiring.mtu),
            index,
            action: KernelAction::LimitFromPod { interface: interface.clone() },
        });
        limit::execute(&mut self.socket, limit, operations, action())
    }

    /// Sets an IPv6 sysctl of the interface in the pod.
    fn set_ipv6(&self, interface: &IfName, setting: &str, value: &'static str) -> Result<(), Error> {
        let path = format!("/proc/sys/net/ipv6/conf/{interface}/{setting}");
        let failed = || Error::file(FileAction::SetInPod { path: path.clone(), value });
        let written = namespace::within(&self.file, || {
            let is_set = fs::read_to_string(&path).is_ok_and(|found| found.trim() == value);
            if is_set { Ok(()) } else { fs::write(&path, value) }
        });
        match written.map_err(failed())? {
            // The kernel has no IPv6, or sysctls are read-only: not a reason to fail the ADD.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ReadOnlyFilesystem) => {
                Ok(())
            }
            written => written.map_err(failed()),
        }
    }
}

/// The prefix of one address: /32 or /128.
pub fn host_prefix(address: std::net::IpAddr) -> IpNetwork {
    IpNetwork::new(address, Family::of(address).bits()).expect("the length of a whole address")
}
