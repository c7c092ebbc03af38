//! Attachments without an interface: released only if the interface is missing twice, a grace period apart.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polder_api::Attachment;
use polder_api::rule;

use crate::moment::Moment;

/// The time since which the interface of each attachment has been missing.
#[derive(Debug, Clone, Default)]
pub struct Orphans(BTreeMap<Attachment, Moment>);

rule! {
    /// Whether the grace period of an interface missing since `since` is over.
    fn is_overdue(since: Moment, grace: Duration, now: Moment) -> bool {
        now.since(since) >= grace
    }
    MissedOnce => true
}

impl Orphans {
    /// Takes the attachments whose interface is missing now. Returns those missing for at least `grace`, except those
    /// with an ADD or DEL in flight. If a returned attachment is not released, its grace period starts again.
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
    fn an_attachment_is_an_orphan_only_after_the_grace_period() {
        let gone: Attachment = "net/c/eth0".parse().unwrap();
        let missing = BTreeSet::from([gone.clone()]);
        let (grace, at) = (Duration::from_secs(30), |seconds: u64| Moment::from_millis(seconds * 1000));
        let mut seen = Orphans::default();
        let mut look = |missing: &BTreeSet<_>, seconds| seen.observe(missing, |_| false, grace, at(seconds));
        assert_eq!(look(&missing, 100), []);
        assert_eq!(look(&missing, 120), []);
        assert_eq!(look(&BTreeSet::new(), 125), [], "it is there again");
        assert_eq!(look(&missing, 135), []);
        assert_eq!(look(&missing, 165), [gone]);
    }

    #[test]
    fn the_grace_period_starts_after_the_last_running_call() {
        let gone: Attachment = "net/c/eth0".parse().unwrap();
        let missing = BTreeSet::from([gone]);
        let mut seen = Orphans::default();
        let mut look = |busy: bool, millis| {
            seen.observe(&missing, |_| busy, Duration::from_secs(1), Moment::from_millis(millis))
        };
        assert_eq!((look(true, 0).len(), look(true, 9_000).len(), look(false, 9_500).len()), (0, 0, 0));
        assert_eq!(look(false, 10_500).len(), 1);
    }
}
