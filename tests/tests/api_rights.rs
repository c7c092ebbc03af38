//! The rights at the Kubernetes API server in the manifests: as few as the agent uses, and none without `[kubernetes]`.

use std::collections::BTreeSet;

use polder_tests::manifest::{Manifest, text};
use serde_json::{Value, json};

const TOKEN: &str = "api-access";

fn rights(role: &Value) -> BTreeSet<String> {
    let words = |rule: &Value, list: &str| -> Vec<String> {
        rule[list].as_array().into_iter().flatten().map(text).collect()
    };
    let rules = role["rules"].as_array().into_iter().flatten();
    let of_rule = |rule: &Value| {
        assert_eq!(rule["apiGroups"], json!([""]));
        assert_eq!(rule["resourceNames"], Value::Null);
        let verbs = words(rule, "verbs");
        words(rule, "resources")
            .into_iter()
            .flat_map(move |resource| verbs.clone().into_iter().map(move |verb| format!("{verb} {resource}")))
            .collect::<Vec<_>>()
    };
    rules.flat_map(of_rule).collect()
}

#[test]
fn the_roles_permit_what_the_agent_does_and_nothing_else() {
    let manifest = Manifest::read("kubernetes");
    let of_cluster = ["list nodes", "watch nodes", "patch nodes", "patch nodes/status"];
    assert_eq!(rights(manifest.document("ClusterRole")), of_cluster.map(str::to_owned).into());
    let of_events = ["create events", "patch events"];
    assert_eq!(rights(manifest.document("Role")), of_events.map(str::to_owned).into());
    let namespace = text(&manifest.document("ServiceAccount")["metadata"]["namespace"]);
    for kind in ["ClusterRoleBinding", "RoleBinding"] {
        let subject = json!([{ "kind": "ServiceAccount", "name": "polder", "namespace": namespace }]);
        assert_eq!(manifest.document(kind)["subjects"], subject, "{kind}");
    }
    // The policy applies to exactly this account, and refuses a request that it cannot evaluate.
    let policy = &manifest.document("ValidatingAdmissionPolicy")["spec"];
    let account = format!("request.userInfo.username == 'system:serviceaccount:{namespace}:polder'");
    assert_eq!(policy["matchConditions"], json!([{ "name": "agent", "expression": account }]));
    assert_eq!(policy["failurePolicy"], "Fail");
    let binding = &manifest.document("ValidatingAdmissionPolicyBinding")["spec"];
    assert_eq!(*binding, json!({ "policyName": "polder", "validationActions": ["Deny"] }));
}

#[test]
fn only_the_agents_container_has_a_token_and_only_with_kubernetes_enabled() {
    for (name, has_token) in [("kubernetes", true), ("base", false)] {
        let manifest = Manifest::read(name);
        assert_eq!(manifest.document("ServiceAccount")["automountServiceAccountToken"], false, "{name}");
        assert_eq!(manifest.pod()["automountServiceAccountToken"], false, "{name}");
        let mounts = |list: &str| manifest.container(list).mounts().contains(&TOKEN.to_owned());
        assert_eq!((mounts("containers"), mounts("initContainers")), (has_token, false), "{name}");
        let config = manifest.config("agent.toml");
        assert_eq!(config.contains("[kubernetes]\n"), has_token, "{name}");
    }
}
