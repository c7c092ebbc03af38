//! Decodes rules of other programs from their expressions. An expression that cannot be decoded becomes
//! `RuleCondition::Other`, which may or may not be true.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use polder_api::Family;

use super::{ForeignVerdict, NamePattern, PacketQueues, RuleCondition};
use crate::error::text;
use crate::nft::decode::{self, NF_ACCEPT, NF_DROP, attributes, number, value};

// Constants of `include/uapi/linux/netfilter/nf_tables.h` and `include/uapi/linux/netfilter.h`.
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_IIFNAME: u32 = 6;
const NFT_META_OIFNAME: u32 = 7;
const NFT_META_NFPROTO: u32 = 15;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_CMP_OP: u16 = 2;
const NFT_CMP_EQ: u32 = 0;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_LOOKUP_SET: u16 = 1;
const NFTA_LOOKUP_DREG: u16 = 3;
const NFTA_LOOKUP_FLAGS: u16 = 5;
const NFTA_FIB_RESULT: u16 = 2;
const NFT_FIB_RESULT_OIF: u32 = 1;
const NFTA_FIB_FLAGS: u16 = 3;
const NFTA_FIB_F_SADDR: u32 = 1;
const NFTA_FIB_F_IIF: u32 = 1 << 3;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NFT_JUMP: u32 = (-3_i32).cast_unsigned();
const NFT_GOTO: u32 = (-4_i32).cast_unsigned();
const NFT_RETURN: u32 = (-5_i32).cast_unsigned();
/// `NFTA_MATCH_NAME` and `NFTA_TARGET_NAME`: extensions of `iptables` (xtables).
const XTABLES_NAME: u16 = 1;
const NFTA_MATCH_INFO: u16 = 3;
const NFTA_TARGET_INFO: u16 = 3;
const NFTA_QUEUE_NUM: u16 = 1;
const NFTA_QUEUE_TOTAL: u16 = 2;
const NFTA_QUEUE_FLAGS: u16 = 3;
/// `NFT_QUEUE_FLAG_BYPASS`, and `NFQ_FLAG_BYPASS` of `include/uapi/linux/netfilter/xt_NFQUEUE.h`.
const QUEUE_FLAG_BYPASS: u16 = 1;
// Flags of `include/uapi/linux/netfilter/xt_rpfilter.h`.
const XT_RPFILTER_LOOSE: u8 = 1;
const XT_RPFILTER_INVERT: u8 = 1 << 3;

/// The interface that a condition compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InterfaceSide {
    Input,
    Output,
}

impl InterfaceSide {
    pub(super) fn condition(self, names: Vec<NamePattern>) -> RuleCondition {
        match self {
            Self::Input => RuleCondition::Input(names),
            Self::Output => RuleCondition::Output(names),
        }
    }
}

/// A decoded rule, with references to sets not yet resolved.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ReadRule {
    pub(super) conditions: Vec<RuleCondition>,
    pub(super) sets: Vec<(InterfaceSide, String)>,
    pub(super) verdict: ForeignVerdict,
}

pub(super) fn read(body: &[u8]) -> ReadRule {
    let mut rule = ReadRule { conditions: Vec::new(), sets: Vec::new(), verdict: ForeignVerdict::None };
    let mut loaded = Loaded::Unknown;
    let list = value(body, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    for expression in attributes(list).flatten() {
        if expression.kind() == NFTA_LIST_ELEM {
            loaded = rule.take(expression.value(), loaded);
        }
    }
    rule
}

impl ReadRule {
    /// Decodes one expression. `loaded` is the register content before it; returns the content after it.
    fn take(&mut self, expression: &[u8], loaded: Loaded) -> Loaded {
        let name = text(expression, NFTA_EXPR_NAME).unwrap_or_default();
        let data = value(expression, NFTA_EXPR_DATA).unwrap_or_default();
        let xtables_name = || text(data, XTABLES_NAME).unwrap_or_default();
        match (name.as_str(), loaded) {
            ("meta", _) if value(data, NFTA_META_DREG).is_some() => {
                return match number(data, NFTA_META_KEY) {
                    // Two loads in a row are compared together, as one key.
                    _ if loaded != Loaded::Unknown => Loaded::Unknown,
                    Some(NFT_META_IIFNAME) => Loaded::Name(InterfaceSide::Input),
                    Some(NFT_META_OIFNAME) => Loaded::Name(InterfaceSide::Output),
                    Some(NFT_META_NFPROTO) => Loaded::Family,
                    _ => Loaded::Unknown,
                };
            }
            ("payload", Loaded::Unknown) if value(data, NFTA_PAYLOAD_DREG).is_some() => return address(data),
            ("bitwise", Loaded::Address { family, is_source, .. }) => {
                let mask = value(data, NFTA_BITWISE_MASK).and_then(|data| value(data, decode::VALUE));
                let length = mask.and_then(prefix_length);
                return length.map_or(Loaded::Unknown, |length| Loaded::Address {
                    family,
                    is_source,
                    length,
                });
            }
            ("fib", Loaded::Unknown) => {
                let asks_back = NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF;
                let is_back =
                    number(data, NFTA_FIB_FLAGS).is_some_and(|flags| flags & asks_back == asks_back);
                let is_way = number(data, NFTA_FIB_RESULT) == Some(NFT_FIB_RESULT_OIF);
                if is_back && is_way {
                    return Loaded::ReversePath;
                }
                // Another result of `fib`.
            }
            ("cmp", _) => {
                let is_equal = number(data, NFTA_CMP_OP) == Some(NFT_CMP_EQ);
                let key = value(data, NFTA_CMP_DATA).and_then(|data| value(data, decode::VALUE));
                let condition = key.filter(|_| is_equal).and_then(|key| loaded.equals(key));
                self.conditions.push(condition.unwrap_or(RuleCondition::Other));
            }
            ("lookup", Loaded::Name(side)) if is_plain_lookup(data) => {
                self.sets.extend(text(data, NFTA_LOOKUP_SET).map(|set| (side, set)));
            }
            ("immediate", _) => {
                let data = value(data, NFTA_IMMEDIATE_DATA).unwrap_or_default();
                if let Some(verdict) = value(data, NFTA_DATA_VERDICT) {
                    self.verdict = decode_verdict(verdict);
                }
            }
            ("reject", _) => self.verdict = ForeignVerdict::Drop,
            ("target", _) if xtables_name() == "REJECT" => self.verdict = ForeignVerdict::Drop,
            // A queue whose number is computed for each packet is not decoded.
            ("queue", _) if value(data, NFTA_QUEUE_NUM).is_some() => self.verdict = native_queue(data),
            ("target", _) if xtables_name() == "NFQUEUE" => {
                self.verdict = xtables_queue(value(data, NFTA_TARGET_INFO).unwrap_or_default());
            }
            ("match", _) if xtables_name() == "comment" => {}
            ("match", _) if xtables_name() == "rpfilter" => {
                let flags = value(data, NFTA_MATCH_INFO).and_then(|info| info.first().copied()).unwrap_or(0);
                let is_strict = flags & (XT_RPFILTER_LOOSE | XT_RPFILTER_INVERT) == XT_RPFILTER_INVERT;
                self.conditions.push(if is_strict {
                    RuleCondition::OtherReversePath
                } else {
                    RuleCondition::Other
                });
            }
            // These have no verdict: they count, log, or load a register.
            ("counter" | "log" | "meta" | "payload" | "ct" | "bitwise" | "target", _) => {}
            _ => self.conditions.push(RuleCondition::Other),
        }
        Loaded::Unknown
    }
}

/// The content of a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loaded {
    /// Unknown, or nothing.
    Unknown,
    /// The name of the input or output interface.
    Name(InterfaceSide),
    /// The address family of the packet.
    Family,
    /// The result of a reverse path lookup; 0 if the host has no route to the source through the input interface.
    ReversePath,
    /// The first bits of the source or destination address.
    Address { family: Family, is_source: bool, length: u8 },
}

impl Loaded {
    /// The condition that the register has this value.
    fn equals(self, key: &[u8]) -> Option<RuleCondition> {
        match self {
            Self::Unknown => None,
            Self::Name(side) => Some(side.condition(vec![names(key)])),
            Self::Family => match key.first() {
                Some(&NFPROTO_IPV4) => Some(RuleCondition::Family(Family::V4)),
                Some(&NFPROTO_IPV6) => Some(RuleCondition::Family(Family::V6)),
                _ => None,
            },
            Self::ReversePath => key.iter().all(|byte| *byte == 0).then_some(RuleCondition::OtherReversePath),
            Self::Address { family, is_source, length } => {
                let mut bytes = [0; 16];
                bytes.get_mut(..key.len())?.copy_from_slice(key);
                let address = match family {
                    Family::V4 => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
                    Family::V6 => IpAddr::V6(Ipv6Addr::from(bytes)),
                };
                let network = IpNetwork::new(address, length).ok()?;
                Some(if is_source {
                    RuleCondition::Source(network)
                } else {
                    RuleCondition::Destination(network)
                })
            }
        }
    }
}

/// The part of an address that a payload expression loads, by its offset in the header (RFC 791, RFC 8200). A length
/// shorter than an address means its first bytes.
fn address(payload: &[u8]) -> Loaded {
    let base = number(payload, NFTA_PAYLOAD_BASE);
    let position = (number(payload, NFTA_PAYLOAD_OFFSET), number(payload, NFTA_PAYLOAD_LEN));
    let (family, is_source, bytes) = match position {
        (Some(12), Some(bytes @ 1..=4)) => (Family::V4, true, bytes),
        (Some(16), Some(bytes @ 1..=4)) => (Family::V4, false, bytes),
        // A single byte there is the TTL of IPv4.
        (Some(8), Some(bytes @ 2..=16)) => (Family::V6, true, bytes),
        (Some(24), Some(bytes @ 1..=16)) => (Family::V6, false, bytes),
        _ => return Loaded::Unknown,
    };
    match u8::try_from(bytes * 8) {
        Ok(length) if base == Some(NFT_PAYLOAD_NETWORK_HEADER) => {
            Loaded::Address { family, is_source, length }
        }
        _ => Loaded::Unknown,
    }
}

/// The prefix length of a mask; `None` if its bits are not contiguous from the start.
fn prefix_length(mask: &[u8]) -> Option<u8> {
    let ones = mask.iter().map(|byte| byte.count_ones()).sum::<u32>();
    let leading = mask.iter().map_while(|byte| (*byte == 0xff).then_some(8_u32)).sum::<u32>();
    let next = mask.get(usize::try_from(leading / 8).ok()?).map_or(0, |byte| byte.leading_ones());
    (leading + next == ones).then(|| u8::try_from(ones).ok()).flatten()
}

/// Whether the lookup tests membership only, without inversion and without a map.
fn is_plain_lookup(lookup: &[u8]) -> bool {
    value(lookup, NFTA_LOOKUP_DREG).is_none() && number(lookup, NFTA_LOOKUP_FLAGS).unwrap_or(0) == 0
}

fn decode_verdict(verdict: &[u8]) -> ForeignVerdict {
    let chain = || text(verdict, NFTA_VERDICT_CHAIN).unwrap_or_default();
    match number(verdict, NFTA_VERDICT_CODE) {
        Some(NF_ACCEPT) => ForeignVerdict::Accept,
        Some(NF_DROP) => ForeignVerdict::Drop,
        Some(NFT_JUMP) => ForeignVerdict::Jump(chain()),
        Some(NFT_GOTO) => ForeignVerdict::Goto(chain()),
        Some(NFT_RETURN) => ForeignVerdict::Return,
        _ => ForeignVerdict::None,
    }
}

/// The verdict of the expression `queue`. Its numbers have two bytes in network order.
fn native_queue(queue: &[u8]) -> ForeignVerdict {
    let short = |kind| {
        Some(u16::from_be_bytes(value(queue, kind)?.first_chunk().copied()?)).filter(|number| *number > 0)
    };
    ForeignVerdict::Queue(PacketQueues {
        first: short(NFTA_QUEUE_NUM).unwrap_or(0),
        count: short(NFTA_QUEUE_TOTAL).unwrap_or(1),
        bypass: short(NFTA_QUEUE_FLAGS).unwrap_or(0) & QUEUE_FLAG_BYPASS != 0,
    })
}

/// The verdict of the target NFQUEUE of `iptables`: a structure of up to three numbers of two bytes each, by revision of
/// the target (`struct xt_NFQ_info_v3` of `include/uapi/linux/netfilter/xt_NFQUEUE.h`).
fn xtables_queue(info: &[u8]) -> ForeignVerdict {
    let mut numbers = info.as_chunks().0.iter().map(|bytes| u16::from_ne_bytes(*bytes));
    let mut next = |missing| numbers.next().unwrap_or(missing);
    let (first, count, flags) = (next(0), next(1), next(0));
    ForeignVerdict::Queue(PacketQueues { first, count: count.max(1), bypass: flags & QUEUE_FLAG_BYPASS != 0 })
}

/// A full name is compared including its NUL, a prefix without it.
pub(super) fn names(key: &[u8]) -> NamePattern {
    let end = key.iter().position(|byte| *byte == 0);
    let name = String::from_utf8_lossy(&key[..end.unwrap_or(key.len())]).into_owned();
    if end.is_some() { NamePattern::Exactly(name) } else { NamePattern::Prefixed(name) }
}

#[cfg(test)]
mod tests;
