//! Whether the link to a peer carries packets with pods' addresses. Many clouds drop packets whose source is not an address of the
//! machine (AWS: source/destination check; `OpenStack`: port security).
//!
//! Echo requests go to the peer's underlay address without a tunnel. The first has the node's address in the pod network as
//! source. If it gets no reply, a second one uses the node's underlay address. If only the second is answered, the network drops
//! pods' addresses. If neither is answered, the peer is down or ICMP is blocked, and nothing can be concluded.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use polder_api::{Family, NodeName, PerFamily};
use tokio::time::Instant;
use tracing::{info, warn};

use super::Side;
use super::pings::{Pings, send};
use super::schedule::{Key, Schedule, Target, Token, VOLLEY, Verdict};
use super::verdict::Living;
use crate::kernel::desired::Reached;

/// The test result of the direct path to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct {
    /// It carries packets with pods' addresses, or nothing indicates otherwise.
    Carries,
    /// It carries packets with the nodes' addresses, but drops those with pods' addresses.
    Drops,
}

/// Test results of the direct paths, by peer and family.
pub type DirectPaths = BTreeMap<Key, Direct>;

/// How long a path that dropped packets has to carry them before pods use it.
const LASTING: Duration = Duration::from_secs(20);

/// The current conclusion for a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Judged {
    direct: Direct,
    /// Since when a path that dropped packets carries them.
    carries_since: Option<Instant>,
}

impl Judged {
    const fn new(direct: Direct) -> Self {
        Self { direct, carries_since: None }
    }
}

/// Draws the conclusion. `pods` is the verdict on packets with the node's address in the pod network, `nodes` that on packets with
/// its underlay address.
fn judge(
    before: Option<Judged>,
    pods: Verdict,
    nodes: Option<Verdict>,
    peer: Living,
    now: Instant,
) -> Option<Judged> {
    match (pods, before) {
        (Verdict::Answers, Some(before)) if before.direct == Direct::Drops => {
            let since = before.carries_since.unwrap_or(now);
            let direct = if now - since >= LASTING { Direct::Carries } else { Direct::Drops };
            Some(Judged { direct, carries_since: Some(since) })
        }
        (Verdict::Answers, _) => Some(Judged::new(Direct::Carries)),
        (Verdict::Silent, before) => match (nodes, peer) {
            // A peer that has just started does not know yet where this node's pods are.
            (Some(Verdict::Answers), Living::Yes) => Some(Judged::new(Direct::Drops)),
            (Some(Verdict::Silent), _) | (_, Living::No) => {
                Some(before.map_or(Judged::new(Direct::Carries), |before| Judged::new(before.direct)))
            }
            _ => before,
        },
        _ => before,
    }
}

/// The tests of all direct paths.
pub(super) struct Tests<E> {
    /// With the node's address in the pod network: they are sent through the sockets of the host.
    pods: Schedule,
    /// With its underlay address, where the others are not answered.
    nodes: Side<E>,
    /// Where the latter can go.
    on_link: BTreeMap<Key, Target>,
    judged: BTreeMap<Key, Judged>,
}

impl<E: Sync> Tests<E> {
    /// Without any path. A path that carries packets is tested again after `steady`.
    pub(super) fn new(steady: Duration) -> Self {
        Self {
            pods: Schedule::new(steady),
            nodes: Side::new(steady),
            on_link: BTreeMap::new(),
            judged: BTreeMap::new(),
        }
    }

    /// Tests the direct paths to these peers from now on, as far as there are sockets on the host.
    pub(super) fn aim<P: Pings<Echo = E>>(
        &mut self,
        pings: &P,
        paths: &BTreeMap<Key, Reached>,
        host: &PerFamily<Option<E>>,
        underlay: &[IpAddr],
        now: Instant,
    ) {
        for family in Family::BOTH {
            let own = underlay.iter().copied().find(|own| Family::of(*own) == family);
            let opened = self.nodes.echoes[family].as_ref().map(|echo| pings.source(echo));
            if opened != own {
                self.nodes.echoes[family] = own.and_then(|own| match pings.open(own, None) {
                    Ok(echo) => Some(echo),
                    Err(error) => {
                        warn!(source = %own, %error, "cannot open a socket to test direct paths");
                        None
                    }
                });
            }
        }
        let targets = paths.iter().filter(|((_, family), _)| host[*family].is_some());
        self.on_link =
            targets.filter_map(|(key, reached)| Some((key.clone(), Target::direct(reached)?))).collect();
        self.pods.aim(self.on_link.iter().map(|(key, target)| (key.clone(), target.clone())), now);
        self.judged.retain(|key, _| self.on_link.contains_key(key));
        self.follow_up(now);
    }

    /// Tests with the node's underlay address where the other tests got no reply.
    pub(super) fn follow_up(&mut self, now: Instant) {
        let is_silent = |key: &Key| self.pods.seen(key).is_some_and(|seen| seen.verdict == Verdict::Silent);
        let silent = self.on_link.iter().filter(|(key, _)| is_silent(key));
        self.nodes.schedule.aim(silent.map(|(key, target)| (key.clone(), target.clone())), now);
    }

    /// Sends the tests whose time has come; whether there were any.
    pub(super) async fn shoot<P: Pings<Echo = E>>(
        &mut self,
        pings: &P,
        host: &PerFamily<Option<E>>,
        now: Instant,
    ) -> bool {
        let pods = self.pods.shoot(now, VOLLEY);
        let nodes = self.nodes.schedule.shoot(now, VOLLEY);
        let any = !pods.is_empty() || !nodes.is_empty();
        send(pings, host, pods).await;
        send(pings, &self.nodes.echoes, nodes).await;
        any
    }

    /// The sockets with the node's underlay addresses.
    pub(super) fn echoes(&self) -> &PerFamily<Option<E>> {
        &self.nodes.echoes
    }

    /// Records a reply to a test with the address in the pod network.
    pub(super) fn take_pods(&mut self, from: IpAddr, token: Token, now: Instant) {
        self.pods.take(from, token, now);
    }

    /// Records a reply to a test with the underlay address.
    pub(super) fn take_nodes(&mut self, from: IpAddr, token: Token, now: Instant) {
        self.nodes.schedule.take(from, token, now);
    }

    /// Closes a socket that cannot be read.
    pub(super) fn close(&mut self, family: Family) {
        self.nodes.echoes[family] = None;
    }

    /// When the next test is due.
    pub(super) fn next(&self) -> Option<Instant> {
        [self.pods.next(), self.nodes.schedule.next()].into_iter().flatten().min()
    }

    /// The peers whose lease state is needed for a conclusion.
    pub(super) fn suspects(&self) -> impl Iterator<Item = &NodeName> {
        let is_open = |key: &Key| self.nodes.schedule.seen(key).is_some_and(|seen| seen.verdict.is_open());
        let is_known = |key: &Key| self.judged.get(key).is_some_and(|judged| judged.direct == Direct::Drops);
        self.nodes.schedule.keys().filter(move |key| is_open(key) && !is_known(key)).map(|(name, _)| name)
    }

    /// Updates and returns the conclusions for all paths.
    pub(super) fn judge(&mut self, living: impl Fn(&NodeName) -> Living, now: Instant) -> DirectPaths {
        for key in self.on_link.keys() {
            let Some(pods) = self.pods.seen(key) else { continue };
            let nodes = self.nodes.schedule.seen(key).map(|seen| seen.verdict);
            let before = self.judged.get(key).copied();
            let judged = judge(before, pods.verdict, nodes, living(&key.0), now);
            let Some(judged) = judged.filter(|judged| Some(*judged) != before) else { continue };
            let (node, family) = key;
            match (before.map(|before| before.direct), judged.direct) {
                (Some(Direct::Carries) | None, Direct::Drops) => {
                    warn!(%node, %family, "the direct path drops packets with pods' addresses");
                }
                (Some(Direct::Drops), Direct::Carries) => {
                    info!(%node, %family, "the direct path carries packets with pods' addresses again");
                }
                _ => {}
            }
            self.judged.insert(key.clone(), judged);
        }
        self.judged.iter().map(|(key, judged)| (key.clone(), judged.direct)).collect()
    }
}

/// Most peers that are named in the problem.
const NAMED: usize = 5;

/// The problem with direct paths, if there is one. `has_tunnels`: whether pods' packets can use tunnels instead.
pub fn problem(direct: &DirectPaths, has_tunnels: bool) -> Option<String> {
    let dropping = direct.iter().filter(|(_, direct)| **direct == Direct::Drops).map(|((name, _), _)| name);
    let names: BTreeSet<&NodeName> = dropping.collect();
    let count = names.len();
    let mut listed: Vec<String> = names.into_iter().take(NAMED).map(ToString::to_string).collect();
    match count {
        0 => return None,
        count if count > NAMED => listed.push(format!("{} more", count - NAMED)),
        _ => {}
    }
    let (now, remedy) = if has_tunnels {
        (
            "those packets use tunnels, which are slower",
            "set the backend to vxlan to end this message: `polderctl cluster set --backend vxlan`",
        )
    } else {
        ("those packets are lost", "set the backend to auto or vxlan: `polderctl cluster set --backend auto`")
    };
    Some(format!(
        "the network drops packets with pods' addresses on the direct path to {}, but passes packets with this node's \
         address: {now}. Allow pods' addresses in the network (AWS: disable the source/destination check; OpenStack: \
         allowed address pairs or no port security), or {remedy}",
        listed.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is concluded from one verdict after the other, a second apart.
    fn play(verdicts: &[(Verdict, Option<Verdict>, Living)]) -> Vec<Option<Direct>> {
        let mut now = Instant::now();
        let mut judged = None;
        let mut all = Vec::new();
        for (pods, nodes, peer) in verdicts {
            judged = judge(judged, *pods, *nodes, *peer, now);
            all.push(judged.map(|judged| judged.direct));
            now += Duration::from_secs(1);
        }
        all
    }

    const ANSWERS: (Verdict, Option<Verdict>, Living) = (Verdict::Answers, None, Living::Unknown);
    const DROPPED: (Verdict, Option<Verdict>, Living) =
        (Verdict::Silent, Some(Verdict::Answers), Living::Yes);
    const SILENT: (Verdict, Option<Verdict>, Living) = (Verdict::Silent, Some(Verdict::Silent), Living::Yes);

    #[test]
    fn only_a_living_peer_that_answers_to_the_nodes_own_address_alone_is_behind_a_link_that_drops() {
        let outcome = |step| play(&[step])[0];
        assert_eq!(outcome(DROPPED), Some(Direct::Drops));
        assert_eq!(outcome(ANSWERS), Some(Direct::Carries));
        assert_eq!(outcome(SILENT), Some(Direct::Carries), "nothing is known against it");
        for peer in [Living::No, Living::Unknown] {
            assert_ne!(outcome((Verdict::Silent, Some(Verdict::Answers), peer)), Some(Direct::Drops));
        }
        assert_eq!(
            outcome((Verdict::Silent, None, Living::Yes)),
            None,
            "the node's own address is to be tried"
        );
        assert_eq!(outcome((Verdict::Unknown, None, Living::Yes)), None);
    }

    #[test]
    fn a_path_that_dropped_packets_is_used_once_it_carries_them_for_a_while() {
        let mut steps = vec![DROPPED];
        steps.extend([ANSWERS; 15]);
        // A single round that fails: it starts over.
        steps.push(DROPPED);
        steps.extend([ANSWERS; 20]);
        assert!(play(&steps).iter().all(|direct| *direct == Some(Direct::Drops)));
        steps.extend([ANSWERS; 2]);
        assert_eq!(*play(&steps).last().unwrap(), Some(Direct::Carries));
    }

    #[test]
    fn what_was_concluded_stays_while_the_peer_is_down() {
        assert_eq!(play(&[DROPPED, SILENT, SILENT])[2], Some(Direct::Drops));
        assert_eq!(play(&[ANSWERS, SILENT, SILENT])[2], Some(Direct::Carries));
    }
}
