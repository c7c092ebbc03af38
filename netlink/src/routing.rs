//! Routes and rules of all tables, which may have precedence over Polder's routes. They are read, never changed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use polder_api::Family;

use crate::route::Attributes;
use crate::{Error, IfIndex, ROUTE_PROTOCOL, RouteSocket};

/// The number of table main.
pub const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// The number of table local: the host's own addresses, maintained by the kernel.
pub const LOCAL: u32 = 255;

/// A route of any table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyRoute {
    /// The destination.
    pub destination: IpNetwork,
    /// The table number.
    pub table: u32,
    /// The metric: of two routes to the same destination, the kernel uses the one with the lower metric.
    pub priority: u32,
    /// The action for matching packets.
    pub action: RouteAction,
    /// The output interface, if there is one.
    pub index: Option<IfIndex>,
    /// The gateway, if there is one.
    pub gateway: Option<IpAddr>,
    /// Whether it has Polder's protocol number and is in table main.
    pub ours: bool,
}

/// The action of a route for matching packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteAction {
    /// Forwards them.
    Forward,
    /// Delivers them to the host itself.
    Local,
    /// Drops or rejects them; the route type as in `ip route`.
    Drop(&'static str),
}

/// A routing policy rule (`ip rule`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyRule {
    /// The address family.
    pub family: Family,
    /// The priority: the kernel evaluates rules in ascending order.
    pub priority: u32,
    /// The source prefix, if any.
    pub source: Option<IpNetwork>,
    /// The destination prefix, if any.
    pub destination: Option<IpNetwork>,
    /// The input interface (`iif`), if any.
    pub input: Option<String>,
    /// Whether the remaining selectors can match a forwarded packet without a mark.
    pub otherwise: RuleCoverage,
    /// Whether the selectors are inverted (`not`).
    pub inverted: bool,
    /// The action for matching packets.
    pub action: RuleTarget,
}

/// How many packets of a group something applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleCoverage {
    /// None.
    Never,
    /// Possibly some.
    Perhaps,
    /// All.
    Always,
}

/// The action of a routing policy rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleTarget {
    /// Look up the table. Routes with at most that prefix length are ignored (`suppress_prefixlength`).
    Table(u32, Option<u32>),
    /// Drop or reject packets; the action as in `ip rule`.
    Drop(&'static str),
    /// Continue with the rules from that priority on.
    Goto(u32),
    /// Continue with the next rule.
    Continue,
}

impl RouteSocket {
    /// The routes of all tables and both families whose destination `wanted` accepts.
    pub fn any_routes(&mut self, wanted: impl Fn(IpNetwork) -> bool) -> Result<Vec<AnyRoute>, Error> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            routes.extend(self.route_dump(filter, |message| any_route(message, &wanted))?);
        }
        Ok(routes)
    }

    /// The rules of both families, in order of evaluation.
    pub fn any_rules(&mut self) -> Result<Vec<AnyRule>, Error> {
        let mut rules = self.dump(RouteNetlinkMessage::GetRule(RuleMessage::default()), |message| {
            let RouteNetlinkMessage::NewRule(message) = message else { return None };
            any_rule(&message)
        })?;
        rules.sort_by_key(|rule| rule.priority);
        Ok(rules)
    }
}

fn any_route(message: &RouteMessage, wanted: &impl Fn(IpNetwork) -> bool) -> Option<AnyRoute> {
    let action = match message.header.kind {
        RouteType::Unicast => RouteAction::Forward,
        RouteType::Local => RouteAction::Local,
        RouteType::BlackHole => RouteAction::Drop("blackhole"),
        RouteType::Unreachable => RouteAction::Drop("unreachable"),
        RouteType::Prohibit => RouteAction::Drop("prohibit"),
        // Type `throw`, or a type that is not for unicast.
        _ => return None,
    };
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let found = Attributes::of(message);
    let length = message.header.destination_prefix_length;
    let destination = IpNetwork::new(found.destination.unwrap_or(unspecified), length).ok()?;
    if !wanted(destination) {
        return None;
    }
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(number) => Some(*number),
        _ => None,
    });
    let table = table.unwrap_or_else(|| u32::from(message.header.table));
    Some(AnyRoute {
        destination,
        table,
        priority: found.priority,
        action,
        index: found.index,
        gateway: found.gateway,
        ours: table == MAIN && u8::from(message.header.protocol) == ROUTE_PROTOCOL,
    })
}

fn any_rule(message: &RuleMessage) -> Option<AnyRule> {
    let family = match message.header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    let header = &message.header;
    let (mut priority, mut table, mut goto, mut suppressed) = (0, u32::from(header.table), 0, None);
    let (mut source, mut destination, mut input) = (None, None, None);
    let (mut mark, mut bits) = (0, None);
    let mut otherwise = if header.tos == 0 { RuleCoverage::Always } else { RuleCoverage::Perhaps };
    for attribute in &message.attributes {
        let asked = match attribute {
            RuleAttribute::Priority(number) => {
                priority = *number;
                continue;
            }
            RuleAttribute::Table(number) => {
                table = *number;
                continue;
            }
            RuleAttribute::Goto(number) => {
                goto = *number;
                continue;
            }
            // The kernel reports "none" as all bits set.
            RuleAttribute::SuppressPrefixLen(length) => {
                suppressed = Some(*length).filter(|length| *length != u32::MAX);
                continue;
            }
            RuleAttribute::Source(address) => {
                source = IpNetwork::new(*address, header.src_len).ok();
                continue;
            }
            RuleAttribute::Destination(address) => {
                destination = IpNetwork::new(*address, header.dst_len).ok();
                continue;
            }
            RuleAttribute::Iifname(name) => {
                input = Some(name.clone());
                continue;
            }
            RuleAttribute::FwMark(number) => {
                mark = *number;
                continue;
            }
            RuleAttribute::FwMask(number) => {
                bits = Some(*number);
                continue;
            }
            RuleAttribute::SuppressIfGroup(_) | RuleAttribute::Realm(_) | RuleAttribute::Protocol(_) => {
                continue;
            }
            // Forwarded packets have no socket and no tunnel metadata.
            RuleAttribute::Oifname(_) | RuleAttribute::TunId(_) | RuleAttribute::L3MDev(true) => {
                RuleCoverage::Never
            }
            RuleAttribute::L3MDev(false) => continue,
            RuleAttribute::UidRange(range) if range.start > 0 => RuleCoverage::Never,
            RuleAttribute::UidRange(range) if range.end == u32::MAX => continue,
            _ => RuleCoverage::Perhaps,
        };
        otherwise = otherwise.min(asked);
    }
    if mark & bits.unwrap_or(u32::MAX) != 0 {
        otherwise = RuleCoverage::Never;
    }
    let action = match header.action {
        RuleAction::ToTable => RuleTarget::Table(table, suppressed),
        RuleAction::Blackhole => RuleTarget::Drop("blackhole"),
        RuleAction::Unreachable => RuleTarget::Drop("unreachable"),
        RuleAction::Prohibit => RuleTarget::Drop("prohibit"),
        RuleAction::Goto => RuleTarget::Goto(goto),
        _ => RuleTarget::Continue,
    };
    let inverted = header.flags.contains(RuleFlags::Invert);
    Some(AnyRule { family, priority, source, destination, input, otherwise, inverted, action })
}
