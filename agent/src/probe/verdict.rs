//! Combines the probe results of a peer's host and of its probe endpoint into one verdict. Pure functions.

use std::collections::BTreeMap;

use polder_api::NodeName;
use tokio::time::Instant;

use super::schedule::{TargetResult, Verdict};

/// Consecutive rounds without a reply of an endpoint before a fault is reported. They take longer than the lease of a
/// killed agent, and much longer than an upgrade: an endpoint exists only while its agent runs.
pub(super) const ENDPOINT_FAILURES: u8 = 8;

/// The lease state of the peer's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeaseState {
    /// The agent has a lease: it is alive.
    Exists,
    /// The agent has no lease: it is not alive, so its endpoint does not exist.
    Missing,
    /// The lease was not read, or the datastore is unreachable.
    Unknown,
}

/// The last known lease state of a peer's agent. `alive`: whether the agent has a lease, and when that was read.
pub(super) fn lease_state(alive: &BTreeMap<NodeName, (bool, Instant)>, name: &NodeName) -> LeaseState {
    match alive.get(name) {
        Some((true, _)) => LeaseState::Exists,
        Some((false, _)) => LeaseState::Missing,
        None => LeaseState::Unknown,
    }
}

/// The verdict on the path to a peer. `host` is the result of probes of the peer host's address, which are not
/// forwarded; `forwarded` that of probes of its endpoint, if it has one.
pub(super) fn combine(
    host: Option<Verdict>,
    forwarded: Option<TargetResult>,
    lease_state: LeaseState,
) -> Verdict {
    let Some(forwarded) = forwarded else { return host.unwrap_or(Verdict::Unknown) };
    let has_failed = forwarded.lost >= ENDPOINT_FAILURES;
    match (host, forwarded.verdict) {
        (None, verdict)
        | (_, verdict @ (Verdict::Answers | Verdict::PathMtuTooSmall(_) | Verdict::Dropped)) => verdict,
        (Some(Verdict::Silent), Verdict::Silent) => Verdict::Silent,
        (Some(Verdict::Silent | Verdict::Unknown), _) => Verdict::Unknown,
        (Some(_), _) if lease_state == LeaseState::Exists && has_failed => Verdict::Dropped,
        // The endpoint ended with its agent, or may come back before the fault is reported.
        (Some(host), _) if lease_state == LeaseState::Missing || has_failed || forwarded.answered => host,
        (Some(_), _) => Verdict::Unknown,
    }
}

/// Whether the outcome depends on whether the peer's agent is alive.
pub(super) fn is_suspect(host: Option<Verdict>, forwarded: TargetResult) -> bool {
    host.is_some_and(Verdict::is_open) && forwarded.verdict == Verdict::Silent
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL_MTU: Verdict = Verdict::PathMtuTooSmall(1450);

    #[expect(clippy::unnecessary_wraps, reason = "so that it is given as it is taken")]
    fn result(verdict: Verdict, lost: u8, answered: bool) -> Option<TargetResult> {
        Some(TargetResult { verdict, lost, answered })
    }

    #[test]
    fn a_peer_without_an_endpoint_has_the_verdict_of_its_host() {
        for host in [Verdict::Unknown, Verdict::Answers, SMALL_MTU, Verdict::Silent] {
            assert_eq!(combine(Some(host), None, LeaseState::Unknown), host);
        }
    }

    #[test]
    fn an_answer_of_the_endpoint_overrides_the_verdict_of_the_host() {
        for host in [None, Some(Verdict::Unknown), Some(Verdict::Answers), Some(Verdict::Silent)] {
            for verdict in [Verdict::Answers, SMALL_MTU] {
                assert_eq!(combine(host, result(verdict, 0, true), LeaseState::Unknown), verdict, "{host:?}");
            }
        }
    }

    #[test]
    fn a_live_host_that_answers_without_its_endpoint_drops_forwarded_packets() {
        let silent = |lost| result(Verdict::Silent, lost, true);
        let combine = |lost, lease_state| combine(Some(Verdict::Answers), silent(lost), lease_state);
        assert_eq!(combine(ENDPOINT_FAILURES, LeaseState::Exists), Verdict::Dropped);
        assert_eq!(
            combine(ENDPOINT_FAILURES - 1, LeaseState::Exists),
            Verdict::Answers,
            "a restart takes that long"
        );
        assert_eq!(
            combine(ENDPOINT_FAILURES, LeaseState::Missing),
            Verdict::Answers,
            "the agent does not run"
        );
        assert_eq!(
            combine(ENDPOINT_FAILURES, LeaseState::Unknown),
            Verdict::Answers,
            "the lease state is unknown"
        );
    }

    #[test]
    fn an_endpoint_that_never_answered_is_unknown_until_it_fails_long_enough() {
        let never = |lost, lease_state| {
            combine(Some(Verdict::Answers), result(Verdict::Silent, lost, false), lease_state)
        };
        assert_eq!(never(3, LeaseState::Exists), Verdict::Unknown);
        assert_eq!(never(3, LeaseState::Unknown), Verdict::Unknown);
        assert_eq!(never(3, LeaseState::Missing), Verdict::Answers);
        assert_eq!(never(ENDPOINT_FAILURES, LeaseState::Exists), Verdict::Dropped);
        assert_eq!(
            combine(Some(Verdict::Answers), result(Verdict::Unknown, 0, false), LeaseState::Exists),
            Verdict::Unknown
        );
    }

    #[test]
    fn a_peer_is_silent_if_neither_host_nor_endpoint_answers() {
        let both = |host, lost| combine(Some(host), result(Verdict::Silent, lost, true), LeaseState::Exists);
        assert_eq!(both(Verdict::Silent, 3), Verdict::Silent);
        assert_eq!(both(Verdict::Unknown, 9), Verdict::Unknown);
        assert_eq!(combine(None, result(Verdict::Silent, 3, true), LeaseState::Exists), Verdict::Silent);
    }
}
