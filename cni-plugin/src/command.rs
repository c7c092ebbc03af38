//! One plugin call, from its parameters to its output.

use std::io::Read;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde_json::json;

use crate::call::{Call, Network, Program};
use crate::environment::{Environment, Verb, search_path, trace};
use crate::error::Error;
use crate::netconf::{self, NetConf};
use crate::options::PodOptions;
use crate::version::Version;
use crate::{add, check, del, gc, lease, loopback, status};

/// The outcome of a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Success: print this on standard output.
    Output(String),
    /// Failure: print this on standard output and exit with a code other than 0.
    Error(String),
    /// No `CNI_COMMAND`, so the caller is not a runtime: print this on standard error.
    About(String),
}

/// Runs the command of `CNI_COMMAND` with the configuration from standard input.
pub fn run(program: Program, variable: impl Fn(&str) -> Option<String>, input: &mut impl Read) -> Answer {
    // Read the clock before the input: attachments that are added later cannot be in the runtime's list.
    let began = since_boot();
    let Some(command) = variable("CNI_COMMAND") else {
        let versions = Version::ALL.map(Version::as_str).join(", ");
        let (name, release) = (program.name(), env!("CARGO_PKG_VERSION"));
        return Answer::About(format!("CNI plugin {name} {release}, supports CNI {versions}"));
    };
    let mut version = Version::NEWEST;
    let errand = read(program, &command, variable, input, began, &mut version);
    match errand.and_then(|errand| carry_out(program, &errand)) {
        Ok(text) => Answer::Output(text),
        Err(error) => Answer::Error(error.to_json(program.name(), version)),
    }
}

fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every kernel since 2.6.39 has this clock");
    Duration::from(time)
}

/// Runs the command. Returns the text for standard output.
fn carry_out(program: Program, errand: &Invocation) -> Result<String, Error> {
    let nothing = |()| String::new();
    match (program, errand) {
        (_, Invocation::Version) => {
            let supported = json!({ "cniVersion": Version::NEWEST, "supportedVersions": Version::ALL });
            Ok(format!("{supported:#}\n"))
        }
        (Program::Loopback, Invocation::Add(call)) => loopback::add(call),
        (Program::Loopback, Invocation::Del(call)) => loopback::del(call).map(nothing),
        (Program::Loopback, Invocation::Check(call)) => loopback::check(call).map(nothing),
        // The loopback plugin has no state and no agent.
        (Program::Loopback, Invocation::Gc(_) | Invocation::Status(_)) => Ok(String::new()),
        (_, Invocation::Gc(network)) => gc::gc(network).map(nothing),
        (_, Invocation::Status(network)) => status::status(program, network).map(nothing),
        (Program::Polder, Invocation::Add(call)) => add::add(call),
        (Program::Polder, Invocation::Del(call)) => del::del(call).map(nothing),
        (Program::Polder, Invocation::Check(call)) => check::check(call).map(nothing),
        (Program::PolderIpam, Invocation::Add(call)) => lease::add(call),
        (Program::PolderIpam, Invocation::Del(call)) => lease::del(call).map(nothing),
        (Program::PolderIpam, Invocation::Check(call)) => lease::check(call).map(nothing),
    }
}

/// A validated command of the runtime.
#[derive(Debug)]
pub enum Invocation {
    /// Create an interface in a container.
    Add(Call),
    /// Delete the interface.
    Del(Call),
    /// Check that the interface is as ADD made it.
    Check(Call),
    /// Delete attachments that the runtime no longer lists.
    Gc(Network),
    /// Report whether an ADD would succeed.
    Status(Network),
    /// List the supported versions.
    Version,
}

/// Reads and validates a command, without side effects. Sets `version` as soon as the version of the configuration is
/// known: errors are reported in it.
pub fn read(
    program: Program,
    command: &str,
    variable: impl Fn(&str) -> Option<String>,
    input: &mut impl Read,
    began: Duration,
    version: &mut Version,
) -> Result<Invocation, Error> {
    let verb = Verb::parse(command)?;
    if verb == Verb::Version {
        return Ok(Invocation::Version);
    }
    let environment = match verb {
        Verb::Add | Verb::Del | Verb::Check => Some(Environment::read(verb, &variable)?),
        Verb::Gc | Verb::Status | Verb::Version => None,
    };
    let path = match search_path(&variable) {
        Err(error) if verb == Verb::Gc => return Err(error),
        path => path.unwrap_or_default(),
    };
    let mut text = String::with_capacity(4096);
    input.read_to_string(&mut text).map_err(Error::Input)?;
    let (stated, text) = netconf::version(&text)?;
    *version = stated;
    if stated < verb.since() {
        return Err(Error::NoCommand { command: verb, version: stated });
    }
    let needed = netconf::needed_by(verb, &text);
    let options = match &environment {
        Some(environment) if verb == Verb::Add => PodOptions::read(&needed, &environment.arguments)?,
        Some(_) if verb == Verb::Check => PodOptions::read_to_check(&text),
        _ => PodOptions::default(),
    };
    let conf = match program {
        Program::Polder => NetConf::read(stated, needed)?,
        Program::PolderIpam => NetConf::read_ipam(stated, needed)?,
        Program::Loopback => NetConf::read_any(stated, &needed)?,
    };
    let network = Network { conf: NetConf { text, ..conf }, path, trace: trace(&variable), began };
    let Some(environment) = environment else {
        return Ok(if verb == Verb::Gc { Invocation::Gc(network) } else { Invocation::Status(network) });
    };
    let call = Call { environment, options, network };
    Ok(match verb {
        Verb::Add => Invocation::Add(call),
        Verb::Del => Invocation::Del(call),
        _ => Invocation::Check(call),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Input that must not be read: a read panics.
    struct UnreadInput;

    impl Read for UnreadInput {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            panic!("standard input was read");
        }
    }

    #[test]
    fn version_answers_without_reading_standard_input() {
        let command = |name: &str| (name == "CNI_COMMAND").then(|| "VERSION".to_owned());
        let Answer::Output(text) = run(Program::Polder, command, &mut UnreadInput) else {
            panic!("no output")
        };
        let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["supportedVersions"], json!(Version::ALL));
    }

    #[test]
    fn without_a_command_the_program_describes_itself() {
        assert!(
            matches!(run(Program::PolderIpam, |_| None, &mut UnreadInput), Answer::About(text) if text.contains("polder-ipam"))
        );
    }

    #[test]
    fn an_error_is_one_json_object_in_the_version_of_the_configuration() {
        let variable = |name: &str| match name {
            "CNI_COMMAND" => Some("CHECK".to_owned()),
            "CNI_CONTAINERID" | "CNI_IFNAME" | "CNI_NETNS" => Some("x".to_owned()),
            _ => None,
        };
        let answer = run(Program::Polder, variable, &mut r#"{"cniVersion":"0.3.1","name":"n"}"#.as_bytes());
        let Answer::Error(text) = answer else { panic!("no error") };
        let error: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&error["cniVersion"], &error["code"]), (&json!("0.3.1"), &json!(1)));
    }

    #[test]
    fn an_invalid_key_is_ignored_by_commands_that_do_not_need_it() {
        let conf = json!({
            "cniVersion": "1.1.0", "name": "n", "type": "polder", "isGateway": true, "mtu": "large", "pool": "p",
            "ipam": { "type": "polder-ipam", "colour": "red", "routes": 7 },
            "args": { "cni": { "mac": "?" } }, "runtimeConfig": { "bandwidth": { "ingressRate": -1 } }, "dns": 1, "prevResult": {}, "cni.dev/valid-attachments": [],
        });
        let variable = |name: &str| match name {
            "CNI_CONTAINERID" | "CNI_IFNAME" => Some("c1".to_owned()),
            "CNI_NETNS" => Some("/proc/self/ns/net".to_owned()),
            "CNI_PATH" => Some("/nowhere".to_owned()),
            _ => None,
        };
        let read_for = |program, command: &str, conf: &serde_json::Value| {
            let (text, mut version) = (conf.to_string(), Version::NEWEST);
            read(program, command, variable, &mut text.as_bytes(), Duration::ZERO, &mut version)
        };
        let mut own = conf.clone();
        own.as_object_mut().unwrap().remove("ipam");
        for command in ["DEL", "CHECK", "GC", "STATUS"] {
            read_for(Program::Polder, command, &own).expect(command);
            read_for(Program::PolderIpam, command, &conf).expect(command);
        }
        for (program, conf) in [(Program::Polder, &own), (Program::PolderIpam, &conf)] {
            assert!(read_for(program, "ADD", conf).is_err());
            // A missing required key is an error.
            let mut nameless = conf.clone();
            nameless.as_object_mut().unwrap().remove("name");
            assert_eq!(read_for(program, "DEL", &nameless).unwrap_err().code(), 7);
        }
    }
}
