//! What is known of the paths to the peers, in words.

use std::collections::BTreeMap;

use polder_api::status::ProbeState;
use tracing::{info, warn};

use super::schedule::{Key, Verdict};
use crate::kernel::desired::{Path, Reached};

/// Says what is no longer as it was.
pub(super) fn log(before: &BTreeMap<Key, Verdict>, now: &BTreeMap<Key, Verdict>) {
    for ((node, family), verdict) in now {
        let was = before.get(&(node.clone(), *family)).copied().unwrap_or(Verdict::Unknown);
        match (was, verdict) {
            (Verdict::Silent | Verdict::Narrow(_) | Verdict::Dropped, Verdict::Answers) => {
                info!(%node, %family, "answers again");
            }
            (
                Verdict::Unknown | Verdict::Answers | Verdict::Narrow(_) | Verdict::Dropped,
                Verdict::Silent,
            ) => {
                warn!(%node, %family, "does not answer");
            }
            (
                Verdict::Unknown | Verdict::Answers | Verdict::Silent | Verdict::Dropped,
                Verdict::Narrow(bytes),
            ) => {
                warn!(%node, %family, bytes, "answers, but not to packets of that length");
            }
            (
                Verdict::Unknown | Verdict::Answers | Verdict::Silent | Verdict::Narrow(_),
                Verdict::Dropped,
            ) => {
                warn!(%node, %family, "answers, but packets that are forwarded to its pods, or the answers, are dropped");
            }
            _ => {}
        }
    }
}

/// The verdict, as an operator sees it.
pub fn state(verdict: Option<&Verdict>) -> ProbeState {
    match verdict {
        Some(Verdict::Answers) => ProbeState::Answers,
        Some(Verdict::Narrow(_)) => ProbeState::Narrow,
        Some(Verdict::Silent) => ProbeState::Silent,
        Some(Verdict::Dropped) => ProbeState::Dropped,
        Some(Verdict::Unknown) | None => ProbeState::Unknown,
    }
}

/// What is wrong with the way to a peer, if anything is.
pub fn problem((node, family): &Key, verdict: Verdict, reached: &Reached) -> Option<String> {
    let way = match &reached.path {
        Path::Direct { via, .. } => format!("directly to {via}"),
        Path::Tunnel { remote, .. } => format!("through a tunnel to {remote}"),
        Path::Unreachable(_) => return None,
    };
    match verdict {
        Verdict::Unknown | Verdict::Answers => None,
        Verdict::Silent => Some(format!(
            "node {node} does not answer over the way that {family} pods use, {way}: it is down, or what is between does \
             not let it through"
        )),
        Verdict::Dropped => Some(format!(
            "node {node} answers, {way}, but packets that are forwarded to its {family} pods, or the answers, are dropped: look \
             at `polderctl status` on both nodes for forwarding settings and filters"
        )),
        Verdict::Narrow(bytes) => Some(format!(
            "packets of {bytes} bytes do not get to {family} pods of node {node}, {way}, although small ones do: what is \
             between carries less than the interfaces say. Set mtu in the configuration to what it carries, or raise its MTU"
        )),
    }
}
