//! `polderctl status`: the state of this node.

use std::time::{Duration, SystemTime};

use clap::Args;
use polder_api::ask;
use polder_api::status::{FastPathStatus, PacketPath, Status, StoreStatus};

use super::{CommandOutput, Render, Run, Session};
use crate::exit::Exit;

/// Takes no arguments.
#[derive(Debug, Args)]
pub struct Command {}

impl Run for Command {
    fn run(&self, session: &Session<'_>) -> anyhow::Result<CommandOutput> {
        session.show(ask::Status)
    }
}

impl Render for Status {
    fn table(&self) -> String {
        status(self)
    }

    fn exit(&self) -> Exit {
        Exit::of_look(self.is_well())
    }
}

/// The status of a node as text, one fact per line.
fn status(status: &Status) -> String {
    let mut lines = vec![
        format!("node      {} (polder {})", status.node, status.version),
        format!("ready     {}", if status.ready { "yes" } else { "no" }),
    ];
    lines.extend(status.reasons.iter().map(|reason| format!("          {reason}")));
    lines.push(match &status.store {
        StoreStatus::Connected { store, revision } => format!("store     {store}, at revision {revision}"),
        StoreStatus::Disconnected { store, reason } => format!("store     {store} is unreachable: {reason}"),
    });
    if let Some(cluster) = &status.cluster {
        lines.push(format!(
            "cluster   {}, backend {}, attach {}",
            cluster.id, cluster.backend, cluster.attach
        ));
    }
    for uplink in &status.underlay {
        lines.push(format!(
            "underlay  {} on {}, mtu {}, chosen by {}",
            uplink.address, uplink.interface, uplink.mtu, uplink.chosen_by
        ));
    }
    for other in &status.not_underlay {
        let interface = other.interface.as_ref().map(|name| format!(" on {name}")).unwrap_or_default();
        lines.push(format!("          {}{interface} is not used: {}", other.address, other.reason));
    }
    let mtu = status.mtu.map(|mtu| format!(", mtu {mtu}")).unwrap_or_default();
    lines.push(format!("pods      {}{mtu}", status.pods));
    for block in &status.blocks {
        lines.push(format!(
            "block     {} of pool {}: {} used, {} in cool-down, {} free",
            block.block, block.pool, block.used, block.resting, block.free
        ));
    }
    lines.push(fast_path(&status.fast_path));
    if let Some(pass) = &status.last_pass {
        lines.push(format!(
            "kernel    pass {} made {} changes in {}.{:03} ms",
            pass.count,
            pass.writes,
            pass.took_us / 1000,
            pass.took_us % 1000
        ));
        lines.extend(pass.failures.iter().map(|failure| format!("          failed: {failure}")));
    }
    lines.extend(status.repairs.iter().map(|repair| {
        let ago = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(repair.at));
        let more = if repair.more > 0 { format!("; and {} more", repair.more) } else { String::new() };
        let by = if repair.by.is_empty() {
            String::new()
        } else {
            format!(", changed by {}", repair.by.join(", "))
        };
        let ago = ago.unwrap_or_default().as_secs();
        format!("repaired  {ago} s ago{by}: {}{more}", repair.changes.join("; "))
    }));
    lines.extend(
        status.removed.iter().map(|removed| format!("pending   {} is {}", removed.node, removed.standing)),
    );
    lines.extend(status.missing_features.iter().map(|missing| format!("kernel    {missing}")));
    lines.extend(status.problems.iter().map(|problem| format!("problem   {problem}")));
    lines.join("\n") + "\n"
}

/// One line: the state, the number of packets on each path, and the most frequent reasons for the normal path.
fn fast_path(status: &FastPathStatus) -> String {
    let reason = status.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let (fast, normal) = (status.total(PacketPath::Fast), status.total(PacketPath::Normal));
    if fast + normal == 0 {
        return format!("fast path {}{reason}", status.state);
    }
    let mut reasons: Vec<_> = status
        .packets
        .iter()
        .filter(|counted| counted.path == PacketPath::Normal && counted.packets > 0)
        .collect();
    reasons.sort_by_key(|counted| std::cmp::Reverse(counted.packets));
    let reasons: Vec<String> =
        reasons.iter().take(NAMED).map(|counted| format!("{} {}", counted.packets, counted.reason)).collect();
    let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    format!("fast path {}{reason}; {fast} packets fast, {normal} normal{reasons}", status.state)
}

/// How many reasons for the normal path are named.
const NAMED: usize = 3;

#[cfg(test)]
mod tests {
    use polder_api::status::{PacketCount, PassStatus};

    use super::*;

    fn healthy() -> Status {
        Status {
            node: "n1".parse().unwrap(),
            version: "0".into(),
            ready: true,
            reasons: Vec::new(),
            problems: Vec::new(),
            refused_writes: Vec::new(),
            removed: Vec::new(),
            cluster: None,
            store: StoreStatus::Connected { store: "etcd".into(), revision: 1 },
            underlay: Vec::new(),
            not_underlay: Vec::new(),
            mtu: None,
            blocks: Vec::new(),
            pods: 0,
            missing_features: Vec::new(),
            fast_path: FastPathStatus::default(),
            last_pass: None,
            repairs: Vec::new(),
            repair_count: 0,
        }
    }

    fn end_of(change: impl FnOnce(&mut Status)) -> Exit {
        let mut status = healthy();
        change(&mut status);
        status.exit()
    }

    #[test]
    fn a_status_with_a_failure_or_a_problem_exits_with_the_problem_code() {
        assert_eq!(end_of(|_| ()), Exit::Fine);
        assert_eq!(end_of(|status| status.ready = false), Exit::Problem);
        assert_eq!(end_of(|status| status.problems = vec!["the peer is silent".into()]), Exit::Problem);
        let away = StoreStatus::Disconnected { store: "etcd".into(), reason: "refused".into() };
        assert_eq!(end_of(|status| status.store = away), Exit::Problem);
        let pass = |failures| PassStatus { count: 1, writes: 0, written: 0, took_us: 1, failures };
        assert_eq!(end_of(|status| status.last_pass = Some(pass(vec!["no route".into()]))), Exit::Problem);
        assert_eq!(end_of(|status| status.last_pass = Some(pass(Vec::new()))), Exit::Fine);
    }

    #[test]
    fn the_paths_of_packets_are_one_line_with_the_most_frequent_reasons() {
        use polder_api::status::FastPathState::{Off, On};
        let off = FastPathStatus { state: Off, reason: Some("no BPF".into()), packets: Vec::new() };
        assert_eq!(fast_path(&off), "fast path off: no BPF");
        let counted = |path, reason: &str, packets| PacketCount { path, reason: reason.into(), packets };
        let packets = vec![
            counted(PacketPath::Fast, "pod_to_pod", 70),
            counted(PacketPath::Normal, "expired", 2),
            counted(PacketPath::Normal, "no_record", 5),
            counted(PacketPath::Normal, "fragment", 0),
            counted(PacketPath::Fast, "pod_to_node", 30),
        ];
        let on = FastPathStatus { state: On, reason: None, packets };
        assert_eq!(fast_path(&on), "fast path on; 100 packets fast, 7 normal (5 no_record, 2 expired)");
    }

    #[test]
    fn missing_kernel_features_and_repairs_are_not_problems() {
        assert_eq!(
            end_of(|status| status.missing_features = vec!["ports cannot be locked".into()]),
            Exit::Fine
        );
        assert_eq!(end_of(|status| status.repair_count = 7), Exit::Fine);
    }
}
