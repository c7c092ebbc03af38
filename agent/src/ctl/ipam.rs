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
                node.standing.to_string(),
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
                address.standing.to_string(),
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
    lines.push(scope(checked));
    lines.extend(
        checked.absent.iter().map(|node| format!("{node} is not alive: nothing is known of its pods")),
    );
    lines.extend(checked.silent.iter().map(|node| {
        format!("{node} is alive and has not answered in time: nothing is known of its pods. Read the log of its agent")
    }));
    lines.extend(checked.unregistered.iter().map(|node| {
        format!(
            "{node}, this node, is not registered as a member of the cluster: nothing is known of its pods. See \
             polderctl status"
        )
    }));
    lines.join("\n") + "\n"
}

/// How much was checked, and how much of it deviates.
fn scope(checked: &Checked) -> String {
    let attachments: u64 = checked.nodes.iter().map(|node| node.attachments).sum();
    let interfaces: u64 = checked.nodes.iter().map(|node| node.interfaces).sum();
    let unregistered = usize::from(checked.unregistered.is_some());
    let nodes = checked.nodes.len() + checked.silent.len() + checked.absent.len() + unregistered;
    let found = match checked.deviations.len() as u64 + checked.left_out {
        0 if checked.nodes.is_empty() => "no node has answered".to_owned(),
        0 if checked.is_complete() => "nothing deviates".to_owned(),
        0 => "nothing deviates on these".to_owned(),
        1 => "1 deviation".to_owned(),
        number => format!("{number} deviations"),
    };
    format!(
        "{} of {nodes} nodes checked: {attachments} attachments, {interfaces} interfaces; {found}",
        checked.nodes.len()
    )
}

#[cfg(test)]
mod tests {
    use polder_api::ipam::NodeChecked;

    use super::*;

    fn answers(names: &[&str]) -> Vec<NodeChecked> {
        let checked =
            |name: &&str| NodeChecked { name: name.parse().unwrap(), attachments: 2, interfaces: 2 };
        names.iter().map(checked).collect()
    }

    #[test]
    fn a_check_of_all_nodes_says_that_nothing_deviates() {
        let text = checked(&Checked { nodes: answers(&["n1", "n2"]), ..Checked::default() });
        assert_eq!(text, "2 of 2 nodes checked: 4 attachments, 4 interfaces; nothing deviates\n");
    }

    #[test]
    fn nodes_that_were_not_checked_are_named_and_counted() {
        let names = |name: &str| vec![name.parse().unwrap()];
        let text = checked(&Checked {
            nodes: answers(&["n1"]),
            absent: names("n2"),
            silent: names("n3"),
            ..Checked::default()
        });
        assert!(
            text.starts_with("1 of 3 nodes checked: ") && text.contains("nothing deviates on these\n"),
            "{text}"
        );
        for sign in
            ["n2 is not alive: nothing is known of its pods", "n3 is alive and has not answered in time: "]
        {
            assert!(text.contains(sign), "{text}");
        }
    }

    #[test]
    fn a_check_that_nobody_answered_does_not_say_that_nothing_deviates() {
        let text = checked(&Checked { unregistered: Some("n1".parse().unwrap()), ..Checked::default() });
        assert!(text.contains("0 of 1 nodes checked") && text.contains("no node has answered"), "{text}");
        assert!(text.contains("n1, this node, is not registered") && !text.contains("deviates"), "{text}");
    }
}
