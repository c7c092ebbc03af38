//! One call of the plugin, from its parameters to its answer.

use std::io::Read;

use polder_api::Attachment;
use serde_json::json;

use crate::environment::{Environment, Verb};
use crate::error::Error;
use crate::netconf::{self, NetConf};
use crate::version::Version;
use crate::{add, check, del};

/// How a call ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Well: this is for standard output.
    Output(String),
    /// Badly: this is for standard output, and the exit code is not 0.
    Error(String),
    /// It was no call of a runtime: this is for standard error.
    About(String),
}

/// A call that is complete.
#[derive(Debug)]
pub struct Call {
    /// What the runtime passes in the environment.
    pub environment: Environment,
    /// What it passes on standard input.
    pub conf: NetConf,
}

impl Call {
    /// What it is about.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            network: self.conf.name.clone(),
            container: self.environment.container.clone(),
            interface: self.environment.interface.clone(),
        }
    }
}

/// Does what the environment and the standard input say.
pub fn run(variable: impl Fn(&str) -> Option<String>, input: &mut impl Read) -> Answer {
    let Some(command) = variable("CNI_COMMAND") else {
        let versions = Version::ALL.map(Version::as_str).join(", ");
        return Answer::About(format!("CNI plugin polder {}, speaks {versions}", env!("CARGO_PKG_VERSION")));
    };
    let mut version = Version::NEWEST;
    match call(&command, variable, input, &mut version) {
        Ok(text) => Answer::Output(text),
        Err(error) => Answer::Error(error.to_json(version)),
    }
}

/// `version` becomes the one that the configuration says as soon as it is known, for the error that may follow.
fn call(
    command: &str,
    variable: impl Fn(&str) -> Option<String>,
    input: &mut impl Read,
    version: &mut Version,
) -> Result<String, Error> {
    let verb = Verb::parse(command)?;
    if verb == Verb::Version {
        let supported = json!({ "cniVersion": Version::NEWEST, "supportedVersions": Version::ALL });
        return Ok(format!("{supported:#}\n"));
    }
    let environment = Environment::read(verb, variable)?;
    let mut text = String::with_capacity(4096);
    input.read_to_string(&mut text).map_err(Error::Input)?;
    let (spoken, conf) = netconf::version(&text)?;
    *version = spoken;
    let call = Call { environment, conf: NetConf::read(spoken, &conf)? };
    match verb {
        Verb::Add => add::add(&call),
        Verb::Del => del::del(&call).map(|()| String::new()),
        Verb::Check if spoken < Version::V0_4_0 => {
            Err(Error::Config(format!("there is no CHECK in CNI {spoken}")))
        }
        Verb::Check => check::check(&call).map(|()| String::new()),
        Verb::Version => unreachable!("answered above"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Input that must not be touched.
    struct Untouched;

    impl Read for Untouched {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            panic!("standard input was read");
        }
    }

    #[test]
    fn version_answers_without_reading_standard_input() {
        let command = |name: &str| (name == "CNI_COMMAND").then(|| "VERSION".to_owned());
        let Answer::Output(text) = run(command, &mut Untouched) else { panic!("no output") };
        let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    }

    #[test]
    fn without_a_command_it_says_what_it_is() {
        assert!(matches!(run(|_| None, &mut Untouched), Answer::About(text) if text.contains("polder")));
    }

    #[test]
    fn an_error_is_one_json_object_in_the_version_of_the_configuration() {
        let variable = |name: &str| match name {
            "CNI_COMMAND" => Some("CHECK".to_owned()),
            "CNI_CONTAINERID" | "CNI_IFNAME" | "CNI_NETNS" => Some("x".to_owned()),
            _ => None,
        };
        let answer = run(variable, &mut r#"{"cniVersion":"0.3.1","name":"n"}"#.as_bytes());
        let Answer::Error(text) = answer else { panic!("no error") };
        let error: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&error["cniVersion"], &error["code"]), (&json!("0.3.1"), &json!(7)));
    }
}
