//! Tables of others: which of their chains judge packets, and what their rules say, as far as it can be told.

mod rule;

use ipnetwork::IpNetwork;
use polder_api::Family;

use self::rule::{ReadRule, names, read};
use super::decode::{self, number, value};
use super::family::TableFamily;
use super::{FilterSocket, encode};
use crate::Error;
use crate::error::text;

/// What becomes of a packet that no rule of a base chain judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// It passes.
    Accept,
    /// It is dropped.
    Drop,
}

/// What a chain judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Judged {
    /// What is for the host itself: hook input.
    ForHost,
    /// What is forwarded: hook forward.
    Forwarded,
    /// All that comes in: hook prerouting.
    Incoming,
    /// All that goes out: hook postrouting.
    Outgoing,
}

/// A chain on a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChain {
    /// The family of its table.
    pub family: TableFamily,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Its policy.
    pub policy: Policy,
}

/// Names of interfaces in a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Names {
    /// This one.
    Exactly(String),
    /// All that begin so.
    Prefixed(String),
}

/// What must hold for a rule to apply.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Condition {
    /// The packet came in through an interface of one of these names.
    Input(Vec<Names>),
    /// The packet goes out through an interface of one of these names.
    Output(Vec<Names>),
    /// The packet is of that family.
    Family(Family),
    /// The packet comes from an address of that network.
    Source(IpNetwork),
    /// The packet goes to an address of that network.
    Destination(IpNetwork),
    /// The host would not send to the packet's source through the interface that it came in by.
    OtherWayBack,
    /// Something else.
    Other,
}

/// What a rule does with a packet to which it applies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Judgement {
    /// The packet passes this base chain.
    Accept,
    /// It is dropped or refused.
    Drop,
    /// It goes to that chain, and comes back if that does not judge it.
    Jump(String),
    /// It goes to that chain, and then back to where this one was jumped to from.
    Goto(String),
    /// It goes back to where this chain was jumped to from.
    Return,
    /// It goes to the next rule.
    None,
}

/// A rule of others.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ForeignRule {
    /// All of these must hold.
    pub conditions: Vec<Condition>,
    /// What then happens.
    pub judgement: Judgement,
}

impl FilterSocket {
    /// All chains that judge that, of all tables.
    pub fn base_chains(&mut self, judged: Judged) -> Result<Vec<BaseChain>, Error> {
        self.dump(encode::get_all_chains(), |message| {
            let family = TableFamily::of(message.header.family)?;
            base_chain(family, judged, &decode::body(&message, decode::NEW_CHAIN)?)
        })
    }

    /// The rules of one chain, in order. Of a chain that is not there, none.
    pub fn rules_of(
        &mut self,
        family: TableFamily,
        table: &str,
        chain: &str,
    ) -> Result<Vec<ForeignRule>, Error> {
        let found = self.dump(encode::get_rules_of_chain(family, table, chain), |message| {
            let body = decode::body(&message, decode::NEW_RULE)?;
            // Kernels before 5.2 send those of all chains.
            let is_of_chain = text(&body, decode::RULE_TABLE).as_deref() == Some(table)
                && text(&body, decode::RULE_CHAIN).as_deref() == Some(chain);
            is_of_chain.then(|| read(&body))
        });
        let read = match found {
            Err(error) if error.is_missing() => return Ok(Vec::new()),
            found => found?,
        };
        read.into_iter().map(|rule| self.resolve(family, table, rule)).collect()
    }

    /// Looks up the names that a rule has in sets.
    fn resolve(&mut self, family: TableFamily, table: &str, rule: ReadRule) -> Result<ForeignRule, Error> {
        let mut conditions = rule.conditions;
        for (side, set) in rule.sets {
            // Ranges, and what stands for everything, are not names: of such a set nobody knows what is in it.
            let elements = self.dump(encode::get_elements_of(family, table, &set), |message| {
                Some(decode::keys(&message, |key, ends_range| Ok(key.filter(|_| !ends_range).map(names))))
            })?;
            let elements: Result<Vec<_>, _> = elements.into_iter().collect();
            let names: Option<Vec<Names>> = elements?.into_iter().flatten().collect();
            conditions.push(names.map_or(Condition::Other, |names| side.condition(names)));
        }
        Ok(ForeignRule { conditions, judgement: rule.judgement })
    }
}

// `include/uapi/linux/netfilter/nf_tables.h` and `include/uapi/linux/netfilter.h`, all of these.
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_IN: u32 = 1;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;

fn base_chain(family: TableFamily, judged: Judged, body: &[u8]) -> Option<BaseChain> {
    let hook = value(body, NFTA_CHAIN_HOOK)?;
    let wanted = match judged {
        Judged::ForHost => NF_INET_LOCAL_IN,
        Judged::Forwarded => NF_INET_FORWARD,
        Judged::Incoming => NF_INET_PRE_ROUTING,
        Judged::Outgoing => NF_INET_POST_ROUTING,
    };
    (number(hook, NFTA_HOOK_HOOKNUM)? == wanted).then_some(())?;
    // Chains for NAT do not drop, and services have thousands of rules there.
    let is_filter = text(body, NFTA_CHAIN_TYPE).is_none_or(|kind| kind == "filter");
    is_filter.then_some(())?;
    let drops = number(body, decode::CHAIN_POLICY) == Some(decode::NF_DROP);
    Some(BaseChain {
        family,
        table: text(body, NFTA_CHAIN_TABLE)?,
        name: text(body, NFTA_CHAIN_NAME)?,
        policy: if drops { Policy::Drop } else { Policy::Accept },
    })
}
