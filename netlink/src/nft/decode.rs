//! What the kernel tells about a table.

use netlink_packet_netfilter::nftables::{
    ChainAttribute, DataAttribute, ListAttribute, NfTablesMessage, RuleAttribute, SetElementAttribute,
    SetElementFlags, SetElementList, TableAttribute,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};

use super::Element;

/// The policy of a chain that lets pass what no rule judges (`include/uapi/linux/netfilter.h`).
pub(super) const NF_ACCEPT: u32 = 1;

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

pub(super) fn elements(message: &NetfilterMessage) -> Vec<Element> {
    let Some(NfTablesMessage::NewSetElement(list)) = nftables(message) else { return Vec::new() };
    let mut elements = Vec::new();
    for attribute in &list.attributes {
        if let SetElementList::Elements(found) = attribute {
            elements.extend(found.iter().filter_map(element));
        }
    }
    elements
}

fn element(attributes: &ListAttribute<SetElementAttribute>) -> Option<Element> {
    let ListAttribute::Element(attributes) = attributes else { return None };
    let mut key = None;
    let mut ends_range = false;
    for attribute in attributes {
        match attribute {
            SetElementAttribute::Key(DataAttribute::Value(bytes)) => key = Some(bytes.clone()),
            SetElementAttribute::Flags(flags) => ends_range = flags.contains(SetElementFlags::IntervalEnd),
            _ => {}
        }
    }
    Some(Element { key: key?, ends_range })
}
