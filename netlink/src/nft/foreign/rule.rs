//! Decodes rules of other programs from their expressions. An expression that cannot be decoded becomes
//! `RuleCondition::Other`, which may or may not be true.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use polder_api::Family;

use super::{ForeignVerdict, NamePattern, RuleCondition};
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

/// A full name is compared including its NUL, a prefix without it.
pub(super) fn names(key: &[u8]) -> NamePattern {
    let end = key.iter().position(|byte| *byte == 0);
    let name = String::from_utf8_lossy(&key[..end.unwrap_or(key.len())]).into_owned();
    if end.is_some() { NamePattern::Exactly(name) } else { NamePattern::Prefixed(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len() + 4).unwrap();
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
        let name = attribute(NFTA_EXPR_NAME, &[name.as_bytes(), &[0]].concat());
        attribute(NFTA_LIST_ELEM, &[name, attribute(NFTA_EXPR_DATA, &data.concat())].concat())
    }

    fn meta(key: u32) -> Vec<u8> {
        let register = attribute(NFTA_META_DREG, &1_u32.to_be_bytes());
        expression("meta", &[register, attribute(NFTA_META_KEY, &key.to_be_bytes())])
    }

    fn compare(operator: u32, name: &[u8]) -> Vec<u8> {
        let data = attribute(NFTA_CMP_DATA, &attribute(decode::VALUE, name));
        expression("cmp", &[attribute(NFTA_CMP_OP, &operator.to_be_bytes()), data])
    }

    fn verdict(code: u32, chain: &[u8]) -> Vec<u8> {
        let code = attribute(NFTA_VERDICT_CODE, &code.to_be_bytes());
        let verdict = [code, attribute(NFTA_VERDICT_CHAIN, chain)].concat();
        let data = attribute(NFTA_IMMEDIATE_DATA, &attribute(NFTA_DATA_VERDICT, &verdict));
        expression("immediate", &[data])
    }

    fn xtables(kind: &str, name: &str) -> Vec<u8> {
        expression(kind, &[attribute(XTABLES_NAME, &[name.as_bytes(), &[0]].concat())])
    }

    fn rule(expressions: &[Vec<u8>]) -> ReadRule {
        read(&attribute(NFTA_RULE_EXPRESSIONS, &expressions.concat()))
    }

    #[test]
    fn an_interface_rule_of_any_program_is_decoded() {
        let counter = || expression("counter", &[]);
        let comment = || xtables("match", "comment");
        let made = [
            rule(&[meta(NFT_META_IIFNAME), compare(0, b"polder0\0"), counter(), verdict(NF_ACCEPT, b"")]),
            rule(&[
                meta(NFT_META_IIFNAME),
                compare(0, b"polder0\0\0\0\0\0\0\0\0\0"),
                verdict(NF_ACCEPT, b""),
            ]),
            rule(&[meta(NFT_META_IIFNAME), compare(0, b"polder0\0"), comment(), verdict(NF_ACCEPT, b"")]),
        ];
        for rule in made {
            assert_eq!(
                rule.conditions,
                [RuleCondition::Input(vec![NamePattern::Exactly("polder0".to_owned())])]
            );
            assert_eq!(rule.verdict, ForeignVerdict::Accept);
        }
        let all_pods = rule(&[meta(NFT_META_OIFNAME), compare(0, b"pld"), verdict(NFT_JUMP, b"USER\0")]);
        assert_eq!(
            all_pods.conditions,
            [RuleCondition::Output(vec![NamePattern::Prefixed("pld".to_owned())])]
        );
        assert_eq!(all_pods.verdict, ForeignVerdict::Jump("USER".to_owned()));
    }

    #[test]
    fn an_unknown_expression_is_decoded_as_condition_other() {
        let not = rule(&[meta(NFT_META_IIFNAME), compare(1, b"docker0\0"), verdict(NF_ACCEPT, b"")]);
        let other_register = rule(&[
            meta(NFT_META_IIFNAME),
            expression("payload", &[]),
            compare(0, b"polder0\0"),
            verdict(NF_ACCEPT, b""),
        ]);
        let mark = rule(&[meta(3), compare(0, b"\0\0\0\x01"), verdict(NF_ACCEPT, b"")]);
        let new = rule(&[expression("from the future", &[]), verdict(NF_ACCEPT, b"")]);
        let two = rule(&[
            meta(NFT_META_IIFNAME),
            meta(NFT_META_OIFNAME),
            expression("lookup", &[attribute(NFTA_LOOKUP_SET, b"__set0\0")]),
            verdict(NF_ACCEPT, b""),
        ]);
        for rule in [not, other_register, two, mark, new, rule(&[xtables("match", "conntrack")])] {
            assert_eq!(rule.conditions, [RuleCondition::Other]);
        }
        let torn = read(&[200, 0, 4, 0, 1]);
        assert_eq!((torn.conditions, torn.verdict), (Vec::new(), ForeignVerdict::None));
    }

    fn payload(offset: u32, bytes: u32) -> Vec<u8> {
        let fields = [
            (NFTA_PAYLOAD_DREG, 1),
            (NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER),
            (NFTA_PAYLOAD_OFFSET, offset),
            (NFTA_PAYLOAD_LEN, bytes),
        ];
        expression(
            "payload",
            &fields.map(|(kind, number): (u16, u32)| attribute(kind, &number.to_be_bytes())),
        )
    }

    fn masked(mask: &[u8]) -> Vec<u8> {
        expression("bitwise", &[attribute(NFTA_BITWISE_MASK, &attribute(decode::VALUE, mask))])
    }

    #[test]
    fn networks_of_any_prefix_length_are_decoded() {
        let network = |text: &str| text.parse().unwrap();
        let v4 = rule(&[payload(16, 2), compare(0, &[10, 244]), verdict(NF_DROP, b"")]);
        assert_eq!(v4.conditions, [RuleCondition::Destination(network("10.244.0.0/16"))]);
        let whole = rule(&[payload(12, 4), compare(0, &[10, 244, 1, 7])]);
        assert_eq!(whole.conditions, [RuleCondition::Source(network("10.244.1.7/32"))]);
        let part = rule(&[payload(12, 4), masked(&[255, 255, 255, 192]), compare(0, &[10, 244, 1, 64])]);
        assert_eq!(part.conditions, [RuleCondition::Source(network("10.244.1.64/26"))]);
        let family = [meta(NFT_META_NFPROTO), compare(0, &[NFPROTO_IPV6]), payload(24, 7)];
        let v6 = rule(&[family.concat(), compare(0, &[0xfd, 0, 2, 0x44, 0, 0, 0])]);
        let all = [RuleCondition::Family(Family::V6), RuleCondition::Destination(network("fd00:244::/56"))];
        assert_eq!(v6.conditions, all);
    }

    #[test]
    fn only_a_reverse_path_check_is_decoded_as_one() {
        let fib = |flags: u32, result: u32| {
            let fields = [(NFTA_FIB_RESULT, result), (NFTA_FIB_FLAGS, flags)];
            expression(
                "fib",
                &fields.map(|(kind, number): (u16, u32)| attribute(kind, &number.to_be_bytes())),
            )
        };
        let missing = |fib: Vec<u8>| rule(&[fib, compare(0, &[0; 4]), verdict(NF_DROP, b"")]).conditions;
        // firewalld's IPv6_rpfilter: fib saddr . mark . iif oif missing drop
        assert_eq!(missing(fib(0b1101, NFT_FIB_RESULT_OIF)), [RuleCondition::OtherReversePath]);
        assert_eq!(
            missing(fib(0b0010, NFT_FIB_RESULT_OIF)),
            [RuleCondition::Other],
            "it asks for the destination"
        );
        assert_eq!(missing(fib(0b1001, 3)), [RuleCondition::Other], "it asks for the kind of address");
    }

    #[test]
    fn only_a_strict_inverted_rpfilter_match_is_decoded_as_a_reverse_path_check() {
        let dropping = |flags: u8| {
            let name = attribute(XTABLES_NAME, b"rpfilter\0");
            rule(&[expression("match", &[name, attribute(NFTA_MATCH_INFO, &[flags])]), verdict(NF_DROP, b"")])
                .conditions
        };
        // firewalld's IPv6_rpfilter with iptables: -m rpfilter --validmark --invert -j DROP
        assert_eq!(dropping(0b1010), [RuleCondition::OtherReversePath]);
        assert_eq!(dropping(0b0010), [RuleCondition::Other], "without --invert");
        assert_eq!(dropping(0b1001), [RuleCondition::Other], "with --loose");
    }

    #[test]
    fn a_comparison_of_other_header_bytes_is_no_address_condition() {
        for expressions in [
            // The time to live; another network; bits in the middle.
            [payload(8, 1), compare(0, &[64])].concat(),
            [payload(16, 2), compare(1, &[10, 244])].concat(),
            [payload(16, 4), masked(&[255, 0, 255, 0]), compare(0, &[10, 0, 1, 0])].concat(),
        ] {
            assert_eq!(rule(&[expressions]).conditions, [RuleCondition::Other]);
        }
    }

    #[test]
    fn reject_counts_as_drop_and_set_lookups_are_listed() {
        assert_eq!(rule(&[expression("reject", &[])]).verdict, ForeignVerdict::Drop);
        assert_eq!(rule(&[xtables("target", "REJECT")]).verdict, ForeignVerdict::Drop);
        assert_eq!(rule(&[xtables("target", "LOG")]).verdict, ForeignVerdict::None);
        let set = attribute(NFTA_LOOKUP_SET, b"__set0\0");
        let within = rule(&[meta(NFT_META_IIFNAME), expression("lookup", std::slice::from_ref(&set))]);
        assert_eq!(within.sets, [(InterfaceSide::Input, "__set0".to_owned())]);
        let inverted = attribute(NFTA_LOOKUP_FLAGS, &1_u32.to_be_bytes());
        let outside = rule(&[meta(NFT_META_IIFNAME), expression("lookup", &[set, inverted])]);
        assert_eq!((outside.sets, outside.conditions), (Vec::new(), vec![RuleCondition::Other]));
    }
}
