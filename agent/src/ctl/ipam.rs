//! Who has which address, and what a check has found, for people.

use polder_api::ipam::{Checked, Shown};

use super::{pool, print, table};

/// What is known of a subject.
pub fn shown(shown: &Shown) -> String {
    let mut parts: Vec<String> = shown.remarks.iter().map(|remark| format!("{remark}\n")).collect();
    if !shown.pools.is_empty() {
        parts.push(pool::pools(&shown.pools));
    }
    if !shown.nodes.is_empty() {
        let mut table = table(["NODE", "STANDING", "INCARNATION", "GATEWAYS", "BLOCKS", "ADDRESSES USED"]);
        for node in &shown.nodes {
            let gateways: Vec<String> = node.gateways.iter().map(ToString::to_string).collect();
            table.add_row([
                node.name.to_string(),
                node.standing.clone(),
                node.incarnation.clone(),
                gateways.join(" "),
                node.blocks.to_string(),
                node.addresses_used.map_or("?".to_owned(), |used| used.to_string()),
            ]);
        }
        parts.push(print(table));
    }
    if !shown.blocks.is_empty() {
        parts.push(pool::blocks(&shown.blocks));
    }
    if let [one] = shown.addresses.as_slice() {
        parts.push(address(one));
    } else if !shown.addresses.is_empty() {
        let mut table = table(["ADDRESS", "STANDING", "NODE", "POD", "ATTACHMENT", "SINCE"]);
        for address in &shown.addresses {
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            table.add_row([
                address.address.to_string(),
                address.standing.clone(),
                or_dash(address.node.as_ref().map(ToString::to_string)),
                or_dash(address.pod.clone()),
                or_dash(address.attachment.as_ref().map(ToString::to_string)),
                or_dash(address.since.clone()),
            ]);
        }
        parts.push(print(table));
    }
    parts.join("\n")
}

/// All that is known of one address.
fn address(address: &polder_api::ipam::AddressStatus) -> String {
    let mut lines = vec![format!("address      {}", address.address)];
    lines.push(format!("standing     {}: {}", address.standing, address.why));
    let facts = [
        ("pool", address.pool.as_ref().map(ToString::to_string)),
        ("block", address.block.as_ref().map(ToString::to_string)),
        ("node", address.node.as_ref().map(ToString::to_string)),
        ("incarnation", address.incarnation.clone()),
        ("pod", address.pod.clone()),
        ("attachment", address.attachment.as_ref().map(ToString::to_string)),
        ("since", address.since.clone()),
    ];
    let known = facts.into_iter().filter_map(|(name, fact)| Some(format!("{name:<13}{}", fact?)));
    lines.extend(known);
    lines.join("\n") + "\n"
}

/// What a check has found.
pub fn checked(checked: &Checked) -> String {
    let mut lines = Vec::new();
    for found in &checked.deviations {
        let node = found.node.as_ref().map(|node| format!(" [{node}]")).unwrap_or_default();
        lines.push(format!("{}{node}: {}", found.invariant, found.what));
        lines.push(format!("    {}", if found.repaired { "put right" } else { &found.remedy }));
    }
    if checked.left_out > 0 {
        lines.push(format!("{} more are not shown: put these right and check again", checked.left_out));
    }
    let names = |names: &[polder_api::NodeName]| {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        names.join(", ")
    };
    if !checked.silent.is_empty() {
        lines.push(format!("alive, and has not answered in time: {}", names(&checked.silent)));
    }
    if !checked.absent.is_empty() {
        lines.push(format!("not alive, and was not asked: {}", names(&checked.absent)));
    }
    let attachments: u64 = checked.nodes.iter().map(|node| node.attachments).sum();
    let interfaces: u64 = checked.nodes.iter().map(|node| node.interfaces).sum();
    lines.push(format!(
        "{} nodes have looked at themselves: {attachments} attachments, {interfaces} interfaces; {}",
        checked.nodes.len(),
        match checked.deviations.len() {
            0 => "nothing deviates".to_owned(),
            1 => "1 deviation".to_owned(),
            number => format!("{number} deviations"),
        }
    ));
    lines.join("\n") + "\n"
}
