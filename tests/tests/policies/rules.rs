//! Packet filter rules like those of a daemon for `NetworkPolicy`, on a node.
//!
//! They follow kube-network-policies 1.1.1 (`pkg/dataplane/controller.go`), with these differences:
//!
//! * They are made by `iptables-nft`, because the kernel of the lab lacks the nftables expression `queue`
//!   (`CONFIG_NFT_QUEUE`). So the chains have the priority of table `mangle`, -150, instead of 95 after and -95 before
//!   routing. After routing, both precede source NAT, so the queue sees pods' addresses. Before routing, only the
//!   daemon's chain follows destination NAT.
//! * Packets of an accepted connection are recognised by its state alone. The daemon also requires a label that it sets
//!   together with its verdict, which needs `CONFIG_NETFILTER_NETLINK_GLUE_CT`.
//! * The daemon drops and never rejects. `install_with_reject` queues forwarded packets, because no rule can reject a
//!   packet after routing.

use std::net::IpAddr;

use polder_tests::Node;
use polder_tests::queue::REJECT_MARK;

/// The release of kube-network-policies whose rules these are.
pub(crate) const RELEASE: &str = "v1.1.1";

/// The number of the queue.
pub(crate) const QUEUE: u16 = 98;

/// What the kernel does with packets for the queue while no program reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WithoutProgram {
    /// Accepts them: `--fail-open`, the default of the daemon.
    Accept,
    /// Drops them.
    Drop,
}

/// Which packets of a selected pod the rules queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queued {
    /// Those that are no part of an accepted connection.
    New,
    /// All: the state of connections whose label the daemon has removed, because a policy has changed.
    All,
}

/// Replaces the node's rules by the daemon's for these pods.
pub(crate) fn install(node: &Node, pods: &[IpAddr], absent: WithoutProgram, queued: Queued) {
    let queue = queue(absent);
    for v6 in [false, true] {
        let mut lines = String::from("*mangle\n-A POSTROUTING -p udp --dport 53 -j ACCEPT\n");
        if v6 {
            for kind in 133..=137 {
                lines += &format!("-A POSTROUTING -p icmpv6 --icmpv6-type {kind} -j ACCEPT\n");
            }
        }
        lines += "-A POSTROUTING -m owner --uid-owner 0 -j ACCEPT\n";
        if queued == Queued::New {
            lines += "-A POSTROUTING -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n";
        }
        lines += "-A INPUT -i lo -j ACCEPT\n";
        for pod in pods.iter().filter(|pod| pod.is_ipv6() == v6) {
            lines += &format!(
                "-A POSTROUTING -s {pod} {queue}\n-A POSTROUTING -d {pod} {queue}\n\
                 -A INPUT -s {pod} -m conntrack --ctstate NEW {queue}\n\
                 -A PREROUTING -p udp --dport 53 -s {pod} {queue}\n-A PREROUTING -p udp --dport 53 -d {pod} {queue}\n"
            );
        }
        restore(node, v6, &lines);
    }
}

/// Replaces the node's rules by rules that queue the first packets of forwarded connections of these pods, and reject
/// those that the program marks.
pub(crate) fn install_with_reject(node: &Node, pods: &[IpAddr]) {
    let queue = queue(WithoutProgram::Drop);
    for v6 in [false, true] {
        let mut lines = String::from("*mangle\n");
        for pod in pods.iter().filter(|pod| pod.is_ipv6() == v6) {
            for side in ["-s", "-d"] {
                lines += &format!("-A FORWARD {side} {pod} -m conntrack --ctstate NEW {queue}\n");
            }
        }
        let prohibited = if v6 { "icmp6-adm-prohibited" } else { "icmp-admin-prohibited" };
        lines += &format!(
            "COMMIT\n*filter\n-A FORWARD -p tcp -m mark --mark {REJECT_MARK} -j REJECT --reject-with tcp-reset\n\
             -A FORWARD -m mark --mark {REJECT_MARK} -j REJECT --reject-with {prohibited}\n"
        );
        restore(node, v6, &lines);
    }
}

/// Deletes all rules of these tables.
pub(crate) fn remove(node: &Node) {
    for v6 in [false, true] {
        restore(node, v6, "*mangle\nCOMMIT\n*filter\n");
    }
}

/// All rules of `iptables` on the node, without counters.
pub(crate) fn saved(node: &Node) -> String {
    node.shell("{ iptables-nft-save; ip6tables-nft-save; } | grep -v '^#' | sed 's/\\[.*\\]//'")
}

fn queue(absent: WithoutProgram) -> String {
    let bypass = if absent == WithoutProgram::Accept { " --queue-bypass" } else { "" };
    format!("-j NFQUEUE --queue-num {QUEUE}{bypass}")
}

/// Replaces the tables in `lines`, each in one step.
fn restore(node: &Node, v6: bool, lines: &str) {
    let program = if v6 { "ip6tables-nft-restore" } else { "iptables-nft-restore" };
    node.write("/run/policies", &format!("{lines}COMMIT\n"));
    node.run(program, &["/run/policies"]);
}
