//! Texts about the paths to the peers: log lines and problems.

use std::collections::BTreeMap;

use polder_api::status::ProbeState;
use polder_ipam::record::ClusterRecord;
use tracing::{info, warn};

use super::schedule::{Key, Verdict};
use crate::kernel::desired::{Path, PeerPath};

/// Logs the verdicts that changed.
pub(super) fn log(before: &BTreeMap<Key, Verdict>, now: &BTreeMap<Key, Verdict>) {
    for ((node, family), verdict) in now {
        let was = before.get(&(node.clone(), *family)).copied().unwrap_or(Verdict::Unknown);
        match (was, verdict) {
            (Verdict::Silent | Verdict::PathMtuTooSmall(_) | Verdict::Dropped, Verdict::Answers) => {
                info!(%node, %family, "peer answers again");
            }
            (
                Verdict::Unknown | Verdict::Answers | Verdict::PathMtuTooSmall(_) | Verdict::Dropped,
                Verdict::Silent,
            ) => {
                warn!(%node, %family, "peer does not answer on the pod path");
            }
            (
                Verdict::Unknown | Verdict::Answers | Verdict::Silent | Verdict::Dropped,
                Verdict::PathMtuTooSmall(bytes),
            ) => {
                warn!(%node, %family, bytes, "peer answers, but not to packets of this length");
            }
            (
                Verdict::Unknown | Verdict::Answers | Verdict::Silent | Verdict::PathMtuTooSmall(_),
                Verdict::Dropped,
            ) => {
                warn!(%node, %family, "peer answers, but packets forwarded to its pods, or their replies, are dropped");
            }
            _ => {}
        }
    }
}

/// The verdict as reported by `status` and `node list`.
pub fn state(verdict: Option<&Verdict>) -> ProbeState {
    match verdict {
        Some(Verdict::Answers) => ProbeState::Answers,
        Some(Verdict::PathMtuTooSmall(_)) => ProbeState::Narrow,
        Some(Verdict::Silent) => ProbeState::Silent,
        Some(Verdict::Dropped) => ProbeState::Dropped,
        Some(Verdict::Unknown) | None => ProbeState::Unknown,
    }
}

/// The problem with the path to a peer, if any.
pub fn problem(
    (node, family): &Key,
    verdict: Verdict,
    peer_path: &PeerPath,
    cluster: Option<&ClusterRecord>,
) -> Option<String> {
    let (path, needed) = match &peer_path.path {
        Path::Direct { via, .. } => {
            (format!("directly to {via}"), "ICMP and packets with pod addresses".to_owned())
        }
        Path::Tunnel { encapsulation, remote, .. } => (
            format!("through a {encapsulation} tunnel to {remote}"),
            match cluster {
                Some(cluster) => format!("UDP port {}", encapsulation.port(cluster)),
                None => "the UDP port of the tunnel".to_owned(),
            },
        ),
        Path::Unreachable(_) => return None,
    };
    match verdict {
        Verdict::Unknown | Verdict::Answers => None,
        Verdict::Silent => Some(format!(
            "node {node} does not answer on the {family} pod path ({path}): check that {node} is up, and that the \
             network between the nodes permits {needed}"
        )),
        Verdict::Dropped => Some(format!(
            "node {node} answers ({path}), but packets forwarded to its {family} pods, or the replies, are dropped: \
             run `polderctl status` on both nodes, which reports wrong forwarding settings and packet filters"
        )),
        Verdict::PathMtuTooSmall(bytes) => Some(format!(
            "packets of {bytes} bytes do not reach {family} pods of node {node} ({path}), but smaller ones do: a link \
             between the nodes has a smaller MTU than the interfaces of the nodes. Raise the MTU of that link, or set \
             a lower mtu in agent.toml on all nodes"
        )),
    }
}
