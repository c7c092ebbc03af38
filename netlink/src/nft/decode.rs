//! Decodes the kernel's messages about tables, chains, rules and set elements.

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla,
    NlaBuffer, NlasIterator, Parseable,
};
use netlink_packet_netfilter::nftables::{NfTablesMessage, TableAttribute};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterSubsystem,
};

use super::Element;
use crate::Error;
use crate::error::{attribute, text};

/// Verdicts, also used as policies of base chains (`include/uapi/linux/netfilter.h`).
pub(super) const NF_DROP: u32 = 0;
pub(super) const NF_ACCEPT: u32 = 1;

/// `NFT_MSG_NEWCHAIN` (`include/uapi/linux/netfilter/nf_tables.h`, like the constants below).
pub(super) const NEW_CHAIN: u8 = 3;

/// `NFT_MSG_NEWRULE`
pub(super) const NEW_RULE: u8 = 6;

/// `NFT_MSG_NEWSETELEM`
const NEW_SET_ELEMENT: u8 = 12;

/// `NFTA_CHAIN_POLICY`
pub(super) const CHAIN_POLICY: u16 = 5;

/// `NFTA_RULE_TABLE`, `NFTA_RULE_CHAIN` and `NFTA_RULE_USERDATA`
pub(super) const RULE_TABLE: u16 = 1;
pub(super) const RULE_CHAIN: u16 = 2;
const RULE_USER_DATA: u16 = 7;

/// `NFTA_SET_ELEM_LIST_ELEMENTS`
const LIST: u16 = 3;

/// `NFTA_SET_ELEM_KEY` and `NFTA_SET_ELEM_DATA`, and `NFTA_DATA_VALUE` in them.
const KEY: u16 = 1;
const DATA: u16 = 2;
pub(super) const VALUE: u16 = 1;

/// `NFTA_SET_ELEM_FLAGS`, and its flag `NFT_SET_ELEM_INTERVAL_END`.
const FLAGS: u16 = 3;
const INTERVAL_END: u32 = 1;

/// A rule, identified by its chain and comment.
pub(super) struct FoundRule {
    pub(super) chain: String,
    pub(super) comment: String,
}

fn nftables(message: &NetfilterMessage) -> Option<&NfTablesMessage> {
    match &message.inner {
        NetfilterMessageInner::NfTables(message) => Some(message),
        _ => None,
    }
}

pub(super) fn table_comment(message: &NetfilterMessage) -> Option<String> {
    let NfTablesMessage::NewTable(table) = nftables(message)? else { return None };
    table.attributes.iter().find_map(|attribute| match attribute {
        TableAttribute::UserData(data) => comment(data),
        _ => None,
    })
}

pub(super) fn accepts_by_policy(message: &NetfilterMessage) -> bool {
    let chain = body(message, NEW_CHAIN);
    chain.is_some_and(|chain| number(&chain, CHAIN_POLICY) == Some(NF_ACCEPT))
}

/// The rule, if it belongs to that table: kernels before 5.2 send the rules of all tables.
pub(super) fn rule(message: &NetfilterMessage, of: &str) -> Option<FoundRule> {
    let rule = body(message, NEW_RULE)?;
    let found = FoundRule {
        chain: text(&rule, RULE_CHAIN).unwrap_or_default(),
        comment: value(&rule, RULE_USER_DATA).and_then(comment).unwrap_or_default(),
    };
    (text(&rule, RULE_TABLE).as_deref() == Some(of)).then_some(found)
}

/// Decodes a comment in the format of `nft`: type 0, length, text with its NUL.
fn comment(data: &[u8]) -> Option<String> {
    let [0, length, rest @ ..] = data else { return None };
    let text = rest.get(..usize::from(*length).checked_sub(1)?)?;
    String::from_utf8(text.to_vec()).ok()
}

/// A message about a chain, a rule or set elements, with its attributes not decoded further.
///
/// The library's decoder formats the whole message as text for each element, for an error message that is not needed:
/// with 10,000 elements that takes four seconds. It also fails on unknown attributes in chains and rules of other
/// programs.
pub(super) fn with_raw_attributes(
    message: &[u8],
) -> Option<Result<NetlinkMessage<NetfilterMessage>, DecodeError>> {
    let header = NetlinkHeader::parse(&NetlinkBuffer::new(&message)).ok()?;
    let [subsys, message_type] = header.message_type.to_be_bytes();
    let subsys = NetfilterSubsystem::from(subsys);
    let is_read_here = matches!(message_type, NEW_CHAIN | NEW_RULE | NEW_SET_ELEMENT);
    (subsys == NetfilterSubsystem::NfTables && is_read_here).then(|| {
        let payload = message.get(header.buffer_len()..).unwrap_or_default();
        let family = NetfilterHeader::parse(payload)?;
        let attributes = attributes(payload.get(family.buffer_len()..).unwrap_or_default());
        let attributes =
            attributes.map(|attribute| DefaultNla::parse(&attribute?)).collect::<Result<_, _>>()?;
        let inner = NetfilterMessageInner::Other { subsys, message_type, attributes };
        Ok(NetlinkMessage::new(header, NetlinkPayload::InnerMessage(NetfilterMessage::new(family, inner))))
    })
}

/// The attributes of a message of that type, as bytes.
pub(super) fn body(message: &NetfilterMessage, of_type: u8) -> Option<Vec<u8>> {
    let NetfilterMessageInner::Other { message_type, .. } = &message.inner else { return None };
    (*message_type == of_type).then(|| {
        let mut bytes = vec![0; message.inner.buffer_len()];
        message.inner.emit(&mut bytes);
        bytes
    })
}

/// The elements in a message about one of Polder's sets.
pub(super) fn elements(message: &NetfilterMessage) -> Result<Vec<Element>, Error> {
    each_element(message, |attributes| {
        let data = value(attributes, DATA).and_then(|data| value(data, VALUE)).unwrap_or_default();
        let element =
            key(attributes).and_then(|key| Element::with_data(key, data)).ok_or(Error::ElementKey)?;
        Ok(if ends_range(attributes) { element.range_end() } else { element })
    })
}

/// Calls `convert` with the key of each element in the message, and whether the key ends a range. Returns the results.
pub(super) fn keys<T>(
    message: &NetfilterMessage,
    convert: impl Fn(Option<&[u8]>, bool) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    each_element(message, |attributes| convert(key(attributes), ends_range(attributes)))
}

/// The key in the attributes of an element.
fn key(attributes: &[u8]) -> Option<&[u8]> {
    value(attributes, KEY).and_then(|key| value(key, VALUE))
}

fn ends_range(attributes: &[u8]) -> bool {
    number(attributes, FLAGS).unwrap_or_default() & INTERVAL_END != 0
}

/// Calls `convert` with the attributes of each element in the message. Returns the results.
fn each_element<T>(
    message: &NetfilterMessage,
    convert: impl Fn(&[u8]) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let NetfilterMessageInner::Other { message_type: NEW_SET_ELEMENT, attributes: all, .. } = &message.inner
    else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for list in all.iter().filter(|attribute| attribute.kind() == LIST) {
        let mut bytes = vec![0; list.value_len()];
        list.emit_value(&mut bytes);
        for element in attributes(&bytes) {
            found.push(convert(element?.value())?);
        }
    }
    Ok(found)
}

pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<NlaBuffer<&[u8]>, DecodeError>> {
    NlasIterator::new(bytes)
}

/// The value of the first attribute of that kind.
pub(super) fn value(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes.get(attribute(attributes, kind)?)
}

/// The 32-bit value of an attribute, which nftables sends in network byte order.
pub(super) fn number(attributes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(value(attributes, kind)?.try_into().ok()?))
}
