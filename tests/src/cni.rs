//! Inputs of plugins, and handling of their results.

use serde_json::Value;

use crate::agent::Worker;

/// All versions of the specification, oldest first. Compared as texts they have the same order.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// First version with `prevResult` and interfaces in results.
pub const WITH_RESULTS: &str = "0.3.0";

/// First version with CHECK.
pub const WITH_CHECK: &str = "0.4.0";

/// First version with GC and STATUS. Debian's reference plugins do not support it yet.
pub const WITH_GC: &str = "1.1.0";

/// The versions from `first` on.
pub fn since(first: &str) -> impl Iterator<Item = &'static str> {
    VERSIONS.into_iter().filter(move |version| *version >= first)
}

/// The configuration of `polder` with additional keys.
pub fn conf(version: &str, more: &Value) -> Value {
    let mut conf = Worker::netconf(version);
    more.as_object().into_iter().flatten().for_each(|(key, value)| conf[key] = value.clone());
    conf
}

/// The code of the expected error.
pub fn code(outcome: Result<Value, Value>) -> u64 {
    outcome.expect_err("it should have failed")["code"].as_u64().expect("a code")
}

/// The message of the expected error.
pub fn message(outcome: Result<Value, Value>) -> String {
    outcome.expect_err("it should have failed")["msg"].as_str().expect("a message").to_owned()
}
