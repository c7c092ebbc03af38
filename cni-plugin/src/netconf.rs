//! The network configuration on standard input (CNI specification, section 1).

use std::path::PathBuf;

use polder_api::{DEFAULT_SOCKET, NetworkName, PoolName};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::version::Version;

/// The configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct NetConf {
    /// The version that the runtime speaks.
    pub version: Version,
    /// The network's name.
    pub name: NetworkName,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The only pool to take addresses from.
    pub pool: Option<PoolName>,
    /// MTU instead of the node's, in bytes.
    pub mtu: Option<u32>,
    /// Passed on in the result.
    pub dns: Option<Value>,
    /// What the plugins before this one did; what this one did, for CHECK and DEL.
    pub previous: Option<Map<String, Value>>,
}

/// What runtimes put in, for all plugins or for those that ask for it, and that this one has no use for.
const TAKEN: [&str; 6] =
    ["type", "capabilities", "runtimeConfig", "args", "cni.dev/valid-attachments", "cni.dev/attachments"];

/// What is read.
const READ: [&str; 7] = ["cniVersion", "name", "socket", "pool", "mtu", "dns", "prevResult"];

/// The version that the configuration says, or an error that says which are spoken.
pub fn version(text: &str) -> Result<(Version, Map<String, Value>), Error> {
    let conf: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| Error::Decode(error.to_string()))?;
    // The specification before 0.2.0 had no such key.
    let given = field::<String>(&conf, "cniVersion")?.unwrap_or_else(|| "0.1.0".to_owned());
    match Version::parse(&given) {
        Some(version) => Ok((version, conf)),
        None => Err(Error::Version { given }),
    }
}

impl NetConf {
    /// Checks the configuration as a whole.
    pub fn read(version: Version, conf: &Map<String, Value>) -> Result<Self, Error> {
        let known = |key: &str| READ.contains(&key) || TAKEN.contains(&key);
        if let Some((key, value)) = conf.iter().find(|(key, _)| !known(key)) {
            return Err(Error::UnknownKey { key: key.clone(), value: value.to_string() });
        }
        let name = field(conf, "name")?.ok_or_else(|| Error::Config("name is missing".to_owned()))?;
        Ok(Self {
            version,
            name,
            socket: field(conf, "socket")?.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            pool: field(conf, "pool")?,
            mtu: field(conf, "mtu")?,
            dns: field(conf, "dns")?,
            previous: field(conf, "prevResult")?,
        })
    }
}

/// The value of a key; `null` is none.
fn field<T: DeserializeOwned>(conf: &Map<String, Value>, key: &str) -> Result<Option<T>, Error> {
    match conf.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match serde_json::from_value(value.clone()) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(Error::Config(format!("{key}: {error}"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<NetConf, Error> {
        let (version, conf) = version(text)?;
        NetConf::read(version, &conf)
    }

    #[test]
    fn what_a_runtime_passes_is_taken() {
        let conf = read(
            r#"{"cniVersion":"1.0.0","name":"polder","type":"polder","socket":"/s","pool":"p","mtu":1400,
                "capabilities":{"portMappings":true},"runtimeConfig":{"x":1},"prevResult":{"ips":[]},"dns":{}}"#,
        );
        let conf = conf.unwrap();
        assert_eq!((conf.version, conf.name.as_str(), conf.mtu), (Version::V1_0_0, "polder", Some(1400)));
        assert_eq!((conf.socket.to_str(), conf.pool.unwrap().as_str()), (Some("/s"), "p"));
    }

    #[test]
    fn each_thing_that_is_wrong_has_its_code_and_is_named() {
        for (text, code, sign) in [
            ("{", 6, "EOF"),
            ("[]", 6, "expected a map"),
            (r#"{"name":"n"}"#, 1, "0.1.0"),
            (r#"{"cniVersion":"1.2.0","name":"n"}"#, 1, "1.2.0"),
            (r#"{"cniVersion":"1.0.0"}"#, 7, "name is missing"),
            (r#"{"cniVersion":"1.0.0","name":"a b"}"#, 7, "name: "),
            (r#"{"cniVersion":"1.0.0","name":"n","mtu":"big"}"#, 7, "mtu: "),
            (r#"{"cniVersion":"1.0.0","name":"n","mtu":-1}"#, 7, "mtu: "),
            (r#"{"cniVersion":"1.0.0","name":"n","pool":"a/b"}"#, 7, "pool: "),
            (r#"{"cniVersion":"1.0.0","name":"n","bridge":"cni0"}"#, 2, "\"bridge\" with value \"cni0\""),
            (r#"{"cniVersion":1,"name":"n"}"#, 7, "cniVersion: "),
        ] {
            let error = read(text).expect_err(text);
            assert_eq!(error.code(), code, "{text}: {error}");
            assert!(error.to_string().contains(sign), "{text}: {error}");
        }
    }
}
