//! The taint that keeps pods away from a node until its pod network is ready.
//!
//! Polder never adds it: a cloud provider or the kubelet (`--register-with-taints`) creates the node with it. So pods are
//! not placed on a node whose earlier CNI configuration would serve them.

use serde_json::{Value, json};

use super::node_object::NodeObject;

/// The key of the taint. Its value and its effect do not matter.
pub const NOT_READY: &str = "node.polder.dev/not-ready";

/// The patch that removes the taint from this Node; `None` if the Node has none. A merge patch replaces the list, which
/// other writers change too: the version of the object is the precondition.
pub fn removal(node: &NodeObject) -> Option<Value> {
    if !node.has_taint(NOT_READY) {
        return None;
    }
    let others: Vec<_> =
        node.taints.iter().filter(|taint| taint.key != NOT_READY).map(|taint| &taint.wire).collect();
    Some(json!({ "metadata": { "resourceVersion": node.version.0 }, "spec": { "taints": others } }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::fixture::node;

    #[test]
    fn only_this_taint_is_removed_whatever_its_effect_and_others_keep_all_fields() {
        let foreign = json!({
            "key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": "2026-01-02T03:04:05Z"
        });
        let with = node(json!({ "spec": { "taints": [
            { "key": NOT_READY, "effect": "NoSchedule" },
            foreign,
            { "key": NOT_READY, "value": "true", "effect": "NoExecute" },
        ] } }));
        let patch = removal(&with).unwrap();
        assert_eq!(patch, json!({ "metadata": { "resourceVersion": "7" }, "spec": { "taints": [foreign] } }));
        assert_eq!(removal(&node(json!({ "spec": { "taints": [foreign] } }))), None);
        assert_eq!(removal(&node(json!({}))), None);
    }
}
