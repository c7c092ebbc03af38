//! Rules: which routing table answers for which source address.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use nix::errno::Errno;

use crate::address::family;
use crate::route::Table;
use crate::{Error, Operation, RouteSocket};

/// Behind the rule for the host's own addresses (0), before that for the main table (32766).
const PRIORITY: u32 = 84;

/// What is sent from an address goes the way that a table knows. Where the table knows none, the next rule is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The address.
    pub source: IpAddr,
    /// The table.
    pub table: Table,
}

impl Rule {
    /// Makes the rule. Succeeds where it is there already.
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
    /// The rules for single source addresses, of both families.
    pub fn rules(&mut self) -> Result<Vec<Rule>, Error> {
        self.dump(RouteNetlinkMessage::GetRule(RuleMessage::default()), |message| rule(&message))
    }
}

fn rule(message: &RouteNetlinkMessage) -> Option<Rule> {
    let RouteNetlinkMessage::NewRule(message) = message else { return None };
    let (mut source, mut table) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => source = Some(*address),
            RuleAttribute::Table(number) => table = Some(Table::from(*number)),
            _ => {}
        }
    }
    let whole = |source: &IpAddr| message.header.src_len == if source.is_ipv4() { 32 } else { 128 };
    Some(Rule { source: source.filter(whole)?, table: table? })
}
