//! Routes and rules of others: what the kernel asks before ours, or instead of them. They are read, and never changed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use polder_api::Family;

use crate::route::Attributes;
use crate::{Error, IfIndex, ROUTE_PROTOCOL, RouteSocket};

/// The number of the table that everybody uses.
pub const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// The number of the table of the host's own addresses, which the kernel keeps.
pub const LOCAL: u32 = 255;

/// A route of any table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyRoute {
    /// Where to.
    pub destination: IpNetwork,
    /// The number of its table.
    pub table: u32,
    /// Its metric: of two routes to the same destination the lower one is taken.
    pub priority: u32,
    /// What becomes of packets.
    pub leads: Leads,
    /// The interface that it leads to, if there is one.
    pub index: Option<IfIndex>,
    /// The router that it leads to, if there is one.
    pub gateway: Option<IpAddr>,
    /// Whether it carries our protocol number, in the main table.
    pub ours: bool,
}

/// What becomes of packets that take a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leads {
    /// They are sent on.
    On,
    /// They are for the host itself.
    ToHost,
    /// They are dropped or refused; the word for it in `ip route`.
    Nowhere(&'static str),
}

/// A rule that says which table is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnyRule {
    /// The packets that it is for.
    pub family: Family,
    /// Rules are asked in this order.
    pub priority: u32,
    /// The source addresses that it is for, if not all.
    pub source: Option<IpNetwork>,
    /// The destinations that it is for, if not all.
    pub destination: Option<IpNetwork>,
    /// The interface that packets come in by, if not any.
    pub input: Option<String>,
    /// Whether a forwarded packet without a mark can be one that it is for, by what else it asks for.
    pub otherwise: Applies,
    /// Whether it is for all packets but those.
    pub inverted: bool,
    /// What it does with them.
    pub action: RuleTarget,
}

/// To how many of some packets something applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Applies {
    /// To none of them.
    Never,
    /// Perhaps to some.
    Perhaps,
    /// To all of them.
    Always,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleTarget {
    /// The table is asked. Routes of at most that prefix length do not count.
    Table(u32, Option<u32>),
    /// Packets are dropped or refused; the word for it in `ip rule`.
    Nowhere(&'static str),
    /// The rules from that priority on are asked next.
    Goto(u32),
    /// The next rule is asked.
    Nothing,
}

impl RouteSocket {
    /// The routes of all tables and both families that `wanted` wants, by destination.
    pub fn any_routes(&mut self, wanted: impl Fn(IpNetwork) -> bool) -> Result<Vec<AnyRoute>, Error> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            routes.extend(self.route_dump(filter, |message| any_route(message, &wanted))?);
        }
        Ok(routes)
    }

    /// The rules of both families, in the order in which they are asked.
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
    let leads = match message.header.kind {
        RouteType::Unicast => Leads::On,
        RouteType::Local => Leads::ToHost,
        RouteType::BlackHole => Leads::Nowhere("blackhole"),
        RouteType::Unreachable => Leads::Nowhere("unreachable"),
        RouteType::Prohibit => Leads::Nowhere("prohibit"),
        // The next rule is asked, or it is for no single address.
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
        leads,
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
    let mut otherwise = if header.tos == 0 { Applies::Always } else { Applies::Perhaps };
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
            // None is told as all bits set.
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
            // What is forwarded comes from no socket, and from no tunnel's metadata.
            RuleAttribute::Oifname(_) | RuleAttribute::TunId(_) | RuleAttribute::L3MDev(true) => {
                Applies::Never
            }
            RuleAttribute::L3MDev(false) => continue,
            RuleAttribute::UidRange(range) if range.start > 0 => Applies::Never,
            RuleAttribute::UidRange(range) if range.end == u32::MAX => continue,
            _ => Applies::Perhaps,
        };
        otherwise = otherwise.min(asked);
    }
    if mark & bits.unwrap_or(u32::MAX) != 0 {
        otherwise = Applies::Never;
    }
    let action = match header.action {
        RuleAction::ToTable => RuleTarget::Table(table, suppressed),
        RuleAction::Blackhole => RuleTarget::Nowhere("blackhole"),
        RuleAction::Unreachable => RuleTarget::Nowhere("unreachable"),
        RuleAction::Prohibit => RuleTarget::Nowhere("prohibit"),
        RuleAction::Goto => RuleTarget::Goto(goto),
        _ => RuleTarget::Nothing,
    };
    let inverted = header.flags.contains(RuleFlags::Invert);
    Some(AnyRule { family, priority, source, destination, input, otherwise, inverted, action })
}
