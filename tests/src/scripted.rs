//! An IPAM plugin that a test controls: it records its requests and returns the configured result.

use serde_json::{Value, json};

use crate::cni::WITH_RESULTS;
use crate::node::Node;

/// Folder of the scripted plugins on a node.
pub const SCRIPTED_PLUGINS: &str = "/run/scripted";

const SCRIPT: &str = r#"#!/bin/sh
cd /run/scripted
echo "$CNI_COMMAND" >>asked
if [ -e error ]; then cat error; exit 1; fi
if [ "$CNI_COMMAND" = ADD ]; then cat result; fi
"#;

/// The plugin `scripted-ipam` of a node.
#[derive(Debug)]
pub struct ScriptedIpam<'a>(&'a Node);

impl<'a> ScriptedIpam<'a> {
    /// Installs the plugin on a node.
    pub fn new(node: &'a Node) -> Self {
        let program = format!("{SCRIPTED_PLUGINS}/scripted-ipam");
        node.write(&program, SCRIPT);
        node.run("chmod", &["+x", &program]);
        Self(node)
    }

    /// A network configuration with this plugin.
    pub fn conf() -> Value {
        json!({ "ipam": { "type": "scripted-ipam" } })
    }

    /// Makes the plugin return these IPv4 addresses in the format of that version; before 0.3.0 only the first one.
    pub fn gives(&self, version: &str, addresses: &[&str]) {
        let ip = |address: &&str| match version {
            "1.0.0" | "1.1.0" => json!({ "address": address }),
            _ => json!({ "address": address, "version": "4" }),
        };
        let result = if version < WITH_RESULTS {
            json!({ "cniVersion": version, "ip4": { "ip": addresses[0] } })
        } else {
            json!({ "cniVersion": version, "ips": addresses.iter().map(ip).collect::<Value>() })
        };
        self.0.write(&path("result"), &result.to_string());
    }

    /// Makes the plugin fail with this error.
    pub fn fails(&self, error: &str) {
        self.0.write(&path("error"), error);
    }

    /// Makes the plugin succeed again.
    pub fn recovers(&self) {
        self.0.run("rm", &[&path("error")]);
    }

    /// The requests since the last call, in order.
    pub fn take_calls(&self) -> String {
        let asked = self.0.read(&path("asked")).unwrap_or_default();
        self.0.run("rm", &["-f", &path("asked")]);
        asked.replace('\n', " ").trim().to_owned()
    }
}

fn path(name: &str) -> String {
    format!("{SCRIPTED_PLUGINS}/{name}")
}
