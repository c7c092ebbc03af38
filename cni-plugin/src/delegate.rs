//! Calls the delegated IPAM plugin that `ipam.type` names (CNI specification, section 4).

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

use crate::action::FileAction;
use crate::call::Network;
use crate::delegated::{DelegatedResult, DelegatedRoute};
use crate::environment::{BadEnvironment, Verb};
use crate::error::Error;

#[derive(Debug, Deserialize)]
struct GivenAddress {
    /// Named `ip` up to CNI 0.2.0.
    #[serde(alias = "ip")]
    address: IpNetwork,
    #[serde(default)]
    routes: Vec<DelegatedRoute>,
}

/// The fields of all versions; each result has those of one version.
#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    ips: Vec<GivenAddress>,
    ip4: Option<GivenAddress>,
    ip6: Option<GivenAddress>,
    #[serde(default)]
    routes: Vec<DelegatedRoute>,
    dns: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Failure {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

/// Why a delegated IPAM plugin failed. The message starts with the name of the plugin.
#[derive(Debug, thiserror::Error)]
pub enum DelegateFailure {
    /// The plugin succeeded, but its output is not the result of an ADD.
    /// Remedy: check that ipam.type names an IPAM plugin, and its release.
    #[error("invalid result: {0}")]
    BadResult(serde_json::Error),
    /// The plugin succeeded without an address.
    /// Remedy: check the ranges in ipam of the network configuration.
    #[error("the result has no address")]
    NoAddress,
    /// The plugin reported an error: its message and details. The code is passed on.
    /// Remedy: look the message up in the documentation of that plugin.
    #[error("{message}{}", separated(details))]
    Reported {
        /// The error code of the plugin.
        code: u32,
        /// The error message of the plugin.
        message: String,
        /// The details of the plugin; may be empty.
        details: String,
    },
    /// The plugin failed without an error in the form of the CNI specification, for example because it crashed.
    /// Remedy: check what it printed, and the log of the runtime.
    #[error("it ended with {status} and printed {printed:?}")]
    NoError {
        /// How the plugin ended.
        status: ExitStatus,
        /// The text on its standard output.
        printed: String,
    },
}

/// The details after the message; empty without details.
fn separated(details: &str) -> String {
    if details.is_empty() { String::new() } else { format!(": {details}") }
}

impl DelegateFailure {
    /// The error code for the runtime: that of the plugin, or one of the CNI specification.
    pub fn code(&self) -> u32 {
        match self {
            Self::BadResult(_) | Self::NoAddress => 6,
            Self::Reported { code, .. } => *code,
            Self::NoError { .. } => 5,
        }
    }
}

/// Requests addresses from the plugin.
pub fn add(network: &Network, plugin: &str) -> Result<DelegatedResult, Error> {
    let output = call(network, plugin, Verb::Add)?;
    parse(&output).map_err(|failure| failed(plugin, failure))
}

fn parse(output: &[u8]) -> Result<DelegatedResult, DelegateFailure> {
    let answer: Answer = serde_json::from_slice(output).map_err(DelegateFailure::BadResult)?;
    let all = answer.ips.into_iter().chain(answer.ip4).chain(answer.ip6);
    let mut given = DelegatedResult { routes: answer.routes, dns: answer.dns, ..DelegatedResult::default() };
    for address in all {
        given.addresses.push(address.address.ip());
        given.routes.extend(address.routes);
    }
    if given.addresses.is_empty() {
        return Err(DelegateFailure::NoAddress);
    }
    Ok(given)
}

/// Runs the plugin with the environment and configuration of this call and with `verb`. Returns its standard output.
pub fn call(network: &Network, plugin: &str, verb: Verb) -> Result<Vec<u8>, Error> {
    let program = find(network, plugin)?;
    let run = || {
        let mut child = Command::new(&program)
            .env("CNI_COMMAND", verb.as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        // Ignore a write error: the plugin may not read its input.
        let text = serde_json::to_vec(&network.conf.text)?;
        let _ = child.stdin.take().map(|mut input| input.write_all(&text));
        child.wait_with_output()
    };
    let output = run().map_err(Error::file(FileAction::RunPlugin { program: program.clone() }))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let failure = match serde_json::from_slice(&output.stdout) {
        Ok(Failure { code, msg: message, details }) => DelegateFailure::Reported { code, message, details },
        Err(_) => {
            let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            DelegateFailure::NoError { status: output.status, printed }
        }
    };
    Err(failed(plugin, failure))
}

fn failed(plugin: &str, failure: DelegateFailure) -> Error {
    Error::Delegate { plugin: plugin.to_owned(), failure }
}

fn find(network: &Network, plugin: &str) -> Result<PathBuf, Error> {
    let mut candidates = network.path.iter().map(|folder| folder.join(plugin));
    candidates.find(|candidate| candidate.is_file()).ok_or_else(|| {
        BadEnvironment::NoPlugin { plugin: plugin.to_owned(), folders: network.path.clone() }.into()
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_of_every_version_is_decoded() {
        let new = json!({
            "cniVersion": "1.1.0", "dns": {},
            "ips": [{ "address": "192.0.2.5/24", "gateway": "192.0.2.1" }, { "address": "2001:db8::5/64" }],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.0.0.0/8", "gw": "192.0.2.1", "mtu": 1400 }],
        });
        let old = json!({
            "cniVersion": "0.2.0", "dns": {},
            "ip4": { "ip": "192.0.2.5/24", "gateway": "192.0.2.1",
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.0.0.0/8", "gw": "192.0.2.1", "mtu": 1400 }] },
            "ip6": { "ip": "2001:db8::5/64" },
        });
        let new = parse(new.to_string().as_bytes()).unwrap();
        assert_eq!(new.addresses, ["192.0.2.5".parse::<IpAddr>().unwrap(), "2001:db8::5".parse().unwrap()]);
        assert_eq!((new.routes.len(), new.routes[1].mtu), (2, Some(1400)));
        assert_eq!(parse(old.to_string().as_bytes()).unwrap(), new);
        assert!(parse(b"{}").unwrap_err().to_string().contains("no address"));
        assert!(parse(b"sorry").is_err());
    }
}
