//! Combines the probe results of a peer's host and of its probe endpoint into one verdict. Pure functions.

use super::schedule::{Seen, Verdict};

/// Consecutive rounds without a reply of an endpoint before a fault is reported. They take longer than the lease of a
/// killed agent, and much longer than an upgrade: an endpoint exists only while its agent runs.
pub(super) const ENDPOINT_FAILURES: u8 = 8;

/// The lease state of the peer's agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Living {
    /// It is alive.
    Yes,
    /// It is not alive, so its endpoint does not exist.
    No,
    /// The lease was not read, or the datastore is unreachable.
    Unknown,
}

/// The verdict on the path to a peer. `host` is the result of probes of the peer host's address, which are not
/// forwarded; `forwarded` that of probes of its endpoint, if it has one.
pub(super) fn combine(host: Option<Verdict>, forwarded: Option<Seen>, living: Living) -> Verdict {
    let Some(forwarded) = forwarded else { return host.unwrap_or(Verdict::Unknown) };
    let has_failed = forwarded.lost >= ENDPOINT_FAILURES;
    match (host, forwarded.verdict) {
        (None, verdict)
        | (_, verdict @ (Verdict::Answers | Verdict::PathMtuTooSmall(_) | Verdict::Dropped)) => verdict,
        (Some(Verdict::Silent), Verdict::Silent) => Verdict::Silent,
        (Some(Verdict::Silent | Verdict::Unknown), _) => Verdict::Unknown,
        (Some(_), _) if living == Living::Yes && has_failed => Verdict::Dropped,
        // The endpoint ended with its agent, or may come back before the fault is reported.
        (Some(host), _) if living == Living::No || has_failed || forwarded.answered => host,
        (Some(_), _) => Verdict::Unknown,
    }
}

/// Whether the outcome depends on whether the peer's agent is alive.
pub(super) fn is_suspect(host: Option<Verdict>, forwarded: Seen) -> bool {
    host.is_some_and(Verdict::is_open) && forwarded.verdict == Verdict::Silent
}

#[cfg(test)]
mod tests {
    use super::*;

    const NARROW: Verdict = Verdict::PathMtuTooSmall(1450);

    #[expect(clippy::unnecessary_wraps, reason = "so that it is given as it is taken")]
    fn seen(verdict: Verdict, lost: u8, answered: bool) -> Option<Seen> {
        Some(Seen { verdict, lost, answered })
    }

    #[test]
    fn a_peer_without_an_endpoint_has_the_verdict_of_its_host() {
        for host in [Verdict::Unknown, Verdict::Answers, NARROW, Verdict::Silent] {
            assert_eq!(combine(Some(host), None, Living::Unknown), host);
        }
    }

    #[test]
    fn an_answer_of_the_endpoint_overrides_the_verdict_of_the_host() {
        for host in [None, Some(Verdict::Unknown), Some(Verdict::Answers), Some(Verdict::Silent)] {
            for verdict in [Verdict::Answers, NARROW] {
                assert_eq!(combine(host, seen(verdict, 0, true), Living::Unknown), verdict, "{host:?}");
            }
        }
    }

    #[test]
    fn a_live_host_that_answers_without_its_endpoint_drops_forwarded_packets() {
        let silent = |lost| seen(Verdict::Silent, lost, true);
        let combine = |lost, living| combine(Some(Verdict::Answers), silent(lost), living);
        assert_eq!(combine(ENDPOINT_FAILURES, Living::Yes), Verdict::Dropped);
        assert_eq!(
            combine(ENDPOINT_FAILURES - 1, Living::Yes),
            Verdict::Answers,
            "a restart takes that long"
        );
        assert_eq!(combine(ENDPOINT_FAILURES, Living::No), Verdict::Answers, "the agent is away");
        assert_eq!(combine(ENDPOINT_FAILURES, Living::Unknown), Verdict::Answers, "nobody knows");
    }

    #[test]
    fn an_endpoint_that_never_answered_is_unknown_until_it_fails_long_enough() {
        let never =
            |lost, living| combine(Some(Verdict::Answers), seen(Verdict::Silent, lost, false), living);
        assert_eq!(never(3, Living::Yes), Verdict::Unknown);
        assert_eq!(never(3, Living::Unknown), Verdict::Unknown);
        assert_eq!(never(3, Living::No), Verdict::Answers);
        assert_eq!(never(ENDPOINT_FAILURES, Living::Yes), Verdict::Dropped);
        assert_eq!(
            combine(Some(Verdict::Answers), seen(Verdict::Unknown, 0, false), Living::Yes),
            Verdict::Unknown
        );
    }

    #[test]
    fn a_peer_is_silent_if_neither_host_nor_endpoint_answers() {
        let both = |host, lost| combine(Some(host), seen(Verdict::Silent, lost, true), Living::Yes);
        assert_eq!(both(Verdict::Silent, 3), Verdict::Silent);
        assert_eq!(both(Verdict::Unknown, 9), Verdict::Unknown);
        assert_eq!(combine(None, seen(Verdict::Silent, 3, true), Living::Yes), Verdict::Silent);
    }
}
