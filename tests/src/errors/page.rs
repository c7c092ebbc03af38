//! The list of all errors, in Markdown: `docs/errors.md`.

use std::collections::BTreeMap;

use super::listed::Listed;

/// The command that writes the file.
pub const COMMAND: &str = "POLDER_WRITE_ERRORS=1 cargo test -p polder-tests --test errors";

/// The folder of a crate, and the title and content of its section.
const SECTIONS: [[&str; 3]; 6] = [
    [
        "cni-plugin",
        "Plugin",
        "Reported to the container runtime, which writes them to its log and to the events of the pod.",
    ],
    [
        "agent",
        "Agent",
        "In the log of `polder-agent`, in `polderctl status`, and in the output of `polderctl`.",
    ],
    ["ipam", "IPAM and cluster records", "Addresses, blocks, pools, nodes and the cluster settings."],
    ["store", "Datastore", "etcd, the file of a cluster without etcd, and the ledger."],
    ["netlink", "Kernel", "Requests to the kernel about interfaces, routes and filters."],
    ["api", "Common", "Names, addresses and the messages between plugin, `polderctl` and agent."],
];

/// The content of `docs/errors.md`.
pub fn page(errors: &[Listed]) -> String {
    let mut page = format!(
        "# Errors\n\n\
         The text of every error, its cause and its remedy. This file is generated from the source code:\n\
         `{COMMAND}` rewrites it.\n\n\
         To find an error, search for the fixed words of its message: values are placeholders in `<angle brackets>`.\n\
         `<cause>` is the text of another error, which often is an entry of its own: search for it too.\n\
         If the remedy is \"in the text\", the message itself contains it.\n"
    );
    for [folder, title, content] in SECTIONS {
        let errors: Vec<&Listed> = errors.iter().filter(|error| error.crate_folder == folder).collect();
        if !errors.is_empty() {
            page += &format!("\n## {title}\n\n{content}\n\n{}", table(&errors));
        }
    }
    page
}

/// The table of a section: errors with the same text are one row.
fn table(errors: &[&Listed]) -> String {
    let mut rows: BTreeMap<&str, [Vec<String>; 2]> = BTreeMap::new();
    for error in errors {
        let cells = [error.cause.clone(), error.remedy.as_ref().map(ToString::to_string).unwrap_or_default()];
        for (cell, line) in rows.entry(&error.text).or_default().iter_mut().zip(cells) {
            let line = prose(&line);
            if !cell.contains(&line) {
                cell.push(line);
            }
        }
    }
    let mut table = "| text | cause | remedy |\n|---|---|---|\n".to_owned();
    for (text, cells) in rows {
        let [causes, remedies] = cells.map(|lines| lines.join("<br>"));
        table += &format!("| {} | {causes} | {remedies} |\n", code(text));
    }
    table
}

/// A code span in a table.
fn code(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    if text.contains('`') { format!("`` {text} ``") } else { format!("`{text}`") }
}

/// A text of a doc comment in a table: without links to other items, and without HTML.
fn prose(text: &str) -> String {
    let (mut prose, mut rest, mut in_code) = (String::new(), text, false);
    while let Some(character) = rest.chars().next() {
        if let Some((label, after)) = link(rest).filter(|_| !in_code) {
            prose += &label.replace('|', "\\|");
            rest = after;
            continue;
        }
        in_code ^= character == '`';
        match character {
            '|' => prose.push_str("\\|"),
            '<' if !in_code => prose.push_str("&lt;"),
            _ => prose.push(character),
        }
        rest = &rest[character.len_utf8()..];
    }
    prose
}

/// The label of a link at the start of the text, and the text after the link. A link without a target is one to an
/// item, if its label is code.
fn link(text: &str) -> Option<(&str, &str)> {
    let (label, after) = text.strip_prefix('[')?.split_once(']')?;
    let target = after.strip_prefix('(').and_then(|target| target.split_once(')'));
    match target {
        Some((_, after)) => Some((label, after)),
        None => (label.starts_with('`') && label.ends_with('`')).then_some((label, after)),
    }
}
