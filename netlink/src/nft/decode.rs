//! What the kernel tells about a table.

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla,
    NlaBuffer, NlasIterator, Parseable,
};
use netlink_packet_netfilter::nftables::{NfTablesMessage, TableAttribute};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterSubsystem,
};

use super::Element;
use crate::error::{attribute, text};

/// Verdicts, and policies of chains, which say what becomes of what no rule judges (`include/uapi/linux/netfilter.h`).
pub(super) const NF_DROP: u32 = 0;
pub(super) const NF_ACCEPT: u32 = 1;

/// `NFT_MSG_NEWCHAIN` (`include/uapi/linux/netfilter/nf_tables.h`, as all of these).
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

/// `NFTA_SET_ELEM_KEY`, and `NFTA_DATA_VALUE` in it.
const KEY: u16 = 1;
pub(super) const VALUE: u16 = 1;

/// `NFTA_SET_ELEM_FLAGS`, and of those `NFT_SET_ELEM_INTERVAL_END`.
const FLAGS: u16 = 3;
const INTERVAL_END: u32 = 1;

/// A rule, as far as it can be told from others.
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

/// The rule, if it is one of that table: kernels before 5.2 send those of all tables.
pub(super) fn rule(message: &NetfilterMessage, of: &str) -> Option<FoundRule> {
    let rule = body(message, NEW_RULE)?;
    let found = FoundRule {
        chain: text(&rule, RULE_CHAIN).unwrap_or_default(),
        comment: value(&rule, RULE_USER_DATA).and_then(comment).unwrap_or_default(),
    };
    (text(&rule, RULE_TABLE).as_deref() == Some(of)).then_some(found)
}

/// A comment as `nft` keeps it: type 0, length, text with its NUL.
fn comment(data: &[u8]) -> Option<String> {
    let [0, length, rest @ ..] = data else { return None };
    let text = rest.get(..usize::from(*length).checked_sub(1)?)?;
    String::from_utf8(text.to_vec()).ok()
}

/// A message about a chain, a rule or elements of a set, its attributes not yet taken apart.
///
/// The library would do that too. But for each element it first writes the whole message down as text, for an error that it
/// then does not have: with 10,000 elements that takes four seconds. And chains and rules of others may have in them what
/// it has never heard of, which is no reason not to know the rest.
pub(super) fn undigested(message: &[u8]) -> Option<Result<NetlinkMessage<NetfilterMessage>, DecodeError>> {
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

/// The attributes of a message of that type, one behind the other.
pub(super) fn body(message: &NetfilterMessage, of_type: u8) -> Option<Vec<u8>> {
    let NetfilterMessageInner::Other { message_type, .. } = &message.inner else { return None };
    (*message_type == of_type).then(|| {
        let mut bytes = vec![0; message.inner.buffer_len()];
        message.inner.emit(&mut bytes);
        bytes
    })
}

/// The elements in a message about elements of a set of ours.
pub(super) fn elements(message: &NetfilterMessage) -> Result<Vec<Element>, DecodeError> {
    keys(message, |key, ends_range| {
        let element = key.and_then(Element::with_key).ok_or("an element of a set with no key of ours")?;
        Ok(if ends_range { element.behind_range() } else { element })
    })
}

/// What `put` makes of the key of each element in such a message, and whether that is the first behind a range.
pub(super) fn keys<T>(
    message: &NetfilterMessage,
    put: impl Fn(Option<&[u8]>, bool) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let NetfilterMessageInner::Other { message_type: NEW_SET_ELEMENT, attributes: all, .. } = &message.inner
    else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for list in all.iter().filter(|attribute| attribute.kind() == LIST) {
        let mut bytes = vec![0; list.value_len()];
        list.emit_value(&mut bytes);
        for element in attributes(&bytes) {
            let element = element?;
            let key = value(element.value(), KEY).and_then(|key| value(key, VALUE));
            let flags = number(element.value(), FLAGS).unwrap_or_default();
            found.push(put(key, flags & INTERVAL_END != 0)?);
        }
    }
    Ok(found)
}

pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<NlaBuffer<&[u8]>, DecodeError>> {
    NlasIterator::new(bytes)
}

/// What the first attribute of that kind has.
pub(super) fn value(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes.get(attribute(attributes, kind)?)
}

/// A number of 32 bits, which nftables has in network order.
pub(super) fn number(attributes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(value(attributes, kind)?.try_into().ok()?))
}
