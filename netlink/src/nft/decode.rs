//! What the kernel tells about a table.

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla,
    NlaBuffer, NlasIterator, Parseable, parse_u32_be,
};
use netlink_packet_netfilter::nftables::{ChainAttribute, NfTablesMessage, RuleAttribute, TableAttribute};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterSubsystem,
};

use super::Element;

/// The policy of a chain that lets pass what no rule judges (`include/uapi/linux/netfilter.h`).
pub(super) const NF_ACCEPT: u32 = 1;

/// `NFT_MSG_NEWSETELEM` (`include/uapi/linux/netfilter/nf_tables.h`, as all of these).
const NEW_SET_ELEMENT: u8 = 12;

/// `NFTA_SET_ELEM_LIST_ELEMENTS`
const LIST: u16 = 3;

/// `NFTA_SET_ELEM_KEY`, in which `NFTA_DATA_VALUE` comes first.
const KEY: u16 = 1;

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
    let Some(NfTablesMessage::NewChain(chain)) = nftables(message) else { return false };
    chain.attributes.contains(&ChainAttribute::Policy(NF_ACCEPT))
}

/// The rule, if it is one of that table: kernels before 5.2 send those of all tables.
pub(super) fn rule(message: &NetfilterMessage, of: &str) -> Option<FoundRule> {
    let NfTablesMessage::NewRule(rule) = nftables(message)? else { return None };
    let mut found = FoundRule { chain: String::new(), comment: String::new() };
    let mut is_ours = false;
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Table(table) => is_ours = table == of,
            RuleAttribute::Chain(chain) => found.chain.clone_from(chain),
            RuleAttribute::UserData(data) => found.comment = comment(data).unwrap_or_default(),
            _ => {}
        }
    }
    is_ours.then_some(found)
}

/// A comment as `nft` keeps it: type 0, length, text with its NUL.
fn comment(data: &[u8]) -> Option<String> {
    let [0, length, rest @ ..] = data else { return None };
    let text = rest.get(..usize::from(*length).checked_sub(1)?)?;
    String::from_utf8(text.to_vec()).ok()
}

/// A message about elements of a set, its attributes not yet taken apart.
///
/// The library would do that too. But for each element it first writes the whole message down as text, for an error that it
/// then does not have: with 10,000 elements that takes four seconds.
pub(super) fn undigested(message: &[u8]) -> Option<Result<NetlinkMessage<NetfilterMessage>, DecodeError>> {
    let header = NetlinkHeader::parse(&NetlinkBuffer::new(&message)).ok()?;
    let [subsys, message_type] = header.message_type.to_be_bytes();
    let subsys = NetfilterSubsystem::from(subsys);
    let is_about_elements = subsys == NetfilterSubsystem::NfTables && message_type == NEW_SET_ELEMENT;
    is_about_elements.then(|| {
        let payload = message.get(header.buffer_len()..).unwrap_or_default();
        let family = NetfilterHeader::parse(payload)?;
        let attributes = attributes(payload.get(family.buffer_len()..).unwrap_or_default());
        let attributes =
            attributes.map(|attribute| DefaultNla::parse(&attribute?)).collect::<Result<_, _>>()?;
        let inner = NetfilterMessageInner::Other { subsys, message_type, attributes };
        Ok(NetlinkMessage::new(header, NetlinkPayload::InnerMessage(NetfilterMessage::new(family, inner))))
    })
}

/// The elements in a message about elements of a set.
pub(super) fn elements(message: &NetfilterMessage) -> Result<Vec<Element>, DecodeError> {
    let NetfilterMessageInner::Other { message_type: NEW_SET_ELEMENT, attributes: all, .. } = &message.inner
    else {
        return Ok(Vec::new());
    };
    let mut elements = Vec::new();
    for list in all.iter().filter(|attribute| attribute.kind() == LIST) {
        let mut bytes = vec![0; list.value_len()];
        list.emit_value(&mut bytes);
        for found in attributes(&bytes) {
            elements.push(element(found?.value())?);
        }
    }
    Ok(elements)
}

fn element(bytes: &[u8]) -> Result<Element, DecodeError> {
    let mut element = None;
    let mut ends_range = false;
    for attribute in attributes(bytes) {
        let attribute = attribute?;
        match attribute.kind() {
            KEY => {
                let value = attributes(attribute.value()).next().transpose()?;
                element = value.and_then(|value| Element::with_key(value.value()));
            }
            FLAGS => ends_range = parse_u32_be(attribute.value())? & INTERVAL_END != 0,
            _ => {}
        }
    }
    let element = element.ok_or_else(|| DecodeError::from("an element of a set with no key of ours"))?;
    Ok(if ends_range { element.behind_range() } else { element })
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<NlaBuffer<&[u8]>, DecodeError>> {
    NlasIterator::new(bytes)
}
