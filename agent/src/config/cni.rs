//! Section `[cni]`: the CNI configuration file, and the plugins that the runtime calls after Polder's.

use std::collections::BTreeMap;

use polder_api::{Attachment, NetworkName};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use toml::Table;

use super::{ConfigError, value};
use crate::conflist::{Network, OWN_CAPABILITIES, VERSIONS};

/// The section as written, with defaults.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CniFile {
    name: Option<NetworkName>,
    file: String,
    version: Option<String>,
    chain: Vec<Table>,
}

impl Default for CniFile {
    fn default() -> Self {
        Self { name: None, file: "10-polder.conflist".to_owned(), version: None, chain: Vec::new() }
    }
}

impl CniFile {
    /// The file name, if runtimes read files of that name.
    pub(super) fn file_name(&self) -> Result<&str, ConfigError> {
        let is_name = !self.file.contains('/') && !self.file.starts_with('.');
        if is_name && self.file.ends_with(".conflist") {
            return Ok(&self.file);
        }
        value(
            "cni.file",
            format!(
                "{:?} is not a valid file name: set the name of a file in cni_conf_dir that ends with .conflist",
                self.file
            ),
        )
    }

    /// The validated content of the CNI configuration.
    pub(super) fn check(self) -> Result<Network, ConfigError> {
        if let Some(name) = self.name.as_ref().filter(|name| **name == Attachment::of_probe().network) {
            return value(
                "cni.name",
                format!("{name} is reserved for the node's own probes: choose another name"),
            );
        }
        let chain = self.chain.into_iter().map(plugin).collect::<Result<Vec<_>, _>>()?;
        one_plugin_for_each_capability(&chain)?;
        // Plugins of other software are often older, and a runtime uses the newest offered version.
        let usual = if chain.is_empty() { "1.1.0" } else { "1.0.0" };
        let version = self.version.as_deref().unwrap_or(usual);
        let Some(newest) = VERSIONS.iter().position(|known| *known == version) else {
            return value(
                "cni.version",
                format!("unsupported version {version:?}: supported are {}", VERSIONS.join(", ")),
            );
        };
        Ok(Network {
            name: self.name,
            versions: &VERSIONS[..=newest],
            has_fixed_versions: self.version.is_some(),
            chain,
        })
    }
}

/// A plugin of the chain as JSON.
fn plugin(table: Table) -> Result<Value, ConfigError> {
    const KEY: &str = "cni.chain";
    let plugin = serde_json::to_value(&table).or_else(|error| value(KEY, error.to_string()))?;
    match plugin["type"].as_str() {
        Some("polder" | "polder-ipam") => {
            return value(KEY, "polder is already in the chain: list only the other plugins".to_owned());
        }
        Some(name) if !name.is_empty() && !name.contains('/') => {}
        _ => {
            return value(
                KEY,
                format!("plugin {plugin} has no type: set it, e.g. {{ type = \"portmap\", ... }}"),
            );
        }
    }
    // TOML has dates, JSON does not.
    if plugin.to_string().contains("$__toml_private_datetime") {
        return value(KEY, format!("plugin {}: put dates in quotes", plugin["type"]));
    }
    let capabilities = &plugin["capabilities"];
    let are_flags = capabilities.as_object().is_some_and(|all| all.values().all(Value::is_boolean));
    if !capabilities.is_null() && !are_flags {
        return value(
            KEY,
            format!(
                "plugin {}: capabilities must be a table of booleans, e.g. capabilities = {{ portMappings = true }}",
                plugin["type"]
            ),
        );
    }
    Ok(plugin)
}

/// A runtime passes the values of a capability to every plugin that declares it: two plugins would configure the same
/// thing.
fn one_plugin_for_each_capability(chain: &[Value]) -> Result<(), ConfigError> {
    let mut owners: BTreeMap<&str, &str> = OWN_CAPABILITIES.iter().map(|name| (*name, "polder")).collect();
    for plugin in chain {
        let name = plugin["type"].as_str().unwrap_or_default();
        let declared = plugin["capabilities"].as_object().into_iter().flatten();
        for (capability, _) in declared.filter(|(_, is_on)| **is_on == Value::Bool(true)) {
            if let Some(owner) = owners.insert(capability, name) {
                let problem = format!(
                    "capability {capability} is declared by both {owner} and {name}: only one plugin may declare it, \
                     remove it from {name}"
                );
                return value("cni.chain", problem);
            }
        }
    }
    Ok(())
}
