//! Routing policy rules that select a table by source address.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use nix::errno::Errno;

use crate::address::family;
use crate::route::RouteTable;
use crate::{Error, Operation, RouteSocket};

/// The rule priority: after the rule for table local (0), before the one for table main (32766).
const PRIORITY: u32 = 84;

/// A rule: packets from `source` are routed by `table`. If the table has no route, the kernel continues with the next
/// rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoutingRule {
    /// The source address.
    pub source: IpAddr,
    /// The routing table.
    pub table: RouteTable,
}

impl RoutingRule {
    /// Creates the rule. Succeeds if it already exists.
    pub fn add(&self) -> Operation {
        let mut message = RuleMessage::default();
        message.header.family = family(self.source);
        message.header.src_len = if self.source.is_ipv4() { 32 } else { 128 };
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![
            RuleAttribute::Source(self.source),
            RuleAttribute::Table(self.table.number()),
            RuleAttribute::Priority(PRIORITY),
        ];
        let operation = Operation::new(RouteNetlinkMessage::NewRule(message), NLM_F_CREATE | NLM_F_EXCL);
        operation.harmless_if(Errno::EEXIST)
    }
}

impl RouteSocket {
    /// The rules with a single source address, of both families.
    pub fn rules(&mut self) -> Result<Vec<RoutingRule>, Error> {
        self.dump(RouteNetlinkMessage::GetRule(RuleMessage::default()), |message| rule(&message))
    }
}

fn rule(message: &RouteNetlinkMessage) -> Option<RoutingRule> {
    let RouteNetlinkMessage::NewRule(message) = message else { return None };
    let (mut source, mut table) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => source = Some(*address),
            RuleAttribute::Table(number) => table = Some(RouteTable::from(*number)),
            _ => {}
        }
    }
    let whole = |source: &IpAddr| message.header.src_len == if source.is_ipv4() { 32 } else { 128 };
    Some(RoutingRule { source: source.filter(whole)?, table: table? })
}
