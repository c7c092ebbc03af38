//! What has no interface any more: released only when it was missing twice, a grace period apart.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polder_api::Attachment;
use polder_api::rule;

use crate::moment::Moment;

/// Since when attachments have been seen to miss their interface.
#[derive(Debug, Clone, Default)]
pub struct Missing(BTreeMap<Attachment, Moment>);

rule! {
    /// Whether what has been missed since then is gone.
    fn is_overdue(since: Moment, grace: Duration, now: Moment) -> bool {
        now.since(since) >= grace
    }
    MissedOnce => true
}

impl Missing {
    /// Takes in what misses its interface now; returns what has for longer than `grace`, and that nobody works on. That
    /// one begins anew, should it not be released.
    pub fn observe(
        &mut self,
        missing: &BTreeSet<Attachment>,
        is_in_flight: impl Fn(&Attachment) -> bool,
        grace: Duration,
        now: Moment,
    ) -> Vec<Attachment> {
        self.0.retain(|attachment, _| missing.contains(attachment));
        let mut overdue = Vec::new();
        for attachment in missing.iter().filter(|attachment| !is_in_flight(attachment)) {
            let since = *self.0.entry(attachment.clone()).or_insert(now);
            if is_overdue(since, grace, now) {
                self.0.remove(attachment);
                overdue.push(attachment.clone());
            }
        }
        overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_once_or_not_for_long_is_left_alone() {
        let gone: Attachment = "net/c/eth0".parse().unwrap();
        let missing = BTreeSet::from([gone.clone()]);
        let (grace, at) = (Duration::from_secs(30), |seconds: u64| Moment::from_millis(seconds * 1000));
        let mut seen = Missing::default();
        let mut look = |missing: &BTreeSet<_>, seconds| seen.observe(missing, |_| false, grace, at(seconds));
        assert_eq!(look(&missing, 100), []);
        assert_eq!(look(&missing, 120), []);
        assert_eq!(look(&BTreeSet::new(), 125), [], "it is there again");
        assert_eq!(look(&missing, 135), []);
        assert_eq!(look(&missing, 165), [gone]);
    }

    #[test]
    fn what_somebody_works_on_is_not_counted() {
        let gone: Attachment = "net/c/eth0".parse().unwrap();
        let missing = BTreeSet::from([gone]);
        let mut seen = Missing::default();
        let mut look = |busy: bool, millis| {
            seen.observe(&missing, |_| busy, Duration::from_secs(1), Moment::from_millis(millis))
        };
        assert_eq!((look(true, 0).len(), look(true, 9_000).len(), look(false, 9_500).len()), (0, 0, 0));
        assert_eq!(look(false, 10_500).len(), 1);
    }
}
