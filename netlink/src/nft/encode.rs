//! Encodes nftables messages for tables, chains, rules and set elements (`include/uapi/linux/netfilter/nf_tables.h`).

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook as HookAttribute,
    HookNumber, Immediate, InetHookNumber, ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator,
    Payload, Register, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementFlags,
    SetElementList, SetElementMessage, SetFlags, SetMessage, TableAttribute, TableFlags, TableMessage,
    Verdict as VerdictNumber, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use polder_api::Family;

use super::family::TableFamily;
use super::{
    Chain, Element, ElementKey, Hook, InterfaceMatch, Match, Rule, Set, SetMatch, TableKind, Verdict,
};
use crate::Operation;

/// Elements per message: an attribute is at most 64 KiB long, an element about 60 bytes.
const ELEMENTS_PER_MESSAGE: usize = 512;

const NFNL_SUBSYS_NFTABLES: u16 = 10;

pub(super) fn begin() -> NetfilterMessage {
    control(ControlMessage::BatchBegin)
}

pub(super) fn end() -> NetfilterMessage {
    control(ControlMessage::BatchEnd)
}

fn control(message: ControlMessage) -> NetfilterMessage {
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES);
    NetfilterMessage::new(header, message)
}

fn about(kind: TableKind, message: impl Into<NetfilterMessageInner>) -> NetfilterMessage {
    let family = match kind {
        TableKind::Ip => NetfilterProtoFamily::Inet,
        TableKind::Arp => NetfilterProtoFamily::ARP,
    };
    of_family(family, message)
}

fn of_family(family: NetfilterProtoFamily, message: impl Into<NetfilterMessageInner>) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

fn create(kind: TableKind, message: NfTablesMessage) -> Operation<NetfilterMessage> {
    Operation::new(about(kind, message), NLM_F_CREATE)
}

pub(super) fn add_table(kind: TableKind, name: &str, comment: Option<&str>) -> Operation<NetfilterMessage> {
    let mut attributes = vec![TableAttribute::Name(name.to_owned())];
    attributes.extend(comment.map(|comment| TableAttribute::UserData(user_data(comment))));
    create(kind, NfTablesMessage::NewTable(TableMessage { attributes }))
}

/// Creates a table owned by the sending socket: the kernel deletes it when the socket is closed.
pub(super) fn add_owned_table(kind: TableKind, name: &str) -> Operation<NetfilterMessage> {
    let attributes = vec![TableAttribute::Name(name.to_owned()), TableAttribute::Flags(TableFlags::Owner)];
    create(kind, NfTablesMessage::NewTable(TableMessage { attributes }))
}

pub(super) fn get_table(kind: TableKind, name: &str) -> NetfilterMessage {
    let attributes = vec![TableAttribute::Name(name.to_owned())];
    about(kind, NfTablesMessage::GetTable(TableMessage { attributes }))
}

pub(super) fn delete_table(kind: TableKind, name: &str) -> Operation<NetfilterMessage> {
    let attributes = vec![TableAttribute::Name(name.to_owned())];
    Operation::new(about(kind, NfTablesMessage::DeleteTable(TableMessage { attributes })), 0)
}

pub(super) fn add_chain(table: &str, chain: &Chain) -> Operation<NetfilterMessage> {
    /// `include/uapi/linux/netfilter_arp.h`
    const NF_ARP_IN: HookNumber = HookNumber::Other(0);
    let (kind, hook, priority) = match chain.hook {
        Hook::Raw => ("filter", InetHookNumber::PreRouting.into(), -300_i32),
        Hook::Input => ("filter", InetHookNumber::LocalIn.into(), 0),
        Hook::ArpInput => ("filter", NF_ARP_IN, 0),
        Hook::SourceNat => ("nat", InetHookNumber::PostRouting.into(), 100),
    };
    let attributes = vec![
        ChainAttribute::Table(table.to_owned()),
        ChainAttribute::Name(chain.name.to_owned()),
        ChainAttribute::Hook(vec![
            HookAttribute::Number(hook),
            HookAttribute::Priority(priority.cast_unsigned()),
        ]),
        ChainAttribute::Policy(super::decode::NF_ACCEPT),
        ChainAttribute::Type(kind.to_owned()),
    ];
    create(chain.hook.table(), NfTablesMessage::NewChain(ChainMessage { attributes }))
}

pub(super) fn get_chain(table: &str, chain: &Chain) -> NetfilterMessage {
    let attributes =
        vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(chain.name.to_owned())];
    about(chain.hook.table(), NfTablesMessage::GetChain(ChainMessage { attributes }))
}

/// Requests the chains of all tables of all families.
pub(super) fn get_all_chains() -> NetfilterMessage {
    let all = ChainMessage { attributes: Vec::new() };
    of_family(NetfilterProtoFamily::Unspec, NfTablesMessage::GetChain(all))
}

/// Creates a set; `id` identifies it within the transaction.
pub(super) fn add_set(table: &str, set: &Set, id: u32) -> Operation<NetfilterMessage> {
    let flags = if set.key.has_ranges() { SetFlags::Interval } else { SetFlags::empty() };
    let mut attributes = vec![
        SetAttribute::Table(table.to_owned()),
        SetAttribute::Name(set.name.to_owned()),
        SetAttribute::Flags(flags),
        SetAttribute::KeyType(set.key.type_number()),
        SetAttribute::KeyLen(set.key.length()),
        SetAttribute::Id(id),
    ];
    if let ElementKey::TunnelSource(outer, inner) = set.key {
        attributes.push(SetAttribute::UserData(type_of_tunnel_source(outer, inner)));
    }
    create(set.table, NfTablesMessage::NewSet(SetMessage { attributes }))
}

/// User data of a set whose key has a part without a type: with it, `nft` prints `typeof ip saddr . @th,336,32`,
/// which it can read again. The format is that of nft 1.0.6 (`src/netlink.c`, `src/expression.c` and `src/payload.c`
/// there). The kernel stores it and does not interpret it.
fn type_of_tunnel_source(outer: Family, inner: Family) -> Vec<u8> {
    const CONCATENATION: u32 = 13;
    const PAYLOAD: u32 = 7;
    let one = |kind: u8, value: &[u8]| {
        let length = u8::try_from(value.len()).expect("a few numbers");
        [&[kind, length], value].concat()
    };
    let number = |kind: u8, value: u32| one(kind, &value.to_ne_bytes());
    // Protocol (`proto_desc_id`) and field; for a part that is not a field, its offset.
    let (protocol, field) = match outer {
        Family::V4 => (12, 11),
        Family::V6 => (13, 8),
    };
    let sender = [number(0, protocol), number(1, field)].concat();
    let Field(base, offset, length) = inner_source(inner);
    let fields =
        [number(0, 0), number(1, 0), number(2, base + 1), number(3, offset * 8), number(4, length * 8)];
    let part = |index: u8, payload: &[u8]| one(index, &[number(0, PAYLOAD), one(1, payload)].concat());
    let parts = [part(0, &sender), part(1, &fields.concat())].concat();
    let key = [number(0, CONCATENATION), one(1, &parts)].concat();
    [number(0, 0), one(3, &key)].concat()
}

pub(super) fn add_elements<'a>(
    table: &str,
    set: &Set,
    elements: impl IntoIterator<Item = &'a Element>,
) -> Vec<Operation<NetfilterMessage>> {
    let chunks = element_messages(table, set, elements).into_iter();
    chunks.map(|message| create(set.table, NfTablesMessage::NewSetElement(message))).collect()
}

pub(super) fn delete_elements<'a>(
    table: &str,
    set: &Set,
    elements: impl IntoIterator<Item = &'a Element>,
) -> Vec<Operation<NetfilterMessage>> {
    let chunks = element_messages(table, set, elements).into_iter();
    chunks
        .map(|message| Operation::new(about(set.table, NfTablesMessage::DeleteSetElement(message)), 0))
        .collect()
}

/// Deletes all elements of the set: the message names no element.
pub(super) fn flush_set(table: &str, set: &Set) -> Operation<NetfilterMessage> {
    let message = SetElementMessage { attributes: of_set(table, set.name) };
    Operation::new(about(set.table, NfTablesMessage::DeleteSetElement(message)), 0)
}

pub(super) fn get_elements(table: &str, set: &Set) -> NetfilterMessage {
    let message = SetElementMessage { attributes: of_set(table, set.name) };
    about(set.table, NfTablesMessage::GetSetElement(message))
}

pub(super) fn get_elements_of(family: TableFamily, table: &str, set: &str) -> NetfilterMessage {
    let message = SetElementMessage { attributes: of_set(table, set) };
    of_family(family.number(), NfTablesMessage::GetSetElement(message))
}

fn of_set(table: &str, set: &str) -> Vec<SetElementList> {
    vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())]
}

fn element_messages<'a>(
    table: &str,
    set: &Set,
    elements: impl IntoIterator<Item = &'a Element>,
) -> Vec<SetElementMessage> {
    let list: Vec<_> = elements.into_iter().map(element).collect();
    let message = |chunk: &[_]| {
        let mut attributes = of_set(table, set.name);
        attributes.push(SetElementList::Elements(chunk.to_vec()));
        SetElementMessage { attributes }
    };
    list.chunks(ELEMENTS_PER_MESSAGE).map(message).collect()
}

fn element(element: &Element) -> ListAttribute<SetElementAttribute> {
    let mut attributes = vec![SetElementAttribute::Key(DataAttribute::Value(element.key().to_vec()))];
    if element.ends_range() {
        attributes.push(SetElementAttribute::Flags(SetElementFlags::IntervalEnd));
    }
    ListAttribute::Element(attributes)
}

pub(super) fn get_rules(kind: TableKind, table: &str) -> NetfilterMessage {
    let attributes = vec![RuleAttribute::Table(table.to_owned())];
    about(kind, NfTablesMessage::GetRule(RuleMessage { attributes }))
}

pub(super) fn get_rules_of_chain(family: TableFamily, table: &str, chain: &str) -> NetfilterMessage {
    let attributes = vec![RuleAttribute::Table(table.to_owned()), RuleAttribute::Chain(chain.to_owned())];
    of_family(family.number(), NfTablesMessage::GetRule(RuleMessage { attributes }))
}

pub(super) fn add_rule(table: &str, chain: &Chain, rule: &Rule) -> Operation<NetfilterMessage> {
    let mut expressions: Vec<Expressions> = rule.matches.iter().flat_map(matching).collect();
    expressions.push(Expressions::Other { expression_type: "counter".to_owned(), attributes: Vec::new() });
    expressions.push(verdict(rule.verdict));
    let attributes = vec![
        RuleAttribute::Table(table.to_owned()),
        RuleAttribute::Chain(chain.name.to_owned()),
        RuleAttribute::Expressions(expressions.into_iter().map(ListAttribute::from).collect()),
        RuleAttribute::UserData(user_data(rule.comment)),
    ];
    let message = NfTablesMessage::NewRule(RuleMessage { attributes });
    Operation::new(about(chain.hook.table(), message), NLM_F_CREATE | NLM_F_APPEND)
}

/// Encodes a comment in the format of `nft`: type 0, length, text with its NUL.
fn user_data(comment: &str) -> Vec<u8> {
    let text = &comment.as_bytes()[..comment.len().min(120)];
    let length = u8::try_from(text.len() + 1).expect("at most 121");
    [&[0, length], text, &[0]].concat()
}

/// The interface type with link-layer addresses of six bytes (`include/uapi/linux/if_arp.h`).
const ARPHRD_ETHER: u16 = 1;

/// A position in a packet: base (`enum nft_payload_bases`), offset and length in bytes.
#[derive(Clone, Copy)]
struct Field(u32, u32, u32);

const SENDER_MAC: Field = Field(0, 6, 6);
const UDP_DESTINATION: Field = Field(2, 2, 2);
/// The VNI follows the UDP header (8 bytes) and the VXLAN flags (4 bytes) (RFC 7348, section 5).
const VXLAN_VNI: Field = Field(2, 12, 3);
/// The type of the inner frame follows the VXLAN header (8 bytes) and the frame's addresses (12 bytes).
const CARRIED_TYPE: Field = Field(2, 28, 2);
const ICMP_TYPE: Field = Field(2, 0, 1);
/// RFC 826, for Ethernet and IPv4.
const ARP_OPERATION: Field = Field(1, 6, 2);
const ARP_SENDER_MAC: Field = Field(1, 8, 6);
const ARP_SENDER: Field = Field(1, 14, 4);

/// The source address of the inner packet.
fn inner_source(family: Family) -> Field {
    match family {
        Family::V4 => Field(2, 42, 4),
        Family::V6 => Field(2, 38, 16),
    }
}

/// `ETH_P_IP` and `ETH_P_IPV6`.
fn ether_type(family: Family) -> u16 {
    match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    }
}

fn source(family: Family) -> Field {
    match family {
        Family::V4 => Field(1, 12, 4),
        Family::V6 => Field(1, 8, 16),
    }
}

fn destination(family: Family) -> Field {
    match family {
        Family::V4 => Field(1, 16, 4),
        Family::V6 => Field(1, 24, 16),
    }
}

/// `NFPROTO_*`.
fn protocol_number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

fn matching(what: &Match) -> Vec<Expressions> {
    match *what {
        Match::Input(interface) => vec![load_meta(MetaKey::Iifname), equal(name_of(interface))],
        Match::Output(interface) => vec![load_meta(MetaKey::Oifname), equal(name_of(interface))],
        Match::NotOutput(interface) => vec![load_meta(MetaKey::Oifname), differs(name_of(interface))],
        Match::Family(family) => vec![load_meta(MetaKey::Nfproto), equal(vec![protocol_number(family)])],
        Match::UdpTo(port) => {
            const UDP: u8 = 17;
            let protocol = [load_meta(MetaKey::L4Proto), equal(vec![UDP])];
            let port = [load(UDP_DESTINATION, Register::Reg1), equal(port.to_be_bytes().to_vec())];
            [protocol, port].concat()
        }
        Match::VxlanOf(vni) => {
            vec![load(VXLAN_VNI, Register::Reg1), equal(vni.to_be_bytes()[1..].to_vec())]
        }
        Match::Source(within) => vec![load(source(within.family()), Register::Reg1), lookup(within)],
        Match::Destination(within) => {
            vec![load(destination(within.family()), Register::Reg1), lookup(within)]
        }
        Match::Sender(within) => vec![
            load_meta(MetaKey::Iftype),
            equal(ARPHRD_ETHER.to_ne_bytes().to_vec()),
            load(SENDER_MAC, Register::Reg1),
            // The six bytes take two registers of four bytes.
            load(source(within.family()), Register::Reg32_02),
            lookup(within),
        ],
        Match::Icmpv6(number) => {
            const ICMPV6: u8 = 58;
            let protocol = [load_meta(MetaKey::L4Proto), equal(vec![ICMPV6])];
            [protocol, [load(ICMP_TYPE, Register::Reg1), equal(vec![number])]].concat()
        }
        Match::InnerFamily(family) => {
            let number = ether_type(family).to_be_bytes();
            vec![load(CARRIED_TYPE, Register::Reg1), equal(number.to_vec())]
        }
        Match::TunnelSource { inner, length, set } => {
            // Each part of a key takes as many registers of four bytes as it needs.
            let register = match set.family() {
                Family::V4 => Register::Reg32_01,
                Family::V6 => Register::Reg32_04,
            };
            let Field(_, _, bytes) = inner_source(inner);
            vec![
                load(source(set.family()), Register::Reg1),
                load(inner_source(inner), register),
                mask(register, bytes, length),
                lookup(set),
            ]
        }
        Match::ArpReply => {
            const ARPOP_REPLY: u16 = 2;
            vec![load(ARP_OPERATION, Register::Reg1), equal(ARPOP_REPLY.to_be_bytes().to_vec())]
        }
        Match::ArpSender(within) => {
            vec![load(ARP_SENDER_MAC, Register::Reg1), load(ARP_SENDER, Register::Reg32_02), lookup(within)]
        }
        Match::Unicast => {
            const RTN_UNICAST: u32 = 1;
            vec![load_destination_type(), equal(RTN_UNICAST.to_ne_bytes().to_vec())]
        }
    }
}

impl SetMatch {
    fn family(self) -> Family {
        match self {
            Self::Set(family, _) | Self::NotSet(family, _) => family,
        }
    }
}

fn load_meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(Register::Reg1)])
}

fn load(Field(base, offset, length): Field, register: Register) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(register),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

/// Masks the register to its first bits.
fn mask(register: Register, bytes: u32, length: u8) -> Expressions {
    let mask = (0..bytes).map(|byte| {
        let ones = u32::from(length).saturating_sub(byte * 8).min(8);
        (0xff00_u16 >> ones).to_be_bytes()[1]
    });
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(register),
        Bitwise::DestinationRegister(register),
        Bitwise::Length(bytes),
        Bitwise::Mask(DataAttribute::Value(mask.collect())),
        Bitwise::Xor(DataAttribute::Value(vec![0; bytes as usize])),
    ])
}

/// A full name is compared including its NULs, a prefix without them.
fn name_of(interface: InterfaceMatch) -> Vec<u8> {
    match interface {
        InterfaceMatch::Named(name) => [name.as_bytes(), &[0; 16][name.len().min(16)..]].concat(),
        InterfaceMatch::Prefixed(prefix) => prefix.as_bytes().to_vec(),
    }
}

fn equal(value: Vec<u8>) -> Expressions {
    compare(Operator::Equal, value)
}

fn differs(value: Vec<u8>) -> Expressions {
    compare(Operator::NotEqual, value)
}

fn compare(operator: Operator, value: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(value)),
    ])
}

fn lookup(within: SetMatch) -> Expressions {
    const NFT_LOOKUP_F_INV: u32 = 1;
    let (set, flags) = match within {
        SetMatch::Set(_, set) => (set, 0),
        SetMatch::NotSet(_, set) => (set, NFT_LOOKUP_F_INV),
    };
    Expressions::Lookup(vec![
        Lookup::Set(set.to_owned()),
        Lookup::SourceRegister(Register::Reg1),
        Lookup::Flags(flags),
    ])
}

/// `fib daddr type`: the type of the destination according to the routing tables.
fn load_destination_type() -> Expressions {
    const NFTA_FIB_DREG: u16 = 1;
    const NFTA_FIB_RESULT: u16 = 2;
    const NFTA_FIB_FLAGS: u16 = 3;
    const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
    const NFTA_FIB_F_DADDR: u32 = 1 << 1;
    other(
        "fib",
        &[
            (NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR),
            (NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE),
            (NFTA_FIB_DREG, Register::Reg1.into()),
        ],
    )
}

fn verdict(verdict: Verdict) -> Expressions {
    match verdict {
        Verdict::Drop => immediate(super::decode::NF_DROP),
        Verdict::Accept => immediate(super::decode::NF_ACCEPT),
        Verdict::Masquerade => {
            const NFTA_MASQ_FLAGS: u16 = 1;
            const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;
            other("masq", &[(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY)])
        }
    }
}

fn immediate(verdict: u32) -> Expressions {
    let code = VerdictAttribute::Code(VerdictNumber::Other(verdict));
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![code])),
    ])
}

/// An expression for which the library has no type, with 32-bit attributes in network byte order.
fn other(name: &str, attributes: &[(u16, u32)]) -> Expressions {
    let attributes =
        attributes.iter().map(|(kind, value)| DefaultNla::new(*kind, value.to_be_bytes().to_vec())).collect();
    Expressions::Other { expression_type: name.to_owned(), attributes }
}
