//! An IPAM plugin that does what a test wants: it writes down what it is asked, and answers what it is told to.

use serde_json::{Value, json};

use crate::cni::WITH_RESULTS;
use crate::node::Node;

/// Where such plugins are on a node.
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
    /// Puts the plugin on a node.
    pub fn new(node: &'a Node) -> Self {
        let program = format!("{SCRIPTED_PLUGINS}/scripted-ipam");
        node.write(&program, SCRIPT);
        node.run("chmod", &["+x", &program]);
        Self(node)
    }

    /// The configuration that names it.
    pub fn conf() -> Value {
        json!({ "ipam": { "type": "scripted-ipam" } })
    }

    /// From now on it gives these IPv4 addresses, in the shape of that version. Before 0.3.0 that is the first alone.
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

    /// From now on it fails, and says this.
    pub fn fails(&self, error: &str) {
        self.0.write(&path("error"), error);
    }

    /// From now on it does not fail any more.
    pub fn recovers(&self) {
        self.0.run("rm", &[&path("error")]);
    }

    /// What it was asked since the last time, in a row.
    pub fn asked(&self) -> String {
        let asked = self.0.read(&path("asked")).unwrap_or_default();
        self.0.run("rm", &["-f", &path("asked")]);
        asked.replace('\n', " ").trim().to_owned()
    }
}

fn path(name: &str) -> String {
    format!("{SCRIPTED_PLUGINS}/{name}")
}
