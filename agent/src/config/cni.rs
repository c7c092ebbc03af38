//! Section `[cni]`: the CNI configuration file, and the plugins that the runtime calls after Polder's.

use std::collections::BTreeMap;

use polder_api::{Attachment, NetworkName};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use toml::Table;

use super::{ConfigError, value};
use crate::conflist::{Network, OWN_CAPABILITIES, VERSIONS};

/// Why a value of the section is invalid.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCni {
    /// Runtimes read only files of that extension that are directly in the directory.
    #[error(
        "{file:?} is not a valid file name: set the name of a file in cni_conf_dir that ends with .conflist"
    )]
    File {
        /// The value.
        file: String,
    },
    /// The addresses of the node's probe endpoint are allocated under that network name.
    #[error("{name} is reserved for the node's own probes: choose another name")]
    ReservedName {
        /// The network name.
        name: NetworkName,
    },
    /// Polder does not implement that version of the CNI specification.
    #[error("unsupported version {version:?}: supported are {}", VERSIONS.join(", "))]
    Version {
        /// The version.
        version: String,
    },
    /// The entry of a plugin cannot be written as JSON.
    ///
    /// Remedy: use only strings, numbers, booleans, lists and tables in the entry.
    #[error(transparent)]
    NoJson(serde_json::Error),
    /// The agent adds the entry of Polder itself.
    #[error("polder is already in the chain: list only the other plugins")]
    Polder,
    /// The type of the entry, which is the file name of the plugin, is missing, empty or a path.
    #[error("plugin {plugin} has no type: set it, e.g. {{ type = \"portmap\", ... }}")]
    NoType {
        /// The entry.
        plugin: Value,
    },
    /// The entry has a TOML date, and JSON has none.
    #[error("plugin {plugin}: put dates in quotes")]
    Date {
        /// Type of the plugin.
        plugin: Value,
    },
    /// The capabilities of the entry are not a table, or contain another value than `true` and `false`.
    #[error(
        "plugin {plugin}: capabilities must be a table of booleans, e.g. capabilities = {{ portMappings = true }}"
    )]
    Capabilities {
        /// Type of the plugin.
        plugin: Value,
    },
    /// The runtime would pass the values of the capability to both plugins, which would configure the same thing.
    #[error(
        "capability {capability} is declared by both {first} and {second}: only one plugin may declare it, remove it \
         from {second}"
    )]
    TwoOwners {
        /// The capability.
        capability: String,
        /// Type of the first plugin that declares it.
        first: String,
        /// Type of the second plugin.
        second: String,
    },
    /// The runtime would pass the values of the capability to both entries, which would configure the same thing.
    #[error(
        "capability {capability} is declared by two entries of plugin {plugin}: only one may declare it, remove it \
         from the other"
    )]
    DeclaredTwice {
        /// The capability.
        capability: String,
        /// Type of the plugin.
        plugin: String,
    },
}

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
        value("cni.file", InvalidCni::File { file: self.file.clone() })
    }

    /// The validated content of the CNI configuration.
    pub(super) fn check(self) -> Result<Network, ConfigError> {
        if let Some(name) = self.name.as_ref().filter(|name| **name == Attachment::of_probe().network) {
            return value("cni.name", InvalidCni::ReservedName { name: name.clone() });
        }
        let chain = self.chain.into_iter().map(plugin).collect::<Result<Vec<_>, _>>()?;
        one_plugin_for_each_capability(&chain)?;
        // Plugins of other software are often older, and a runtime uses the newest offered version.
        let usual = if chain.is_empty() { "1.1.0" } else { "1.0.0" };
        let version = self.version.as_deref().unwrap_or(usual);
        let Some(newest) = VERSIONS.iter().position(|known| *known == version) else {
            return value("cni.version", InvalidCni::Version { version: version.to_owned() });
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
    let plugin = serde_json::to_value(&table).or_else(|error| value(KEY, InvalidCni::NoJson(error)))?;
    match plugin["type"].as_str() {
        Some("polder" | "polder-ipam") => {
            return value(KEY, InvalidCni::Polder);
        }
        Some(name) if !name.is_empty() && !name.contains('/') => {}
        _ => {
            return value(KEY, InvalidCni::NoType { plugin });
        }
    }
    // TOML has dates, JSON does not.
    if plugin.to_string().contains("$__toml_private_datetime") {
        return value(KEY, InvalidCni::Date { plugin: plugin["type"].clone() });
    }
    let capabilities = &plugin["capabilities"];
    let are_flags = capabilities.as_object().is_some_and(|all| all.values().all(Value::is_boolean));
    if !capabilities.is_null() && !are_flags {
        return value(KEY, InvalidCni::Capabilities { plugin: plugin["type"].clone() });
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
                let (capability, first, second) = (capability.clone(), owner.to_owned(), name.to_owned());
                let problem = if first == second {
                    InvalidCni::DeclaredTwice { capability, plugin: first }
                } else {
                    InvalidCni::TwoOwners { capability, first, second }
                };
                return value("cni.chain", problem);
            }
        }
    }
    Ok(())
}
