//! The schedule without sockets.

use polder_ipam::tasks::lease::LEASE_TTL;
use polder_netlink::IfIndex;

use super::super::verdict::ENDPOINT_FAILURES;
use super::*;
use crate::kernel::tunnel::Encapsulation;

fn target(address: &str) -> ProbeTarget {
    let address: IpAddr = address.parse().unwrap();
    let path = Path::Direct { via: "10.0.0.2".parse().unwrap(), index: IfIndex::new(2) };
    ProbeTarget { address, path, mtu: 1450, sizes: Sizes::Both }
}

fn key() -> Key {
    ("n2".parse().unwrap(), Family::V4)
}

/// A schedule with one target, and its clock.
struct Scenario {
    schedule: Schedule,
    now: Instant,
}

impl Scenario {
    fn new() -> Self {
        let (mut schedule, now) = (Schedule::new(STEADY), Instant::now());
        schedule.set_targets([(key(), target("10.244.1.1"))].into_iter(), now);
        Self { schedule, now }
    }

    /// Runs rounds with replies of these sizes. Returns the verdict and the time until the next round.
    fn rounds(&mut self, number: usize, sizes: &[Size]) -> (Verdict, Duration) {
        for _ in 0..number {
            self.now = self.schedule.next().unwrap();
            let due_probes = self.schedule.due_probes(self.now, 10);
            assert_eq!(due_probes.len(), 1);
            for size in sizes {
                let token = Token { number: due_probes[0].number, size: *size };
                self.schedule.record_reply(due_probes[0].to, token, self.now);
            }
        }
        (self.schedule.result(&key()).unwrap().verdict, self.schedule.next().unwrap() - self.now)
    }
}

const STEADY: Duration = Duration::from_secs(30);
const ALL: &[Size] = &[Size::Small, Size::Full];

#[test]
fn a_peer_that_answers_is_probed_again_after_the_steady_interval() {
    let mut play = Scenario::new();
    assert_eq!(play.rounds(1, ALL).0, Verdict::Answers);
    let (verdict, pause) = play.rounds(1, ALL);
    assert!(verdict == Verdict::Answers && pause >= STEADY, "{pause:?}");
}

#[test]
fn a_peer_is_silent_after_three_lost_rounds_until_one_is_answered() {
    let mut play = Scenario::new();
    play.rounds(2, ALL);
    for _ in 0..2 {
        assert_eq!(play.rounds(1, &[]), (Verdict::Answers, SOON));
    }
    assert_eq!(play.rounds(1, ALL).0, Verdict::Answers);
    assert_eq!(play.rounds(3, &[]), (Verdict::Answers, SOON), "the third one may still be answered");
    assert_eq!(play.rounds(1, &[]).0, Verdict::Silent);
    assert_eq!(play.rounds(1, ALL).0, Verdict::Answers);
}

#[test]
fn a_silent_peer_is_probed_soon_and_then_at_growing_intervals() {
    let mut play = Scenario::new();
    play.rounds(1, ALL);
    for _ in 0..2 {
        assert_eq!(play.rounds(3, &[]), (Verdict::Answers, SOON));
        assert_eq!([1, 1, 1, 1, 1].map(|rounds| play.rounds(rounds, &[]).1.as_secs()), [1, 2, 4, 5, 5]);
        play.rounds(1, ALL);
    }
}

#[test]
fn a_path_with_a_small_mtu_is_probed_soon_and_then_at_growing_intervals() {
    let mut play = Scenario::new();
    let narrow = &[Size::Small];
    for _ in 0..2 {
        assert_eq!(play.rounds(3, narrow).1, SOON);
        assert_eq!([1, 1, 1, 1, 1].map(|rounds| play.rounds(rounds, narrow).1.as_secs()), [1, 2, 4, 5, 5]);
        play.rounds(1, ALL);
    }
    play.rounds(8, narrow);
    // A path that passed small packets passes none, and then small packets again.
    assert_eq!(play.rounds(4, &[]), (Verdict::Silent, Duration::from_secs(1)));
    play.rounds(1, narrow);
    assert_eq!(play.rounds(1, narrow), (Verdict::PathMtuTooSmall(1450), Duration::from_secs(1)));
}

#[test]
fn endpoint_failures_take_longer_than_the_lease_of_a_killed_agent() {
    let mut play = Scenario::new();
    play.rounds(1, ALL);
    let first = play.schedule.next().unwrap();
    while play.schedule.result(&key()).unwrap().lost < ENDPOINT_FAILURES {
        play.rounds(1, &[]);
    }
    // Factor 1.5: a lease can last longer when the datastore changes its leader.
    let (missed, lease) = (play.now - first, LEASE_TTL);
    assert!(missed >= lease + lease / 2, "{missed:?}");
}

#[test]
fn a_path_has_a_small_mtu_until_a_full_size_probe_is_answered() {
    let mut play = Scenario::new();
    play.rounds(1, ALL);
    assert_eq!(play.rounds(4, &[Size::Small]).0, Verdict::PathMtuTooSmall(1450));
    assert_eq!(play.rounds(1, &[Size::Small]).0, Verdict::PathMtuTooSmall(1450));
    assert_eq!(play.rounds(1, ALL).0, Verdict::Answers);
}

#[test]
fn the_verdict_of_a_peer_with_a_new_path_is_unknown() {
    let mut play = Scenario::new();
    play.rounds(1, ALL);
    let other = Path::Tunnel {
        encapsulation: Encapsulation::Vxlan,
        over: Family::V4,
        remote: "10.0.0.2".parse().unwrap(),
        next_hop: "10.244.1.1".parse().unwrap(),
    };
    let mut target = target("10.244.1.1");
    target.path = other;
    let moved = || [(key(), target.clone())].into_iter();
    play.schedule.set_targets(moved(), play.now);
    assert_eq!(play.schedule.result(&key()).unwrap().verdict, Verdict::Unknown);
    assert_eq!(play.schedule.next(), Some(play.now));
    play.schedule.due_probes(play.now, 10);
    play.schedule.set_targets(moved(), play.now);
    assert_ne!(play.schedule.next(), Some(play.now), "the path has not changed");
    play.schedule.set_targets(std::iter::empty(), play.now);
    assert_eq!((play.schedule.keys().count(), play.schedule.next()), (0, None));
}

#[test]
fn with_small_probes_only_their_answers_are_sufficient() {
    let mut play = Scenario::new();
    let small = ProbeTarget { sizes: Sizes::Small, ..target("10.244.1.1") };
    play.schedule.set_targets([(key(), small)].into_iter(), play.now);
    let (verdict, pause) = play.rounds(5, &[Size::Small]);
    assert!(verdict == Verdict::Answers && pause >= STEADY, "{verdict:?} {pause:?}");
    assert_eq!(play.rounds(4, &[]).0, Verdict::Silent);
}

#[test]
fn lost_rounds_are_counted_until_an_answer_and_probe_now_makes_a_probe_due() {
    let mut play = Scenario::new();
    play.rounds(1, ALL);
    play.schedule.probe_now(&key(), play.now);
    assert_eq!(play.schedule.next(), Some(play.now));
    play.rounds(4, &[]);
    assert_eq!(
        play.schedule.result(&key()),
        Some(TargetResult { verdict: Verdict::Silent, lost: 3, answered: true })
    );
    play.rounds(1, &[Size::Small]);
    assert_eq!(play.schedule.result(&key()).unwrap().lost, 0);
}

#[test]
fn a_reply_from_another_address_is_ignored() {
    let mut play = Scenario::new();
    let due_probes = play.schedule.due_probes(play.now, 10);
    let token = Token { number: due_probes[0].number, size: Size::Full };
    play.schedule.record_reply("10.244.1.2".parse().unwrap(), token, play.now);
    assert_eq!(play.schedule.result(&key()).unwrap().verdict, Verdict::Unknown);
}
