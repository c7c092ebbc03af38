//! The parameters that a runtime passes in the environment (CNI specification, section 2, "Parameters").

use std::fmt;
use std::path::PathBuf;

use polder_api::{ContainerId, IfName, InvalidName, Pod};

use crate::error::Error;
use crate::version::Version;

/// The parameters of the call are missing or invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadEnvironment {
    /// The runtime did not set a variable that the command needs.
    /// Remedy: check the release of the runtime; if a person called the plugin, set the variable.
    #[error("{variable} is not set")]
    NotSet {
        /// The name of the variable.
        variable: &'static str,
    },
    /// The runtime called a command that this release does not support.
    #[error("unknown CNI_COMMAND {command:?}: use one of {}", Verb::ALL.map(Verb::as_str).join(", "))]
    UnknownCommand {
        /// The value of `CNI_COMMAND`.
        command: String,
    },
    /// A container ID or interface name is invalid.
    /// Remedy: correct the name as the end of the message states.
    #[error("{variable}: {problem}")]
    BadName {
        /// The name of the variable.
        variable: &'static str,
        /// The rule for valid names.
        problem: InvalidName,
    },
    /// A part of `CNI_ARGS` has no equals sign, or more than one.
    /// Remedy: write `CNI_ARGS` as KEY=VALUE pairs, separated by semicolons.
    #[error("CNI_ARGS contains {text:?}, which is not KEY=VALUE")]
    NotPair {
        /// The part.
        text: String,
    },
    /// `CNI_ARGS` has keys that this plugin does not know, and no `IgnoreUnknown=1`.
    /// Remedy: remove the keys, or add IgnoreUnknown=1.
    #[error("unknown keys in CNI_ARGS: {}", keys.join(", "))]
    UnknownArguments {
        /// The keys.
        keys: Vec<String>,
    },
    /// More than one variable can be missing or invalid. Each error is listed by itself.
    /// Remedy: see each error.
    #[error("{}", joined(.0))]
    Several(Vec<BadEnvironment>),
    /// The IPAM plugin of the network configuration is not installed on this node.
    /// Remedy: install the plugin in a directory of `CNI_PATH`, or correct ipam.type.
    #[error("ipam.type: plugin {plugin} not found in CNI_PATH ({})", listed(folders))]
    NoPlugin {
        /// The name of the plugin.
        plugin: String,
        /// The folders of `CNI_PATH`.
        folders: Vec<PathBuf>,
    },
}

fn joined(errors: &[BadEnvironment]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn listed(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(":")
}

/// The value of `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Create an interface in a container.
    Add,
    /// Delete the interface.
    Del,
    /// Check that the interface is as ADD made it.
    Check,
    /// Delete attachments that the runtime no longer lists.
    Gc,
    /// Report whether an ADD would succeed.
    Status,
    /// List the supported versions.
    Version,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Verb {
    /// All values of `CNI_COMMAND`.
    const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    /// The value as in `CNI_COMMAND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    /// Parses the value of `CNI_COMMAND`. An unknown value is an error with code 4.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|verb| verb.as_str() == text).ok_or_else(|| {
            let command = text.to_owned();
            BadEnvironment::UnknownCommand { command }.into()
        })
    }

    /// The first version of the specification that defines the verb.
    pub fn since(self) -> Version {
        match self {
            Self::Add | Self::Del | Self::Version => Version::V0_1_0,
            Self::Check => Version::V0_4_0,
            Self::Gc | Self::Status => Version::V1_1_0,
        }
    }

    fn needs_namespace(self) -> bool {
        matches!(self, Self::Add | Self::Check)
    }
}

/// The parameters of a call for one attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// `CNI_CONTAINERID`.
    pub container: ContainerId,
    /// `CNI_IFNAME`.
    pub interface: IfName,
    /// `CNI_NETNS`; optional for DEL.
    pub netns: Option<PathBuf>,
    /// `CNI_NETNS_OVERRIDE`: `CNI_NETNS` may be the namespace that the plugin runs in.
    pub own_netns_allowed: bool,
    /// The parsed `CNI_ARGS`.
    pub arguments: Arguments,
}

/// The parsed `CNI_ARGS`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Arguments {
    /// The pod, from `K8S_POD_NAMESPACE`, `K8S_POD_NAME` and `K8S_POD_UID`.
    pub pod: Option<Pod>,
    /// `IP`: the requested address.
    pub address: Option<String>,
    /// `MAC`: the requested MAC address.
    pub mac: Option<String>,
}

/// The folders of `CNI_PATH`, which are searched for delegated plugins.
pub fn search_path(variable: impl Fn(&str) -> Option<String>) -> Result<Vec<PathBuf>, Error> {
    let path = variable("CNI_PATH").filter(|path| !path.is_empty());
    let path = path.ok_or(BadEnvironment::NotSet { variable: "CNI_PATH" })?;
    Ok(std::env::split_paths(&path).collect())
}

/// The trace context of the call for the logs (W3C Trace Context and Baggage): `traceparent`, then `tracestate` and
/// `baggage` if they are set.
pub fn trace(variable: impl Fn(&str) -> Option<String>) -> Option<String> {
    const MAX_LENGTH: usize = 512;
    let value = |name: &str| {
        variable(name).filter(|value| {
            !value.is_empty()
                && value.len() <= MAX_LENGTH
                && value.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
        })
    };
    let mut trace = value("TRACEPARENT")?;
    for (name, key) in [("TRACESTATE", "tracestate"), ("BAGGAGE", "baggage")] {
        if let Some(value) = value(name) {
            trace = format!("{trace} {key}={value}");
        }
    }
    Some(trace)
}

impl Environment {
    /// Reads the variables that the verb needs. The error lists all problems.
    pub fn read(verb: Verb, variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let value = |name: &str| variable(name).filter(|value| !value.is_empty());
        let mut problems = Vec::new();
        let mut required = |name: &'static str| {
            value(name).or_else(|| {
                problems.push(BadEnvironment::NotSet { variable: name });
                None
            })
        };
        let container = required("CNI_CONTAINERID");
        let interface = required("CNI_IFNAME");
        let netns = if verb.needs_namespace() { required("CNI_NETNS") } else { value("CNI_NETNS") };
        let container: Option<ContainerId> = checked("CNI_CONTAINERID", container, &mut problems);
        let interface: Option<IfName> = checked("CNI_IFNAME", interface, &mut problems);
        let arguments = arguments(&variable("CNI_ARGS").unwrap_or_default()).unwrap_or_else(|problem| {
            problems.push(problem);
            Arguments::default()
        });
        match (container, interface) {
            (Some(container), Some(interface)) if problems.is_empty() => Ok(Self {
                container,
                interface,
                netns: netns.map(PathBuf::from),
                own_netns_allowed: matches!(
                    variable("CNI_NETNS_OVERRIDE").as_deref(),
                    Some("TRUE" | "true" | "1")
                ),
                arguments,
            }),
            _ => Err(BadEnvironment::Several(problems).into()),
        }
    }
}

fn checked<T: std::str::FromStr<Err = InvalidName>>(
    variable: &'static str,
    value: Option<String>,
    problems: &mut Vec<BadEnvironment>,
) -> Option<T> {
    match value?.parse() {
        Ok(value) => Some(value),
        Err(problem) => {
            problems.push(BadEnvironment::BadName { variable, problem });
            None
        }
    }
}

/// Reads `CNI_ARGS`: pairs `KEY=VALUE`, joined by semicolons.
fn arguments(text: &str) -> Result<Arguments, BadEnvironment> {
    let (mut namespace, mut name, mut uid) = (None, None, None);
    let mut arguments = Arguments::default();
    let mut unknown = Vec::new();
    let mut ignores_unknown = false;
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = match pair.split_once('=') {
            Some((key, value)) if !value.contains('=') => (key, value.to_owned()),
            _ => return Err(BadEnvironment::NotPair { text: pair.to_owned() }),
        };
        let value = Some(value).filter(|value| !value.is_empty());
        match key {
            "IgnoreUnknown" => {
                ignores_unknown = matches!(value.as_deref(), Some("1" | "true" | "TRUE" | "True"));
            }
            "K8S_POD_NAMESPACE" => namespace = value,
            "K8S_POD_NAME" => name = value,
            "K8S_POD_UID" => uid = value,
            "K8S_POD_INFRA_CONTAINER_ID" => {}
            "IP" => arguments.address = value,
            "MAC" => arguments.mac = value,
            other => unknown.push(other.to_owned()),
        }
    }
    if !unknown.is_empty() && !ignores_unknown {
        return Err(BadEnvironment::UnknownArguments { keys: unknown });
    }
    arguments.pod = namespace.zip(name).map(|(namespace, name)| Pod { namespace, name, uid });
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(verb: Verb, variables: &[(&str, &str)]) -> Result<Environment, Error> {
        Environment::read(verb, |name| {
            let found = variables.iter().rev().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    const ALL: [(&str, &str); 3] =
        [("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/run/netns/c1")];

    #[test]
    fn one_error_names_all_missing_variables() {
        let error = read(Verb::Add, &[]).unwrap_err();
        assert_eq!(error.code(), 4);
        for name in ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"] {
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn a_del_needs_no_namespace() {
        assert_eq!(read(Verb::Del, &ALL[..2]).unwrap().netns, None);
        assert!(read(Verb::Check, &ALL[..2]).is_err());
    }

    #[test]
    fn bad_names_are_refused_with_the_variable_and_the_rule() {
        for (name, value) in
            [("CNI_IFNAME", "a/b"), ("CNI_IFNAME", "sixteen-bytes-xx"), ("CNI_CONTAINERID", "a b")]
        {
            let error = read(Verb::Add, &[&ALL[..], &[(name, value)]].concat()).unwrap_err();
            assert_eq!(error.code(), 4);
            assert!(error.to_string().contains(&format!("{name}: ")), "{error}");
        }
    }

    #[test]
    fn the_pod_is_read_from_the_arguments_of_kubernetes() {
        let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1;FOO=BAR";
        let pod =
            read(Verb::Add, &[&ALL[..], &[("CNI_ARGS", arguments)]].concat()).unwrap().arguments.pod.unwrap();
        assert_eq!((pod.to_string().as_str(), pod.uid.as_deref()), ("default/web-0", Some("u1")));
    }

    #[test]
    fn malformed_or_unknown_arguments_are_refused() {
        for (arguments, expected) in
            [("FOO=BAR", "FOO"), ("K8S_POD_UID=a=b", "K8S_POD_UID=a=b"), ("x", "\"x\"")]
        {
            let error = read(Verb::Add, &[&ALL[..], &[("CNI_ARGS", arguments)]].concat()).unwrap_err();
            assert!(error.code() == 4 && error.to_string().contains(expected), "{error}");
        }
    }
}
