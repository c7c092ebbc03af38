//! Any key and value in the datastore is decoded as a record or refused, without a panic.
//!
//! `PROPTEST_CASES` is the number of cases; `scripts/fuzz` runs without a limit.

use polder_ipam::Revision;
use polder_ipam::record::decode;
use polder_ipam::store::{Contents, Entry};
use polder_ipam::view::View;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Keys with valid records.
fn records() -> Vec<(&'static str, Value)> {
    vec![
        (
            "/polder/v1/cluster",
            json!({ "id": "c", "backend": "auto", "attach": "bridge", "vxlan": { "vni": 1, "port": 8472 },
                "masquerade": { "enabled": true, "except": ["10.0.0.0/8"] } }),
        ),
        ("/polder/v1/pools/p", json!({ "cidr": "10.0.0.0/16", "block_length": 26, "state": "active" })),
        (
            "/polder/v1/nodes/n",
            json!({ "incarnation": "i", "machine_id": "m", "boot_id": "b", "underlay": ["10.1.0.1"],
                "gateways": ["10.0.0.1"], "vtep_mac": "06:00:00:00:00:01", "mtu": 1450, "version": "0" }),
        ),
        (
            "/polder/v1/blocks/4-0a000000-26",
            json!({ "node": "n", "incarnation": "i", "pool": "p", "nonce": "x" }),
        ),
    ]
}

fn leaf() -> impl Strategy<Value = Value> {
    let telling = vec!["10.0.0.0/8", "::/0", "0.0.0.0/0", "ff:ff:ff:ff:ff:ff", "auto", ""];
    prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        prop::sample::select(telling).prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
    ]
}

#[test]
fn the_unchanged_records_are_valid() {
    for (key, record) in records() {
        assert!(decode(key, record.to_string().as_bytes()).is_ok(), "{key}");
    }
}

proptest! {
    #[test]
    fn a_mutated_record_is_decoded_or_refused_with_its_key(
        which in 0..4_usize,
        field in any::<prop::sample::Index>(),
        value in prop::option::of(leaf()),
    ) {
        let (key, mut record) = records().swap_remove(which);
        let fields = record.as_object_mut().expect("an object");
        let name = fields.keys().nth(field.index(fields.len())).cloned().expect("a field");
        match value {
            Some(value) => drop(fields.insert(name, value)),
            None => drop(fields.remove(&name)),
        }
        let value = record.to_string().into_bytes();
        if let Err(reason) = decode(key, &value) {
            let (key, revision) = (key.to_owned(), Revision::new(1));
            let entries = vec![Entry { key: key.clone(), value, revision }];
            let view = View::from_snapshot(Contents { revision, entries });
            prop_assert_eq!(view.refused, [(key, reason.into())].into());
        }
    }

    #[test]
    fn any_key_with_any_value_is_decoded_or_refused(
        key in prop_oneof![any::<String>(), "/polder/v1/(pools|nodes|blocks|addresses|alive)/[ -~]{0,40}"],
        value in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let _ = decode(&key, &value);
    }
}
