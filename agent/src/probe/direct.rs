//! Whether the link to a peer carries packets with pod addresses. Many clouds drop packets whose source is not an
//! address of the machine (AWS: source/destination check; `OpenStack`: port security).
//!
//! While pods use the direct path, the probes of that path show whether it carries their packets. If these probes get
//! no reply, the node sends echo requests from its underlay address to that of the peer. If those are answered, and the
//! peer's agent is alive, the network drops packets with pod addresses, and the tunnel is used. If the tunnel does not
//! work either, the direct path is used again.
//!
//! While the tunnel is used, echo requests from the node's address in the pod network to the peer's underlay address
//! show when the direct path carries packets with pod addresses again. They do not show whether it carries packets *to*
//! pod addresses. So each failed return doubles the time until the next one.
//!
//! A strict reverse path filter of the peer drops these requests while the peer itself uses the tunnel, and one of this
//! node drops the replies. Then both nodes keep the tunnel, and each reports its own filter
//! ([`Filter::reverse_path_problem`](crate::kernel::foreign_state::Filter::reverse_path_problem)).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use polder_api::{Family, NodeName, PerFamily};
use tokio::time::Instant;
use tracing::{info, warn};

use super::ProbeSet;
use super::not_ready::Peers;
use super::pings::{Pings, send};
use super::schedule::{BATCH, Key, ProbeTarget, Schedule, Token, Verdict};
use super::verdict::LeaseState;
use crate::kernel::desired::{Path, PeerPath};

/// The test result of the direct path to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct {
    /// It carries packets with pod addresses, or nothing indicates otherwise.
    Carries,
    /// It carries packets with the nodes' addresses, but drops those with pod addresses.
    Drops,
}

/// Test results of the direct paths, by peer and family.
pub type DirectPaths = BTreeMap<Key, Direct>;

/// Time without replies on the direct path, while the peer answers to the node's underlay address, until the tunnel is
/// used. A peer needs part of it to learn the route to a new node.
const CONFIRM: Duration = Duration::from_secs(5);

/// Time after the change to the tunnel before a silent tunnel counts as failed.
const TRIAL: Duration = Duration::from_secs(15);

/// How long a path that dropped packets must carry them before pods use it again: the minimum and the maximum.
const LASTING: Duration = Duration::from_secs(20);
const LONGEST: Duration = Duration::from_secs(3600);

/// Pause between two tests of a path that dropped packets: while it carries them, and the maximum while it does not.
const STEADY: Duration = Duration::from_secs(2);
const SELDOM: Duration = Duration::from_secs(30);

/// The known state of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PathState {
    /// Whether pods use the direct path, and not the tunnel.
    is_direct: bool,
    /// The verdict on the path that pods use.
    used: Verdict,
    /// Whether the last test of the direct path with the node's address in the pod network was answered; `None` before
    /// the first test.
    carries: Option<bool>,
    /// The verdict on packets between the nodes' underlay addresses.
    nodes: Option<Verdict>,
    /// Whether the peer's agent is alive.
    peer: LeaseState,
}

/// The result for a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Judged {
    /// `None` until the first test succeeds or has failed for some time, if the tunnel was in use before.
    direct: Option<Direct>,
    /// Start of the use of the current path, direct or tunnel.
    since: Instant,
    /// Time since when the direct path seems to drop packets, if pods use it, or to carry them, if pods use the tunnel.
    other_since: Option<Instant>,
    /// How long it must seem to carry packets before pods use it again.
    lasting: Duration,
    /// Earliest time of the next change to the tunnel, after a failed one.
    tunnel_from: Instant,
}

impl Judged {
    fn new(direct: Option<Direct>, now: Instant) -> Self {
        Self { direct, since: now, other_since: None, lasting: Duration::ZERO, tunnel_from: now }
    }

    /// The next result.
    fn next(self, facts: &PathState, now: Instant) -> Self {
        let answers_alone = facts.used == Verdict::Silent
            && facts.nodes == Some(Verdict::Answers)
            && facts.peer == LeaseState::Exists;
        if facts.is_direct {
            self.while_direct(facts, answers_alone, now)
        } else {
            self.while_tunnelled(facts, answers_alone, now)
        }
    }

    fn while_direct(self, facts: &PathState, answers_alone: bool, now: Instant) -> Self {
        if self.direct == Some(Direct::Drops) && !facts.used.is_open() {
            // The engine is about to use the tunnel, if the cluster has tunnels.
            return self;
        }
        let known = Self { direct: Some(Direct::Carries), ..self };
        if !answers_alone {
            let other_since = if facts.used == Verdict::Unknown { self.other_since } else { None };
            return Self { other_since, ..known };
        }
        let since = self.other_since.unwrap_or(now);
        if now - since < CONFIRM || now < self.tunnel_from {
            return Self { other_since: Some(since), ..known };
        }
        let lasting = (self.lasting * 2).clamp(LASTING, LONGEST);
        Self { direct: Some(Direct::Drops), since: now, other_since: None, lasting, ..self }
    }

    fn while_tunnelled(self, facts: &PathState, answers_alone: bool, now: Instant) -> Self {
        // The engine is about to use the direct path.
        if self.direct == Some(Direct::Carries) {
            return self;
        }
        let carries = Self { direct: Some(Direct::Carries), since: now, other_since: None, ..self };
        if answers_alone && now - self.since >= TRIAL {
            let lasting = (self.lasting * 2).clamp(LASTING, LONGEST);
            return Self { lasting, tunnel_from: now + lasting, ..carries };
        }
        // The peer is up, but no test can be answered: ICMP is blocked between the nodes.
        if self.direct.is_none() && facts.used.is_open() && facts.nodes == Some(Verdict::Silent) {
            return carries;
        }
        let drops = facts.carries == Some(false) && facts.nodes == Some(Verdict::Answers);
        if self.direct.is_none() && drops && now - self.since >= TRIAL {
            return Self { direct: Some(Direct::Drops), other_since: None, ..self };
        }
        let since = self.other_since.unwrap_or(now);
        match facts.carries {
            Some(true) if now - since >= self.lasting => carries,
            Some(true) => Self { other_since: Some(since), ..self },
            Some(false) => Self { other_since: None, ..self },
            None => self,
        }
    }
}

/// The tests of all direct paths.
pub(super) struct Tests<E> {
    /// Tests with the node's address in the pod network, while pods use the tunnel: sent through the sockets of the
    /// host.
    pods: Schedule,
    /// Tests with the node's underlay address, while the path of pods does not answer, or before the first test of the
    /// direct path.
    nodes: ProbeSet<E>,
    /// The peers on the same link, and whether pods use the direct path.
    on_link: BTreeMap<Key, (ProbeTarget, bool)>,
    judged: BTreeMap<Key, Judged>,
}

impl<E: Sync> Tests<E> {
    /// No paths yet. A path between underlay addresses that is up is tested again after `steady`.
    pub(super) fn new(steady: Duration) -> Self {
        Self {
            pods: Schedule::new(STEADY.min(steady)).at_least_every(SELDOM),
            nodes: ProbeSet::new(steady),
            on_link: BTreeMap::new(),
            judged: BTreeMap::new(),
        }
    }

    /// Opens the sockets with the node's underlay addresses. Returns whether a socket was opened or closed.
    pub(super) fn open_sockets<P: Pings<Socket = E>>(&mut self, pings: &P, underlay: &[IpAddr]) -> bool {
        let mut is_changed = false;
        for family in Family::BOTH {
            let own = underlay.iter().copied().find(|address| Family::of(*address) == family);
            let opened = self.nodes.sockets[family].as_ref().map(|socket| pings.source(socket));
            if opened != own {
                self.nodes.sockets[family] = own.and_then(|own| match pings.open(own, None) {
                    Ok(socket) => Some(socket),
                    Err(error) => {
                        warn!(source = %own, %error, "cannot open a socket to test direct paths");
                        None
                    }
                });
                is_changed |= opened.is_some() || self.nodes.sockets[family].is_some();
            }
        }
        is_changed
    }

    /// Sets the peers whose direct paths are tested, in families with sockets on the host.
    pub(super) fn set_targets(
        &mut self,
        paths: &BTreeMap<Key, PeerPath>,
        host: &PerFamily<Option<E>>,
        now: Instant,
    ) {
        let targets = paths.iter().filter(|((_, family), _)| host[*family].is_some());
        let on_link = targets.filter_map(|(key, peer_path)| {
            let is_direct = matches!(peer_path.path, Path::Direct { .. });
            Some((key.clone(), (ProbeTarget::direct(peer_path)?, is_direct)))
        });
        self.on_link = on_link.collect();
        let tunnelled = self.on_link.iter().filter(|(_, (_, is_direct))| !is_direct);
        self.pods.set_targets(tunnelled.map(|(key, (target, _))| (key.clone(), target.clone())), now);
        self.judged.retain(|key, _| self.on_link.contains_key(key));
    }

    /// Sets the targets of the tests with the node's underlay address: paths without a reply, and untested paths.
    fn set_underlay_targets(&mut self, used: &BTreeMap<Key, Verdict>, now: Instant) {
        let is_silent = |key: &Key| used.get(key) == Some(&Verdict::Silent);
        let is_untested = |key: &Key| self.judged.get(key).is_some_and(|judged| judged.direct.is_none());
        let targets = self.on_link.iter().filter(|(key, _)| is_silent(key) || is_untested(key));
        self.nodes.schedule.set_targets(targets.map(|(key, (target, _))| (key.clone(), target.clone())), now);
    }

    /// Sends the tests that are due. Returns whether any were due.
    pub(super) async fn send_due_probes<P: Pings<Socket = E>>(
        &mut self,
        pings: &P,
        host: &PerFamily<Option<E>>,
        now: Instant,
    ) -> bool {
        let pods = self.pods.due_probes(now, BATCH);
        let nodes = self.nodes.schedule.due_probes(now, BATCH);
        let any = !pods.is_empty() || !nodes.is_empty();
        send(pings, host, pods).await;
        send(pings, &self.nodes.sockets, nodes).await;
        any
    }

    /// The sockets with the node's underlay addresses.
    pub(super) fn sockets(&self) -> &PerFamily<Option<E>> {
        &self.nodes.sockets
    }

    /// Records a reply to a test with the address in the pod network.
    pub(super) fn record_pod_address_reply(&mut self, from: IpAddr, token: Token, now: Instant) {
        self.pods.record_reply(from, token, now);
    }

    /// Records a reply to a test with the underlay address.
    pub(super) fn record_underlay_reply(&mut self, from: IpAddr, token: Token, now: Instant) {
        self.nodes.schedule.record_reply(from, token, now);
    }

    /// Closes a socket that cannot be read.
    pub(super) fn close(&mut self, family: Family) {
        self.nodes.sockets[family] = None;
    }

    /// Time of the next test.
    pub(super) fn next(&self) -> Option<Instant> {
        [self.pods.next(), self.nodes.schedule.next()].into_iter().flatten().min()
    }

    /// The peers whose lease state affects the result. `used` are the verdicts on the paths that pods use.
    pub(super) fn suspects(&self, used: &BTreeMap<Key, Verdict>) -> impl Iterator<Item = &NodeName> {
        let is_open =
            |key: &Key| self.nodes.schedule.result(key).is_some_and(|result| result.verdict.is_open());
        let is_silent = |key: &Key| used.get(key) == Some(&Verdict::Silent);
        let suspects = self.nodes.schedule.keys().filter(move |key| is_silent(key) && is_open(key));
        suspects.map(|(name, _)| name)
    }

    /// Evaluates all tests. Returns the results that affect the choice of paths, and the keys whose paths must be
    /// probed at once, because they just began to look like they drop packets. `used` are the verdicts on the paths
    /// that pods use.
    pub(super) fn judge(
        &mut self,
        used: &BTreeMap<Key, Verdict>,
        lease_state: impl Fn(&NodeName) -> LeaseState,
        now: Instant,
    ) -> (DirectPaths, Vec<Key>) {
        self.set_underlay_targets(used, now);
        let (mut results, mut doubted) = (DirectPaths::new(), Vec::new());
        for (key, (_, is_direct)) in &self.on_link {
            let facts = PathState {
                is_direct: *is_direct,
                used: used.get(key).copied().unwrap_or(Verdict::Unknown),
                carries: self.pods.result(key).and_then(|result| match result.verdict {
                    Verdict::Unknown => None,
                    verdict => Some(verdict.is_open() && result.lost == 0),
                }),
                nodes: self.nodes.schedule.result(key).map(|result| result.verdict),
                peer: lease_state(&key.0),
            };
            let before = self.judged.get(key).copied();
            let begun = before
                .unwrap_or_else(|| Judged::new(if *is_direct { Some(Direct::Carries) } else { None }, now));
            let judged = begun.next(&facts, now);
            let (node, family) = key;
            match (begun.direct, judged.direct) {
                (Some(Direct::Carries) | None, Some(Direct::Drops)) => {
                    warn!(%node, %family, "packets with pod addresses are dropped on the direct path");
                }
                (Some(Direct::Drops), Some(Direct::Carries)) => {
                    info!(%node, %family, "the direct path is in use again");
                }
                _ => {}
            }
            if *is_direct && begun.other_since.is_none() && judged.other_since.is_some() {
                doubted.push(key.clone());
            }
            match judged.direct {
                Some(Direct::Drops) => drop(results.insert(key.clone(), Direct::Drops)),
                Some(Direct::Carries) if !is_direct => drop(results.insert(key.clone(), Direct::Carries)),
                _ => {}
            }
            if before != Some(judged) {
                self.judged.insert(key.clone(), judged);
            }
        }
        (results, doubted)
    }
}

/// The problem with direct paths, if any. `has_tunnels`: whether pod packets can use tunnels instead.
pub fn problem(direct: &DirectPaths, has_tunnels: bool) -> Option<String> {
    let dropping = direct.iter().filter(|(_, direct)| **direct == Direct::Drops).map(|((name, _), _)| name);
    let names: BTreeSet<&NodeName> = dropping.collect();
    if names.is_empty() {
        return None;
    }
    let peers = Peers::of(names.into_iter());
    let (now, remedy) = if has_tunnels {
        (
            "those packets use tunnels, which are slower",
            "set the backend to vxlan to end this message: `polderctl cluster set --backend vxlan`",
        )
    } else {
        ("those packets are lost", "set the backend to auto or vxlan: `polderctl cluster set --backend auto`")
    };
    Some(format!(
        "packets with pods' addresses are dropped on the direct path to some peers (peers: {peers}), but those with this \
         node's address are not: {now}. If `polderctl status` on this node or on these peers reports a reverse path \
         filter or rp_filter, correct that first. Otherwise the network drops them: allow pods' addresses in it (AWS: \
         disable the source/destination check; OpenStack: allowed address pairs or no port security), or {remedy}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path that is evaluated every second.
    struct Scenario {
        judged: Judged,
        now: Instant,
    }

    impl Scenario {
        fn new(direct: Option<Direct>) -> Self {
            let now = Instant::now();
            Self { judged: Judged::new(direct, now), now }
        }

        /// The result after that number of seconds with these facts.
        fn after(&mut self, seconds: u64, facts: PathState) -> Option<Direct> {
            for _ in 0..seconds {
                self.judged = self.judged.next(&facts, self.now);
                self.now += Duration::from_secs(1);
            }
            self.judged.direct
        }
    }

    const CARRIES: Option<Direct> = Some(Direct::Carries);
    const DROPS: Option<Direct> = Some(Direct::Drops);

    /// Pods use the direct path, and it carries their packets.
    const GOOD: PathState = PathState {
        is_direct: true,
        used: Verdict::Answers,
        carries: None,
        nodes: None,
        peer: LeaseState::Unknown,
    };
    /// The direct path drops pod packets, but not packets between the nodes' addresses.
    const DROPPING: PathState =
        PathState { used: Verdict::Silent, nodes: Some(Verdict::Answers), peer: LeaseState::Exists, ..GOOD };
    /// The peer is down.
    const DOWN: PathState = PathState { nodes: Some(Verdict::Silent), ..DROPPING };
    /// Pods use the tunnel, and the direct path drops their packets.
    const TUNNELLED: PathState =
        PathState { is_direct: false, carries: Some(false), nodes: Some(Verdict::Answers), ..GOOD };
    /// The direct path seems to carry pod packets again.
    const HEALED: PathState = PathState { carries: Some(true), ..TUNNELLED };

    #[test]
    fn the_tunnel_replaces_a_direct_path_that_loses_only_pod_packets() {
        assert_eq!(Scenario::new(CARRIES).after(5, DROPPING), CARRIES, "the peer may not know this node yet");
        assert_eq!(Scenario::new(CARRIES).after(7, DROPPING), DROPS);
        for other in [
            GOOD,
            DOWN,
            PathState { used: Verdict::Dropped, ..DROPPING },
            PathState { nodes: None, ..DROPPING },
            PathState { peer: LeaseState::Missing, ..DROPPING },
            PathState { peer: LeaseState::Unknown, ..DROPPING },
        ] {
            assert_eq!(Scenario::new(CARRIES).after(60, other), CARRIES, "{other:?}");
        }
        // A link that was down for all packets is up again: the next probe is answered.
        let mut play = Scenario::new(CARRIES);
        for facts in [DOWN, DROPPING, GOOD, DROPPING] {
            assert_eq!(play.after(4, facts), CARRIES);
        }
    }

    #[test]
    fn a_failed_return_to_the_direct_path_doubles_the_waiting_time() {
        let mut play = Scenario::new(CARRIES);
        for lasting in [20, 40, 80] {
            assert_eq!(play.after(7, DROPPING), DROPS);
            assert_eq!(play.after(30, TUNNELLED), DROPS);
            assert_eq!(play.after(lasting, HEALED), DROPS);
            // A lost test restarts the time.
            assert_eq!(play.after(1, TUNNELLED), DROPS);
            assert_eq!(play.after(lasting, HEALED), DROPS);
            assert_eq!(play.after(2, HEALED), CARRIES);
        }
        for _ in 0..20 {
            play.after(7, DROPPING);
            play.after(4000, HEALED);
        }
        assert_eq!(play.judged.lasting, LONGEST);
    }

    #[test]
    fn a_failing_tunnel_is_abandoned_and_not_retried_soon() {
        let silent = PathState { used: Verdict::Silent, peer: LeaseState::Exists, ..TUNNELLED };
        let mut play = Scenario::new(CARRIES);
        assert_eq!(play.after(7, DROPPING), DROPS);
        assert_eq!(play.after(12, silent), DROPS);
        assert_eq!(play.after(5, silent), CARRIES);
        assert_eq!(play.after(30, DROPPING), CARRIES);
        assert_eq!(play.after(30, DROPPING), DROPS, "the network may have changed");
    }

    #[test]
    fn a_starting_agent_keeps_the_tunnel_until_a_test_succeeds_or_icmp_is_blocked() {
        assert_eq!(Scenario::new(None).after(15, TUNNELLED), None);
        assert_eq!(Scenario::new(None).after(60, PathState { carries: None, ..TUNNELLED }), None);
        assert_eq!(Scenario::new(None).after(1, HEALED), CARRIES);
        let blocked = PathState { nodes: Some(Verdict::Silent), ..TUNNELLED };
        assert_eq!(Scenario::new(None).after(1, blocked), CARRIES, "ICMP is blocked");
        let down = PathState { used: Verdict::Silent, ..blocked };
        assert_eq!(Scenario::new(None).after(60, down), None, "the peer is down");
    }

    #[test]
    fn a_tunnel_that_was_in_use_before_is_reported_if_the_direct_path_never_carries() {
        let mut play = Scenario::new(None);
        assert_eq!(play.after(17, TUNNELLED), DROPS);
        assert_eq!(play.after(60, TUNNELLED), DROPS);
        assert_eq!(play.after(1, HEALED), CARRIES);
    }

    #[test]
    fn the_problem_names_reverse_path_filters_before_the_network() {
        let key = ("n2".parse().unwrap(), Family::V6);
        let text = problem(&DirectPaths::from([(key, Direct::Drops)]), true).unwrap();
        let position = |words| text.find(words).unwrap_or_else(|| panic!("{text}"));
        assert!(
            position("e.g. n2") < position("reverse path filter or rp_filter, correct that first"),
            "{text}"
        );
        assert!(position("rp_filter") < position("Otherwise the network drops them"), "{text}");
    }
}
