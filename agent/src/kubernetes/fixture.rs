//! For tests: Node objects.

use serde_json::{Value, json};

use super::node_object::NodeObject;

/// Node `n1` in version 7, with more fields.
pub(crate) fn node(more: Value) -> NodeObject {
    let mut object = json!({ "metadata": { "name": "n1", "uid": "u1", "resourceVersion": "7" } });
    merge(&mut object, more);
    NodeObject::of(serde_json::from_value(object).unwrap()).unwrap()
}

fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            more.into_iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (into, more) => *into = more,
    }
}
