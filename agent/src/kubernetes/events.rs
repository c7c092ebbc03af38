//! Which problems of the node become Events on its Node object, and when.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use polder_api::NodeName;
use polder_ipam::ids::NodeUid;
use tokio::time::Instant;

use super::text::shortened;

/// The name of the component in Events.
const COMPONENT: &str = "polder-agent";

/// The reason of all Events.
const REASON: &str = "PolderProblem";

/// A problem that persists is reported again after this time. By default, the API server deletes an Event one hour after
/// its last change (`--event-ttl`).
const AGAIN_AFTER: Duration = Duration::from_secs(3600);

/// Most Events in that time: texts can contain numbers that change.
const MOST: usize = 10;

/// A problem is reported if it still exists after this time.
const PERSISTS: Duration = Duration::from_secs(30);

/// The problems known so far.
#[derive(Debug, Default)]
pub struct EventLog {
    problems: BTreeMap<String, Reported>,
}

#[derive(Debug, Clone, Copy)]
struct Reported {
    seen: Instant,
    /// When it was reported first and last, and how often.
    sent: Option<(Timestamp, Instant, i32)>,
}

/// A problem to report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    text: String,
    first: Timestamp,
    count: i32,
}

impl EventLog {
    /// Notes the current problems, and returns one that is to be reported now. [`Self::sent`] confirms it.
    pub fn next(&mut self, problems: &[String], now: Instant, clock: Timestamp) -> Option<Report> {
        self.problems.retain(|text, known| {
            let is_recent = known.sent.is_some_and(|(_, last, _)| now - last < AGAIN_AFTER);
            is_recent || problems.contains(text)
        });
        for text in problems {
            self.problems.entry(text.clone()).or_insert(Reported { seen: now, sent: None });
        }
        let recent = |known: &&Reported| known.sent.is_some_and(|(_, last, _)| now - last < AGAIN_AFTER);
        if self.problems.values().filter(recent).count() >= MOST {
            return None;
        }
        problems.iter().find_map(|text| {
            let known = self.problems.get(text)?;
            let is_due = now - known.seen >= PERSISTS && !recent(&known);
            let (first, count) = known.sent.map_or((clock, 0), |(first, _, count)| (first, count));
            is_due.then(|| Report { text: text.clone(), first, count: count.saturating_add(1) })
        })
    }

    /// The report was sent.
    pub fn sent(&mut self, report: &Report, now: Instant) {
        if let Some(known) = self.problems.get_mut(&report.text) {
            known.sent = Some((report.first, now, report.count));
        }
    }
}

impl Report {
    /// The Event about a Node. Its name follows from the problem: an agent that starts again changes the Event of the
    /// earlier one, and counts from 1 again.
    pub fn event(&self, node: &NodeName, uid: &NodeUid, now: Timestamp) -> Event {
        let mut hasher = DefaultHasher::new();
        self.text.hash(&mut hasher);
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{node}.{:016x}", hasher.finish())),
                // Events about objects without a namespace are in this one.
                namespace: Some("default".to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: Some(node.to_string()),
                uid: Some(uid.to_string()),
                ..ObjectReference::default()
            },
            type_: Some("Warning".to_owned()),
            reason: Some(REASON.to_owned()),
            message: Some(shortened(&self.text)),
            source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: Some(node.to_string()) }),
            reporting_component: Some(COMPONENT.to_owned()),
            reporting_instance: Some(node.to_string()),
            first_timestamp: Some(Time(self.first)),
            last_timestamp: Some(Time(now)),
            count: Some(self.count),
            ..Event::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    /// Sends all that is due.
    fn send(log: &mut EventLog, problems: &[String], now: Instant) -> Vec<(String, i32)> {
        let mut sent = Vec::new();
        while let Some(report) = log.next(problems, now, Timestamp::UNIX_EPOCH) {
            log.sent(&report, now);
            sent.push((report.text.clone(), report.count));
        }
        sent
    }

    #[test]
    fn a_problem_is_reported_when_it_persists_and_then_once_an_hour() {
        let (mut log, start, problems) = (EventLog::default(), Instant::now(), texts(&["no path"]));
        assert_eq!(send(&mut log, &problems, start), []);
        assert_eq!(send(&mut log, &problems, start + PERSISTS), [("no path".to_owned(), 1)]);
        assert_eq!(send(&mut log, &problems, start + PERSISTS * 10), []);
        assert_eq!(send(&mut log, &problems, start + PERSISTS + AGAIN_AFTER), [("no path".to_owned(), 2)]);
        // It ends and returns within the hour.
        assert_eq!(send(&mut log, &[], start + AGAIN_AFTER * 2), []);
        assert_eq!(send(&mut log, &problems, start + AGAIN_AFTER * 2), []);
        let short_lived = texts(&["short"]);
        assert_eq!(send(&mut log, &short_lived, start + AGAIN_AFTER * 3), []);
        assert_eq!(send(&mut log, &[], start + AGAIN_AFTER * 3 + PERSISTS), []);
        assert_eq!(send(&mut log, &short_lived, start + AGAIN_AFTER * 3 + PERSISTS * 2), []);
    }

    #[test]
    fn texts_that_change_all_the_time_cause_few_events() {
        let (mut log, start) = (EventLog::default(), Instant::now());
        let mut sent = 0;
        for minute in 0..60 {
            let now = start + Duration::from_secs(60 * minute);
            let problems = texts(&[&format!("{minute} packets lost")]);
            send(&mut log, &problems, now);
            sent += send(&mut log, &problems, now + PERSISTS).len();
        }
        assert_eq!(sent, MOST);
        assert!(log.problems.len() <= MOST + 1, "{}", log.problems.len());
    }

    #[test]
    fn an_event_has_the_name_of_its_problem_and_names_the_node() {
        let report = Report { text: "no path".to_owned(), first: Timestamp::UNIX_EPOCH, count: 3 };
        let (node, uid): (NodeName, _) = ("n1".parse().unwrap(), NodeUid::new("u1"));
        let event = report.event(&node, &uid, Timestamp::UNIX_EPOCH);
        let other = Report { text: "no bridge".to_owned(), ..report.clone() };
        assert_eq!(event.metadata.name, report.event(&node, &uid, Timestamp::now()).metadata.name);
        assert_ne!(event.metadata.name, other.event(&node, &uid, Timestamp::now()).metadata.name);
        assert_eq!(event.involved_object.uid.as_deref(), Some("u1"));
        assert_eq!((event.message.as_deref(), event.count), (Some("no path"), Some(3)));
    }
}
