//! What a runtime passes to a plugin, and what it makes of the answer.

use serde_json::Value;

use crate::agent::Worker;

/// All versions of the specification, the oldest first. As texts they compare as they follow each other.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Since when results go from plugin to plugin, and name interfaces.
pub const WITH_RESULTS: &str = "0.3.0";

/// Since when there is CHECK.
pub const WITH_CHECK: &str = "0.4.0";

/// The version with GC and STATUS. The reference plugins that Debian has do not speak it yet.
pub const WITH_GC: &str = "1.1.0";

/// The versions from that one on.
pub fn since(first: &str) -> impl Iterator<Item = &'static str> {
    VERSIONS.into_iter().filter(move |version| *version >= first)
}

/// The configuration of `polder`, with more in it.
pub fn conf(version: &str, more: &Value) -> Value {
    let mut conf = Worker::netconf(version);
    more.as_object().into_iter().flatten().for_each(|(key, value)| conf[key] = value.clone());
    conf
}

/// The code of an error.
pub fn code(outcome: Result<Value, Value>) -> u64 {
    outcome.expect_err("it should have failed")["code"].as_u64().expect("a code")
}

/// The message of an error.
pub fn message(outcome: Result<Value, Value>) -> String {
    outcome.expect_err("it should have failed")["msg"].as_str().expect("a message").to_owned()
}
