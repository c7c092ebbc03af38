//! When the Node's condition `NetworkUnavailable` is written, and with which value.
//!
//! The node lifecycle controller turns the value True into the taint `node.kubernetes.io/network-unavailable:NoSchedule`:
//! no new pods are placed on the node, running pods stay (`nodeConditionToTaintKeyStatusMap` in
//! `pkg/controller/nodelifecycle/node_lifecycle_controller.go`). It never changes this condition, not even of a node whose
//! kubelet is silent, and neither does the kubelet: so the condition needs no heartbeat. The route controller of a cloud
//! provider also writes it, if it is enabled (`--configure-cloud-routes`).

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::node_object::{Condition, ConditionStatus, NETWORK_UNAVAILABLE};
use super::text::shortened;

/// A ready node is reported as not ready only after this time: an agent that starts next to running pods, or that chooses
/// a new path, does not change the condition.
const WORSE_AFTER: Duration = Duration::from_secs(30);

/// Shortest time between two writes of the same status: other writers, and reasons that change, cause few writes.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Reason of a ready node.
const READY: &str = "PolderReady";

/// Reason of a node that is not ready.
const NOT_READY: &str = "PolderNotReady";

/// The state of the node, and of the condition as last written by this agent.
#[derive(Debug, Clone, Copy)]
pub struct ConditionInputs<'a> {
    /// The condition in the Node object.
    pub current: Option<&'a Condition>,
    /// Why the node is not ready. Empty if it is.
    pub reasons: &'a [String],
    /// How long the node has not been ready.
    pub not_ready_for: Duration,
    /// The status that this agent wrote last, and how long ago.
    pub written: Option<(ConditionStatus, Duration)>,
}

/// The condition to write; `None` if the Node has the right one, or if it is too early.
pub fn to_write(inputs: ConditionInputs<'_>) -> Option<Condition> {
    let ConditionInputs { current, reasons, not_ready_for, written } = inputs;
    let wanted = wanted(reasons);
    if current.is_some_and(|current| fits(current, &wanted)) {
        return None;
    }
    if wanted.status == ConditionStatus::True && not_ready_for < WORSE_AFTER {
        return None;
    }
    let too_soon = written.is_some_and(|(status, ago)| status == wanted.status && ago < AGAIN_AFTER);
    (!too_soon).then_some(wanted)
}

/// The condition of a node with these reasons.
fn wanted(reasons: &[String]) -> Condition {
    let (status, reason, message) = if reasons.is_empty() {
        (ConditionStatus::False, READY, "the pod network of this node is ready".to_owned())
    } else {
        (ConditionStatus::True, NOT_READY, shortened(&reasons.join("; ")))
    };
    Condition { kind: NETWORK_UNAVAILABLE.to_owned(), status, reason: reason.to_owned(), message }
}

/// Whether the Node has the right condition. The reason of another writer stays if the status is right.
fn fits(current: &Condition, wanted: &Condition) -> bool {
    let is_own_text = current.reason == NOT_READY && wanted.status == ConditionStatus::True;
    current.status == wanted.status && (!is_own_text || current.message == wanted.message)
}

/// The patch that writes the condition. The API server merges conditions by type and keeps fields that are not in the
/// patch: the time of the transition changes only with the status.
pub fn patch(condition: &Condition, before: Option<&Condition>, now: Timestamp) -> Value {
    let now = time(now);
    let mut fields = json!({
        "type": condition.kind,
        "status": condition.status.as_str(),
        "reason": condition.reason,
        "message": condition.message,
        "lastHeartbeatTime": now,
    });
    if before.is_none_or(|before| before.status != condition.status) {
        fields["lastTransitionTime"] = json!(now);
    }
    json!({ "status": { "conditions": [fields] } })
}

/// The time as in objects of Kubernetes: in seconds.
fn time(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn reasons(reasons: &[&str]) -> Vec<String> {
        reasons.iter().map(|reason| (*reason).to_owned()).collect()
    }

    fn inputs<'a>(current: Option<&'a Condition>, reasons: &'a [String]) -> ConditionInputs<'a> {
        ConditionInputs { current, reasons, not_ready_for: LONG, written: None }
    }

    fn of(status: ConditionStatus, reason: &str, message: &str) -> Condition {
        let (kind, reason, message) = (NETWORK_UNAVAILABLE.to_owned(), reason.to_owned(), message.to_owned());
        Condition { kind, status, reason, message }
    }

    #[test]
    fn a_ready_node_is_reported_at_once_and_only_once() {
        let unrouted = of(ConditionStatus::True, "NoRouteCreated", "no route");
        for current in [None, Some(&unrouted)] {
            let fresh = ConditionInputs { not_ready_for: Duration::ZERO, ..inputs(current, &[]) };
            let written = to_write(fresh).unwrap();
            assert_eq!((written.status, &*written.reason), (ConditionStatus::False, READY));
            assert_eq!(to_write(inputs(Some(&written), &[])), None);
        }
        let of_another = of(ConditionStatus::False, "RouteCreated", "routes exist");
        assert_eq!(to_write(inputs(Some(&of_another), &[])), None);
    }

    #[test]
    fn a_node_is_reported_as_not_ready_only_after_a_while() {
        let ready = of(ConditionStatus::False, READY, "");
        let reasons = reasons(&["no bridge", "no path"]);
        for current in [None, Some(&ready)] {
            let early = ConditionInputs { not_ready_for: WORSE_AFTER / 2, ..inputs(current, &reasons) };
            assert_eq!(to_write(early), None);
            let written = to_write(inputs(current, &reasons)).unwrap();
            assert_eq!(
                (written.status, &*written.reason, &*written.message),
                (ConditionStatus::True, NOT_READY, "no bridge; no path")
            );
            assert_eq!(to_write(inputs(Some(&written), &reasons)), None);
        }
    }

    #[test]
    fn other_reasons_are_written_but_not_often() {
        let (before, after) = (of(ConditionStatus::True, NOT_READY, "no bridge"), reasons(&["no path"]));
        let again = |ago| ConditionInputs {
            written: Some((ConditionStatus::True, ago)),
            ..inputs(Some(&before), &after)
        };
        assert_eq!(to_write(again(AGAIN_AFTER / 2)), None);
        assert_eq!(to_write(again(AGAIN_AFTER)).unwrap().message, "no path");
        // The node became ready again meanwhile: that is never late.
        let ready = ConditionInputs {
            written: Some((ConditionStatus::True, Duration::ZERO)),
            ..inputs(Some(&before), &[])
        };
        assert_eq!(to_write(ready).unwrap().status, ConditionStatus::False);
        // Another writer has the same status with its own reason.
        let foreign = of(ConditionStatus::True, "NoRouteCreated", "no route");
        assert_eq!(to_write(inputs(Some(&foreign), &after)), None);
    }

    #[test]
    fn another_writer_does_not_cause_a_write_at_each_of_its_writes() {
        let foreign = of(ConditionStatus::True, "NoRouteCreated", "no route");
        let again = |ago| ConditionInputs {
            written: Some((ConditionStatus::False, ago)),
            ..inputs(Some(&foreign), &[])
        };
        assert_eq!(to_write(again(AGAIN_AFTER / 2)), None);
        assert!(to_write(again(AGAIN_AFTER)).is_some());
    }

    #[test]
    fn the_time_of_the_transition_changes_only_with_the_status() {
        let now: Timestamp = "2026-01-02T03:04:05.678Z".parse().unwrap();
        let (ready, not_ready) = (wanted(&[]), wanted(&reasons(&["no path"])));
        let changed = patch(&not_ready, Some(&ready), now);
        let fields = &changed["status"]["conditions"][0];
        assert_eq!(
            *fields,
            json!({
                "type": "NetworkUnavailable", "status": "True", "reason": NOT_READY, "message": "no path",
                "lastHeartbeatTime": "2026-01-02T03:04:05Z", "lastTransitionTime": "2026-01-02T03:04:05Z",
            })
        );
        let same = patch(&not_ready, Some(&not_ready), now);
        assert_eq!(same["status"]["conditions"][0]["lastTransitionTime"], Value::Null);
        assert_eq!(patch(&ready, None, now)["status"]["conditions"][0]["status"], "False");
    }
}
