//! External input is accepted or refused, without a panic.
//!
//! `PROPTEST_CASES` is the number of cases; `scripts/fuzz` runs without a limit.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::time::Duration;

use polder_api::message::{Question, Reply};
use polder_cni_plugin::call::Program;
use polder_cni_plugin::command::read;
use polder_cni_plugin::error::Error;
use polder_cni_plugin::version::Version;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Random JSON, in which keys and values of real configurations are frequent.
fn json() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        "[ -~]{0,20}".prop_map(String::from),
        any::<String>(),
        prop::sample::select(vec![
            "1.1.0",
            "0.2.0",
            "polder",
            "10.0.0.1/24",
            "fd00::1",
            "02:00:00:00:00:01",
            "host-local",
            ".."
        ])
        .prop_map(str::to_owned),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text.prop_map(Value::from),
    ];
    let key = prop_oneof![
        prop::sample::select(vec![
            "cniVersion",
            "name",
            "type",
            "socket",
            "pool",
            "mtu",
            "dns",
            "prevResult",
            "ipam",
            "runtimeConfig",
            "args",
            "cni",
            "ips",
            "mac",
            "routes",
            "cni.dev/valid-attachments",
            "containerID",
            "ifname",
            "io.kubernetes.cri.pod-annotations",
            "polder.dev/address",
            "polder.dev/pool",
            "capabilities",
        ])
        .prop_map(str::to_owned),
        "[a-z]{1,8}".prop_map(String::from),
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// A valid configuration with up to two changed keys, random JSON, or random bytes.
fn conf() -> impl Strategy<Value = Vec<u8>> {
    let right =
        json!({ "cniVersion": "1.1.0", "name": "n", "type": "polder", "ipam": { "type": "polder-ipam" } });
    let changed = prop::collection::vec((0..5_usize, json()), 0..3).prop_map(move |changes| {
        let mut conf = right.clone();
        for (place, value) in changes {
            match place {
                0 => conf["cniVersion"] = value,
                1 => conf["ipam"] = value,
                2 => conf["runtimeConfig"] = value,
                3 => conf["prevResult"] = value,
                _ => conf["cni.dev/valid-attachments"] = value,
            }
        }
        conf.to_string().into_bytes()
    });
    prop_oneof![
        changed,
        json().prop_map(|json| json.to_string().into_bytes()),
        prop::collection::vec(any::<u8>(), 0..200),
    ]
}

fn value() -> impl Strategy<Value = Option<String>> {
    prop::option::of(prop_oneof![
        "[a-z0-9]{1,15}".prop_map(String::from),
        "([A-Z0-9_]{1,9}=[a-z0-9.:]{0,9};?){0,4}".prop_map(String::from),
        any::<String>(),
    ])
}

fn verb() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"])
}

/// Checks that the error is one JSON object with a known code.
fn assert_presentable(error: &Error, version: Version) {
    let text = error.to_json("polder", version);
    let error: Value = serde_json::from_str(&text).unwrap();
    let code = error["code"].as_u64().unwrap();
    assert!(matches!(code, 1 | 2 | 4..=7), "{text}");
    assert!(!error["msg"].as_str().unwrap().is_empty());
}

proptest! {
    #[test]
    fn every_call_is_decoded_or_refused(
        verb in verb(),
        ipam in any::<bool>(),
        variables in prop::array::uniform6(value()),
        input in conf(),
    ) {
        const NAMES: [&str; 6] =
            ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS", "CNI_PATH", "TRACEPARENT"];
        let variable = |name: &str| {
            NAMES.iter().position(|known| *known == name).and_then(|index| variables[index].clone())
        };
        let program = if ipam { Program::PolderIpam } else { Program::Polder };
        let mut version = Version::NEWEST;
        if let Err(error) = read(program, verb, variable, &mut input.as_slice(), Duration::ZERO, &mut version) {
            assert_presentable(&error, version);
        }
    }

    #[test]
    fn every_message_is_decoded_or_refused(json in json(), bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let text = json.to_string();
        for input in [text.as_bytes(), &bytes] {
            let _ = serde_json::from_slice::<Question>(input);
            let _ = serde_json::from_slice::<Reply>(input);
        }
    }
}
