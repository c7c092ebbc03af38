//! `polderctl ipam`: show, check and release address allocations.

use std::net::IpAddr;

use clap::Subcommand;
use polder_api::InvalidName;
use polder_api::ask;
use polder_api::ipam::{AddressStanding, AddressStatus, Checked, Release, RepairMode, Shown, Subject};
use polder_ipam::Cidr;
use polder_ipam::cidr::ParseCidrError;

use super::{CommandOutput, Render, Run, Session, Usage, block, pool, table, table_text};
use crate::exit::Exit;

/// Subcommands of `polderctl ipam`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show owner, state and use of an address, pod, block, node or pool, or of the whole cluster
    Show {
        /// One of: cluster, pool NAME, block CIDR, node NAME, pod NAMESPACE/NAME, ADDRESS [default: cluster]
        #[arg(num_args = 0..=2, value_name = "WHAT")]
        subject: Vec<String>,
    },
    /// Compare the cluster's records with the ledger and the kernel of every node, and print deviations
    Check {
        /// Also repair deviations, except where a repair would affect a running pod
        #[arg(long)]
        repair: bool,
    },
    /// Release a reserved address, or the address of a deleted pod of this node
    Release {
        /// Address to release
        address: IpAddr,
        /// Declare that the pod that holds the reserved address is permanently gone
        #[arg(long)]
        dead: bool,
    },
}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        match self {
            Self::Show { subject } => session.show(ask::Show(parse(subject).map_err(Usage::Subject)?)),
            Self::Check { repair } => {
                session.show(ask::Inspect(if *repair { RepairMode::Safe } else { RepairMode::None }))
            }
            Self::Release { address, dead } => {
                session.show(ask::Release(Release { address: *address, dead: *dead }))
            }
        }
    }
}

/// The subject of `polderctl ipam show` is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoSubject {
    /// The name of the pool or node is invalid.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The block is not a range.
    #[error(transparent)]
    Block(#[from] ParseCidrError),
    /// The words are not one of the known subjects.
    #[error(
        "{given:?} cannot be shown: use cluster, pool NAME, block CIDR, node NAME, pod NAMESPACE/NAME or an IP address"
    )]
    Unknown {
        /// The words.
        given: String,
    },
}

/// Parses the arguments of `polderctl ipam show`.
fn parse(words: &[String]) -> Result<Subject, NoSubject> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] | ["cluster"] => Ok(Subject::Cluster),
        ["pool", name] => Ok(Subject::Pool(name.parse()?)),
        ["block", cidr] => {
            let cidr: Cidr = cidr.parse()?;
            Ok(Subject::Block(cidr.into()))
        }
        ["node", name] => Ok(Subject::Node(name.parse()?)),
        ["pod", name] if name.split('/').count() == 2 => Ok(Subject::Pod((*name).to_owned())),
        [address] if let Ok(address) = address.parse() => Ok(Subject::Address(address)),
        _ => Err(NoSubject::Unknown { given: words.join(" ") }),
    }
}

impl Render for Shown {
    fn table(&self) -> String {
        shown(self)
    }

    fn exit(&self) -> Exit {
        let is_unknown = |address: &AddressStatus| address.standing == AddressStanding::Unknown;
        if self.addresses.iter().any(is_unknown) { Exit::Failed } else { Exit::Fine }
    }
}

impl Render for Checked {
    fn table(&self) -> String {
        checked(self)
    }

    fn exit(&self) -> Exit {
        Exit::of_look(self.is_clean())
    }
}

/// Tables with all facts about a subject.
fn shown(shown: &Shown) -> String {
    let mut parts: Vec<String> = shown.remarks.iter().map(|remark| format!("{remark}\n")).collect();
    if !shown.pools.is_empty() {
        parts.push(pool::pools(&shown.pools));
    }
    if !shown.nodes.is_empty() {
        let mut table = table(["NODE", "STATE", "INCARNATION", "GATEWAYS", "BLOCKS", "ADDRESSES USED"]);
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
        parts.push(table_text(table));
    }
    if !shown.blocks.is_empty() {
        parts.push(block::blocks(&shown.blocks));
    }
    if let [one] = shown.addresses.as_slice() {
        parts.push(address(one));
    } else if !shown.addresses.is_empty() {
        let mut table = table(["ADDRESS", "STATE", "NODE", "POD", "ATTACHMENT", "SINCE"]);
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
        parts.push(table_text(table));
    }
    parts.join("\n")
}

/// Details of one address, one fact per line.
fn address(address: &AddressStatus) -> String {
    let mut lines = vec![format!("address      {}", address.address)];
    lines.push(format!("state        {}: {}", address.standing, address.why));
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

/// Deviations and summary of a check.
fn checked(checked: &Checked) -> String {
    let mut lines = Vec::new();
    for found in &checked.deviations {
        let node = found.node.as_ref().map(|node| format!("[{node}] ")).unwrap_or_default();
        lines.push(format!("{node}{} (violates: {})", found.what, found.invariant));
        lines.push(format!("    {}", if found.repaired { "repaired" } else { &found.remedy }));
    }
    if checked.left_out > 0 {
        lines.push(format!(
            "{} more deviations are not shown: repair these and check again",
            checked.left_out
        ));
    }
    lines.push(scope(checked));
    lines.extend(checked.absent.iter().map(|node| format!("{node} is not alive: its pods were not checked")));
    lines.extend(checked.silent.iter().map(|node| {
        format!(
            "{node} is alive but did not answer in time: its pods were not checked. See the log of its agent"
        )
    }));
    lines.extend(checked.unregistered.iter().map(|node| {
        format!(
            "{node} (this node) is not registered as a member of the cluster: its pods were not checked. See \
             polderctl status"
        )
    }));
    lines.join("\n") + "\n"
}

/// Summary line: how much was checked, and the number of deviations.
fn scope(checked: &Checked) -> String {
    let attachments: u64 = checked.nodes.iter().map(|node| node.attachments).sum();
    let interfaces: u64 = checked.nodes.iter().map(|node| node.interfaces).sum();
    let unregistered = usize::from(checked.unregistered.is_some());
    let nodes = checked.nodes.len() + checked.silent.len() + checked.absent.len() + unregistered;
    let found = match checked.deviations.len() as u64 + checked.left_out {
        0 if checked.nodes.is_empty() => "no node answered".to_owned(),
        0 if checked.is_complete() => "no deviations".to_owned(),
        0 => "no deviations on these".to_owned(),
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
    fn a_check_of_all_nodes_reports_no_deviations() {
        let text = checked(&Checked { nodes: answers(&["n1", "n2"]), ..Checked::default() });
        assert_eq!(text, "2 of 2 nodes checked: 4 attachments, 4 interfaces; no deviations\n");
    }

    #[test]
    fn unchecked_nodes_are_listed_and_counted() {
        let names = |name: &str| vec![name.parse().unwrap()];
        let text = checked(&Checked {
            nodes: answers(&["n1"]),
            absent: names("n2"),
            silent: names("n3"),
            ..Checked::default()
        });
        assert!(
            text.starts_with("1 of 3 nodes checked: ") && text.contains("no deviations on these\n"),
            "{text}"
        );
        for sign in ["n2 is not alive: its pods were not checked", "n3 is alive but did not answer in time: "]
        {
            assert!(text.contains(sign), "{text}");
        }
    }

    #[test]
    fn a_check_without_any_answer_does_not_report_that_there_are_no_deviations() {
        let text = checked(&Checked { unregistered: Some("n1".parse().unwrap()), ..Checked::default() });
        assert!(text.contains("0 of 1 nodes checked") && text.contains("no node answered"), "{text}");
        assert!(text.contains("n1 (this node) is not registered") && !text.contains("deviation"), "{text}");
    }

    fn subject(words: &str) -> Result<Subject, NoSubject> {
        parse(&words.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_subject_of_ipam_show_is_parsed_from_one_or_two_words() {
        assert_eq!(subject(""), Ok(Subject::Cluster));
        assert_eq!(subject("pool ipv4"), Ok(Subject::Pool("ipv4".parse().unwrap())));
        assert_eq!(subject("block 10.0.0.0/26"), Ok(Subject::Block("10.0.0.0/26".parse().unwrap())));
        assert_eq!(subject("10.0.0.5"), Ok(Subject::Address("10.0.0.5".parse().unwrap())));
        assert_eq!(subject("pod default/web-0"), Ok(Subject::Pod("default/web-0".into())));
        assert!(subject("block 10.0.0.1/26").unwrap_err().to_string().contains("did you mean 10.0.0.0/26?"));
        for wrong in ["pod web-0", "block", "something", "node a/b"] {
            assert!(subject(wrong).is_err(), "{wrong} was taken");
        }
    }

    #[test]
    fn a_check_is_fine_only_if_every_member_was_checked() {
        let name = |name: &str| name.parse().unwrap();
        let checked = NodeChecked { name: name("n1"), attachments: 0, interfaces: 0 };
        let all = Checked { nodes: vec![checked], ..Checked::default() };
        assert_eq!(all.exit(), Exit::Fine);
        assert_eq!(Checked { absent: vec![name("n2")], ..all.clone() }.exit(), Exit::Problem);
        assert_eq!(Checked { silent: vec![name("n2")], ..all.clone() }.exit(), Exit::Problem);
        assert_eq!(Checked { unregistered: Some(name("n2")), ..all.clone() }.exit(), Exit::Problem);
        assert_eq!(Checked { left_out: 1, ..all }.exit(), Exit::Problem);
        assert_eq!(Checked::default().exit(), Exit::Problem, "nobody was checked");
    }
}
