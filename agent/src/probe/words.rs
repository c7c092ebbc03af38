//! Texts about the paths to the peers: log lines and problems.

use std::collections::BTreeMap;

use polder_api::status::ProbeState;
use tracing::{info, warn};

use super::schedule::{Key, Verdict};
use crate::kernel::desired::{Path, Reached};

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
pub fn problem((node, family): &Key, verdict: Verdict, reached: &Reached) -> Option<String> {
    let way = match &reached.path {
        Path::Direct { via, .. } => format!("directly to {via}"),
        Path::Tunnel { remote, .. } => format!("through a tunnel to {remote}"),
        Path::Unreachable(_) => return None,
    };
    match verdict {
        Verdict::Unknown | Verdict::Answers => None,
        Verdict::Silent => Some(format!(
            "node {node} does not answer on the path that {family} pods use, {way}: the node is down, or the network \
             between drops the packets"
        )),
        Verdict::Dropped => Some(format!(
            "node {node} answers, {way}, but packets forwarded to its {family} pods, or their replies, are dropped: \
             check `polderctl status` on both nodes for forwarding settings and packet filters"
        )),
        Verdict::PathMtuTooSmall(bytes) => Some(format!(
            "packets of {bytes} bytes do not reach {family} pods of node {node}, {way}, but small ones do: the network \
             between has a smaller MTU than the interfaces. Set mtu in the configuration to what it supports, or raise \
             its MTU"
        )),
    }
}
