//! What a rule of others says, taken from its expressions. What is not understood is a condition of which nobody knows
//! whether it holds.

use super::{Condition, Judgement, Names};
use crate::error::text;
use crate::nft::decode::{self, NF_ACCEPT, NF_DROP, attributes, number, value};

// `include/uapi/linux/netfilter/nf_tables.h` and `include/uapi/linux/netfilter.h`, all of these.
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_IIFNAME: u32 = 6;
const NFT_META_OIFNAME: u32 = 7;
const NFTA_CMP_OP: u16 = 2;
const NFT_CMP_EQ: u32 = 0;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_LOOKUP_SET: u16 = 1;
const NFTA_LOOKUP_DREG: u16 = 3;
const NFTA_LOOKUP_FLAGS: u16 = 5;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NFT_JUMP: u32 = (-3_i32).cast_unsigned();
const NFT_GOTO: u32 = (-4_i32).cast_unsigned();
const NFT_RETURN: u32 = (-5_i32).cast_unsigned();
/// `NFTA_MATCH_NAME` and `NFTA_TARGET_NAME`: what `iptables` had before nftables, and still calls.
const XTABLES_NAME: u16 = 1;

/// Which of its two interfaces a rule looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Input,
    Output,
}

impl Side {
    pub(super) fn condition(self, names: Vec<Names>) -> Condition {
        match self {
            Self::Input => Condition::Input(names),
            Self::Output => Condition::Output(names),
        }
    }
}

/// A rule that may still refer to sets.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ReadRule {
    pub(super) conditions: Vec<Condition>,
    pub(super) sets: Vec<(Side, String)>,
    pub(super) judgement: Judgement,
}

pub(super) fn read(body: &[u8]) -> ReadRule {
    let mut rule = ReadRule { conditions: Vec::new(), sets: Vec::new(), judgement: Judgement::None };
    let mut loaded = None;
    let list = value(body, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    for expression in attributes(list).flatten() {
        if expression.kind() == NFTA_LIST_ELEM {
            loaded = rule.take(expression.value(), loaded);
        }
    }
    rule
}

impl ReadRule {
    /// Takes in one expression. `loaded` is the interface whose name the expression before has put into a register.
    fn take(&mut self, expression: &[u8], loaded: Option<Side>) -> Option<Side> {
        let name = text(expression, NFTA_EXPR_NAME).unwrap_or_default();
        let data = value(expression, NFTA_EXPR_DATA).unwrap_or_default();
        let xtables_name = || text(data, XTABLES_NAME).unwrap_or_default();
        match (name.as_str(), loaded) {
            ("meta", _) if value(data, NFTA_META_DREG).is_some() => {
                return match number(data, NFTA_META_KEY) {
                    // Two names in a row are looked up together.
                    _ if loaded.is_some() => None,
                    Some(NFT_META_IIFNAME) => Some(Side::Input),
                    Some(NFT_META_OIFNAME) => Some(Side::Output),
                    _ => None,
                };
            }
            ("cmp", Some(side)) if number(data, NFTA_CMP_OP) == Some(NFT_CMP_EQ) => {
                let key = value(data, NFTA_CMP_DATA).and_then(|data| value(data, decode::VALUE));
                self.conditions.push(key.map_or(Condition::Other, |key| side.condition(vec![names(key)])));
            }
            ("lookup", Some(side)) if is_plain_lookup(data) => {
                self.sets.extend(text(data, NFTA_LOOKUP_SET).map(|set| (side, set)));
            }
            ("immediate", _) => {
                let data = value(data, NFTA_IMMEDIATE_DATA).unwrap_or_default();
                if let Some(verdict) = value(data, NFTA_DATA_VERDICT) {
                    self.judgement = judgement(verdict);
                }
            }
            ("reject", _) => self.judgement = Judgement::Drop,
            ("target", _) if xtables_name() == "REJECT" => self.judgement = Judgement::Drop,
            ("match", _) if xtables_name() == "comment" => {}
            // They count, write down, or put something into a register.
            ("counter" | "log" | "meta" | "payload" | "ct" | "bitwise" | "target", _) => {}
            _ => self.conditions.push(Condition::Other),
        }
        None
    }
}

/// Whether it asks for nothing but membership.
fn is_plain_lookup(lookup: &[u8]) -> bool {
    value(lookup, NFTA_LOOKUP_DREG).is_none() && number(lookup, NFTA_LOOKUP_FLAGS).unwrap_or(0) == 0
}

fn judgement(verdict: &[u8]) -> Judgement {
    let chain = || text(verdict, NFTA_VERDICT_CHAIN).unwrap_or_default();
    match number(verdict, NFTA_VERDICT_CODE) {
        Some(NF_ACCEPT) => Judgement::Accept,
        Some(NF_DROP) => Judgement::Drop,
        Some(NFT_JUMP) => Judgement::Jump(chain()),
        Some(NFT_GOTO) => Judgement::Goto(chain()),
        Some(NFT_RETURN) => Judgement::Return,
        _ => Judgement::None,
    }
}

/// A whole name is compared with its NUL, the start of one without.
pub(super) fn names(key: &[u8]) -> Names {
    let end = key.iter().position(|byte| *byte == 0);
    let name = String::from_utf8_lossy(&key[..end.unwrap_or(key.len())]).into_owned();
    if end.is_some() { Names::Exactly(name) } else { Names::Prefixed(name) }
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
    fn a_rule_for_an_interface_is_read_as_one_whoever_made_it() {
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
            assert_eq!(rule.conditions, [Condition::Input(vec![Names::Exactly("polder0".to_owned())])]);
            assert_eq!(rule.judgement, Judgement::Accept);
        }
        let all_pods = rule(&[meta(NFT_META_OIFNAME), compare(0, b"pld"), verdict(NFT_JUMP, b"USER\0")]);
        assert_eq!(all_pods.conditions, [Condition::Output(vec![Names::Prefixed("pld".to_owned())])]);
        assert_eq!(all_pods.judgement, Judgement::Jump("USER".to_owned()));
    }

    #[test]
    fn what_is_not_understood_is_a_condition() {
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
            assert_eq!(rule.conditions, [Condition::Other]);
        }
        let torn = read(&[200, 0, 4, 0, 1]);
        assert_eq!((torn.conditions, torn.judgement), (Vec::new(), Judgement::None));
    }

    #[test]
    fn a_refusal_is_a_drop_and_a_set_is_looked_up_later() {
        assert_eq!(rule(&[expression("reject", &[])]).judgement, Judgement::Drop);
        assert_eq!(rule(&[xtables("target", "REJECT")]).judgement, Judgement::Drop);
        assert_eq!(rule(&[xtables("target", "LOG")]).judgement, Judgement::None);
        let set = attribute(NFTA_LOOKUP_SET, b"__set0\0");
        let within = rule(&[meta(NFT_META_IIFNAME), expression("lookup", std::slice::from_ref(&set))]);
        assert_eq!(within.sets, [(Side::Input, "__set0".to_owned())]);
        let inverted = attribute(NFTA_LOOKUP_FLAGS, &1_u32.to_be_bytes());
        let outside = rule(&[meta(NFT_META_IIFNAME), expression("lookup", &[set, inverted])]);
        assert_eq!((outside.sets, outside.conditions), (Vec::new(), vec![Condition::Other]));
    }
}
