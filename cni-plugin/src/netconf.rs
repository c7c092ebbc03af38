//! The network configuration on standard input (CNI specification, section 1).

use std::path::PathBuf;

use polder_api::{ContainerId, DEFAULT_SOCKET, Family, IfName, NetworkName, PoolName};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::environment::Verb;
use crate::error::Error;
use crate::version::Version;

/// The network configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadConfig {
    /// The configuration lacks a key that this plugin needs.
    /// Remedy: add the key to the network configuration.
    #[error("{key} is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// The value of a key has the wrong type or form.
    /// Remedy: correct the value in the network configuration.
    #[error("{key}: {problem}")]
    BadValue {
        /// The key.
        key: String,
        /// The cause.
        problem: serde_json::Error,
    },
    /// The name of the IPAM plugin is not a file name.
    /// Remedy: set ipam.type to the file name of a plugin in `CNI_PATH`, without a directory.
    #[error("ipam.type: {plugin:?} is not a plugin name")]
    NotPluginName {
        /// The value of `ipam.type`.
        plugin: String,
    },
    /// `polder` delegates to `polder-ipam`, which allocates from the same pools.
    #[error("ipam.type: polder allocates from its own pools without an IPAM plugin: remove ipam")]
    OwnPlugin,
    /// CHECK was called without the result of the ADD, for example because the runtime lost it.
    #[error("prevResult is missing: CHECK needs the result of the ADD")]
    NoPrevious,
    /// The result of an early version has one address per family, but the IPAM plugin returned more.
    #[error(
        "the IPAM plugin returned more than one {family} address, but a CNI {version} result holds only one: set \
         cniVersion 0.3.0 or later"
    )]
    SeveralAddresses {
        /// The address family.
        family: Family,
        /// The version of the configuration.
        version: Version,
    },
}

/// The validated network configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct NetConf {
    /// `cniVersion`: the version of the result.
    pub version: Version,
    /// `name`: the name of the network.
    pub name: NetworkName,
    /// `socket`: the path of the agent's socket.
    pub socket: PathBuf,
    /// `pool`: the only pool to allocate from.
    pub pool: Option<PoolName>,
    /// `mtu`: MTU in bytes, instead of the node's.
    pub mtu: Option<u32>,
    /// `dns`: copied to the result.
    pub dns: Option<Value>,
    /// `prevResult`: for ADD the result of the previous plugins of the chain, for CHECK and DEL the result of the ADD.
    pub previous: Option<Map<String, Value>>,
    /// `ipam.routes`: the pod's routes, instead of a default route.
    pub routes: Option<Vec<Value>>,
    /// `ipam.type`: the IPAM plugin that allocates the addresses, instead of the agent.
    pub delegate: Option<String>,
    /// The attachments that are valid, for GC. `None` (no list: delete nothing) is not an empty list (delete all).
    pub valid: Option<Vec<ValidAttachment>>,
    /// The whole configuration, unchanged, for a delegated plugin.
    pub text: Map<String, Value>,
}

/// An attachment that the runtime lists as valid.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ValidAttachment {
    /// The container ID.
    #[serde(rename = "containerID")]
    pub container: ContainerId,
    /// The name of the interface in the container.
    #[serde(rename = "ifname")]
    pub interface: IfName,
}

#[derive(Debug, Deserialize)]
struct Ipam {
    #[serde(rename = "type")]
    plugin: Option<String>,
}

/// Keys that runtimes add and that this plugin accepts. `NetConf` does not read them; `PodOptions` reads the last two.
const IGNORED_KEYS: [&str; 4] = ["type", "capabilities", "runtimeConfig", "args"];

/// The keys that `NetConf` reads.
const KNOWN_KEYS: [&str; 10] = [
    "cniVersion",
    "name",
    "socket",
    "pool",
    "mtu",
    "dns",
    "prevResult",
    "ipam",
    VALID_ATTACHMENTS,
    VALID_ATTACHMENTS_BEFORE_1_1,
];

const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// The key that runtimes used instead of `VALID_ATTACHMENTS` before CNI 1.1.0.
const VALID_ATTACHMENTS_BEFORE_1_1: &str = "cni.dev/attachments";

/// Parses the configuration and its `cniVersion`; an unsupported version is an error that lists the supported ones.
pub fn version(text: &str) -> Result<(Version, Map<String, Value>), Error> {
    let conf: Map<String, Value> = serde_json::from_str(text).map_err(Error::Decode)?;
    // Before 0.2.0 the specification does not define this key.
    let given = field::<String>(&conf, "cniVersion")?.unwrap_or_else(|| "0.1.0".to_owned());
    match Version::parse(&given) {
        Some(version) => Ok((version, conf)),
        None => Err(Error::Version { given }),
    }
}

/// The keys of a configuration that a verb needs. ADD needs all: an unknown key is an error, because it would not be
/// applied. The other verbs concern an attached pod, and must not fail because of a key that they do not need.
pub fn needed_by(verb: Verb, conf: &Map<String, Value>) -> Map<String, Value> {
    let more: &[&str] = match verb {
        Verb::Add | Verb::Version => return conf.clone(),
        Verb::Del => &[],
        Verb::Check => &["prevResult"],
        Verb::Gc => &[VALID_ATTACHMENTS, VALID_ATTACHMENTS_BEFORE_1_1],
        Verb::Status => &["pool"],
    };
    let is_needed = |key: &str| ["name", "socket", "ipam"].contains(&key) || more.contains(&key);
    let mut needed: Map<String, Value> = conf
        .iter()
        .filter(|(key, _)| is_needed(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if let Some(Value::Object(ipam)) = needed.get_mut("ipam") {
        ipam.retain(|key, _| ["type", "socket"].contains(&key.as_str()) || more.contains(&key.as_str()));
    }
    needed
}

impl NetConf {
    /// Validates the configuration of `polder`.
    pub fn read(version: Version, conf: Map<String, Value>) -> Result<Self, Error> {
        only(&conf, &[&KNOWN_KEYS[..], &IGNORED_KEYS].concat())?;
        let delegate = delegate(field::<Ipam>(&conf, "ipam")?)?;
        Ok(Self { delegate, mtu: field(&conf, "mtu")?, ..Self::of_network(version, &conf, &conf)? })
    }

    /// Validates the configuration of another plugin whose `ipam.type` is `polder-ipam`.
    pub fn read_ipam(version: Version, conf: Map<String, Value>) -> Result<Self, Error> {
        let own: Map<String, Value> = field(&conf, "ipam")?.ok_or(BadConfig::Missing { key: "ipam" })?;
        only(&own, &["type", "socket", "pool", "routes"])?;
        Ok(Self { routes: field(&own, "routes")?, ..Self::of_network(version, &conf, &own)? })
    }

    /// Reads the configuration of `loopback`, which needs only the name.
    pub fn read_any(version: Version, conf: &Map<String, Value>) -> Result<Self, Error> {
        Self::of_network(version, conf, &Map::new())
    }

    /// Reads the common keys from `conf` and Polder's keys from `own`.
    fn of_network(
        version: Version,
        conf: &Map<String, Value>,
        own: &Map<String, Value>,
    ) -> Result<Self, Error> {
        let name = field(conf, "name")?.ok_or(BadConfig::Missing { key: "name" })?;
        Ok(Self {
            version,
            name,
            socket: field(own, "socket")?.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            pool: field(own, "pool")?,
            mtu: None,
            dns: field(conf, "dns")?,
            previous: field(conf, "prevResult")?,
            delegate: None,
            routes: None,
            valid: match field(conf, VALID_ATTACHMENTS)? {
                Some(valid) => Some(valid),
                None => field(conf, VALID_ATTACHMENTS_BEFORE_1_1)?,
            },
            text: conf.clone(),
        })
    }
}

/// Rejects unknown keys, because they would not be applied.
fn only(conf: &Map<String, Value>, known: &[&str]) -> Result<(), Error> {
    match conf.iter().find(|(key, _)| !known.contains(&key.as_str())) {
        Some((key, value)) => Err(Error::UnknownKey { key: key.clone(), value: value.to_string() }),
        None => Ok(()),
    }
}

/// The delegated IPAM plugin, if its name is a valid file name.
fn delegate(ipam: Option<Ipam>) -> Result<Option<String>, Error> {
    let Some(plugin) = ipam.and_then(|ipam| ipam.plugin) else { return Ok(None) };
    if plugin.is_empty() || plugin.contains('/') || plugin == "." || plugin == ".." {
        return Err(BadConfig::NotPluginName { plugin }.into());
    }
    if plugin == "polder-ipam" {
        return Err(BadConfig::OwnPlugin.into());
    }
    Ok(Some(plugin))
}

/// The value of a key; `null` is treated as missing.
pub(crate) fn field<T: DeserializeOwned>(conf: &Map<String, Value>, key: &str) -> Result<Option<T>, Error> {
    match conf.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match serde_json::from_value(value.clone()) {
            Ok(value) => Ok(Some(value)),
            Err(problem) => Err(BadConfig::BadValue { key: key.to_owned(), problem }.into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<NetConf, Error> {
        let (version, conf) = version(text)?;
        NetConf::read(version, conf)
    }

    #[test]
    fn the_configuration_of_a_runtime_is_accepted() {
        let conf = read(
            r#"{"cniVersion":"1.0.0","name":"polder","type":"polder","socket":"/s","pool":"p","mtu":1400,
                "capabilities":{"portMappings":true},"runtimeConfig":{"x":1},"prevResult":{"ips":[]},"dns":{}}"#,
        );
        let conf = conf.unwrap();
        assert_eq!((conf.version, conf.name.as_str(), conf.mtu), (Version::V1_0_0, "polder", Some(1400)));
        assert_eq!((conf.socket.to_str(), conf.pool.unwrap().as_str()), (Some("/s"), "p"));
    }

    #[test]
    fn each_configuration_error_has_its_code_and_names_the_key() {
        for (text, code, expected) in [
            ("{", 6, "EOF"),
            ("[]", 6, "expected a map"),
            (r#"{"cniVersion":"1.2.0","name":"n"}"#, 1, "1.2.0"),
            (r#"{"cniVersion":"1.0.0"}"#, 7, "name is missing"),
            (r#"{"cniVersion":"1.0.0","name":"a b"}"#, 7, "name: "),
            (r#"{"cniVersion":"1.0.0","name":"n","mtu":"big"}"#, 7, "mtu: "),
            (r#"{"cniVersion":"1.0.0","name":"n","mtu":-1}"#, 7, "mtu: "),
            (r#"{"cniVersion":"1.0.0","name":"n","pool":"a/b"}"#, 7, "pool: "),
            (r#"{"cniVersion":"1.0.0","name":"n","bridge":"cni0"}"#, 2, "\"bridge\" with value \"cni0\""),
            (r#"{"cniVersion":1,"name":"n"}"#, 7, "cniVersion: "),
            (r#"{"cniVersion":"1.0.0","name":"n","ipam":{"type":"../sh"}}"#, 7, "ipam.type: "),
            (r#"{"cniVersion":"1.0.0","name":"n","ipam":{"type":"polder-ipam"}}"#, 7, "remove ipam"),
            (r#"{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":{}}"#, 7, "valid-attachments: "),
        ] {
            let error = read(text).expect_err(text);
            assert_eq!(error.code(), code, "{text}: {error}");
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }
}
