//! The kinds of patches that the API server knows, as far as the recordings show them.

use serde_json::Value;

/// The resource version of the patch is not that of the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Conflict;

/// Applies the body of a PATCH request with that content type.
pub(super) fn apply(object: &mut Value, content_type: &str, body: &Value) -> Result<(), Conflict> {
    let expected = &body["metadata"]["resourceVersion"];
    if !expected.is_null() && *expected != object["metadata"]["resourceVersion"] {
        return Err(Conflict);
    }
    match content_type {
        "application/merge-patch+json" => merge(object, body),
        "application/strategic-merge-patch+json" => strategic(object, body, ""),
        other => panic!("the stand-in does not know patches of type {other}"),
    }
    Ok(())
}

/// A merge patch, RFC 7386.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let object = target.as_object_mut().expect("it was just made one");
    for (key, value) in fields {
        if value.is_null() {
            object.remove(key);
        } else {
            merge(object.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// A strategic merge patch of a Node: conditions and addresses are merged by their type, other lists are replaced
/// (`patchStrategy` in core/v1/types.go).
fn strategic(target: &mut Value, patch: &Value, place: &str) {
    match patch {
        Value::Object(fields) => {
            if !target.is_object() {
                *target = Value::Object(serde_json::Map::new());
            }
            let object = target.as_object_mut().expect("it was just made one");
            for (key, value) in fields {
                assert!(!key.starts_with('$'), "the stand-in does not know the directive {key}");
                if value.is_null() {
                    object.remove(key);
                } else {
                    strategic(object.entry(key).or_insert(Value::Null), value, &format!("{place}/{key}"));
                }
            }
        }
        Value::Array(items) if matches!(place, "/status/conditions" | "/status/addresses") => {
            if !target.is_array() {
                *target = Value::Array(Vec::new());
            }
            let list = target.as_array_mut().expect("it was just made one");
            for item in items {
                match list.iter_mut().find(|old| old["type"] == item["type"]) {
                    Some(old) => strategic(old, item, &format!("{place}/-")),
                    // The real server puts new ones first.
                    None => list.insert(0, item.clone()),
                }
            }
        }
        other => *target = other.clone(),
    }
}
