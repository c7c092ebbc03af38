//! Errors of the plugins, with the codes of the CNI specification (section "Error").

use std::io::ErrorKind;

use polder_api::IfName;
use polder_api::client::ClientError;
use polder_api::frame::FrameError;
use polder_api::message::{Refusal, RefusalKind};
use serde_json::json;

use crate::environment::Verb;
use crate::version::Version;

/// An error reported to the container runtime.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The `cniVersion` of the configuration is not supported.
    #[error("unsupported cniVersion {given:?}: supported are {}", supported())]
    Version {
        /// The value of `cniVersion`.
        given: String,
    },
    /// The command does not exist in the version of the configuration.
    #[error("CNI {version} has no {command}: set cniVersion {} or later", command.since())]
    NoCommand {
        /// The value of `CNI_COMMAND`.
        command: Verb,
        /// The version of the configuration.
        version: Version,
    },
    /// The configuration has an unknown key.
    #[error("unknown key in the network configuration: {key:?} with value {value}")]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value, as JSON.
        value: String,
    },
    /// An environment variable is missing or invalid.
    #[error("{0}")]
    Environment(String),
    /// Standard input cannot be read.
    #[error("cannot read the network configuration from standard input")]
    Input(#[source] std::io::Error),
    /// Standard input is not JSON.
    #[error("the network configuration is not a JSON object: {0}")]
    Decode(String),
    /// A value in the configuration is invalid.
    #[error("{0}")]
    Config(String),
    /// The container already has an interface of that name.
    #[error("the container already has an interface {0}")]
    InterfaceExists(IfName),
    /// The bridge has the maximum number of ports that the kernel allows (1023).
    #[error(
        "bridge {} is full (1023 ports): run pods on other nodes, or set attach to \"routed\" for the cluster",
        polder_api::BRIDGE
    )]
    BridgeFull,
    /// The agent is unreachable or did not answer.
    #[error(transparent)]
    Agent(#[from] ClientError),
    /// The agent refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A netlink request failed.
    #[error("cannot {action}")]
    Kernel {
        /// The action, as a verb phrase that follows "cannot".
        action: String,
        /// The kernel's error.
        #[source]
        source: polder_netlink::Error,
    },
    /// A file or namespace operation failed.
    #[error("cannot {action}")]
    File {
        /// The action, as a verb phrase that follows "cannot".
        action: String,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// A delegated IPAM plugin failed.
    #[error("{plugin}: {message}")]
    Delegate {
        /// The name of the plugin.
        plugin: String,
        /// The error code from the plugin.
        code: u32,
        /// The error message and details from the plugin.
        message: String,
    },
    /// Two independent errors.
    #[error("{0}; {1}")]
    Both(Box<Error>, Box<Error>),
    /// STATUS: an ADD would fail (code 50).
    #[error("{0}")]
    NotAvailable(String),
    /// STATUS: an ADD would fail, and running pods may be disconnected (code 51).
    #[error("{0}")]
    Limited(String),
    /// CHECK: the interface differs from what ADD made.
    #[error("{0}")]
    NotAsAttached(String),
}

fn supported() -> String {
    Version::ALL.map(Version::as_str).join(", ")
}

impl Error {
    /// Maps a netlink error; `action` is a verb phrase that follows "cannot".
    pub fn kernel(action: impl Into<String>) -> impl FnOnce(polder_netlink::Error) -> Self {
        let action = action.into();
        move |source| Self::Kernel { action, source }
    }

    /// Maps an I/O error; `action` is a verb phrase that follows "cannot".
    pub fn file(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::File { action, source }
    }

    /// Whether a retry within seconds may succeed: the agent is restarting, or it answered "try again".
    pub fn passes(&self) -> bool {
        match self {
            Self::Agent(ClientError::Unreachable { source, .. }) => {
                matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
            }
            Self::Agent(ClientError::NoAnswer { source, .. }) => matches!(source, FrameError::Io(_)),
            Self::Refused(refusal) => refusal.kind == RefusalKind::TryAgain,
            _ => false,
        }
    }

    /// The error code: 1 to 99 are defined by the CNI specification, 100 and up by Polder.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::NoCommand { .. } => 1,
            Self::UnknownKey { .. } => 2,
            Self::Environment(_) => 4,
            Self::Input(_) | Self::Kernel { .. } | Self::File { .. } | Self::BridgeFull => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::Agent(_) => 11,
            Self::InterfaceExists(_) => 102,
            Self::Both(first, _) => first.code(),
            Self::NotAvailable(_) => 50,
            Self::Limited(_) => 51,
            Self::Delegate { code, .. } => *code,
            Self::NotAsAttached(_) => 110,
            Self::Refused(refusal) => match refusal.kind {
                RefusalKind::Missing => 3,
                RefusalKind::Failed => 5,
                RefusalKind::Invalid => 7,
                RefusalKind::TryAgain => 11,
                RefusalKind::PoolExhausted => 100,
                RefusalKind::AddressTaken => 101,
                RefusalKind::Exists => 102,
                RefusalKind::Removed => 103,
            },
        }
    }

    /// The error as JSON for the runtime. `details` holds the chain of causes.
    pub fn to_json(&self, program: &str, version: Version) -> String {
        let mut details = Vec::new();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            details.push(cause.to_string());
            source = cause.source();
        }
        let error = json!({
            "cniVersion": version,
            "code": self.code(),
            "msg": format!("{program}: {self}"),
            "details": details.join(": "),
        });
        format!("{error:#}\n")
    }
}
