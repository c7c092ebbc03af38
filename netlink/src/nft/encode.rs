//! Encodes nftables messages for tables, chains, rules and set elements (`include/uapi/linux/netfilter/nf_tables.h`).

mod condition;
mod translation;

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, Expressions, Hook as HookAttribute, HookNumber, Immediate,
    InetHookNumber, ListAttribute, NfTablesMessage, Register, RuleAttribute, RuleMessage, SetAttribute,
    SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage, SetFlags, SetMessage,
    TableAttribute, TableFlags, TableMessage, Verdict as VerdictNumber, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use polder_api::Family;

use self::condition::{Field, inner_source};
use super::family::TableFamily;
use super::{Chain, Element, ElementKey, Hook, Rule, Set, TableKind, Verdict};
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
        // Not -100, the priority of kube-proxy and of iptables: of two chains with the same priority, the one that was
        // created last comes first.
        Hook::DestinationNat => ("nat", InetHookNumber::PreRouting.into(), -99),
        Hook::LocalDestinationNat => ("nat", InetHookNumber::LocalOut.into(), -99),
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
    let mut flags = if set.key.has_ranges() { SetFlags::Interval } else { SetFlags::empty() };
    let data = set.key.data();
    flags.set(SetFlags::Map, data.is_some());
    let mut attributes = vec![
        SetAttribute::Table(table.to_owned()),
        SetAttribute::Name(set.name.to_owned()),
        SetAttribute::Flags(flags),
        SetAttribute::KeyType(set.key.type_number()),
        SetAttribute::KeyLen(set.key.length()),
        SetAttribute::Id(id),
    ];
    if let Some(data) = data {
        attributes.push(SetAttribute::DataType(data.type_number));
        attributes.push(SetAttribute::DataLen(data.length));
    }
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
    let chunks = element_messages(table, set, elements.into_iter().map(element)).into_iter();
    chunks.map(|message| create(set.table, NfTablesMessage::NewSetElement(message))).collect()
}

pub(super) fn delete_elements<'a>(
    table: &str,
    set: &Set,
    elements: impl IntoIterator<Item = &'a Element>,
) -> Vec<Operation<NetfilterMessage>> {
    let keys = elements.into_iter().map(|element| ListAttribute::Element(key_attributes(element)));
    let chunks = element_messages(table, set, keys).into_iter();
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

fn element_messages(
    table: &str,
    set: &Set,
    elements: impl Iterator<Item = ListAttribute<SetElementAttribute>>,
) -> Vec<SetElementMessage> {
    let list: Vec<_> = elements.collect();
    let message = |chunk: &[_]| {
        let mut attributes = of_set(table, set.name);
        attributes.push(SetElementList::Elements(chunk.to_vec()));
        SetElementMessage { attributes }
    };
    list.chunks(ELEMENTS_PER_MESSAGE).map(message).collect()
}

fn element(element: &Element) -> ListAttribute<SetElementAttribute> {
    let mut attributes = key_attributes(element);
    if !element.data().is_empty() {
        attributes.push(SetElementAttribute::Data(DataAttribute::Value(element.data().to_vec())));
    }
    ListAttribute::Element(attributes)
}

/// The attributes that identify an element. The kernel deletes an element of a map whatever data the message has.
fn key_attributes(element: &Element) -> Vec<SetElementAttribute> {
    let mut attributes = vec![SetElementAttribute::Key(DataAttribute::Value(element.key().to_vec()))];
    if element.ends_range() {
        attributes.push(SetElementAttribute::Flags(SetElementFlags::IntervalEnd));
    }
    attributes
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
    let mut expressions: Vec<Expressions> = rule.matches.iter().flat_map(condition::expressions).collect();
    if let Verdict::TranslateDestination(map) = rule.verdict {
        expressions.extend(translation::look_up(map));
    }
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

fn verdict(verdict: Verdict) -> Expressions {
    match verdict {
        Verdict::Drop => immediate(super::decode::NF_DROP),
        Verdict::Accept => immediate(super::decode::NF_ACCEPT),
        Verdict::Masquerade => {
            const NFTA_MASQ_FLAGS: u16 = 1;
            const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;
            other("masq", &[(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY)])
        }
        Verdict::TranslateDestination(map) => translation::translate(map),
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
