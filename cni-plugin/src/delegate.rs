//! Calls the delegated IPAM plugin that `ipam.type` names (CNI specification, section 4).

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

use crate::call::Network;
use crate::delegated::{DelegatedResult, DelegatedRoute};
use crate::environment::Verb;
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

/// Requests addresses from the plugin.
pub fn add(network: &Network, plugin: &str) -> Result<DelegatedResult, Error> {
    let output = call(network, plugin, Verb::Add)?;
    parse(&output).map_err(|problem| failed(plugin, 6, problem))
}

fn parse(output: &[u8]) -> Result<DelegatedResult, String> {
    let answer: Answer =
        serde_json::from_slice(output).map_err(|error| format!("invalid result: {error}"))?;
    let all = answer.ips.into_iter().chain(answer.ip4).chain(answer.ip6);
    let mut given = DelegatedResult { routes: answer.routes, dns: answer.dns, ..DelegatedResult::default() };
    for address in all {
        given.addresses.push(address.address.ip());
        given.routes.extend(address.routes);
    }
    if given.addresses.is_empty() {
        return Err("the result has no address".to_owned());
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
    let output = run().map_err(Error::file(format!("run {}", program.display())))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(match serde_json::from_slice::<Failure>(&output.stdout) {
        Ok(failure) if failure.details.is_empty() => failed(plugin, failure.code, failure.msg),
        Ok(failure) => failed(plugin, failure.code, format!("{}: {}", failure.msg, failure.details)),
        Err(_) => {
            let printed = String::from_utf8_lossy(&output.stdout);
            failed(plugin, 5, format!("it ended with {} and printed {:?}", output.status, printed.trim()))
        }
    })
}

fn failed(plugin: &str, code: u32, message: String) -> Error {
    Error::Delegate { plugin: plugin.to_owned(), code, message }
}

fn find(network: &Network, plugin: &str) -> Result<PathBuf, Error> {
    let mut candidates = network.path.iter().map(|folder| folder.join(plugin));
    candidates.find(|candidate| candidate.is_file()).ok_or_else(|| {
        let folders: Vec<_> = network.path.iter().map(|folder| folder.display().to_string()).collect();
        let problem = format!("ipam.type: plugin {plugin} not found in CNI_PATH ({})", folders.join(":"));
        Error::Environment(problem)
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_is_understood_in_the_shape_of_every_version() {
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
        assert!(parse(b"{}").unwrap_err().contains("no address"));
        assert!(parse(b"sorry").is_err());
    }
}
