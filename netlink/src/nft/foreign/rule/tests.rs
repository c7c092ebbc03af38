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
        rule(&[meta(NFT_META_IIFNAME), compare(0, b"polder0\0\0\0\0\0\0\0\0\0"), verdict(NF_ACCEPT, b"")]),
        rule(&[meta(NFT_META_IIFNAME), compare(0, b"polder0\0"), comment(), verdict(NF_ACCEPT, b"")]),
    ];
    for rule in made {
        assert_eq!(rule.conditions, [RuleCondition::Input(vec![NamePattern::Exactly("polder0".to_owned())])]);
        assert_eq!(rule.verdict, ForeignVerdict::Accept);
    }
    let all_pods = rule(&[meta(NFT_META_OIFNAME), compare(0, b"pld"), verdict(NFT_JUMP, b"USER\0")]);
    assert_eq!(all_pods.conditions, [RuleCondition::Output(vec![NamePattern::Prefixed("pld".to_owned())])]);
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
    expression("payload", &fields.map(|(kind, number): (u16, u32)| attribute(kind, &number.to_be_bytes())))
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
        expression("fib", &fields.map(|(kind, number): (u16, u32)| attribute(kind, &number.to_be_bytes())))
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
fn a_rule_that_queues_packets_is_decoded_with_its_queues_and_its_bypass() {
    let queues = |first, count, bypass| ForeignVerdict::Queue(PacketQueues { first, count, bypass });
    let native = |fields: &[(u16, u16)]| {
        let fields: Vec<_> =
            fields.iter().map(|(kind, number)| attribute(*kind, &number.to_be_bytes())).collect();
        rule(&[expression("queue", &fields)])
    };
    let one = native(&[(NFTA_QUEUE_NUM, 98), (NFTA_QUEUE_TOTAL, 1), (NFTA_QUEUE_FLAGS, 1)]);
    assert_eq!((one.verdict, one.conditions), (queues(98, 1, true), Vec::new()));
    let several = native(&[(NFTA_QUEUE_NUM, 0), (NFTA_QUEUE_TOTAL, 4), (NFTA_QUEUE_FLAGS, 2)]);
    assert_eq!(several.verdict, queues(0, 4, false));
    let computed = native(&[(NFTA_QUEUE_FLAGS, 1)]);
    assert_eq!((computed.verdict, computed.conditions), (ForeignVerdict::None, vec![RuleCondition::Other]));
    let target = |info: &[u16]| {
        let info: Vec<u8> = info.iter().flat_map(|number| number.to_ne_bytes()).collect();
        let name = attribute(XTABLES_NAME, b"NFQUEUE\0");
        rule(&[expression("target", &[name, attribute(NFTA_TARGET_INFO, &info)])]).verdict
    };
    // Revisions 0, 1 and 3 of the target.
    assert_eq!(target(&[98, 0]), queues(98, 1, false));
    assert_eq!(target(&[98, 2]), queues(98, 2, false));
    assert_eq!(target(&[98, 2, 1, 0]), queues(98, 2, true));
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
