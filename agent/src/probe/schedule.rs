//! Times of the probes of each peer, and the verdict from the replies. Uses neither clock nor sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use polder_api::{Family, NodeName};
use tokio::time::Instant;

use crate::kernel::desired::{OnLink, Path, PeerPath};

/// Maximum number of targets that are probed at once.
pub(super) const BATCH: usize = 20;

/// A peer's name, and the family of its pods.
pub type Key = (NodeName, Family);

/// A probed address and the path to it. A changed path starts without results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeTarget {
    /// The address that is probed: the peer's own in the pod network, or that of its probe endpoint.
    pub address: IpAddr,
    /// The path to it.
    pub path: Path,
    /// MTU of the path, in bytes: the length of full-size probes.
    pub mtu: u32,
    /// The probe sizes that are sent.
    pub sizes: Sizes,
}

/// The probe sizes that are sent to a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// Only packets of minimum length.
    Small,
    /// Packets of minimum length, and of the maximum length that a pod can send.
    Both,
}

impl ProbeTarget {
    /// The target at the peer's host, if the peer is reachable.
    pub fn host(peer_path: &PeerPath, sizes: Sizes) -> Option<Self> {
        Self::at(peer_path.gateway, peer_path, sizes)
    }

    /// The target at the peer's probe endpoint, if it has one.
    pub fn endpoint(peer_path: &PeerPath) -> Option<Self> {
        Self::at(peer_path.probe, peer_path, Sizes::Both)
    }

    /// The target for tests of the direct path to a peer on the same link, whether or not pods use that path.
    pub(super) fn direct(peer_path: &PeerPath) -> Option<Self> {
        let OnLink { via, index } = peer_path.on_link?;
        Some(Self {
            address: via,
            path: Path::Direct { via, index },
            mtu: peer_path.mtu,
            sizes: Sizes::Small,
        })
    }

    fn at(address: Option<IpAddr>, peer_path: &PeerPath, sizes: Sizes) -> Option<Self> {
        let address = address.filter(|_| !matches!(peer_path.path, Path::Unreachable(_)))?;
        Some(Self { address, path: peer_path.path.clone(), mtu: peer_path.mtu, sizes })
    }
}

/// The result of probing a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// No result yet.
    Unknown,
    /// The peer answers to packets of every size.
    Answers,
    /// The peer answers to small packets, but not to packets of this length, in bytes.
    PathMtuTooSmall(u32),
    /// The peer does not answer.
    Silent,
    /// The peer's host answers, but packets forwarded like pod packets, or their replies, are lost.
    Dropped,
}

/// The results of a target so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetResult {
    /// The current verdict.
    pub verdict: Verdict,
    /// Consecutive rounds without any reply.
    pub lost: u8,
    /// Whether any reply ever arrived.
    pub answered: bool,
}

impl Verdict {
    /// Whether replies arrive.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Answers | Self::PathMtuTooSmall(_))
    }
}

/// The data in a probe and its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Number of the target.
    pub number: u32,
    /// Size of the probe.
    pub size: Size,
}

/// Size of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Minimum length.
    Small,
    /// Length of the longest packet of a pod.
    Full,
}

/// A probe to send, or one of each size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueProbe {
    /// Number of the target.
    pub number: u32,
    /// The target's address.
    pub to: IpAddr,
    /// Length of the full-size packet in bytes, if one is sent.
    pub full: Option<u32>,
    /// Whether the previous round got no reply.
    pub lost: bool,
}

/// Consecutive failed rounds before the verdict changes.
const FAILURES: u8 = 3;

/// Pause between two rounds while a reply is missing.
const SOON: Duration = Duration::from_millis(500);

/// Pauses between rounds after a bad verdict: the first one is `FIRST_PAUSE`, and each next one is twice as long, up to
/// `LONGEST_PAUSE`. A peer that starts together with this node is found soon; a peer that is down for a long time is
/// probed rarely.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[expect(clippy::struct_excessive_bools, reason = "the flags are independent")]
#[derive(Debug)]
struct State {
    key: Key,
    target: ProbeTarget,
    verdict: Verdict,
    /// Whether a round was sent whose result is not counted yet.
    round_pending: bool,
    /// Whether a reply of each size arrived in that round.
    small: bool,
    full: bool,
    /// Consecutive rounds without any reply, and with a reply to the small probe only.
    rounds_without_reply: u8,
    rounds_without_full: u8,
    /// Whether any reply ever arrived.
    answered: bool,
    /// The pause after the next round, if the verdict is bad and does not change.
    pause: Duration,
    due: Instant,
}

/// All targets by number. The state of each is small, because a cluster has thousands of them.
#[derive(Debug)]
pub struct Schedule {
    /// Pause between two rounds of a target without a fault.
    steady: Duration,
    /// The longest pause between rounds to a target with a fault.
    longest: Duration,
    states: BTreeMap<u32, State>,
    numbers: BTreeMap<Key, u32>,
    due: BTreeSet<(Instant, u32)>,
    /// Number of the newest target.
    last_number: u32,
}

impl Schedule {
    /// No targets yet. Targets without a fault are probed again after `steady`.
    pub fn new(steady: Duration) -> Self {
        Self {
            steady,
            longest: LONGEST_PAUSE,
            states: BTreeMap::new(),
            numbers: BTreeMap::new(),
            due: BTreeSet::new(),
            last_number: 0,
        }
    }

    /// Sets the longest pause between rounds to a target with a fault.
    pub(super) fn at_least_every(self, longest: Duration) -> Self {
        Self { longest, ..self }
    }

    /// Sets the targets. New targets and those with a changed path are probed at once.
    pub fn set_targets(&mut self, targets: impl Iterator<Item = (Key, ProbeTarget)>, now: Instant) {
        let mut before = std::mem::take(&mut self.numbers);
        let mut states = std::mem::take(&mut self.states);
        let new_states = targets.map(|(key, target)| {
            let known = before.remove(&key).and_then(|number| Some((number, states.remove(&number)?)));
            known.filter(|(_, state)| state.target == target).unwrap_or_else(|| {
                // A new number, so that replies to probes on the old path are ignored.
                self.last_number = self.last_number.wrapping_add(1);
                (self.last_number, State::new(key, target, now))
            })
        });
        // `collect` fills the nodes of the B-tree. Inserting thousands of ascending keys one by one leaves most nodes
        // half full, which wastes memory.
        self.states = new_states.collect();
        self.numbers = self.states.iter().map(|(number, state)| (state.key.clone(), *number)).collect();
        self.due = self.states.iter().map(|(number, state)| (state.due, *number)).collect();
    }

    /// Starts a round for the due targets, at most `at_most`, and counts the result of their last round.
    pub fn due_probes(&mut self, now: Instant, at_most: usize) -> Vec<DueProbe> {
        let ready = self.due.iter().take_while(|(due, _)| *due <= now).take(at_most);
        let ready: Vec<_> = ready.copied().collect();
        let mut due_probes = Vec::new();
        for (due, number) in ready {
            self.due.remove(&(due, number));
            let Some(state) = self.states.get_mut(&number) else { continue };
            state.count();
            state.due = now + state.pause(self.longest);
            due_probes.push(DueProbe {
                number,
                to: state.target.address,
                full: (state.target.sizes == Sizes::Both).then_some(state.target.mtu),
                lost: state.rounds_without_reply > 0,
            });
            self.due.insert((state.due, number));
        }
        due_probes
    }

    /// Records a reply, even a late one: it proves that the path works.
    pub fn record_reply(&mut self, from: IpAddr, token: Token, now: Instant) {
        let state = self.states.get_mut(&token.number).filter(|state| state.target.address == from);
        let Some(state) = state else { return };
        state.small = true;
        state.rounds_without_reply = 0;
        state.answered = true;
        if token.size == Size::Full || state.target.sizes == Sizes::Small {
            state.full = true;
            state.rounds_without_full = 0;
            state.verdict = Verdict::Answers;
            self.due.remove(&(state.due, token.number));
            // Spread over time, so that targets are not probed at once.
            state.due = now + self.steady + self.steady / 64 * (token.number % 16);
            self.due.insert((state.due, token.number));
        } else if matches!(state.verdict, Verdict::Silent) {
            state.verdict = Verdict::Unknown;
        }
    }

    /// Probes a target at once that answered until now, because another probe of the peer failed.
    pub fn probe_now(&mut self, key: &Key, now: Instant) {
        let Some(number) = self.numbers.get(key) else { return };
        let state = self.states.get_mut(number).filter(|state| state.due > now + SOON);
        if let Some(state) = state.filter(|state| state.verdict.is_open()) {
            self.due.remove(&(state.due, *number));
            state.due = now;
            self.due.insert((now, *number));
        }
    }

    /// Probes a target with a fault at once, and then with the short pauses of a new target: the fault may be over.
    pub(super) fn probe_now_and_reset_pause(&mut self, key: &Key, now: Instant) {
        let Some(number) = self.numbers.get(key) else { return };
        let Some(state) = self.states.get_mut(number) else { return };
        self.due.remove(&(state.due, *number));
        (state.due, state.pause) = (now, FIRST_PAUSE);
        self.due.insert((now, *number));
    }

    /// The key of the target with that number.
    pub fn key_of(&self, number: u32) -> Option<&Key> {
        self.states.get(&number).map(|state| &state.key)
    }

    /// The results of a target, if it exists.
    pub fn result(&self, key: &Key) -> Option<TargetResult> {
        let state = self.states.get(self.numbers.get(key)?)?;
        let lost = state.rounds_without_reply;
        Some(TargetResult { verdict: state.verdict, lost, answered: state.answered })
    }

    /// Number of targets.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// The targets' keys.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.numbers.keys()
    }

    /// Time of the next probe.
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }
}

/// Probes peers at once through `other`, if the last probe of `schedule` to them got no reply. `probes` are those of
/// `schedule`.
pub(super) fn probe_other_kind(probes: &[DueProbe], schedule: &Schedule, other: &mut Schedule, now: Instant) {
    for probe in probes.iter().filter(|probe| probe.lost) {
        if let Some(key) = schedule.key_of(probe.number) {
            other.probe_now(key, now);
        }
    }
}

impl State {
    fn new(key: Key, target: ProbeTarget, due: Instant) -> Self {
        Self {
            key,
            target,
            verdict: Verdict::Unknown,
            round_pending: false,
            small: false,
            full: false,
            rounds_without_reply: 0,
            rounds_without_full: 0,
            answered: false,
            pause: FIRST_PAUSE,
            due,
        }
    }

    /// Counts the result of the last round and starts the next one.
    fn count(&mut self) {
        let before = self.verdict;
        let (small, full) = (std::mem::take(&mut self.small), std::mem::take(&mut self.full));
        let full = full || self.target.sizes == Sizes::Small;
        if std::mem::replace(&mut self.round_pending, true) {
            match (small, full) {
                (false, _) => self.rounds_without_reply = self.rounds_without_reply.saturating_add(1),
                (true, false) => self.rounds_without_full = self.rounds_without_full.saturating_add(1),
                (true, true) => {}
            }
        }
        if self.rounds_without_reply >= FAILURES {
            self.verdict = Verdict::Silent;
        } else if self.rounds_without_full >= FAILURES {
            self.verdict = Verdict::PathMtuTooSmall(self.target.mtu);
        }
        if self.verdict != before {
            self.pause = FIRST_PAUSE;
        }
    }

    /// The pause until the next round, unless a reply arrives.
    fn pause(&mut self, longest: Duration) -> Duration {
        match self.verdict {
            Verdict::Silent | Verdict::PathMtuTooSmall(_) | Verdict::Dropped => {
                let longer = (self.pause * 2).min(longest);
                std::mem::replace(&mut self.pause, longer)
            }
            Verdict::Answers | Verdict::Unknown => SOON,
        }
    }
}

#[cfg(test)]
mod tests;
