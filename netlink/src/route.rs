//! Routes: Polder's routes in the main table, and the default routes of pods.

mod metric;

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use polder_api::Family;
use rtnetlink::RouteMessageBuilder;

pub use self::metric::metric;
use crate::address::family;
use crate::{Error, IfIndex, Operation, ROUTE_PROTOCOL, RouteSocket};

/// Base of the table numbers of interfaces: the table is this plus the interface index. Few programs use numbers this
/// high.
const OWN_TABLES: u32 = 84_000;

/// A routing table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteTable(u32);

impl RouteTable {
    /// Table main (254).
    pub const MAIN: Self = Self(RouteHeader::RT_TABLE_MAIN as u32);

    /// The table of one interface.
    pub const fn of_interface(index: IfIndex) -> Self {
        Self(OWN_TABLES + index.number())
    }

    /// The table number.
    pub(crate) const fn number(self) -> u32 {
        self.0
    }
}

impl From<u32> for RouteTable {
    fn from(number: u32) -> Self {
        Self(number)
    }
}

/// A default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The output interface. `None` for a multipath route.
    pub index: Option<IfIndex>,
    /// The gateway, if there is one.
    pub gateway: Option<IpAddr>,
}

/// A route of Polder: in the main table, with Polder's protocol number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    /// The destination.
    pub destination: IpNetwork,
    /// The next hop, or unreachable.
    pub target: KernelTarget,
    /// The preferred source address of packets that the host itself sends.
    pub source: Option<IpAddr>,
    /// The route MTU in bytes, if it is less than the interface's.
    pub mtu: Option<u32>,
}

/// The next hop of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelTarget {
    /// The destinations are neighbours on the interface.
    Link {
        /// The interface.
        index: IfIndex,
    },
    /// Packets go to the gateway.
    Gateway {
        /// The interface of the gateway.
        index: IfIndex,
        /// The gateway.
        gateway: IpAddr,
        /// Flag `onlink`: the gateway is a neighbour on the interface, although no route covers it.
        onlink: bool,
    },
    /// Type `unreachable`: senders get an ICMP error.
    Unreachable,
}

/// A route with Polder's protocol number but another metric, so Polder did not create it. It exists beside Polder's
/// route, or has precedence over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConflictingRoute {
    /// The destination.
    pub destination: IpNetwork,
    /// The metric; the lowest value has precedence, and 0 is the lowest.
    pub priority: u32,
}

impl ConflictingRoute {
    /// Deletes the route.
    pub fn delete(&self) -> Operation {
        delete_with(self.destination, self.priority)
    }
}

/// Creates the route, or replaces Polder's route to its destination atomically.
pub fn replace(route: &Route) -> Operation {
    Operation::new(RouteNetlinkMessage::NewRoute(message(route)), NLM_F_CREATE | NLM_F_REPLACE)
}

/// A route inside a pod, via an on-link gateway. It does not have Polder's protocol number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnlinkRoute {
    /// The routing table.
    pub table: RouteTable,
    /// The destination; `None` for a default route.
    pub destination: Option<IpNetwork>,
    /// The route MTU in bytes, if it is less than the interface's.
    pub mtu: Option<u32>,
    /// The advertised TCP maximum segment size in bytes; `None` derives it from the MTU.
    pub advmss: Option<u32>,
    /// The metric; `None` for the kernel's default.
    pub priority: Option<u32>,
}

impl OnlinkRoute {
    /// A default route in that table.
    pub const fn to_everywhere(table: RouteTable) -> Self {
        Self { table, destination: None, mtu: None, advmss: None, priority: None }
    }
}

/// Creates a route of a pod with flag `onlink`. Fails if the route already exists.
pub fn onlink(index: IfIndex, gateway: IpAddr, route: &OnlinkRoute) -> Operation {
    let everything = match family(gateway) {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    let (to, length) = route.destination.map_or((everything, 0), |to| (to.network(), to.prefix()));
    let builder = RouteMessageBuilder::<IpAddr>::new().destination_prefix(to, length);
    let builder =
        builder.expect("the length of a network is in range").output_interface(index.number()).onlink();
    let mut builder = builder.gateway(gateway).expect("gateway of the family").table_id(route.table.number());
    if let Some(priority) = route.priority {
        builder = builder.priority(priority);
    }
    let metrics: Vec<RouteMetric> =
        route.mtu.map(RouteMetric::Mtu).into_iter().chain(route.advmss.map(RouteMetric::Advmss)).collect();
    if !metrics.is_empty() {
        builder.get_mut().attributes.push(RouteAttribute::Metrics(metrics));
    }
    Operation::new(RouteNetlinkMessage::NewRoute(builder.build()), NLM_F_CREATE | NLM_F_EXCL)
}

/// Deletes Polder's route to the destination. Routes of other programs to it stay.
pub fn delete(destination: IpNetwork) -> Operation {
    delete_with(destination, metric(destination))
}

fn delete_with(destination: IpNetwork, priority: u32) -> Operation {
    let mut message = builder(destination).priority(priority).build();
    message.header.scope = RouteScope::NoWhere;
    message.header.kind = RouteType::Unspec;
    Operation::new(RouteNetlinkMessage::DelRoute(message), 0)
}

fn builder(destination: IpNetwork) -> RouteMessageBuilder {
    RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.ip(), destination.prefix())
        .expect("the prefix length of a network is in range")
        .protocol(RouteProtocol::from(ROUTE_PROTOCOL))
        .priority(metric(destination))
}

fn message(route: &Route) -> RouteMessage {
    let mut builder = builder(route.destination);
    builder = match route.target {
        KernelTarget::Link { index } => builder.output_interface(index.number()).scope(RouteScope::Link),
        KernelTarget::Gateway { index, gateway, onlink } => {
            let builder =
                builder.output_interface(index.number()).gateway(gateway).expect("gateway of the family");
            if onlink { builder.onlink() } else { builder }
        }
        KernelTarget::Unreachable => builder.kind(RouteType::Unreachable),
    };
    if let Some(source) = route.source {
        builder = builder.pref_source(source).expect("source of the family");
    }
    if let Some(mtu) = route.mtu {
        builder.get_mut().attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    builder.build()
}

/// A route of another origin in table main: the kernel, an administrator, DHCP or router advertisements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignRoute {
    /// The destination.
    pub destination: IpNetwork,
    /// The output interface. `None` for a multipath route.
    pub index: Option<IfIndex>,
    /// The gateways. Empty if the destinations are on the link.
    pub gateways: Vec<IpAddr>,
}

/// The protocols of configured routes (`rtnetlink.h`). Routing daemons are excluded: they can have very many routes,
/// and their gateways are on networks for which the kernel has a route.
const CONFIGURED: [RouteProtocol; 5] = [
    RouteProtocol::Kernel,
    RouteProtocol::Boot,
    RouteProtocol::Static,
    RouteProtocol::Ra,
    RouteProtocol::Dhcp,
];

/// The next hop of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextHop {
    /// None: the destination is on the link.
    Destination,
    /// A router.
    Router(IpAddr),
    /// Unknown: there are several next hops, or the route has an attribute that is not decoded here. Treated as not
    /// on the link, to be safe.
    Unsupported,
}

impl NextHop {
    /// The next hop in the answer to a route lookup (`rt_fill_info` in `net/ipv4/route.c`, `rt6_fill_node` in
    /// `net/ipv6/route.c`).
    fn of(attributes: &[RouteAttribute]) -> Self {
        use RouteAttribute::{
            CacheInfo, Destination, Dport, Expires, Flowlabel, Gateway, Iif, IpProto, Mark, Metrics,
            MfcStats, Oif, PrefSource, Preference, Priority, Realm, Source, Sport, Table, TtlPropagate, Uid,
            Via,
        };
        let router = attributes.iter().find_map(|attribute| match attribute {
            Gateway(address) => ip(address),
            Via(RouteVia::Inet(address)) => Some((*address).into()),
            Via(RouteVia::Inet6(address)) => Some((*address).into()),
            _ => None,
        });
        let is_irrelevant = |attribute: &RouteAttribute| {
            matches!(
                attribute,
                CacheInfo(_)
                    | Destination(_)
                    | Dport(_)
                    | Expires(_)
                    | Flowlabel(_)
                    | Iif(_)
                    | IpProto(_)
                    | Mark(_)
                    | Metrics(_)
                    | MfcStats(_)
                    | Oif(_)
                    | PrefSource(_)
                    | Preference(_)
                    | Priority(_)
                    | Realm(_)
                    | Source(_)
                    | Sport(_)
                    | Table(_)
                    | TtlPropagate(_)
                    | Uid(_)
            )
        };
        match router {
            Some(router) => Self::Router(router),
            None if attributes.iter().all(is_irrelevant) => Self::Destination,
            None => Self::Unsupported,
        }
    }

    /// The address of the router, if the next hop is one.
    pub fn router(self) -> Option<IpAddr> {
        match self {
            Self::Router(router) => Some(router),
            Self::Destination | Self::Unsupported => None,
        }
    }
}

/// The result of a route lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteLookup {
    /// The output interface.
    pub index: IfIndex,
    /// The next hop.
    pub next_hop: NextHop,
    /// The source address.
    pub source: Option<IpAddr>,
    /// Whether the address belongs to the host.
    pub local: bool,
}

impl RouteSocket {
    /// Polder's routes in the main table, of both families, and routes with Polder's protocol number but another
    /// metric.
    pub fn routes(&mut self) -> Result<(Vec<Route>, Vec<ConflictingRoute>), Error> {
        let (mut routes, mut conflicting) = (Vec::new(), Vec::new());
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            filter.header.table = RouteHeader::RT_TABLE_MAIN;
            filter.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
            for (route, priority) in self.route_dump(filter, marked)? {
                if priority == metric(route.destination) {
                    routes.push(route);
                } else {
                    conflicting.push(ConflictingRoute { destination: route.destination, priority });
                }
            }
        }
        Ok((routes, conflicting))
    }

    /// The configured routes of other origin in the main table, of both families, except types such as `unreachable`.
    pub fn foreign_routes(&mut self) -> Result<Vec<ForeignRoute>, Error> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for protocol in CONFIGURED {
                let mut filter = RouteMessage::default();
                filter.header.address_family = family;
                filter.header.table = RouteHeader::RT_TABLE_MAIN;
                filter.header.protocol = protocol;
                routes.extend(self.route_dump(filter, foreign)?);
            }
        }
        Ok(routes)
    }

    /// The default routes of a family in a table.
    pub fn default_routes(&mut self, family: Family, table: RouteTable) -> Result<Vec<DefaultRoute>, Error> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        filter.attributes.push(RouteAttribute::Table(table.number()));
        self.route_dump(filter, |message| {
            let found = Attributes::of(message);
            let is_default = message.header.destination_prefix_length == 0;
            is_default.then_some(DefaultRoute { index: found.index, gateway: found.gateway })
        })
    }

    pub(crate) fn route_dump<T>(
        &mut self,
        filter: RouteMessage,
        mut put: impl FnMut(&RouteMessage) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let dump = self.dump(RouteNetlinkMessage::GetRoute(filter), |message| match message {
            RouteNetlinkMessage::NewRoute(message) => put(&message),
            _ => None,
        });
        match dump {
            // The table does not exist: a new namespace has no main table yet.
            Err(error) if error.is_missing() => Ok(Vec::new()),
            other => other,
        }
    }

    /// Looks up the route to `address`; `None` if the kernel has no route.
    pub fn look_up(&mut self, address: IpAddr) -> Result<Option<RouteLookup>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(address);
        message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(address.into()));
        match self.get(RouteNetlinkMessage::GetRoute(message)) {
            Ok(RouteNetlinkMessage::NewRoute(message)) => Ok(looked_up(&message)),
            Ok(_) => Err(Error::NoAnswer),
            Err(Error::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The decoded attributes of a route message.
#[derive(Default)]
pub(crate) struct Attributes {
    pub(crate) destination: Option<IpAddr>,
    pub(crate) gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    pub(crate) index: Option<IfIndex>,
    mtu: Option<u32>,
    pub(crate) priority: u32,
}

impl Attributes {
    pub(crate) fn of(message: &RouteMessage) -> Self {
        let mut all = Self::default();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => all.destination = ip(address),
                RouteAttribute::Gateway(address) => all.gateway = ip(address),
                RouteAttribute::PrefSource(address) => all.source = ip(address),
                RouteAttribute::Oif(index) => all.index = Some(IfIndex::new(*index)),
                RouteAttribute::Priority(priority) => all.priority = *priority,
                RouteAttribute::Metrics(metrics) => {
                    all.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        all
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// The destination of a route.
pub(crate) fn destination(message: &RouteMessage) -> Option<IpNetwork> {
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let destination = Attributes::of(message).destination.unwrap_or(unspecified);
    IpNetwork::new(destination, message.header.destination_prefix_length).ok()
}

/// The outgoing interface of a route with one next hop.
pub(crate) fn outgoing(message: &RouteMessage) -> Option<IfIndex> {
    Attributes::of(message).index
}

/// The route and its metric; `None` if it does not have Polder's protocol number.
fn marked(message: &RouteMessage) -> Option<(Route, u32)> {
    if u8::from(message.header.protocol) != ROUTE_PROTOCOL {
        return None;
    }
    let attributes = Attributes::of(message);
    let target = match (message.header.kind, attributes.index, attributes.gateway) {
        (RouteType::Unicast, Some(index), Some(gateway)) => KernelTarget::Gateway {
            index,
            gateway,
            onlink: message.header.flags.contains(RouteFlags::Onlink),
        },
        (RouteType::Unicast, Some(index), None) => KernelTarget::Link { index },
        _ => KernelTarget::Unreachable,
    };
    let destination = destination(message)?;
    let route = Route { destination, target, source: attributes.source, mtu: attributes.mtu };
    Some((route, attributes.priority))
}

fn foreign(message: &RouteMessage) -> Option<ForeignRoute> {
    let is_configured = CONFIGURED.contains(&message.header.protocol);
    if !is_configured || message.header.kind != RouteType::Unicast {
        return None;
    }
    let destination = destination(message)?;
    let several = message.attributes.iter().filter_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => Some(hops.iter().flat_map(|hop| &hop.attributes)),
        _ => None,
    });
    let gateways =
        message.attributes.iter().chain(several.flatten()).filter_map(|attribute| match attribute {
            RouteAttribute::Gateway(address) => ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
            _ => None,
        });
    Some(ForeignRoute { destination, index: outgoing(message), gateways: gateways.collect() })
}

fn looked_up(message: &RouteMessage) -> Option<RouteLookup> {
    let attributes = Attributes::of(message);
    match message.header.kind {
        kind @ (RouteType::Unicast | RouteType::Local) => Some(RouteLookup {
            index: attributes.index?,
            next_hop: NextHop::of(&message.attributes),
            source: attributes.source,
            local: kind == RouteType::Local,
        }),
        _ => None,
    }
}
