//! Tables of other programs: reads their base chains and rules, as far as they can be decoded.

mod rule;

use ipnetwork::IpNetwork;
use polder_api::Family;

use self::rule::{ReadRule, names, read};
use super::decode::{self, number, value};
use super::family::TableFamily;
use super::{FilterSocket, encode};
use crate::Error;
use crate::error::text;

/// The policy of a base chain, for packets that match no rule with a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The packet passes.
    Accept,
    /// The packet is dropped.
    Drop,
}

/// The hook of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BaseHook {
    /// Hook input: packets for the host itself.
    ForHost,
    /// Hook forward: forwarded packets.
    Forwarded,
    /// Hook prerouting: all incoming packets.
    Incoming,
    /// Hook postrouting: all outgoing packets.
    Outgoing,
}

/// A base chain: a chain on a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChain {
    /// The family of the table.
    pub family: TableFamily,
    /// The name of the table.
    pub table: String,
    /// The name of the chain.
    pub name: String,
    /// The policy of the chain.
    pub policy: Policy,
}

/// A match of interface names in a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NamePattern {
    /// Exactly this name.
    Exactly(String),
    /// All names with this prefix.
    Prefixed(String),
}

/// A condition of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RuleCondition {
    /// The input interface has one of these names.
    Input(Vec<NamePattern>),
    /// The output interface has one of these names.
    Output(Vec<NamePattern>),
    /// The packet has that address family.
    Family(Family),
    /// The source address is in that network.
    Source(IpNetwork),
    /// The destination address is in that network.
    Destination(IpNetwork),
    /// The host has no route to the source through the input interface (reverse path filter).
    OtherReversePath,
    /// A condition that is not decoded.
    Other,
}

/// The verdict of a rule on a matching packet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ForeignVerdict {
    /// Accepts the packet in this base chain.
    Accept,
    /// Drops or rejects the packet.
    Drop,
    /// Jumps to that chain; continues after this rule if that chain has no verdict.
    Jump(String),
    /// Goes to that chain; at its end, continues in the caller of this chain.
    Goto(String),
    /// Returns to the caller of this chain.
    Return,
    /// Passes the packet to a program, which accepts or drops it in this base chain.
    Queue(PacketQueues),
    /// Continues with the next rule.
    None,
}

/// Netfilter queues that a rule distributes packets to: one, or several in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PacketQueues {
    /// The number of the first queue.
    pub first: u16,
    /// How many queues there are, at least 1.
    pub count: u16,
    /// Whether packets pass while no program reads the queue (`bypass`). If not, the kernel drops them.
    pub bypass: bool,
}

/// A rule of another program.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ForeignRule {
    /// The conditions; all must be true.
    pub conditions: Vec<RuleCondition>,
    /// The verdict on matching packets.
    pub verdict: ForeignVerdict,
}

impl FilterSocket {
    /// The filter chains on that hook, of all tables.
    pub fn base_chains(&mut self, base_hook: BaseHook) -> Result<Vec<BaseChain>, Error> {
        self.dump(encode::get_all_chains(), |message| {
            let family = TableFamily::of(message.header.family)?;
            base_chain(family, base_hook, &decode::body(&message, decode::NEW_CHAIN)?)
        })
    }

    /// The rules of one chain, in order. Empty if the chain does not exist.
    pub fn rules_of(
        &mut self,
        family: TableFamily,
        table: &str,
        chain: &str,
    ) -> Result<Vec<ForeignRule>, Error> {
        let found = self.dump(encode::get_rules_of_chain(family, table, chain), |message| {
            let body = decode::body(&message, decode::NEW_RULE)?;
            // Kernels before 5.2 send the rules of all chains.
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

    /// Replaces the sets of a rule by the interface names in them.
    fn resolve(&mut self, family: TableFamily, table: &str, rule: ReadRule) -> Result<ForeignRule, Error> {
        let mut conditions = rule.conditions;
        for (side, set) in rule.sets {
            // Ranges and catch-all elements are not names: such a set cannot be decoded.
            let elements = self.dump_set(encode::get_elements_of(family, table, &set), |message| {
                decode::keys(message, |key, ends_range| Ok(key.filter(|_| !ends_range).map(names)))
            })?;
            let names: Option<Vec<NamePattern>> = elements.into_iter().collect();
            conditions.push(names.map_or(RuleCondition::Other, |names| side.condition(names)));
        }
        Ok(ForeignRule { conditions, verdict: rule.verdict })
    }
}

// Constants of `include/uapi/linux/netfilter/nf_tables.h` and `include/uapi/linux/netfilter.h`.
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_IN: u32 = 1;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;

fn base_chain(family: TableFamily, base_hook: BaseHook, body: &[u8]) -> Option<BaseChain> {
    let hook = value(body, NFTA_CHAIN_HOOK)?;
    let wanted = match base_hook {
        BaseHook::ForHost => NF_INET_LOCAL_IN,
        BaseHook::Forwarded => NF_INET_FORWARD,
        BaseHook::Incoming => NF_INET_PRE_ROUTING,
        BaseHook::Outgoing => NF_INET_POST_ROUTING,
    };
    (number(hook, NFTA_HOOK_HOOKNUM)? == wanted).then_some(())?;
    // NAT chains do not drop packets, and Services have thousands of rules there.
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
